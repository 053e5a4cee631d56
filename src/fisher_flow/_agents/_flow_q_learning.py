import dataclasses
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from jax import lax
from jaxtyping import Array, PRNGKeyArray, PyTree, Scalar, ScalarLike

from .._checks import check_at_least, check_positive_integer
from .._data import Transitions
from .._flows import AbstractPolicy, OneStepPolicy
from .._networks import ActionMLP, make_encoder
from .._refinement import BestOf
from .._values import AbstractCriticLearning, CriticLearner, TemporalDifference
from ._agent import AbstractAgent, check_parts
from ._behaviour_flow import BehaviourFlow
from ._learner import adam, first, Learner


class FlowQState(eqx.Module):
    flow: Learner
    critic: CriticLearner
    actor: Learner


class FlowQLearning(AbstractAgent):
    r"""Flow Q-learning (FQL): a one-step policy $\mu(o, z)$ that is distilled from the behaviour
    flow and raises the critic at the same time,

    $$\min_\mu\; \alpha\, \mathbb E\bigl[\operatorname{mean}(\mu(o, z) - \mathrm{flow}(o, z))^2
        \bigr] - \frac{\mathbb E[Q(o, \mu(o, z))]}{\mathbb E|Q(o, \mu(o, z))|}, \qquad
        y = r + \gamma\, m\, \bar Q(o', \mu(o', z')).$$

    Logs `flow_loss`, `critic_loss`, `q_mean`, `q_max`, `distillation_loss` (the squared distance
    from the flow: an upper bound of $W_2^2$) and `actor_q` (the value of the policy's own actions;
    far above `q_mean` means that it exploits the critic).

    ??? cite "Reference"

        ```bibtex
        @inproceedings{park2025flow,
            title={Flow {Q}-learning},
            author={Park, Seohong and Li, Qiyang and Levine, Sergey},
            booktitle={International Conference on Machine Learning},
            year={2025},
        }
        ```
    """

    _: dataclasses.KW_ONLY
    flow: BehaviourFlow = BehaviourFlow()
    critic: AbstractCriticLearning = TemporalDifference()
    coefficient: ScalarLike = 1.0
    normalise_q: bool = eqx.field(default=True, static=True)
    num_candidates: int = eqx.field(default=1, static=True)
    learning_rate: ScalarLike = 3e-4

    def __check_init__(self):
        check_at_least("coefficient", self.coefficient, 0, 1.0)
        check_parts(self.flow, self.critic, self.learning_rate)
        check_positive_integer("num_candidates", self.num_candidates, 1)

    def init(self, example: Transitions, *, key: PRNGKeyArray) -> FlowQState:
        flow_key, critic_key, actor_key = jr.split(key, 3)
        observation, action = first(example)
        critic = self.critic.init(observation, action, key=critic_key)
        encoder, _, actor_key = make_encoder(
            self.flow.encoder,
            observation,
            action.dtype,
            actor_key,
            "BehaviourFlow(encoder=fisher_flow.ImpalaEncoder())",
        )
        width_size, depth = self.flow.width_size, self.flow.depth
        network = ActionMLP(observation, action, width_size, depth, encoder=encoder, key=actor_key)
        actor = OneStepPolicy(network, action.shape, bounds=self.flow.bounds, dtype=action.dtype)
        optimiser = adam(self.learning_rate)
        return FlowQState(
            self.flow.init(example, key=flow_key),
            CriticLearner.init(critic, optimiser),
            Learner.init(actor, optimiser),
        )

    def update(
        self, state: FlowQState, batch: Transitions, *, key: PRNGKeyArray
    ) -> tuple[FlowQState, dict[str, Scalar]]:
        flow_key, next_key, noise_key = jr.split(key, 3)
        optimiser = adam(self.learning_rate)
        μ: OneStepPolicy = state.actor.model
        flow, flow_loss = self.flow.update(state.flow, batch, key=flow_key)

        next_keys = jr.split(next_key, len(batch))
        next_a = jax.vmap(lambda o, key: μ.sample(o, key=key))(batch.next_observations, next_keys)
        critic, critic_logs = state.critic.update(self.critic, optimiser, batch, next_a, key=key)

        z = jr.normal(noise_key, batch.actions.shape, batch.actions.dtype)
        π = self.flow.policy(state.flow)
        taught = jax.vmap(lambda o, z: π.project(π.flow(o, z)))(batch.observations, z)
        taught = lax.stop_gradient(taught)

        @eqx.filter_grad(has_aux=True)
        def actor_gradient(μ):
            a = jax.vmap(μ)(batch.observations, z)
            distillation = jnp.mean((a - taught) ** 2)
            q = jax.vmap(state.critic.model)(batch.observations, μ.project(a))
            scale = lax.stop_gradient(jnp.mean(jnp.abs(q))) if self.normalise_q else 1
            loss = self.coefficient * distillation - jnp.mean(q) / scale
            return loss, {"distillation_loss": distillation, "actor_q": jnp.mean(q)}

        gradient, actor_logs = actor_gradient(μ)
        actor = state.actor.step(gradient, optimiser)
        logs = {"flow_loss": flow_loss, **critic_logs, **actor_logs}
        return FlowQState(flow, critic, actor), logs

    def policy(self, state: FlowQState, observations: PyTree[Array], *, key: Any) -> AbstractPolicy:
        del observations, key
        μ, critic = state.actor.model, state.critic.model
        return μ if self.num_candidates == 1 else BestOf(μ, critic, self.num_candidates)


FlowQLearning.__init__.__doc__ = r"""**Arguments:**

- `flow`: the behaviour flow. The actor has the same widths and an encoder of the same kind.
- `critic`: how the critic is made and learned.
- `coefficient`: the weight $\alpha$ of the distillation. It has to be tuned to each task.
- `normalise_q`: whether to divide by the mean of $|Q|$.
- `num_candidates`: the number of actions that the policy draws when it acts. It takes the best of
    them by the critic. Published results use 1.
- `learning_rate`: the rate of Adam for the critic and the actor.
"""
