"""Damped solves with a metric of any kind.

A value that is not finite passes through. `lineax.linear_solve` raises when a tangent is not
finite, even with `throw=False`, and one action at which the critic is broken would end a whole
batch.
"""

import equinox as eqx
import jax
import jax.numpy as jnp
import lineax as lx
from jaxtyping import Array, Float, Scalar

from ._krylov import KrylovPositivePart, masked_trace
from ._whitening import WhitenedOperator


def damped_solve(
    operator: lx.AbstractLinearOperator,
    vector: Float[Array, " size"],
    damping: Scalar,
    solver: lx.AbstractLinearSolver,
) -> Float[Array, " size"]:
    """Solves `(operator + damping I) x = vector`; NaN where the operator is not finite.

    A whitened operator is damped in its own coordinates.
    """
    if isinstance(operator, WhitenedOperator):
        whitened = operator.whitening.whiten_gradient(vector)
        solution = damped_solve(operator.operator, whitened, damping, solver)
        return operator.whitening.colour(solution)
    if isinstance(operator, KrylovPositivePart):
        return operator.damped_solve(vector, damping)
    # A factorisation of what is not finite may not end well.
    leaves = jax.tree.leaves(eqx.filter(operator, eqx.is_inexact_array))
    finite = jnp.asarray(True)
    for leaf in leaves:
        finite = finite & jnp.all(jnp.isfinite(leaf))
    operator = jax.tree.map(
        lambda leaf: jnp.where(finite, leaf, 0) if eqx.is_inexact_array(leaf) else leaf, operator
    )
    if isinstance(operator, lx.MatrixLinearOperator):  # a sum of two kinds cannot be sharded
        ridge = damping * jnp.eye(vector.size, dtype=vector.dtype)
        damped = lx.MatrixLinearOperator(operator.as_matrix() + ridge, lx.positive_semidefinite_tag)
    else:
        ridge = lx.DiagonalLinearOperator(jnp.full(vector.size, damping))
        damped = lx.TaggedLinearOperator(operator + ridge, lx.positive_semidefinite_tag)
    solution: Array = _linear_solve(damped, vector, solver)
    return jnp.where(finite, solution, jnp.nan)


def damped_matrix(
    operator: lx.AbstractLinearOperator, damping: Scalar
) -> Float[Array, "size size"]:
    """The matrix of `operator + damping I`, as a damped solve takes it."""
    if isinstance(operator, WhitenedOperator):
        inner = damped_matrix(operator.operator, damping)
        whitened = lx.MatrixLinearOperator(inner, lx.positive_semidefinite_tag)
        return WhitenedOperator(whitened, operator.whitening).as_matrix()
    matrix = lx.materialise(operator).as_matrix()
    return matrix + damping * jnp.eye(matrix.shape[0], dtype=matrix.dtype)


def mean_eigenvalue(operator: lx.AbstractLinearOperator, action: Array) -> Scalar:
    """The mean eigenvalue of a metric at an action: exact, or an estimate from one random probe,
    to be averaged over actions. A whitened operator has it in its own coordinates."""
    if isinstance(operator, WhitenedOperator):
        varies = operator.whitening.varies.astype(action.dtype)
        return masked_trace(operator.operator, action, varies) / operator.whitening.rank
    return masked_trace(operator, action, jnp.ones(action.size, action.dtype)) / action.size


@eqx.filter_custom_jvp
def _linear_solve(
    operator: lx.AbstractLinearOperator,
    vector: Float[Array, " size"],
    solver: lx.AbstractLinearSolver,
) -> Float[Array, " size"]:
    """Solves `operator @ x = vector`; what fails comes back as not finite."""
    if isinstance(operator, lx.MatrixLinearOperator) and isinstance(solver, lx.AutoLinearSolver):
        # The same factorisation, without the check of structures: inside `shard_map` those of
        # vectors and of matrices differ.
        return solver.compute(solver.init(operator, {}), vector, {})[0]
    return lx.linear_solve(operator, vector, solver, throw=False).value


@_linear_solve.def_jvp
def _linear_solve_jvp(primals, tangents):
    operator, vector, solver = primals
    operator_dot, vector_dot, _ = tangents
    x = _linear_solve(operator, vector, solver)
    _, operator_dot_x = eqx.filter_jvp(lambda A: A.mv(x), (operator,), (operator_dot,))
    vector_dot = 0 if vector_dot is None else vector_dot
    operator_dot_x = 0 if operator_dot_x is None else operator_dot_x
    return x, _linear_solve(operator, vector_dot - operator_dot_x, solver)
