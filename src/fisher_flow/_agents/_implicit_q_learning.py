import dataclasses

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, PRNGKeyArray, PyTree, Scalar, ScalarLike

from .._checks import check_at_least, check_positive_integer
from .._data import Transitions
from .._flows import AbstractPolicy
from .._networks import make_encoder, QNetwork, ValueNetwork
from .._refinement import AbstractRefinement, BestOf, refine
from .._values import AbstractCriticLearning, CriticLearner, TemporalDifference
from ._agent import AbstractAgent, check_parts
from ._behaviour_flow import BehaviourFlow
from ._learner import adam, first, Learner


class ImplicitQState(eqx.Module):
    flow: Learner
    critic: CriticLearner
    value: Learner


class ImplicitQLearning(AbstractAgent):
    r"""Implicit Q-learning with a flow (IFQL): an expectile of the values in the data stands for
    their maximum, and the policy is the best of several actions of the behaviour flow.

    $$V \leftarrow \arg\min_V \mathbb E\bigl[\,|\kappa - 1[u < 0]|\, u^2\bigr],
        \quad u = \operatorname{agg}_j \bar Q_j(o, a) - V(o), \qquad
        Q_i(o, a) \to r + \gamma\, m\, V(o').$$

    No policy is sampled in training. Give it a `refinement` and its critic refines the flow.

    Logs `flow_loss`, `critic_loss`, `q_mean`, `q_max`, `value_loss` and `v_mean` (above `q_mean` if
    the expectile $\kappa$ is above 1/2).

    ??? cite "Reference"

        The first paper has the critic. The second replaces its policy by a flow with the best of
        $N$ actions, and calls the method IFQL.

        ```bibtex
        @inproceedings{kostrikov2022offline,
            title={Offline reinforcement learning with implicit {Q}-learning},
            author={Kostrikov, Ilya and Nair, Ashvin and Levine, Sergey},
            booktitle={International Conference on Learning Representations},
            year={2022},
        }
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
    expectile: ScalarLike = 0.9
    refinement: AbstractRefinement | None = None
    num_candidates: int = eqx.field(default=32, static=True)
    learning_rate: ScalarLike = 3e-4

    def __check_init__(self):
        check_at_least("expectile", self.expectile, 0, 0.9, maximum=1)
        check_parts(self.flow, self.critic, self.learning_rate)
        check_positive_integer("num_candidates", self.num_candidates, 32)

    def init(self, example: Transitions, *, key: PRNGKeyArray) -> ImplicitQState:
        flow_key, critic_key, value_key = jr.split(key, 3)
        observation, action = first(example)
        critic = self.critic.init(observation, action, key=critic_key)
        encoder, size, value_key = make_encoder(
            self.critic.encoder,
            observation,
            action.dtype,
            value_key,
            "TemporalDifference(encoder=fisher_flow.ImpalaEncoder())",
        )
        width_size, depth = self.critic.width_size, self.critic.depth
        network = QNetwork(size, width_size, depth, action.dtype, value_key)
        value = ValueNetwork(network, encoder)
        optimiser = adam(self.learning_rate)
        return ImplicitQState(
            self.flow.init(example, key=flow_key),
            CriticLearner.init(critic, optimiser),
            Learner.init(value, optimiser),
        )

    def update(
        self, state: ImplicitQState, batch: Transitions, *, key: PRNGKeyArray
    ) -> tuple[ImplicitQState, dict[str, Scalar]]:
        optimiser = adam(self.learning_rate)
        flow, flow_loss = self.flow.update(state.flow, batch, key=key)

        q = jax.vmap(state.critic.target)(batch.observations, jnp.asarray(batch.actions))

        @eqx.filter_grad(has_aux=True)
        def value_gradient(value):
            v = jax.vmap(value)(batch.observations)
            u = q - v
            loss = jnp.mean(jnp.where(u < 0, 1 - self.expectile, self.expectile) * u**2)
            return loss, {"value_loss": loss, "v_mean": jnp.mean(v)}

        gradient, value_logs = value_gradient(state.value.model)
        value = state.value.step(gradient, optimiser)

        next_v = jax.vmap(state.value.model)(batch.next_observations)
        critic, critic_logs = state.critic.update_towards(
            self.critic, optimiser, batch, next_v, key=key
        )
        logs = {"flow_loss": flow_loss, **critic_logs, **value_logs}
        return ImplicitQState(flow, critic, value), logs

    def policy(
        self, state: ImplicitQState, observations: PyTree[Array], *, key: PRNGKeyArray
    ) -> AbstractPolicy:
        policy: AbstractPolicy = self.flow.policy(state.flow)
        critic = state.critic.model
        if self.refinement is not None:
            policy = refine(policy, critic, self.refinement, observations=observations, key=key)
        return policy if self.num_candidates == 1 else BestOf(policy, critic, self.num_candidates)


ImplicitQLearning.__init__.__doc__ = r"""**Arguments:**

- `flow`: the behaviour flow.
- `critic`: how the critic is made and learned. The value has the same widths and an encoder of the
    same kind.
- `expectile`: the expectile $\kappa$ between 0 and 1; 1/2 is the mean.
- `refinement`: the `method` of [`fisher_flow.refine`][]; `None` to leave the flow as it is.
- `num_candidates`: the number of actions that the policy draws. It takes the best by the critic.
- `learning_rate`: the rate of Adam for the critic and the value.
"""
