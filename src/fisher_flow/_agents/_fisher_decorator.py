import dataclasses
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import optax
from jax import lax
from jaxtyping import Array, PRNGKeyArray, PyTree, Scalar, ScalarLike

from .._checks import check_at_least, check_count, check_instance, check_positive_integer
from .._data import Transitions
from .._flows import AbstractPolicy
from .._geometry import (
    AbstractCost,
    AveragedFisher,
    calibrate,
    Euclidean,
    FisherRao,
    has_open_score,
    is_open,
    PaperScore,
    ScoreOuterProduct,
    unsettled_score,
)
from .._networks import zero_network
from .._refinement import at_radius, BestOf, NetworkDisplacement, RefinedPolicy, Residual
from .._values import AbstractCriticLearning, CriticLearner, TemporalDifference
from ._agent import AbstractAgent, check_parts, require_next_actions
from ._behaviour_flow import BehaviourFlow
from ._learner import adam, first, Learner


class FisherDecoratorState(eqx.Module):
    flow: Learner
    critic: CriticLearner
    residual: Learner
    log_dual: Scalar
    metric: AbstractCost


class FisherDecorator(AbstractAgent):
    r"""Fisher Decorator (FiDec): a residual map $a \mapsto a + \delta(o, a)$ of the behaviour flow,
    trained together with the flow and the critic,

    $$\min_\delta\; -\frac{\mathbb E[Q(o, a + \delta)]}{\mathbb E|Q(o, a + \delta)|}
        + \lambda\, \frac{\mathbb E[\text{cost of } \delta]}{\epsilon}, \qquad
        y = r + \gamma\, m\, \bar Q(o', a' + \delta(o', a')),$$

    where the metric says what a displacement costs (a score to which no time was given is calibrated
    to the flow as it is learned, by [`fisher_flow.calibrate_score`][]), and the multiplier $\lambda$ rises while the
    mean cost is above the radius $\epsilon$ and falls while it is below. The cost is a prediction of the
    KL, on a batch. So the policy that is made of the agent is scaled until its *measured* KL meets the
    radius, as in [`fisher_flow.Residual`][]. With [`fisher_flow.Euclidean`][] and
    one candidate it is DeFlow.

    Logs `flow_loss`, `critic_loss`, `q_mean`, `q_max`, `cost` (settles at the radius; in nats for
    metrics that predict a KL), `log_dual` (settles; a steady rise means that the radius cannot be
    kept), and `actor_q` (the value of the policy's own actions; far above `q_mean` means that it
    exploits the critic).

    ??? cite "Reference"

        The method is the one of the paper. This library divides the cost by its radius, so that
        the multiplier does not depend on the scale of either.

        ```bibtex
        @article{cheng2026fisher,
            title={Fisher Decorator: Refining flow policy via a local transport map},
            author={Cheng and Wang and Yuan and Wang and Chen and Zeng and Sun},
            journal={arXiv:2604.17919},
            year={2026},
        }
        ```
    """  # noqa: E501

    metric: AbstractCost = FisherRao()
    radius: ScalarLike = 0.5
    _: dataclasses.KW_ONLY
    flow: BehaviourFlow = BehaviourFlow()
    critic: AbstractCriticLearning = TemporalDifference()
    from_data: bool = eqx.field(default=False, static=True)
    num_candidates: int = eqx.field(default=2, static=True)
    num_witnesses: int = eqx.field(default=512, static=True)
    learning_rate: ScalarLike = 3e-4

    def __check_init__(self):
        check_instance("metric", self.metric, AbstractCost, "fisher_flow.FisherRao()")
        check_at_least("radius", self.radius, 0, 0.5)
        check_parts(self.flow, self.critic, self.learning_rate)
        check_positive_integer("num_candidates", self.num_candidates, 1)
        check_count("num_witnesses", self.num_witnesses, 512)

    @staticmethod
    def paper(radius: ScalarLike = 0.001, **options: Any) -> "FisherDecorator":
        """As in the paper: the rank-one Fisher matrix, with its score at time 0.8, and the first
        action that is drawn."""
        return FisherDecorator(
            ScoreOuterProduct(PaperScore(0.8)), radius, **{"num_candidates": 1, **options}
        )

    @staticmethod
    def released(
        radius: ScalarLike = 0.001, num_samples: int = 4, **options: Any
    ) -> "FisherDecorator":
        """As in the authors' released code: the Fisher matrix of a state, averaged over samples,
        damped and divided by its trace. The score is the one of the paper, since what the code
        uses in its place is not a score."""
        metric = AveragedFisher(PaperScore(0.8), num_samples)
        return FisherDecorator(metric, radius, **{"num_candidates": 1, **options})

    @staticmethod
    def deflow(
        action_size: int, divergence: ScalarLike = 0.001, **options: Any
    ) -> "FisherDecorator":
        """DeFlow: the mean over the entries of an action of the squared displacement is held to
        `divergence`."""
        check_positive_integer("action_size", action_size, 5)
        radius = 0.5 * action_size * divergence
        return FisherDecorator(Euclidean(), radius, **{"num_candidates": 1, **options})

    def init(self, example: Transitions, *, key: PRNGKeyArray) -> FisherDecoratorState:
        if self.from_data:
            require_next_actions(example, "`from_data=True`", "`from_data=False`")
        flow_key, critic_key, residual_key = jr.split(key, 3)
        observation, action = first(example)
        critic = self.critic.init(observation, action, key=critic_key)
        residual = zero_network(
            observation,
            action,
            self.flow.width_size,
            self.flow.depth,
            encoder=self.flow.encoder,
            example="BehaviourFlow(encoder=fisher_flow.ImpalaEncoder())",
            key=residual_key,
        )
        return FisherDecoratorState(
            self.flow.init(example, key=flow_key),
            CriticLearner.init(critic, self._optimiser()),
            Learner.init(residual, self._optimiser()),
            # From a strong penalty down: what strays while the flow is young is slow to come back.
            jnp.zeros((), action.dtype),
            _with_a_time(self.metric, action),
        )

    def settle(
        self, state: FisherDecoratorState, observations: PyTree[Array], *, key: PRNGKeyArray
    ) -> FisherDecoratorState:
        if not has_open_score(self.metric):
            return state
        metric = _calibrated(self.metric, self.flow.policy(state.flow), observations, key)
        return eqx.tree_at(lambda state: state.metric, state, metric)

    def _optimiser(self) -> optax.GradientTransformation:
        return optax.chain(optax.clip_by_global_norm(5.0), adam(self.learning_rate))

    def update(
        self, state: FisherDecoratorState, batch: Transitions, *, key: PRNGKeyArray
    ) -> tuple[FisherDecoratorState, dict[str, Scalar]]:
        flow_key, next_key, base_key, cost_key = jr.split(key, 4)
        o, next_o = batch.observations, batch.next_observations
        π = self.flow.policy(state.flow)
        δ = state.residual.model
        flow, flow_loss = self.flow.update(state.flow, batch, key=flow_key)

        if self.from_data:
            a, next_a = batch.actions, batch.next_actions
        else:
            draw = jax.vmap(lambda o, key: π.draw(o, key=key))
            a = draw(o, jr.split(base_key, len(batch)))
            next_a = draw(next_o, jr.split(next_key, len(batch)))

        moved = π.project(next_a + jax.vmap(δ)(next_o, next_a))
        critic, critic_logs = state.critic.update(
            self.critic, self._optimiser(), batch, moved, key=key
        )

        cost_keys = jr.split(cost_key, len(batch))
        λ = lax.stop_gradient(jnp.exp(state.log_dual))
        # With a radius of zero nothing draws the residual away from zero, where it starts.
        may_move = jnp.asarray(self.radius) > 0
        ε = jnp.where(may_move, self.radius, 1)

        @eqx.filter_grad(has_aux=True)
        def residual_gradient(δ):
            def cost_of_one(o, a, key):
                return state.metric.cost(π, o, a, lambda a: δ(o, a), key=key)

            q = jax.vmap(state.critic.model)(o, π.project(a + jax.vmap(δ)(o, a)))
            scale = lax.stop_gradient(jnp.mean(jnp.abs(q)))
            cost = jnp.mean(jax.vmap(cost_of_one)(o, a, cost_keys))
            loss = λ * cost / ε - jnp.where(may_move, jnp.mean(q) / scale, 0)
            return loss, {"cost": cost, "actor_q": jnp.mean(q)}

        gradient, residual_logs = residual_gradient(δ)
        residual = state.residual.step(gradient, self._optimiser())
        violation = jnp.clip(residual_logs["cost"] / ε - 1, -1, 1)
        log_dual = state.log_dual + 0.01 * lax.stop_gradient(violation)

        logs = {"flow_loss": flow_loss, **critic_logs, **residual_logs, "log_dual": log_dual}
        state = FisherDecoratorState(flow, critic, residual, log_dual, state.metric)
        return state, logs

    def policy(
        self, state: FisherDecoratorState, observations: PyTree[Array], *, key: Any
    ) -> AbstractPolicy:
        flow, critic = self.flow.policy(state.flow), state.critic.model
        network = state.residual.model
        method = Residual(state.metric, self.radius, num_witnesses=self.num_witnesses)
        if has_open_score(self.metric):
            refined = at_radius(method, flow, critic, network, observations, key=key)
        else:  # a published cost is not in nats: the dual alone holds it to the radius
            displacement = NetworkDisplacement(network, jnp.ones_like(state.log_dual))
            refined = RefinedPolicy(flow, critic, displacement, method)
        return refined if self.num_candidates == 1 else BestOf(refined, critic, self.num_candidates)


FisherDecorator.__init__.__doc__ = r"""**Arguments:**

- `metric`: what a displacement costs.
- `radius`: the mean cost $\epsilon$ to spend; in nats for metrics that predict a KL.

**Other arguments:**

- `flow`: the behaviour flow. The residual has the same widths and an encoder of the same kind.
- `critic`: how the critic is made and learned.
- `from_data`: whether the residual is trained on the actions of the data instead of samples of the
    flow. They are samples of the behaviour policy too. That saves both rollouts of an update.
- `num_candidates`: the number of refined actions that the policy draws when it acts. It takes the
    best of them by the critic, since a local map cannot move an action from one mode (a peak of the
    density) to another. That spends at most [`BestOf.kl_bound`][fisher_flow.BestOf] more. More than
    two gained return on HalfCheetah, lost much on cube-single and lost a little on Pendulum.
- `num_witnesses`: the number of actions on which the KL is measured by densities when the policy is
    made, as in [`fisher_flow.Residual`][].
- `learning_rate`: the rate of Adam for the critic and the residual.
"""


@eqx.filter_jit
def _calibrated(metric, policy, observations, key) -> AbstractCost:
    # Under `jit` the order of the score is an array too, so no choice is a reason to compile.
    return calibrate(metric, policy, observations, None, key)


def _with_a_time(metric: AbstractCost, action: Array) -> AbstractCost:
    """The metric as it is until it is settled, in the shape that it has then."""
    score = unsettled_score(action, action.dtype)
    return jax.tree.map(lambda x: score if is_open(x) else x, metric, is_leaf=is_open)
