from dataclasses import KW_ONLY
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import lineax as lx
from jax import lax
from jaxtyping import Array, PRNGKeyArray, PyTree, Scalar, ScalarLike, UInt32

from .._checks import (
    batch_length,
    check_at_least,
    check_count,
    check_instance,
    check_positive_integer,
)
from .._custom_types import Action, Critic, Observation
from .._flows import AbstractFlowPolicy
from .._geometry import (
    AbstractCost,
    AbstractMetric,
    in_continuous_time,
    ObservedInformation,
    TransportKL,
    with_flow,
)
from .._linalg import damped_solve
from .._trees import constant, finite_or_zero, fold_in_values
from ._correct_length import correct_length
from ._executed_critic import critic_gradient
from ._meet_radius import linearised_fields, meet_radius, over_batch, OverRows
from ._method import (
    AbstractDisplacement,
    AbstractTransport,
    check_method,
    draw_from_flow,
    measure_by,
    Reached,
)
from ._radius import scaled
from ._refined_policy import RefinedPolicy


class NaturalStep(AbstractTransport):
    r"""A natural-gradient step in action space: refinement without training.

    $$\delta(a) = \eta\, \bigl(G(a) + \lambda \bar g I\bigr)^{-1} \nabla_a Q(o, a),$$

    where $G$ is the metric, $\bar g$ its mean eigenvalue over actions of the policy and $\lambda$
    the damping. With a calibrated score the identity is the one of coordinates in which the actions
    have covariance one. Among the steps of one cost it is, to first order, the one that gains most.

    The step is then as long as the *measured* KL allows: $\eta$ starts from the length at which
    the damped quadratic cost equals the radius,
    $\eta^2 = 2 \epsilon / \mathbb E[g^\top (G + \lambda \bar g I)^{-1} g]$, and is shortened or
    lengthened until [`fisher_flow.TransportKL`][] equals it. Where neighbouring actions would cross
    (a fold), the damping is raised fourfold up to three times, and if that does not help the step
    is shortened.

    Multiplying the critic by a positive constant, or adding one, changes nothing.

    !!! tip

        With `observations`, damping and length are settled once, and a sample costs one gradient
        of the critic and one solve with the metric. Without them both are settled anew at every
        observation, from `num_auxiliary` actions drawn there: nothing needs to be known in
        advance, every state spends the same KL, and a sample costs some hundred times more.
    """

    metric: AbstractMetric = ObservedInformation()
    radius: ScalarLike = 0.5
    _: KW_ONLY
    damping: ScalarLike = 0.2
    num_steps: int = eqx.field(static=True, default=1)
    max_folded: ScalarLike = 0.01
    num_auxiliary: int = eqx.field(static=True, default=64)
    num_calibration: int = eqx.field(static=True, default=16_384)
    num_witnesses: int = eqx.field(static=True, default=512)
    solver: lx.AbstractLinearSolver = lx.AutoLinearSolver(well_posed=True)
    measure: TransportKL = None  # pyright: ignore

    def __post_init__(self):
        if isinstance(self.metric, AbstractCost) and not isinstance(self.metric, AbstractMetric):
            name = type(self.metric).__name__
            raise ValueError(
                f"`metric` must price single steps, but got `{name}()`, which prices the "
                "divergence of a field. Write `NaturalStep(metric=ObservedInformation())`, or "
                f"train with `Residual(metric={name}())`."
            )
        example = "fisher_flow.ObservedInformation()"
        check_method(self.metric, AbstractMetric, self.radius, self.measure, example)
        if self.measure is None:
            self.measure = measure_by(self.metric)

    def __check_init__(self):
        check_at_least("damping", self.damping, 0, 0.2)
        check_at_least("max_folded", self.max_folded, 0, 0.01)
        check_positive_integer("num_steps", self.num_steps, 1)
        check_positive_integer("num_auxiliary", self.num_auxiliary, 64)
        check_positive_integer("num_calibration", self.num_calibration, 16_384)
        check_count("num_witnesses", self.num_witnesses, 512)
        check_instance(
            "solver", self.solver, lx.AbstractLinearSolver, "lineax.AutoLinearSolver(True)"
        )

    def fit(
        self,
        policy: AbstractFlowPolicy,
        critic: Critic,
        observations: PyTree[Any] | None,
        *,
        key: PRNGKeyArray,
    ) -> RefinedPolicy:
        if observations is None:
            return RefinedPolicy(policy, critic, _StepPerState(self, jr.key_data(key)), self)
        measured = in_continuous_time(policy, observations, key=key)
        step, reached = _calibrated_step(measured, critic, self, observations, key)
        refined = RefinedPolicy(measured, critic, step, self, reached)
        refined = correct_length(refined, observations, self.num_witnesses, key=key)
        return with_flow(refined, policy.flow_policy)


NaturalStep.__init__.__doc__ = r"""**Arguments:**

- `metric`: what a step costs in each direction.
- `radius`: the KL to spend, in nats, averaged over observations. The measured KL meets it
    unless folds forbid.

**Other arguments:**

- `damping`: the multiple $\lambda$ of the metric's mean eigenvalue that is added to it at
    first; without observations eight times as much, since few actions show few folds.
- `num_steps`: the number of short steps to split the step into, each from where the one
    before it ended. Several follow the critic around curves and fold less; sampling costs
    as many times more.
- `max_folded`: the share of actions at which the transport map may fold. If maps before it
    fold at more actions already, this map may not add folds.
- `num_auxiliary`: without observations, the number of actions drawn at a state to settle
    the length of the step there.
- `num_calibration`: with observations, the number of actions drawn to settle it once.
- `num_witnesses`: with observations, the number of actions on which the KL is then measured again
    by densities, as `certify` does, to correct the length. With 0 the length is not corrected.
- `solver`: any Lineax solver for symmetric positive definite operators. Actions of more
    than 32 entries do not need it: `ObservedInformation` solves them in a small space.
- `measure`: how the KL is measured. By default with the score of the metric.

**Raises:**

- `ValueError` if an argument is not of its kind, or the metric prices fields rather than
    steps.
"""


class _CalibratedStep(AbstractDisplacement):
    """Damping and length are known: the step itself."""

    method: NaturalStep
    damping: Scalar  # absolute: a multiple of the identity
    scale: Scalar
    key_data: UInt32[Array, "..."]  # not a key, which Equinox cannot write to a file

    def __call__(
        self, policy: AbstractFlowPolicy, critic: Critic, observation: Observation, action: Action
    ) -> Action:
        length = (self.scale / self.method.num_steps).astype(action.dtype)

        def step(a):
            return length * self.direction(policy, critic, observation, a, self.damping)

        if self.method.num_steps == 1:
            return step(action)
        end = lax.fori_loop(0, self.method.num_steps, lambda _, a: a + step(a), action)
        return end - action

    def direction(self, policy, critic, observation, action, damping: Scalar) -> Action:
        """The unscaled step; NaN where the critic or the metric is not finite."""
        g, finite = finite_or_zero(critic_gradient(policy, critic, observation, action))
        # A metric may not be zero, as at a score of zero.
        floor = jnp.asarray(jnp.finfo(action.dtype).tiny, action.dtype) ** 0.5
        damping = jnp.maximum(damping.astype(action.dtype), floor)
        # After other maps, too, the metric is the metric of the flow: as a preconditioner it need
        # not be exact, and the curvature of a refined density costs derivatives of ever higher
        # order.
        G = self.method.metric.operator(
            policy.flow_policy, observation, action, key=jr.wrap_key_data(self.key_data)
        )
        step = damped_solve(G, g.reshape(-1), damping, self.method.solver)
        return jnp.where(finite, step.reshape(action.shape), jnp.nan)


class _StepPerState(AbstractDisplacement):
    """Damping and length are settled at every observation, from actions drawn there."""

    method: NaturalStep
    key_data: UInt32[Array, "..."]

    def __call__(
        self, policy: AbstractFlowPolicy, critic: Critic, observation: Observation, action: Action
    ) -> Action:
        # Noise that is fixed at a state, so that the displacement is a function of its arguments;
        # and another at every state, so that its errors average out.
        key = fold_in_values(jr.wrap_key_data(self.key_data), observation)
        auxiliary_key, metric_key = jr.split(key)
        keys = jr.split(auxiliary_key, self.method.num_auxiliary)
        method, π, Q, o = constant((self.method, policy, critic, observation))
        draws = jax.vmap(lambda key: draw_from_flow(π, o, key))(keys)

        def over_rows(function):
            return jax.vmap(lambda *row: function(o, *row))

        # Few actions show few of the folds, hence a start further up.
        step, _ = _settle(method, π, Q, draws, over_rows, metric_key, 8 * method.damping)
        return step(policy, critic, observation, action)


@eqx.filter_jit
def _calibrated_step(policy, critic, method, observations, key) -> tuple[_CalibratedStep, Reached]:
    row_key, action_key, metric_key = jr.split(key, 3)
    policy, critic, method, observations = constant((policy, critic, method, observations))
    length = batch_length("observations", observations)
    n = method.num_calibration
    # Every observation once, or as often as another, before a random remainder.
    rows = jnp.concatenate([jr.permutation(row_key, length)] * -(-n // length))[:n]
    rows = jax.tree.map(lambda leaf: jnp.asarray(leaf)[rows], observations)
    over_rows = over_batch(rows)
    draws = over_rows(lambda o, key: draw_from_flow(policy, o, key))(jr.split(action_key, n))
    return _settle(method, policy, critic, draws, over_rows, metric_key, method.damping)


def _settle(
    method: NaturalStep,
    policy: AbstractFlowPolicy,
    critic: Critic,
    draws: tuple[Array, Array],
    over_rows: OverRows,
    key: PRNGKeyArray,
    damping: ScalarLike,
) -> tuple[_CalibratedStep, Reached]:
    """Settles the damping and the length of a step over a batch of `draw_from_flow`.

    Both are constants of the result: the arguments come without gradients.
    """
    actions, _ = draws
    size = actions[0].size
    radius = jnp.asarray(method.radius, actions.dtype)
    zero = jnp.zeros((), actions.dtype)
    key_data = jr.key_data(key)

    def eigenvalue_and_gradient(o, a):
        eigenvalue = method.metric.mean_eigenvalue(policy.flow_policy, o, a, key=key)
        return eigenvalue, critic_gradient(policy, critic, o, a)

    eigenvalues: Array
    eigenvalues, gradients = over_rows(eigenvalue_and_gradient)(actions)
    eigenvalue = jnp.mean(jnp.where(jnp.isfinite(eigenvalues), eigenvalues, 0))

    def attempt(damping):
        def fields_at(scale):
            step = _CalibratedStep(method, damping, scale, key_data)
            field = lambda o, a: step(policy, critic, o, a)
            return linearised_fields(method, policy, field, actions, over_rows)

        if method.num_steps == 1:
            # A single step and its Jacobian are proportional to the scale.
            unit = fields_at(jnp.ones_like(radius))
            directions = unit[0]
            fields = lambda scale: (scaled(scale, unit[0]), scaled(scale, unit[1]))
        else:
            step = _CalibratedStep(method, damping, zero, key_data)
            directions = over_rows(lambda o, a: step.direction(policy, critic, o, a, damping))(
                actions
            )
            fields = lambda scale: jax.tree.map(
                lambda x: jnp.where(scale > 0, x, 0), fields_at(scale)
            )
        # E[gᵀ (G + λI)⁻¹ g], whose half is the quadratic cost of the unscaled direction.
        squared_norm = jnp.nanmean(jnp.sum((gradients * directions).reshape(-1, size), axis=1))
        usable = jnp.isfinite(squared_norm) & (squared_norm > 0)
        initial = jnp.sqrt(2 * radius / jnp.where(usable, squared_norm, 1))
        initial = jnp.where(usable, initial, 0)
        return meet_radius(method, policy, fields, initial, draws, over_rows)

    def raise_damping(state):
        rung, damping, _, _ = state
        damping = jnp.where(rung == 0, damping, 4 * damping)
        return rung + 1, damping, *attempt(damping)

    def folds_forbid(state):
        rung, _, _, reached = state
        return (rung == 0) | ((rung < 4) & reached.limited)

    damping = jnp.asarray(damping, actions.dtype) * eigenvalue
    state = (jnp.asarray(0), damping, zero, Reached(zero, jnp.asarray(True)))
    _, damping, scale, reached = lax.while_loop(folds_forbid, raise_damping, state)
    return _CalibratedStep(method, damping, scale, key_data), reached
