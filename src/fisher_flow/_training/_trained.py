import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np

from .._agents import AbstractAgent
from .._data import Transitions
from .._flows import AbstractPolicy


# called as augment(batch, key=key), returns a batch
Augment = Callable[..., Transitions]


@dataclasses.dataclass(frozen=True)
class Trained:
    """What [`fisher_flow.train`][] and [`fisher_flow.fine_tune`][] return: an agent and what it has
    learned, for every seed."""

    agent: AbstractAgent
    """The agent."""

    seeds: tuple[int, ...]
    """The seeds it was trained with."""

    states: tuple[Any, ...]
    """Its state for each of them."""

    transitions: Transitions
    """The logged transitions that it was trained on."""

    num_updates: int
    """The number of all updates, with those online."""

    augment: Augment | None = None
    """What is done to every batch."""

    def policy(self, seed: int | None = None) -> Any:
        """The policy learned with a seed, by default the first seed. It is an `AbstractPolicy`; the
        agent decides which kind.

        **Arguments:**

        - `seed`: one of the seeds of the training.
        """
        seed = self.seeds[0] if seed is None else seed
        if seed not in self.seeds:
            raise ValueError(
                f"`seed` must be one of those trained, {self.seeds}, but got `{seed!r}`. Write "
                f"`trained.policy({self.seeds[0]})`."
            )
        state = self.states[self.seeds.index(seed)]
        return make_policy(self.agent, state, self.transitions, seed)


def make_policy(
    agent: AbstractAgent, state: Any, transitions: Transitions, seed: int
) -> AbstractPolicy:
    """The policy of a state. A seed has the same observations and key at every call, so that the
    policy is a function of the state."""
    return agent.policy(state, some_observations(transitions, seed), key=jr.key(seed))


def some_observations(transitions: Transitions, seed: int) -> Any:
    """Some observations of the data, fewer if they are large, such as images."""
    # Without a permutation, which would take memory for every row.
    row = sum(leaf[:1].nbytes for leaf in jax.tree.leaves(transitions.observations))
    num = min(len(transitions), 10_000, max(1, 2**27 // max(1, row)))
    rows = np.random.default_rng(seed).choice(len(transitions), num, replace=False)
    return jax.tree.map(lambda leaf: jnp.asarray(leaf[rows]), transitions.observations)
