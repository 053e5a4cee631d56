from typing import Any

from jaxtyping import PRNGKeyArray

from .._checks import check_instance
from .._custom_types import Action, Observation
from .._data import Normaliser
from .._flows import AbstractPolicy


class NormalisedPolicy(AbstractPolicy):
    """A policy that was trained on normalised observations, made to take observations as the
    environment returns them."""

    policy: AbstractPolicy
    normaliser: Normaliser

    def __init__(self, policy: AbstractPolicy, normaliser: Normaliser):
        """**Arguments:**

        - `policy`: any policy.
        - `normaliser`: the normaliser of the transitions that it was trained on.
        """
        check_instance("policy", policy, AbstractPolicy, "trained.policy()")
        check_instance("normaliser", normaliser, Normaliser, "Normaliser.of(transitions)")
        self.policy = policy
        self.normaliser = normaliser

    @property
    def action_shape(self) -> tuple[int, ...]:
        return self.policy.action_shape

    @property
    def bounds(self) -> Any:
        return self.policy.bounds

    def draw(self, observation: Observation, *, key: PRNGKeyArray) -> Action:
        return self.policy.draw(self.normaliser(observation), key=key)
