"""Solves of linear systems that let values which are not finite through.

`lineax.linear_solve` raises when a tangent is not finite, even with `throw=False`, and would take
a whole batch down with one action at which the critic is broken.
"""

import equinox as eqx
import lineax as lx
from jaxtyping import Array, Float


@eqx.filter_custom_jvp
def linear_solve(
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


@linear_solve.def_jvp
def _linear_solve_jvp(primals, tangents):
    operator, vector, solver = primals
    operator_dot, vector_dot, _ = tangents
    x = linear_solve(operator, vector, solver)
    _, operator_dot_x = eqx.filter_jvp(lambda A: A.mv(x), (operator,), (operator_dot,))
    vector_dot = 0 if vector_dot is None else vector_dot
    operator_dot_x = 0 if operator_dot_x is None else operator_dot_x
    return x, linear_solve(operator, vector_dot - operator_dot_x, solver)
