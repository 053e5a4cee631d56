import dataclasses

import equinox as eqx
import jax.random as jr
from jaxtyping import Array, PRNGKeyArray, PyTree, Scalar, ScalarLike

from .._checks import check_positive_integer
from .._data import Transitions
from .._flows import AbstractPolicy
from .._refinement import AbstractRefinement, BestOf, NaturalStep, refine
from .._values import AbstractCriticLearning, CriticLearner, TemporalDifference
from ._agent import AbstractAgent, check_parts, require_next_actions
from ._behaviour_flow import BehaviourFlow
from ._learner import adam, first, Learner


class OneStepState(eqx.Module):
    flow: Learner
    critic: CriticLearner


class OneStep(AbstractAgent):
    r"""One step of policy improvement: a behaviour flow, a critic of the behaviour policy, and, at
    the end, a refinement of the flow by the critic.

    The target of the critic takes the action $a'$ that the data took next. So no policy is sampled
    in training, and no action is evaluated that is not in the data. It is the cheapest agent here
    and the hardest to break. The `refinement` plays no part in training: an agent with another one
    makes another policy of the same state.

    Logs `flow_loss`, `critic_loss` (in squared units of the return; grows with it), `q_mean`
    (should settle near the mean return that is left) and `q_max` (far above any return in the data
    means that the critic diverges).

    ??? cite "Reference"

        Offline, a single step of improvement can be as good as many:

        ```bibtex
        @inproceedings{brandfonbrener2021offline,
            title={Offline {RL} without off-policy evaluation},
            author={Brandfonbrener, David and Whitney, William F. and Ranganath, Rajesh
                    and Bruna, Joan},
            booktitle={Advances in Neural Information Processing Systems},
            year={2021},
        }
        ```
    """

    _: dataclasses.KW_ONLY
    flow: BehaviourFlow = BehaviourFlow()
    critic: AbstractCriticLearning = TemporalDifference()
    refinement: AbstractRefinement | None = NaturalStep()
    num_candidates: int = eqx.field(default=2, static=True)
    learning_rate: ScalarLike = 3e-4

    def __check_init__(self):
        check_parts(self.flow, self.critic, self.learning_rate)
        check_positive_integer("num_candidates", self.num_candidates, 2)

    def init(self, example: Transitions, *, key: PRNGKeyArray) -> OneStepState:
        require_next_actions(
            example, "`OneStep`", "train `ImplicitQLearning`, which does not need them"
        )
        flow_key, critic_key = jr.split(key)
        critic = self.critic.init(*first(example), key=critic_key)
        return OneStepState(
            self.flow.init(example, key=flow_key),
            CriticLearner.init(critic, adam(self.learning_rate)),
        )

    def update(
        self, state: OneStepState, batch: Transitions, *, key: PRNGKeyArray
    ) -> tuple[OneStepState, dict[str, Scalar]]:
        flow, flow_loss = self.flow.update(state.flow, batch, key=key)
        critic, logs = state.critic.update(
            self.critic, adam(self.learning_rate), batch, batch.next_actions, key=key
        )
        return OneStepState(flow, critic), {"flow_loss": flow_loss, **logs}

    def policy(
        self, state: OneStepState, observations: PyTree[Array], *, key: PRNGKeyArray
    ) -> AbstractPolicy:
        policy: AbstractPolicy = self.flow.policy(state.flow)
        critic = state.critic.model
        if self.refinement is not None:
            policy = refine(policy, critic, self.refinement, observations=observations, key=key)
        return policy if self.num_candidates == 1 else BestOf(policy, critic, self.num_candidates)


OneStep.__init__.__doc__ = """**Arguments:**

- `flow`: the behaviour flow.
- `critic`: how the critic is made and learned.
- `refinement`: the `method` of [`fisher_flow.refine`][]; `None` to leave the flow as it is.
- `num_candidates`: the number of refined actions that the policy draws. It takes the best by the
    critic; 1 for no choice.
- `learning_rate`: the rate of Adam for the critic.
"""
