from collections.abc import Callable

import diffrax
import equinox as eqx
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, PRNGKeyArray, Scalar

from ..._checks import check_positive_integer
from ..._custom_types import Action, Observation
from ..._flows import FlowPolicy
from ..._linalg import value_and_jacobian
from ..._trees import as_inexact, constant
from ._log_ratio import AbstractLogRatio, log_normal, SteeredAction, SteeredPair


class ExecutedLogRatio(AbstractLogRatio):
    r"""The exact log-ratio of the sampler that acts, whatever its steps.

    A solver with $n$ steps to fixed times is a chain of $n$ maps, and ten Euler steps are another
    sampler than the flow in continuous time. The density of what it draws follows from the
    determinants of its steps,

    $$\log q(x_n) = \log \mathcal N(x_0) - \sum_k \log |\det \nabla F_k(x_k)|, \qquad
        x_{k+1} = F_k(x_k), \quad F_k(x) = x + h_k\,u(t_k, x) \text{ for Euler's method.}$$

    The density of the unsteered sampler at the same action needs the noise from which it would
    have drawn that action: its steps are inverted from the end to the beginning, each by Newton's
    method from the point where the steered trajectory was.

    It is exact for any velocity, learned or not, for any explicit Runge-Kutta method of Diffrax,
    and for the very actions that are drawn. Each step costs one Jacobian of the steered step and
    several Jacobians of the unsteered step: about $8 (d + 1)$ velocities for an action of $d$
    entries.

    The log-ratio is NaN where a map folds (its determinant is not positive), or where no noise is
    found from which the unsteered sampler would have drawn the action. Then $q$ is not absolutely
    continuous with respect to $p$ there, or Newton's method failed.
    """

    max_steps: int = eqx.field(static=True, default=24)

    def __check_init__(self):
        check_positive_integer("max_steps", self.max_steps, 24)

    @eqx.filter_jit
    def __call__(
        self,
        flow: FlowPolicy,
        steered: SteeredPair,
        observation: Observation,
        noise: Action,
        *,
        key: PRNGKeyArray | None = None,
    ) -> SteeredAction:
        del key
        check_steps(flow)
        noise = as_inexact(noise)
        steered_velocity = lambda t, x: sum(steered(t, x), jnp.zeros_like(x))
        action, log_q, points = executed_draw(flow, steered_velocity, noise)
        velocity = flow.given(observation)
        log_p = executed_log_prob(flow, velocity, action, points, max_steps=self.max_steps)
        return SteeredAction(action, log_q - log_p)


ExecutedLogRatio.__init__.__doc__ = """**Arguments:**

- `max_steps`: the number of steps after which Newton's method gives up.
"""


def executed_draw(
    flow: FlowPolicy, velocity: Callable[[Scalar, Action], Action], noise: Action
) -> tuple[Action, Scalar, Float[Array, "points ..."]]:
    """The action that the steps of a sampler make of a noise.

    **Arguments:**

    - `flow`: a flow whose steps are fixed; its solver and its times are used.
    - `velocity`: the velocity to follow, a function of a time and a point.
    - `noise`: the point to start from.

    **Returns:**

    - The action.
    - Its log-density under these steps; NaN where one of them folds.
    - The points on the way, from the noise to the action.
    """
    ts = _step_times(flow, noise.dtype)

    def forward(carry, ends):
        x, log_det = carry
        y, J = value_and_jacobian(lambda x: _step(flow, velocity, ends, x), x)
        return (y, log_det + _log_det(J)), x

    zero = jnp.zeros((), noise.dtype)
    (action, log_det), points = lax.scan(forward, (noise, zero), (ts[:-1], ts[1:]))
    return action, log_normal(noise) - log_det, jnp.concatenate([points, action[None]])


def executed_log_prob(
    flow: FlowPolicy,
    velocity: Callable[[Scalar, Action], Action],
    action: Action,
    points: Float[Array, "points ..."],
    *,
    max_steps: int = 24,
) -> Scalar:
    """The log-density, under the steps of a sampler, of an action that other steps have made.

    The steps are inverted from the end to the beginning, each by Newton's method.

    **Arguments:**

    - `flow`, `velocity`: as for `executed_draw`.
    - `action`: where to evaluate the density.
    - `points`: the points on the way to an action nearby, where the search starts.
    - `max_steps`: the number of steps after which Newton's method gives up.

    **Returns:**

    The log-density; NaN where a step folds or no noise is found.
    """
    ts = _step_times(flow, action.dtype)
    frozen = constant(eqx.filter_closure_convert(velocity, ts[0], action))

    def backward(carry, row):
        y, log_det = carry
        ends, guess, arrived = row
        x, J = _inverse_step(
            lambda x: _step(flow, frozen, ends, x),
            lax.stop_gradient(y),
            lax.stop_gradient(guess + y - arrived),
            max_steps,
        )
        # One more Newton step, through which the derivatives of the inverse pass.
        residual = _step(flow, velocity, ends, x) - y
        x = x - jnp.linalg.solve(J, residual.reshape(-1)).reshape(x.shape)
        _, J = value_and_jacobian(lambda x: _step(flow, velocity, ends, x), x)
        return (x, log_det + _log_det(J)), None

    zero = jnp.zeros((), action.dtype)
    rows = (ts[:-1], ts[1:]), points[:-1], points[1:]
    (origin, log_det), _ = lax.scan(backward, (action, zero), rows, reverse=True)
    return log_normal(origin) - log_det


def check_steps(flow: FlowPolicy) -> None:
    """Refuses a sampler whose steps are not maps that can be written down one by one."""
    if has_executed_steps(flow):
        return
    raise ValueError(
        "`log_ratio=ExecutedLogRatio()` needs a sampler that takes steps to fixed times by an "
        f"explicit Runge-Kutta method, but got `{type(flow.solver).__name__}` with "
        f"`{type(flow.stepsize_controller).__name__}`. Write "
        "`log_ratio=fisher_flow.DensityLogRatio()`."
    )


def has_executed_steps(flow: FlowPolicy) -> bool:
    """Whether every step of the sampler is a map of one point to the next."""
    one_step = isinstance(flow.solver, diffrax.Euler | diffrax.AbstractERK)
    return one_step and flow.step_times(None) is not None


def _step_times(flow, dtype) -> Float[Array, " times"]:
    ts = flow.step_times(dtype)
    assert ts is not None, "`check_steps` or `has_executed_steps` comes first"
    return ts


def _log_det(J) -> Scalar:
    sign, log_det = jnp.linalg.slogdet(J)
    return log_det + jnp.where(sign > 0, 0, jnp.nan)


def _step(flow, field, ends, x) -> Action:
    """One step of an explicit method, stage by stage: the loop that Diffrax makes of them cannot
    be differentiated in both modes."""
    t0, t1 = ends
    h = t1 - t0
    if isinstance(flow.solver, diffrax.Euler):
        return x + h * field(t0, x)
    tableau = flow.solver.tableau

    def moved(coefficients):
        increments = [float(c) * k for c, k in zip(coefficients, slopes, strict=True) if c != 0]
        return x + h * sum(increments)

    slopes = [field(t0, x)]
    for c, row in zip(tableau.c, tableau.a_lower, strict=True):
        slopes.append(field(t0 + float(c) * h, moved(row)))
    return moved(tableau.b_sol)


def _inverse_step(step, target, guess, max_steps) -> tuple[Action, Array]:
    """The point that one step carries to `target`, and the Jacobian of the step there: by Newton's
    method, with halved steps where it would not come closer; NaN if it is not found."""
    ε = jnp.finfo(target.dtype).eps
    tol = 64 * ε * (1 + jnp.max(jnp.abs(target)))
    size = lambda residual: jnp.max(jnp.abs(residual))

    def linearised(x):
        moved, J = value_and_jacobian(step, x)
        return moved - target, J

    def unfinished(state):
        i, _, residual, _, length = state
        return (i < max_steps) & (size(residual) > tol) & (length > 1e-4)

    def body(state):
        i, x, residual, J, length = state
        y = x - length * jnp.linalg.solve(J, residual.reshape(-1)).reshape(x.shape)
        new_residual, new_J = linearised(y)
        closer = size(new_residual) < size(residual)  # False if it is not a number
        return (
            i + 1,
            jnp.where(closer, y, x),
            jnp.where(closer, new_residual, residual),
            jnp.where(closer, new_J, J),
            jnp.where(closer, jnp.minimum(2 * length, 1), 0.5 * length),
        )

    one = jnp.ones((), target.dtype)
    state = (jnp.asarray(0), guess, *linearised(guess), one)
    _, x, residual, J, _ = lax.while_loop(unfinished, body, state)
    # Rounding may keep the last steps above the tolerance.
    return x + jnp.where(size(residual) <= 1e3 * tol, 0, jnp.nan), J
