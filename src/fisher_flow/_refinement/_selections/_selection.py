import abc
from typing import Any

import jax
import jax.numpy as jnp
import jax.random as jr
from equinox import AbstractVar
from jaxtyping import Array, Float, PRNGKeyArray, Scalar, ScalarLike

from ..._custom_types import Action, Critic, Observation
from ..._flows import AbstractFlowPolicy, AbstractPolicy, FlowPolicy, TanhBounds
from .._executed_critic import critic_value


class AbstractSelection(AbstractPolicy):
    """Abstract base class for policies that draw several actions and keep one of them.

    A transport map moves actions locally and cannot carry them from one mode of the data to
    another; a choice among several can, and the two combine:
    `BestOf(refine(policy, critic), critic, 8)`.
    """

    policy: AbstractVar[AbstractPolicy]
    critic: AbstractVar[Critic]
    n: AbstractVar[int]

    @abc.abstractmethod
    def probabilities(self, values: Float[Array, " n"]) -> Float[Array, " n"]:
        """The probability with which each action is kept.

        **Arguments:**

        - `values`: the values of the critic. Some of them may not be finite.

        **Returns:**

        Probabilities, zero where the critic is not finite unless it is so everywhere.
        """

    @abc.abstractmethod
    def kl(self, probabilities: Float[Array, " n"]) -> Scalar:
        """The nats that one choice spends: the mean over choices bounds the KL from `policy`.

        **Arguments:**

        - `probabilities`: the probabilities of the `n` actions that were drawn.
        """

    @property
    @abc.abstractmethod
    def kl_bound(self) -> ScalarLike:
        """A bound on the KL from `policy`, in nats, whatever the critic."""

    @property
    def action_shape(self) -> tuple[int, ...]:
        return self.policy.action_shape

    @property
    def bounds(self) -> tuple[Any, Any] | TanhBounds | None:
        return self.policy.bounds

    def draw(self, observation: Observation, *, key: PRNGKeyArray) -> Action:
        def draw_and_value(key):
            action = self.policy.draw(observation, key=key)
            return action, critic_value(self.policy, self.critic, observation, action)

        choice_key, key = jr.split(key)
        actions, values = jax.vmap(draw_and_value)(jr.split(key, self.n))
        return actions[jr.categorical(choice_key, jnp.log(self.probabilities(values)))]


def flow_underneath(policy: AbstractPolicy) -> FlowPolicy | None:
    """The flow that a policy comes from through maps and a choice, if there is one."""
    chosen_from = policy.policy if isinstance(policy, AbstractSelection) else policy
    if not isinstance(chosen_from, AbstractFlowPolicy):
        return None
    flow = chosen_from.flow_policy
    while not isinstance(flow, FlowPolicy):  # a steered flow: the one that it steers
        flow = flow.policy.flow_policy
    return flow
