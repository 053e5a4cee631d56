import dataclasses
from typing import Any

from jaxtyping import Array, PRNGKeyArray, PyTree, Scalar

from .._data import Transitions
from .._flows import FlowPolicy
from ._agent import AbstractAgent
from ._behaviour_flow import BehaviourFlow, check_flow
from ._learner import Learner


class BehaviourCloning(AbstractAgent):
    """The behaviour flow alone: what every other agent has to beat.

    Logs `flow_loss` (falls to the variance that is left in the data, not to zero).
    """

    _: dataclasses.KW_ONLY
    flow: BehaviourFlow = BehaviourFlow()

    def __check_init__(self):
        check_flow(self.flow)

    def init(self, example: Transitions, *, key: PRNGKeyArray) -> Learner:
        return self.flow.init(example, key=key)

    def update(
        self, state: Learner, batch: Transitions, *, key: PRNGKeyArray
    ) -> tuple[Learner, dict[str, Scalar]]:
        state, loss = self.flow.update(state, batch, key=key)
        return state, {"flow_loss": loss}

    def policy(self, state: Learner, observations: PyTree[Array], *, key: Any) -> FlowPolicy:
        del observations, key
        return self.flow.policy(state)


BehaviourCloning.__init__.__doc__ = """**Arguments:**

- `flow`: the behaviour flow.
"""
