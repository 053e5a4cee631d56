import abc
from collections.abc import Callable
from dataclasses import KW_ONLY
from typing import Any

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from jax import lax
from jaxtyping import Array, PRNGKeyArray, PyTree, Scalar, ScalarLike, UInt32

from .._checks import batch_length, check_at_least, check_instance, check_positive_integer
from .._custom_types import Action, Critic, Observation
from .._flows import (
    AbstractAffineGaussianPath,
    AbstractFlowPolicy,
    changed,
    FlowPolicy,
    TanhBounds,
)
from .._geometry import (
    AbstractLogRatio,
    check_steps,
    DensityLogRatio,
    ExecutedLogRatio,
    has_executed_steps,
    mean_log_ratio,
    PathLogRatio,
    SteeredAction,
    SteeredPair,
)
from .._linalg import dense_limit
from .._trees import constant, finite_or_zero, fold_in_values
from ._executed_critic import critic_gradient, critic_value
from ._method import AbstractRefinement, Reached
from ._potentials import AbstractPotential, TiltedAction
from ._radius import is_zero, scale_to_radius


# Along the path, a steering is evaluated between these times: at the two ends it is a quotient of
# two numbers that vanish.
_earliest, _latest = 0.02, 0.999


class AbstractGuidance(eqx.Module):
    """Abstract base class for what is added to the velocity of a flow."""

    @abc.abstractmethod
    def given(
        self, flow: FlowPolicy, observation: Observation
    ) -> Callable[[Scalar, Action, Scalar], tuple[Action, Action]]:
        """The guidance at one observation.

        **Arguments:**

        - `flow`: the flow that is steered.
        - `observation`: one observation, any PyTree of arrays.

        **Returns:**

        A function of a time, a point and a strength, which returns the velocity of the flow there
        and what is added to it.
        """


class CriticGuidance(AbstractGuidance):
    """Steers by a critic, through a potential."""

    critic: Critic
    potential: AbstractPotential

    def given(
        self, flow: FlowPolicy, observation: Observation
    ) -> Callable[[Scalar, Action, Scalar], tuple[Action, Action]]:
        velocity = flow.given(observation)

        def critic(action):
            value = critic_value(flow, self.critic, observation, action)
            gradient = critic_gradient(flow, self.critic, observation, action)
            # One bad value in a velocity would be in the action, and nothing could remove it.
            dtype = action.dtype
            return jnp.asarray(value, dtype), jnp.asarray(gradient, dtype)

        return lambda t, x, strength: self.potential(flow.path, velocity, critic, t, x, strength)


class FieldGuidance(AbstractGuidance):
    """Adds a multiple of a field that is given."""

    field: Callable[[Scalar, Any, Any], Any]

    def given(
        self, flow: FlowPolicy, observation: Observation
    ) -> Callable[[Scalar, Action, Scalar], tuple[Action, Action]]:
        velocity = flow.given(observation)

        def guided(t, x, strength):
            return velocity(t, x), strength * jnp.asarray(self.field(t, x, observation), x.dtype)

        return guided


class SteeredVelocity(eqx.Module):
    """The velocity of a flow plus a guidance of some strength."""

    flow: FlowPolicy
    guidance: AbstractGuidance
    strength: Any  # a scalar, or a function of the observation

    def __call__(self, t: Scalar, x: Action, observation: Observation) -> Action:
        return self.given(observation)(t, x)

    def given(self, observation: Observation) -> Callable[[Scalar, Action], Action]:
        pair = self.pair(observation)

        def velocity(t, x):
            v, Δ = pair(t, x)
            return v + Δ

        return velocity

    def strength_at(self, observation: Observation) -> Array:
        strength: Any = self.strength
        value: Any = strength(observation) if callable(strength) else jnp.asarray(strength)
        return value

    def pair(self, observation: Observation) -> SteeredPair:
        """The velocity of the flow and what is added to it, at one observation."""
        velocity = self.flow.given(observation)
        guided = self.guidance.given(self.flow, observation)
        strength = self.strength_at(observation)

        def at(t, x):
            within = jnp.clip(t, _earliest, _latest)

            def steered(x):
                v, Δ = guided(within, x, strength.astype(x.dtype))
                v = lax.cond(t == within, lambda x: v, lambda x: velocity(t, x), x)
                return v, finite_or_zero(Δ)[0]

            # Without strength it is the flow, at its cost.
            still = lambda x: (velocity(t, x), jnp.zeros_like(x))
            return lax.cond(strength > 0, steered, still, x)

        return at


class SteeredPolicy(AbstractFlowPolicy):
    r"""A flow whose velocity is steered all along the path, $u = v + \Delta$.

    Made by [`fisher_flow.refine`][] with [`fisher_flow.Steering`][], and by
    [`fisher_flow.guide`][]. It is a flow policy itself, with samples and a density. For every
    action that it draws it can tell how much more likely the action is than under the policy that
    is steered: `draw_and_log_ratio`.

    Flow matching on its actions would learn another velocity, unless the steering is the best one.
    So its score does not follow from its velocity; it is
    $\nabla \log q = \nabla \log p + \nabla r$, with the log-ratio $r$ along the path that ends at
    the action.
    """

    policy: AbstractFlowPolicy
    critic: Critic | None
    method: Any
    velocity_field: SteeredVelocity
    log_ratio: AbstractLogRatio
    reached: Reached | None

    def __init__(
        self,
        policy: AbstractFlowPolicy,
        critic: Critic | None,
        method: Any,
        velocity_field: SteeredVelocity,
        log_ratio: AbstractLogRatio,
        reached: Reached | None = None,
    ):
        """**Arguments:**

        - `policy`: the policy that is steered.
        - `critic`: the critic it is steered by, if there is one.
        - `method`: how it was steered.
        - `velocity_field`: its velocity.
        - `log_ratio`: how its log-ratio is computed.
        - `reached`: the KL that was measured when the strength was settled.
        """
        self.policy = policy
        self.critic = critic
        self.method = method
        self.velocity_field = velocity_field
        self.log_ratio = log_ratio
        self.reached = reached

    @property
    def action_shape(self) -> tuple[int, ...]:
        return self.policy.action_shape

    @property
    def bounds(self) -> tuple[Any, Any] | TanhBounds | None:
        return self.policy.bounds

    @property
    def path(self) -> AbstractAffineGaussianPath:
        """The path of the flow that is steered."""
        return self.velocity_field.flow.path

    @property
    def strength(self) -> Any:
        """The strength of the steering: an inverse temperature, if it is by a critic. Without
        observations it is a function of the observation."""
        return self.velocity_field.strength

    @property
    def flow_policy(self) -> Any:
        return self

    @property
    def steered_flow(self) -> FlowPolicy:
        """The same sampler as a plain [`fisher_flow.FlowPolicy`][]. Its score would be read off the
        steered velocity, which is right only if the steering is the best one."""
        return changed(self.velocity_field.flow, velocity=self.velocity_field)

    def from_flow(self, observation: Observation, action: Action) -> Action:
        del observation
        return action

    def to_flow(self, observation: Observation, action: Action) -> Action:
        del observation
        return action

    def velocity(self, t: ScalarLike, x: Action, observation: Observation) -> Action:
        """The steered velocity, with the shape of `x`; arguments as for
        [`fisher_flow.FlowPolicy`][]."""
        return self.steered_flow.velocity(t, x, observation)

    def noise(self, observation: Observation, *, key: PRNGKeyArray) -> Action:
        """The noise at time 0; the same key gives the same as for the policy that is steered."""
        return self.velocity_field.flow.noise(observation, key=key)

    def flow(self, observation: Observation, noise: Action) -> Action:
        """Carries a noise to an action, before its bounds."""
        field = self.velocity_field
        strength = field.strength_at(observation)
        velocity = SteeredVelocity(field.flow, field.guidance, strength)
        steered = changed(field.flow, velocity=velocity)
        # Without strength it is the flow, to the last bit.
        return lax.cond(
            strength > 0,
            lambda z: steered.flow(observation, z),
            lambda z: field.flow.flow(observation, z),
            noise,
        )

    def draw(self, observation: Observation, *, key: PRNGKeyArray) -> Action:
        return self.flow(observation, self.noise(observation, key=key))

    @eqx.filter_jit
    def draw_and_log_ratio(self, observation: Observation, *, key: PRNGKeyArray) -> SteeredAction:
        r"""Draws an action before its bounds, together with its log-ratio $\log q / p$ to the
        policy that is steered.

        **Arguments:**

        - `observation`: one observation, any PyTree of arrays.
        - `key`: a `jax.random.key`. With [`fisher_flow.ExecutedLogRatio`][], the same gives the
            same action as in `draw`, up to rounding.

        **Returns:**

        A [`fisher_flow.SteeredAction`][]. The mean of its log-ratio is the KL of the two policies;
        [`fisher_flow.mean_log_ratio`][] takes it with less noise.
        """
        field = self.velocity_field
        noise = field.flow.noise(observation, key=key)
        pair = field.pair(observation)
        return self.log_ratio(field.flow, pair, observation, noise, key=jr.fold_in(key, 1))

    def log_prob(self, observation: Observation, action: Action, **options: Any) -> Scalar:
        """The log-density of the steered flow in continuous time.

        **Arguments:**

        - `observation`: one observation, any PyTree of arrays.
        - `action`: where to evaluate the density.
        - `**options`: as for [`fisher_flow.FlowPolicy`][]`.log_prob`.

        **Returns:**

        The log-density in nats, a scalar.
        """
        return self.steered_flow.log_prob(observation, action, **options)

    def score(
        self, estimator: Callable[..., Action], observation: Observation, action: Action
    ) -> Action:
        field = self.velocity_field
        pair = field.pair(observation)
        along = PathLogRatio(solver=diffrax.Heun())
        key = jr.key(0)
        r = lambda a: along.backward(field.flow, pair, a, key=key)
        return self.policy.score(estimator, observation, action) + jax.grad(r)(action)


class Steering(AbstractRefinement):
    r"""Steers the flow itself by the critic, all along its path: refinement without training.

    $$u(t, x) = v(t, x) + \Delta(t, x).$$

    A map that comes after the flow moves actions locally, and reads the score where the velocity
    knows it worst. Steering can move mass from one mode to another, since early on the path the
    modes are not yet apart, and it reads the score where it is well conditioned.

    A potential gives the direction, by default [`fisher_flow.TiltedAction`][]. The strength is
    settled such that the *measured* KL of the sampler that acts equals the radius. This KL is the
    mean of the exact log-ratio of every action ([`fisher_flow.ExecutedLogRatio`][]).

    Multiplying the critic by a positive constant, or adding a constant, changes nothing. Where the
    gradient of the critic is not finite, nothing is added to the velocity.

    !!! warning

        Where the critic is rough and the modes are far apart, no potential here is good, and a
        [`fisher_flow.NaturalStep`][] may gain more. Compare the two by [`fisher_flow.certify`][].

    !!! example

        ```python
        import fisher_flow
        import jax

        policy = fisher_flow.FlowPolicy(  # carries N(0, I) to N(observation, I)
            lambda t, x, o: o + (2 * t - 1) * (x - t * o) / (t**2 + (1 - t) ** 2),
            action_shape=(2,),
        )
        critic = lambda observation, action: action.sum()
        observations = jax.random.normal(jax.random.key(0), (64, 2))

        steered = fisher_flow.refine(
            policy,
            critic,
            fisher_flow.Steering(radius=0.5, num_calibration=128),
            observations=observations,
        )
        action, log_ratio = steered.draw_and_log_ratio(observations[0], key=jax.random.key(1))
        ```

    !!! tip

        With `observations`, the strength is settled once: every state has the same temperature,
        and the mean of the KLs of all states is the radius. Without them the strength is settled at
        every observation, from `num_auxiliary` noises: every state spends the same KL, and an
        action costs some thousand times more.
    """

    radius: ScalarLike = 0.5
    potential: AbstractPotential = TiltedAction()
    _: KW_ONLY
    log_ratio: AbstractLogRatio | None = None
    max_unknown: ScalarLike = 0.05
    num_auxiliary: int = eqx.field(static=True, default=32)
    num_calibration: int = eqx.field(static=True, default=2048)

    def __check_init__(self):
        check_at_least("radius", self.radius, 0, 0.5)
        check_instance("potential", self.potential, AbstractPotential, "fisher_flow.TiltedAction()")
        if self.log_ratio is not None:
            example = "fisher_flow.ExecutedLogRatio()"
            check_instance("log_ratio", self.log_ratio, AbstractLogRatio, example)
        check_at_least("max_unknown", self.max_unknown, 0, 0.05)
        check_positive_integer("num_auxiliary", self.num_auxiliary, 32)
        check_positive_integer("num_calibration", self.num_calibration, 2048)

    def fit(
        self,
        policy: AbstractFlowPolicy,
        critic: Critic,
        observations: PyTree[Any] | None,
        *,
        key: PRNGKeyArray,
    ) -> SteeredPolicy:
        """Steers `policy` by `critic`.

        **Arguments:**

        - `policy`: the policy to improve.
        - `critic`: a function of one observation and one action to a scalar.
        - `observations`: a batch of observations, or `None`.
        - `key`: a `jax.random.key`.

        **Returns:**

        The steered policy.
        """
        guidance = CriticGuidance(critic, self.potential)
        return steer(policy, critic, guidance, self, observations, key)


Steering.__init__.__doc__ = """**Arguments:**

- `radius`: the KL to spend, in nats, averaged over observations.
- `potential`: where to steer.

**Other arguments:**

- `log_ratio`: how the KL is measured. The default is [`fisher_flow.ExecutedLogRatio`][] for actions
    of up to 32 entries and samplers whose explicit steps end at fixed times, and
    [`fisher_flow.DensityLogRatio`][] otherwise.
- `max_unknown`: the share of actions whose log-ratio may be unknown. Long steps of a flow with
    sharp modes fold, and an action at a fold has none. Then the KL stays below the radius, and
    `reached.limited` is true: raise `num_steps` of the flow.
- `num_auxiliary`: without observations, the number of actions drawn at a state.
- `num_calibration`: with observations, the number of actions that settle the strength.

**Raises:**

- `ValueError` if an argument is not of its kind.
"""


def steer(policy, critic, guidance, method, observations, key) -> SteeredPolicy:
    """Settles the strength of a guidance by the radius of a method."""
    flow = flow_to_steer(policy)
    log_ratio = log_ratio_of(flow, method.log_ratio)
    if observations is None and is_zero(method.radius):  # at every state, and known beforehand
        strength: Any = jnp.zeros(())
        reached = None
    elif observations is None:
        strength = _StrengthPerState(flow, guidance, method, log_ratio, jr.key_data(key))
        reached = None
    else:
        strength, reached = _settle_over(flow, guidance, method, log_ratio, observations, key)
    field = SteeredVelocity(flow, guidance, strength)
    return SteeredPolicy(policy, critic, method, field, log_ratio, reached)


def flow_to_steer(policy: AbstractFlowPolicy) -> FlowPolicy:
    """The sampler of a policy, as a flow that can be steered."""
    if isinstance(policy, SteeredPolicy):
        return policy.steered_flow
    if isinstance(policy, FlowPolicy):
        return policy
    raise ValueError(
        "`policy` must be a flow, whose path can be steered, but got a "
        f"`{type(policy).__name__}`, which moves actions after their path has ended. Write "
        "`policy=absorb(policy, observations, key=key).policy`."
    )


def log_ratio_of(flow: FlowPolicy, log_ratio: AbstractLogRatio | None) -> AbstractLogRatio:
    """The log-ratio that is given, or the one that suits the sampler."""
    if log_ratio is None:
        small = jax.eval_shape(lambda: jnp.zeros(flow.action_shape)).size <= dense_limit
        return ExecutedLogRatio() if small and has_executed_steps(flow) else DensityLogRatio()
    if isinstance(log_ratio, ExecutedLogRatio):
        check_steps(flow)
    return log_ratio


class _StrengthPerState(eqx.Module):
    """The strength is settled at every observation, from a few noises there."""

    flow: FlowPolicy
    guidance: AbstractGuidance
    method: Any
    log_ratio: AbstractLogRatio
    key_data: UInt32[Array, "..."]  # not a key, which Equinox cannot write to a file

    def __call__(self, observation: Observation) -> Array:
        # Noise that is fixed at a state, and another at every state.
        key = fold_in_values(jr.wrap_key_data(self.key_data), observation)
        this, observation = constant((self, observation))
        over_rows = lambda f: jax.vmap(lambda *row: f(observation, *row))
        keys = jr.split(key, self.method.num_auxiliary)
        strength, _ = _settle(
            this.flow, this.guidance, this.method, this.log_ratio, over_rows, keys
        )
        return strength


@eqx.filter_jit
def _settle_over(flow, guidance, method, log_ratio, observations, key) -> tuple[Array, Reached]:
    row_key, key = jr.split(key)
    constants = constant((flow, guidance, method, log_ratio, observations))
    flow, guidance, method, log_ratio, observations = constants
    length, n = batch_length("observations", observations), method.num_calibration
    # Every observation once, or as often as another, before a random remainder.
    rows = jnp.concatenate([jr.permutation(row_key, length)] * -(-n // length))[:n]
    rows = jax.tree.map(lambda leaf: jnp.asarray(leaf)[rows], observations)

    def over_rows(function):
        return lambda *columns: lax.map(
            lambda row: function(*row), (rows, *columns), batch_size=256
        )

    return _settle(flow, guidance, method, log_ratio, over_rows, jr.split(key, n))


def _settle(flow, guidance, method, log_ratio, over_rows, keys) -> tuple[Array, Reached]:
    """The strength at which the measured KL equals the radius, and what was reached there."""

    def of_row(o, key):
        noise_key, other_key, probe_key = jr.split(key, 3)
        noise = flow.noise(o, key=noise_key)
        if not isinstance(guidance, CriticGuidance):
            return noise, probe_key, jnp.ones((), noise.dtype)
        # Half the square of a difference: its mean is the variance of the critic at one state.
        pair = [flow.flow(o, noise), flow.draw(o, key=other_key)]
        values = [critic_value(flow, guidance.critic, o, a).astype(noise.dtype) for a in pair]
        return noise, probe_key, 0.5 * (values[0] - values[1]) ** 2

    noises, probe_keys, variances = over_rows(of_row)(keys)
    usable = jnp.isfinite(variances)
    spread: Any = jnp.where(usable, variances, 0)
    count = jnp.sum(usable, dtype=noises.dtype)
    variance = jnp.sum(spread) / jnp.maximum(count, 1)
    radius = jnp.asarray(method.radius, noises.dtype)

    def measure(strength):
        field = SteeredVelocity(flow, guidance, strength)

        def one(o, noise, key):
            return log_ratio(flow, field.pair(o), o, noise, key=key).log_ratio

        r = over_rows(one)(noises, probe_keys)
        kl, _ = mean_log_ratio(r)
        return kl, jnp.mean(~jnp.isfinite(r), dtype=noises.dtype)

    # To first order p exp(k Q) costs ½ k² Var Q; a field that is given starts from a weight of one.
    some = variance > 0
    initial = jnp.sqrt(2 * radius / jnp.where(some, variance, 1))
    initial = jnp.where(some, initial, 0)
    if not isinstance(guidance, CriticGuidance):
        initial = jnp.where(radius > 0, jnp.ones_like(initial), 0)
    strength, kl = scale_to_radius(measure, radius, initial, max_folded=method.max_unknown)
    return strength, Reached(kl, kl < 0.95 * radius)
