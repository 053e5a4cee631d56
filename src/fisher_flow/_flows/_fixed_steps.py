from collections.abc import Callable
from typing import Any

import diffrax
import jax
import jax.core
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float


def has_fixed_steps(controller: diffrax.AbstractStepSizeController) -> bool:
    """Whether the ends of all steps are known beforehand."""
    return isinstance(controller, diffrax.ConstantStepSize | diffrax.StepTo)


def fixed_times(
    controller: diffrax.AbstractStepSizeController, num_steps: int, dtype: Any
) -> Float[Array, " times"]:
    """The ends of all steps, from 0 to 1, of a controller whose steps are fixed."""
    if not isinstance(controller, diffrax.StepTo):
        return jnp.linspace(0, 1, num_steps + 1, dtype=dtype)
    ts = jnp.asarray(controller.ts, dtype)
    ts = jnp.where(ts[0] > ts[-1], ts[::-1], ts)  # written down for a solve back in time
    return ts.at[0].set(0).at[-1].set(1)  # a sum of rounded steps may miss it by a little


def check_controller(
    solver: diffrax.AbstractSolver, controller: diffrax.AbstractStepSizeController
) -> None:
    """Refuses times that do not lead from 0 to 1, and adaptive steps that nothing adapts."""
    adapts = isinstance(controller, diffrax.AbstractAdaptiveStepSizeController)
    if adapts and not isinstance(solver, diffrax.AbstractAdaptiveSolver):
        raise ValueError(
            f"`solver` must estimate its error for a `{type(controller).__name__}` to adapt the "
            f"steps, but `{type(solver).__name__}` does not. Write `solver=diffrax.Tsit5()`."
        )
    if not isinstance(controller, diffrax.StepTo) or isinstance(controller.ts, jax.core.Tracer):
        return
    ts = np.asarray(controller.ts, np.float64)
    ts = ts[::-1] if ts[0] > ts[-1] else ts
    kind = controller.ts.dtype if jnp.issubdtype(controller.ts.dtype, jnp.inexact) else jnp.float32
    slack = 8 * float(jnp.finfo(kind).eps)
    if not (abs(ts[0]) <= slack and abs(ts[-1] - 1) <= slack and np.all(np.diff(ts) > 0)):
        raise ValueError(
            "`stepsize_controller` must step to increasing times from 0 (noise) to 1 (action), but "
            f"got `StepTo(ts={np.array2string(np.asarray(controller.ts), threshold=8)})`. Write "
            "`stepsize_controller=diffrax.StepTo(ts=jnp.array([0, 0.4, 0.7, 0.9, 1]))`."
        )


def are_plain_steps(solver: diffrax.AbstractSolver, adjoint: diffrax.AbstractAdjoint) -> bool:
    """Whether a solve is explicit steps to fixed times, without a special adjoint."""
    explicit = isinstance(solver, diffrax.Euler | diffrax.AbstractERK)
    default = isinstance(adjoint, diffrax.RecursiveCheckpointAdjoint)
    return explicit and default and adjoint.checkpoints is None


def take_steps(
    vector_field: Callable[[Any, Any, Any], Any],
    y: Any,
    ts: Float[Array, " times"],
    solver: Any,
) -> Any:
    """Takes one step of a solver between neighbouring times of `ts`. The vector field is called as
    `vector_field(t, y, args)`.

    It is `diffrax.diffeqsolve` without the control of steps, which takes JAX longer to trace than
    the velocity itself. Only the points between the steps are kept for derivatives.
    """
    terms = diffrax.ODETerm(vector_field)

    def step(carry, times):
        y, state = carry
        y, _, _, state, _ = solver.step(terms, *times, y, None, state, False)
        return (y, state), None

    state = solver.init(terms, ts[0], ts[1], y, None)
    step = jax.checkpoint(step, prevent_cse=False)  # barriers are needed only outside a scan
    (y, _), _ = lax.scan(step, (y, state), (ts[:-1], ts[1:]))
    return y


class FixedSteps(diffrax.AbstractStepSizeController[Any, Any]):
    """Steps to given times, as `diffrax.StepTo` does.

    That controller checks its times at run time by calling back into Python. These times have been
    checked, and without callbacks a sampler can be exported to a file and sharded over devices.
    """

    ts: Float[Array, " times"]

    def wrap(self, direction: Any) -> "FixedSteps":
        return FixedSteps(self.ts * direction)

    def init(
        self,
        terms: Any,
        t0: Any,
        t1: Any,
        y0: Any,
        dt0: Any,
        args: Any,
        func: Callable[..., Any],
        error_order: Any,
    ) -> tuple[Any, Any]:
        del terms, t0, t1, y0, dt0, args, func, error_order
        return self.ts[1], jnp.asarray(2)

    def adapt_step_size(
        self,
        t0: Any,
        t1: Any,
        y0: Any,
        y1_candidate: Any,
        args: Any,
        y_error: Any,
        error_order: Any,
        controller_state: Any,
    ) -> tuple[Any, Any, Any, Any, Any, diffrax.RESULTS]:
        del t0, y0, y1_candidate, args, y_error, error_order
        end = self.ts[controller_state]
        return True, t1, end, False, controller_state + 1, diffrax.RESULTS.successful
