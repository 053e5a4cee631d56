from collections.abc import Callable
from dataclasses import KW_ONLY
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import optax
from jax import lax
from jaxtyping import Array, Float, PRNGKeyArray, PyTree, Scalar, ScalarLike

from .._checks import check_at_least, check_count, check_positive_integer
from .._custom_types import Action, Critic, Observation
from .._fit import apply_gradient, fit
from .._flows import AbstractFlowPolicy
from .._geometry import AbstractCost, FisherRao, in_continuous_time, TransportKL, with_flow
from .._linalg import Whitening
from .._networks import AbstractEncoder, zero_network
from .._trees import finite_or_zero, in_full_precision, random_rows
from ._correct_length import correct_length
from ._executed_critic import critic_gradient
from ._meet_radius import linearised_fields, meet_radius, over_batch
from ._method import (
    AbstractDisplacement,
    AbstractTransport,
    check_method,
    draw_from_flow,
    measure_by,
    Reached,
)
from ._radius import is_zero, scaled
from ._refined_policy import RefinedPolicy


class Residual(AbstractTransport):
    r"""A trained residual network: the refinement of the Fisher Decorator paper.

    The network $\delta_\theta(o, a)$ minimises

    $$-\frac{\mathbb E[Q(o, a + \delta_\theta)]}{\mathbb E \|\nabla_a Q\|}
        + \frac{\beta}{\epsilon}\, \mathbb E\Bigl[\text{cost of } \delta_\theta
            + \frac{\lambda \bar g}{2} \|\delta_\theta\|^2\Bigr]$$

    over actions $a$ drawn from the policy. The metric gives the cost and its mean eigenvalue
    $\bar g$, and $\lambda$ is the damping: without it a network drifts along fields that cost
    nothing to second order, such as a rotation within the level sets of the density, until their
    higher orders fold the map. The dual variable $\beta$ rises while the *measured* KL is above
    the radius $\epsilon$ and falls while it is below. When training ends, the displacement is
    scaled so that the measured KL meets the radius.
    No gradient reaches the policy or the critic.

    Its gain is the gain of the whole field: where [`fisher_flow.NaturalStep`][] solves for each
    action alone, a network can trade the divergence at one action against the divergence at
    another.

    ??? cite "Reference"

        Section 4 of the paper, whose cost is
        `ScoreOuterProduct(score=PaperScore(time=0.8))`. The paper does not have the scale of the
        critic by its gradient norm, the dual variable from the measured KL, and the final scale.

        ```bibtex
        @article{cheng2026fisher,
            title={Fisher Decorator: Refining flow policy via a local transport map},
            author={Cheng and Wang and Yuan and Wang and Chen and Zeng and Sun},
            journal={arXiv:2604.17919},
            year={2026},
        }
        ```
    """

    metric: AbstractCost = FisherRao()
    radius: ScalarLike = 0.5
    _: KW_ONLY
    network: Callable[[Any, Any], Any] | None = None
    encoder: AbstractEncoder | None = None
    width_size: int = eqx.field(static=True, default=128)
    depth: int = eqx.field(static=True, default=3)
    num_updates: int = eqx.field(static=True, default=5000)
    batch_size: int = eqx.field(static=True, default=256)
    learning_rate: ScalarLike = 1e-3
    damping: ScalarLike = 0.1
    max_folded: ScalarLike = 0.01
    num_calibration: int = eqx.field(static=True, default=4096)
    num_witnesses: int = eqx.field(static=True, default=512)
    measure: TransportKL = None  # pyright: ignore
    progress: bool = eqx.field(static=True, default=True)

    def __post_init__(self):
        check_method(
            self.metric, AbstractCost, self.radius, self.measure, "fisher_flow.FisherRao()"
        )
        if self.measure is None:
            self.measure = measure_by(self.metric)

    def __check_init__(self):
        for name, example in (
            ("width_size", 128),
            ("depth", 3),
            ("num_updates", 5000),
            ("batch_size", 256),
            ("num_calibration", 4096),
        ):
            check_positive_integer(name, getattr(self, name), example)
        check_at_least("learning_rate", self.learning_rate, 0, 1e-3)
        check_at_least("damping", self.damping, 0, 0.1)
        check_at_least("max_folded", self.max_folded, 0, 0.01)
        check_count("num_witnesses", self.num_witnesses, 512)

    def fit(
        self,
        policy: AbstractFlowPolicy,
        critic: Critic,
        observations: PyTree[Any] | None,
        *,
        key: PRNGKeyArray,
    ) -> RefinedPolicy:
        if observations is None:
            raise ValueError(
                "`observations` must be given to train a `Residual`, but got `None`. Write "
                "`refine(policy, critic, Residual(), observations=observations)` with the "
                "observations of the data, or use `NaturalStep()`, which does not need them."
            )
        network_key, scale_key, train_key, calibration_key = jr.split(key, 4)
        observations = jax.tree.map(jnp.asarray, observations)
        measured = in_continuous_time(policy, observations, key=calibration_key)
        network = in_full_precision(self.network)
        if network is None:
            observation = jax.tree.map(lambda leaf: leaf[0], observations)
            action = eqx.filter_eval_shape(lambda key: policy.draw(observation, key=key), key)
            network = zero_network(
                observation,
                action,
                self.width_size,
                self.depth,
                encoder=self.encoder,
                example="Residual(encoder=fisher_flow.ImpalaEncoder())",
                key=network_key,
            )
            whitening = self.measure.score.whitening
            if whitening is not None:
                _, a, _ = _draw(measured, observations, 256, network_key)
                network = WhitenedNetwork(network, whitening, jnp.mean(a, axis=0))
        if is_zero(self.radius):
            zero = jnp.zeros(())
            displacement, reached = NetworkDisplacement(network, zero), Reached(zero, zero > 0)
            return RefinedPolicy(policy, critic, displacement, self, reached)
        gradient_norm, eigenvalue = _scales(self, measured, critic, observations, scale_key)
        optimiser_state = _optimiser(self).init(eqx.filter(network, eqx.is_inexact_array))
        # From a strong penalty down, so that no early step leaves the data.
        log_dual = jnp.zeros((), gradient_norm.dtype)
        network, *_ = fit(
            _update,
            (self, measured, critic, observations, gradient_norm, eigenvalue),
            (network, optimiser_state, log_dual, log_dual),
            self.num_updates,
            key=train_key,
            progress=self.progress,
            description=f"residual, {type(self.metric).__name__}",
        )
        return at_radius(self, policy, critic, network, observations, key=calibration_key)


Residual.__init__.__doc__ = r"""**Arguments:**

- `metric`: what a displacement costs.
- `radius`: the KL to spend, in nats, averaged over observations. The measured KL meets it
    unless folds forbid.

**Other arguments:**

- `network`: called as `network(observation, action)` for one sample; returns a
    displacement. By default a multilayer perceptron of `depth` hidden layers of
    `width_size` units, which starts from zero and sees the actions in units of their own.
- `encoder`: what that perceptron, if there is one, sees images through, such as
    [`fisher_flow.ImpalaEncoder`][].
- `num_updates`, `batch_size`: the number of gradient steps, and of actions in each.
- `learning_rate`: the initial rate of Adam; it falls to zero along a cosine.
- `damping`: the multiple $\lambda$ of the metric's mean eigenvalue by which every
    displacement is charged in addition. The published method has no damping.
- `max_folded`: the share of actions at which the transport map may fold. If maps before it
    fold at more actions already, this map may not add folds.
- `num_calibration`: the number of actions drawn to settle the final scale.
- `num_witnesses`: the number of actions on which the KL is then measured again by densities, as
    `certify` does, to correct the scale. With 0 the scale is not corrected.
- `measure`: how the KL is measured. By default with the score of the metric.
- `progress`: whether to show a progress bar with the gain, the KL and the dual variable.

**Raises:**

- `ValueError` if an argument is not of its kind.
"""


class NetworkDisplacement(AbstractDisplacement):
    """A network, at the scale that was settled for it."""

    network: Callable[[Any, Any], Any]
    scale: Scalar

    def __call__(
        self, policy: AbstractFlowPolicy, critic: Critic, observation: Observation, action: Action
    ) -> Action:
        return self.scale.astype(action.dtype) * self.network(observation, action)


class WhitenedNetwork(eqx.Module):
    """A network in coordinates in which the actions have mean zero and covariance one."""

    network: Callable[[Any, Any], Any]
    whitening: Whitening
    centre: Float[Array, "..."]

    def __call__(self, observation: Observation, action: Action) -> Action:
        # They are not trained.
        whitening, centre = lax.stop_gradient((self.whitening, self.centre))
        z = whitening.whiten((action - centre).reshape(-1)).reshape(action.shape)
        δ = self.network(observation, z)
        return whitening.colour(δ.reshape(-1)).reshape(action.shape)


def _optimiser(method):
    schedule = optax.cosine_decay_schedule(method.learning_rate, method.num_updates)
    return optax.chain(optax.clip_by_global_norm(5.0), optax.adam(schedule))


def _draw(policy, observations, num, key):
    row_key, action_key = jr.split(key)
    o = random_rows(observations, num, key=row_key)
    keys = jr.split(action_key, num)
    return o, *jax.vmap(lambda o, key: draw_from_flow(policy, o, key))(o, keys)


@eqx.filter_jit
def _scales(method, policy, critic, observations, key) -> tuple[Scalar, Scalar]:
    """The mean norm of the critic's gradient, and the mean eigenvalue of the metric."""
    draw_key, metric_key = jr.split(key)
    o, a, _ = _draw(policy, observations, method.num_calibration, draw_key)

    def norm_and_eigenvalue(row):
        o, a = row
        eigenvalue = method.metric.mean_eigenvalue(policy.flow_policy, o, a, key=metric_key)
        g = critic_gradient(policy, critic, o, a).reshape(-1)
        if method.measure.score.whitening is not None:
            g = method.measure.score.whitening.whiten_gradient(g)
        return jnp.linalg.norm(g), eigenvalue

    norms, eigenvalues = lax.map(norm_and_eigenvalue, (o, a), batch_size=256)

    def finite_mean(values: Array) -> Scalar:
        return jnp.mean(jnp.where(jnp.isfinite(values), values, 0))

    norm, eigenvalue = finite_mean(norms), finite_mean(eigenvalues)
    return jnp.where(norm > 0, norm, 1), eigenvalue


def _update(args, state, key, step):
    method, policy, critic, observations, gradient_norm, eigenvalue = args
    network, optimiser_state, log_dual, last_kl = state
    draw_key, cost_key = jr.split(key)
    o, a, b = _draw(policy, observations, method.batch_size, draw_key)
    cost_keys = jr.split(cost_key, method.batch_size)

    def loss_of_one(network, o, a, key):
        δ = network(o, a)
        # The gradient of -Q, by hand: where the critic is broken it says nothing.
        g, finite = finite_or_zero(critic_gradient(policy, critic, o, lax.stop_gradient(a + δ)))
        gain = jnp.sum(lax.stop_gradient(g / gradient_norm) * δ)
        # After other maps, too, the cost is by the flow, whose score is at hand.
        cost = method.metric.cost(policy.flow_policy, o, a, lambda a: network(o, a), key=key)
        cost = cost + 0.5 * method.damping * eigenvalue * method.metric.squared_length(δ)
        return jnp.where(finite, gain, 0), cost

    @eqx.filter_value_and_grad(has_aux=True)
    def loss_and_gradient(network):
        one = jax.vmap(lambda o, a, key: loss_of_one(network, o, a, key))
        gains, costs = one(o, a, cost_keys)
        gain, cost = jnp.mean(gains), jnp.mean(costs)
        return -gain + lax.stop_gradient(jnp.exp(log_dual)) * cost / method.radius, gain

    (_, gain), gradient = loss_and_gradient(network)
    network, optimiser_state = apply_gradient(
        _optimiser(method), gradient, optimiser_state, network
    )

    def measure():
        def terms_of_one(o, a, b):
            δ, J = method.measure.linearise(policy, lambda a: network(o, a), a)
            terms = method.measure.terms(policy, o, a, δ, J, b)
            if policy.flow_policy is policy or not method.measure.whole_chain:
                return terms, jnp.asarray(False)
            # The maps before this one may fold already.
            δ, J = jnp.zeros_like(δ), jnp.zeros_like(J)
            return terms, method.measure.terms(policy, o, a, δ, J, b).folded

        terms, folded_before = jax.vmap(terms_of_one)(o, a, b)
        kl = jnp.mean(terms.kl)
        violation = jnp.clip(kl / method.radius - 1, -1, 1)
        # Where the map folds its KL is not known: it is too large.
        max_folded = jnp.asarray(method.max_folded, kl.dtype)
        max_folded = jnp.maximum(max_folded, jnp.mean(folded_before, dtype=kl.dtype))
        folds = jnp.mean(terms.folded, dtype=kl.dtype) > max_folded
        return kl, jnp.where(folds, 1, violation).astype(kl.dtype)

    # Measuring costs about as much as an update, so it is done at every fifth.
    kl, violation = lax.cond(
        step % 5 == 0, measure, lambda: (last_kl, jnp.zeros((), log_dual.dtype))
    )
    log_dual = log_dual + 0.05 * violation
    logs = {"gain": gain, "kl": kl, "log_dual": log_dual}
    return (network, optimiser_state, log_dual, kl), logs


def at_radius(
    method: Residual,
    policy: AbstractFlowPolicy,
    critic: Critic,
    network: Callable[[Any, Any], Any],
    observations: PyTree[Any],
    *,
    key: PRNGKeyArray,
) -> RefinedPolicy:
    """A trained network as a refinement, at the scale at which the measured KL meets the radius."""
    measured = in_continuous_time(policy, observations, key=key)
    scale, reached = _final_scale(method, measured, network, observations, key)
    displacement = NetworkDisplacement(network, scale)
    refined = RefinedPolicy(measured, critic, displacement, method, reached)
    refined = correct_length(refined, observations, method.num_witnesses, key=key)
    return with_flow(refined, policy.flow_policy)


@eqx.filter_jit
def _final_scale(method, policy, network, observations, key) -> tuple[Scalar, Reached]:
    o, a, b = _draw(policy, observations, method.num_calibration, key)
    over_rows = over_batch(o)
    δ, J = linearised_fields(method, policy, lambda o, a: network(o, a), a, over_rows)
    fields = lambda scale: (scaled(scale, δ), scaled(scale, J))
    return meet_radius(method, policy, fields, jnp.ones((), a.dtype), (a, b), over_rows)
