"""What Lineax asks of an operator, answered once for the operators of this folder."""

from typing import Any

import jax.numpy as jnp
import lineax as lx


def register_positive_semidefinite(operator_type: type[Any]) -> None:
    """Tells Lineax that an operator is symmetric and positive semidefinite, and no more."""
    for is_so in lx.is_symmetric, lx.is_positive_semidefinite:
        is_so.register(operator_type)(lambda operator: True)
    for is_so in (
        lx.is_diagonal,
        lx.is_tridiagonal,
        lx.is_lower_triangular,
        lx.is_upper_triangular,
        lx.is_negative_semidefinite,
        lx.has_unit_diagonal,
    ):
        is_so.register(operator_type)(lambda operator: False)
    lx.linearise.register(operator_type)(lambda operator: operator)
    lx.conj.register(operator_type)(lambda operator: operator)
    lx.diagonal.register(operator_type)(lambda operator: jnp.diagonal(operator.as_matrix()))
    lx.materialise.register(operator_type)(
        lambda operator: lx.MatrixLinearOperator(operator.as_matrix(), lx.positive_semidefinite_tag)
    )
