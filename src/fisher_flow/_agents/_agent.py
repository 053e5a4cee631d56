import abc
from typing import Any

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, PRNGKeyArray, PyTree, Scalar

from .._checks import check_at_least, check_instance
from .._data import Transitions
from .._flows import AbstractPolicy
from .._values import AbstractCriticLearning
from ._behaviour_flow import check_flow


class AbstractAgent(eqx.Module):
    """Abstract base class for agents: what is learned from a batch of transitions, and how.

    An agent holds settings only. What it learns is a state: `init` makes it, `update` improves it
    by one batch, and `policy` turns it into something that acts. [`fisher_flow.train`][] loops over
    them, and your own code can too.
    """

    @abc.abstractmethod
    def init(self, example: Transitions, *, key: PRNGKeyArray) -> PyTree[Any]:
        """The state to start from.

        **Arguments:**

        - `example`: transitions of the shapes and dtypes of the data; only these are used.
        - `key`: a `jax.random.key` for the initial parameters.
        """

    @abc.abstractmethod
    def update(
        self, state: Any, batch: Transitions, *, key: PRNGKeyArray
    ) -> tuple[Any, dict[str, Scalar]]:
        """One gradient step on each network.

        **Arguments:**

        - `state`: what `init` or the last `update` returned.
        - `batch`: some rows of the data.
        - `key`: a `jax.random.key`.

        **Returns:**

        The new state, and the statistics named in the docstring of the agent.
        """

    def settle(self, state: Any, observations: PyTree[Array], *, key: PRNGKeyArray) -> PyTree[Any]:
        """Settles anew what needs more actions than a batch has, such as the time of a score.

        [`fisher_flow.train`][] calls it before the first update, after 100, 200, 400 and 800 of
        them, and then after every 1000. By default it changes nothing.

        **Arguments:**

        - `state`: what `update` returned.
        - `observations`: a batch of observations of the data.
        - `key`: a `jax.random.key`.

        **Returns:**

        The new state.
        """
        del observations, key
        return state

    @abc.abstractmethod
    def policy(
        self, state: Any, observations: PyTree[Array], *, key: PRNGKeyArray
    ) -> AbstractPolicy:
        """The policy that has been learned.

        **Arguments:**

        - `state`: what `update` returned.
        - `observations`: a batch of observations of the data. Some agents settle something once
            for all of them, such as the length of a step.
        - `key`: a `jax.random.key` for what they settle.
        """


def check_parts(flow: Any, critic: Any, learning_rate: Any) -> None:
    """Checks the parts that several agents have."""
    check_flow(flow)
    example = "fisher_flow.TemporalDifference()"
    check_instance("critic", critic, AbstractCriticLearning, example)
    check_at_least("learning_rate", learning_rate, 0, 3e-4)


def require_next_actions(batch: Transitions, agent: str, example: str) -> Array:
    if batch.next_actions is None:
        raise ValueError(
            f"`transitions` must have `next_actions` for {agent}, but got `None`. Write "
            f"`Transitions.from_episodes(...)`, which knows what was done next, or {example}."
        )
    return jnp.asarray(batch.next_actions)
