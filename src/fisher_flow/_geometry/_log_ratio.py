import abc
import math
from collections.abc import Callable
from dataclasses import KW_ONLY
from typing import Any, NamedTuple

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, PRNGKeyArray, Scalar, ScalarLike

from .._checks import check_at_least, check_instance, check_positive_integer
from .._custom_types import Action, Observation
from .._flows import FlowPolicy
from .._linalg import dense_limit, rademacher_probes, value_and_divergence, value_and_jacobian
from .._trees import as_inexact, constant


# `steered(t, x)`: the velocity of a flow, and what is added to it.
SteeredPair = Callable[[Scalar, Action], tuple[Action, Action]]


class SteeredAction(NamedTuple):
    """An action of a steered flow, and how much more likely it is than under the flow itself."""

    action: Action
    """The action, before its bounds."""

    log_ratio: Scalar
    r"""$\log q(a) - \log p(a)$ in nats; NaN where it is not known."""


class AbstractLogRatio(eqx.Module):
    r"""Abstract base class for the ways to compute the log-ratio of a steered flow,

    $$r = \log \frac{q_1}{p_1}(x_1), \qquad x' = v(t, x) + \Delta(t, x), \quad
        x(0) \sim \mathcal N(0, I),$$

    along the trajectory that draws $x_1$. Here $p_t$ are the densities of the flow $v$, and $q_t$
    the densities of the steered flow $v + \Delta$. The mean of $r$ is
    $\operatorname{KL}(q_1 \,\|\, p_1)$; [`fisher_flow.mean_log_ratio`][] takes it with less noise.
    """

    @abc.abstractmethod
    def __call__(
        self,
        flow: FlowPolicy,
        steered: SteeredPair,
        observation: Observation,
        noise: Action,
        *,
        key: PRNGKeyArray | None = None,
    ) -> SteeredAction:
        r"""Carries a noise to an action along the steered flow, together with its log-ratio.

        **Arguments:**

        - `flow`: the flow policy that is steered.
        - `steered`: called as `steered(t, x)`; returns the velocity $v$ of `flow` there, and
            $\Delta$.
        - `observation`: one observation, any PyTree of arrays.
        - `noise`: the point $x(0)$ to start from.
        - `key`: a `jax.random.key` for probes, if there are any.

        **Returns:**

        A [`fisher_flow.SteeredAction`][].
        """


class PathLogRatio(AbstractLogRatio):
    r"""The log-ratio in the pass that draws the action, from the score along the path.

    Along a steered trajectory

    $$\frac{\mathrm d}{\mathrm dt} \log \frac{q_t}{p_t}(x_t) =
        -\bigl(\nabla \cdot \Delta + \Delta \cdot s_t\bigr)(x_t), \qquad s_t = \nabla \log p_t .$$

    Both logarithms are differentiated along $x' = v + \Delta$, and the divergences of $v$ cancel.
    The score $s_t$ is read off the velocity, and only the divergence of $\Delta$ is needed. So
    there is no density to compute, no inverse to find and no second solve. An action costs one
    Jacobian of $\Delta$ a step, or one product with it for each probe.

    !!! warning

        Two things are assumed. The velocity is the velocity of the path, as only the exact
        minimiser of flow matching is: on a flow that was learned for Pendulum this KL was 14% too
        small, however fine the steps. And the steps are fine: for ten Euler steps it gives half of
        their KL. `DensityLogRatio` does not assume the first, and `ExecutedLogRatio` assumes
        neither.
    """

    num_probes: int | None = eqx.field(static=True, default=None)
    _: KW_ONLY
    solver: diffrax.AbstractSolver | None = None
    stepsize_controller: diffrax.AbstractStepSizeController | None = None
    margin: ScalarLike = 1e-3

    def __check_init__(self):
        _check_solve(self.num_probes, self.solver, self.stepsize_controller)
        check_at_least("margin", self.margin, 0, 1e-3)

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
        del observation
        x = as_inexact(noise)
        r = jnp.zeros((), x.dtype)
        return SteeredAction(*self._solve(flow, steered, (x, r), key, direction=1, moved=True))

    @eqx.filter_jit
    def backward(
        self,
        flow: FlowPolicy,
        steered: SteeredPair,
        action: Action,
        *,
        key: PRNGKeyArray | None = None,
    ) -> Scalar:
        r"""The log-ratio at a given action, by following the steered flow back to its noise.

        **Arguments:**

        - `flow`, `steered`, `key`: as for `__call__`.
        - `action`: where to evaluate it.

        **Returns:**

        The log-ratio in nats.
        """
        x = as_inexact(action)
        r = jnp.zeros((), x.dtype)
        return -self._solve(flow, steered, (x, r), key, direction=-1, moved=True)[1]

    @eqx.filter_jit
    def control(
        self,
        flow: FlowPolicy,
        steered: SteeredPair,
        observation: Observation,
        noise: Action,
        *,
        key: PRNGKeyArray | None = None,
    ) -> Scalar:
        r"""The same integral along the trajectory of the *unsteered* flow, from the same noise.

        Its mean is zero by Stein's identity, and it is close to the log-ratio while the steering is
        small: a control variate for [`fisher_flow.mean_log_ratio`][].

        **Arguments:**

        - `flow`, `steered`, `observation`, `noise`, `key`: as for `__call__`.

        **Returns:**

        The integral $-\int_0^1 (\nabla \cdot \Delta + \Delta \cdot s_t) \,\mathrm dt$.
        """
        del observation
        x = as_inexact(noise)
        r = jnp.zeros((), x.dtype)
        return self._solve(flow, steered, (x, r), key, direction=1, moved=False)[1]

    def _solve(self, flow, steered, state, key, *, direction, moved):
        probes = _probes(self.num_probes, state[0], key)
        latest = jnp.asarray(1 - self.margin, state[0].dtype)

        def terms(t, x):
            def displacement(x):
                v, Δ = steered(t, x)
                return Δ, v

            if probes is None:
                Δ, J, v = value_and_jacobian(displacement, x, has_aux=True)
                divergence = jnp.trace(J)
            else:
                Δ, push, v = jax.linearize(displacement, x, has_aux=True)
                divergence = jnp.mean(jax.vmap(lambda z: jnp.vdot(z, push(z)))(probes))
            s = flow.path.score(t, x, v)
            return v, Δ, -(divergence + jnp.vdot(Δ, s))

        def vector_field(t, state, args):
            x, _ = state
            v, Δ, rate = terms(jnp.minimum(t, latest), x)
            # The trajectory is the one of the sampler, to the very end.
            v, Δ = lax.cond(t > latest, lambda x: steered(t, x), lambda x: (v, Δ), x)
            return (v + Δ if moved else v), rate

        return flow.integrate(
            vector_field,
            state,
            direction=direction,
            solver=flow.solver if self.solver is None else self.solver,
            stepsize_controller=(
                flow.stepsize_controller
                if self.stepsize_controller is None
                else self.stepsize_controller
            ),
        )


PathLogRatio.__init__.__doc__ = r"""**Arguments:**

- `num_probes`: the number of random probes for the divergence. By default it is exact for
    actions of up to 32 entries, and larger ones have one probe.

**Other arguments:**

- `solver`, `stepsize_controller`: how to integrate $x$ and $r$ together. The default is the
    solver of the flow with its steps.
- `margin`: the integrand is evaluated no closer than this to time 1, where the score is the
    quotient of two numbers that vanish.
"""


class DensityLogRatio(AbstractLogRatio):
    r"""The log-ratio of two flows in continuous time, from the density of each,

    $$r = \log \mathcal N(x(0)) - \int_0^1 \nabla \cdot (v + \Delta) \,\mathrm dt - \log p(x(1)).$$

    The first two terms come with the steered trajectory; the last is
    [`fisher_flow.FlowPolicy.log_prob`][], a solve back along the flow itself. No score is read off
    the velocity, so it is exact for learned flows too. Both solves have a solver of their own, so
    the action belongs to the flow in continuous time and not to the few steps that act.

    An action costs two solves with a Jacobian of the velocity a step, or one product with it for
    each probe. The probes of both solves are the same, so that most of their error cancels.
    """

    num_probes: int | None = eqx.field(static=True, default=None)
    _: KW_ONLY
    solver: diffrax.AbstractSolver = diffrax.Tsit5()
    stepsize_controller: diffrax.AbstractStepSizeController | None = None

    def __check_init__(self):
        _check_solve(self.num_probes, self.solver, self.stepsize_controller)

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
        noise = as_inexact(noise)
        probes = _probes(self.num_probes, noise, key)
        unsteered = flow.given(observation)
        controller = self.stepsize_controller
        if controller is None:
            tol = 1e-7 if noise.dtype == jnp.float64 else 1e-5
            controller = diffrax.PIDController(rtol=tol, atol=tol)

        def density(velocity, state, direction):
            return flow.integrate(
                lambda t, state, args: value_and_divergence(
                    lambda x: velocity(t, x), state[0], probes
                ),
                state,
                direction=direction,
                solver=self.solver,
                stepsize_controller=controller,
            )

        zero = jnp.zeros((), noise.dtype)
        action, volume = density(lambda t, x: sum(steered(t, x)), (noise, zero), 1)
        origin, minus_volume = density(unsteered, (action, zero), -1)
        log_ratio = _log_normal(noise) - volume - (_log_normal(origin) + minus_volume)
        return SteeredAction(action, log_ratio)


DensityLogRatio.__init__.__doc__ = """**Arguments:**

- `num_probes`: the number of random probes for the divergences. By default they are exact
    for actions of up to 32 entries, and larger ones have one probe.

**Other arguments:**

- `solver`, `stepsize_controller`: how to integrate, as for
    [`fisher_flow.FlowPolicy.log_prob`][].
"""


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
    return action, _log_normal(noise) - log_det, jnp.concatenate([points, action[None]])


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
    return _log_normal(origin) - log_det


def _check_solve(num_probes: Any, solver: Any, stepsize_controller: Any) -> None:
    if num_probes is not None:
        check_positive_integer("num_probes", num_probes, 1)
    if solver is not None:
        check_instance("solver", solver, diffrax.AbstractSolver, "diffrax.Tsit5()")
    if stepsize_controller is not None:
        check_instance(
            "stepsize_controller",
            stepsize_controller,
            diffrax.AbstractStepSizeController,
            "diffrax.PIDController(rtol=1e-5, atol=1e-5)",
        )


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


def mean_log_ratio(
    log_ratios: Float[Array, " actions"],
    controls: Float[Array, " actions"] | None = None,
    *,
    minus: Float[Array, " actions"] | None = None,
) -> tuple[Scalar, Scalar]:
    r"""The mean of log-ratios, which is a KL, with most of its noise taken away.

    Since $r = \log q - \log p$ at actions of $q$,

    $$\mathbb E[r] = \operatorname{KL}(q \,\|\, p), \qquad \mathbb E[e^{-r} - 1] = 0 .$$

    A single $r$ is of first order in the difference of the two policies, but its mean is of second
    order. So $e^{-r} - 1$ is added: its mean is zero, and to first order it is $-r$. Its
    coefficient is the one that leaves least variance. At 0.02 nats this saves 100 times as many
    actions.

    **Arguments:**

    - `log_ratios`: one number for each action of the steered policy. Numbers that are not finite
        are left out.
    - `controls`: further numbers whose mean is zero, to use instead of $e^{-r} - 1$;
        [`fisher_flow.PathLogRatio`][]`.control` makes such numbers.

    **Other arguments:**

    - `minus`: another estimate of the same KL, one number for each action. Then the mean of the
        difference is returned. An error that both estimates share is not in its standard error.

    **Returns:**

    - The mean in nats.
    - Its standard error.
    """
    r = as_inexact(log_ratios)
    known = jnp.isfinite(r)
    count = jnp.sum(known, dtype=r.dtype)
    r = jnp.where(known, r, 0)
    c = jnp.expm1(-r) if controls is None else jnp.where(known, controls, 0)
    # A ratio that overflows tells nothing about the mean.
    c: Array = jnp.where(jnp.isfinite(c), c, jnp.zeros_like(c))
    mean = lambda x: jnp.sum(x * known.astype(x.dtype)) / count
    centred = c - mean(c)
    variance = mean(centred**2)
    if minus is not None:
        r = r - jnp.where(known, jnp.asarray(minus, r.dtype), 0)
    slope = -mean(r * centred) / jnp.where(variance > 0, variance, 1)
    if controls is None and minus is None:
        # Between 0 and 1 a few heavy weights do no harm.
        slope = jnp.clip(slope, 0, 1)
    values = r + lax.stop_gradient(slope) * c
    result = mean(values)
    return result, jnp.sqrt(mean((values - result) ** 2) / (count - 1))


def _probes(num_probes, like, key):
    if num_probes is None and like.size <= dense_limit:
        return None
    num_probes = 1 if num_probes is None else num_probes
    if key is None:
        raise ValueError(
            f"`key` must be given for an action of shape {like.shape}: its divergence is estimated "
            "by random probes. Write `key=jax.random.key(0)`."
        )
    return rademacher_probes(num_probes, like, key)


def _log_normal(x) -> Scalar:
    return -0.5 * jnp.sum(x**2) - 0.5 * x.size * math.log(2 * math.pi)


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
