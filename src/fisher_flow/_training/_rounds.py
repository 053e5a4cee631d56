import dataclasses
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, PyTree

from .._acting import collect
from .._agents import NormalisedPolicy
from .._data import Normaliser, TooShortError, Transitions
from ._run import Run
from ._sampling import BalancedSampling, ReplayBuffer
from ._validation import checked_rows, finite_numbers


class Online(eqx.Module):
    """What a seed has come to online: all that a checkpoint has to hold."""

    state: PyTree[Any]
    buffer: ReplayBuffer
    num_steps: Int[Array, ""]
    num_updates: Int[Array, ""]

    @staticmethod
    def begin(state: Any, like: Transitions, capacity: int, num_updates: int) -> "Online":
        """Before the first step."""
        buffer = ReplayBuffer.empty(like, capacity)
        return Online(state, buffer, jnp.asarray(0), jnp.asarray(num_updates))


@dataclasses.dataclass(frozen=True)
class Rounds:
    """The rounds of `fine_tune`: a seed plays an episode in each environment, and learns."""

    run: Run
    envs: Any
    transitions: Transitions  # the logged ones, on the device
    normaliser: Normaliser | None
    prepare: Callable[[Transitions], Transitions] | None
    num_steps: int
    updates_per_step: float
    online_share: float | None
    max_steps: int

    def play_one(self, online: Online, seed: int) -> tuple[Online, dict[str, float] | None]:
        """One round of a seed; the row of the log, if there were updates."""
        episodes = {"return": np.nan, "episode_seed": np.nan}
        # Unless a run that had been finished goes on, which owes updates.
        if not self._owes_updates(online):
            online, episodes = self._play(online, seed)
        # With less than one update for all of its steps, or nothing to learn from yet.
        if not self._owes_updates(online):
            return online, None
        online, means = self._learn(online, seed)
        counts = {"steps": int(online.num_steps), "buffer_size": int(online.buffer.size)}
        return online, means | episodes | counts

    def _owes_updates(self, online: Online) -> bool:
        return self._num_due(online) != int(online.num_updates) and int(online.buffer.size) > 0

    def _num_due(self, online: Online) -> int:
        """The number of updates that the steps played so far call for."""
        steps = min(int(online.num_steps), self.num_steps)
        return self.run.first + round(self.updates_per_step * steps)

    def _play(self, online: Online, seed: int) -> tuple[Online, dict[str, float]]:
        """Plays the episodes of a round and writes them to the buffer."""
        policy = self.run.policy(online.state, seed)
        if self.normaliser is not None:
            policy = NormalisedPolicy(policy, self.normaliser)
        # Other episodes for every seed and round, and for a run that goes on from this one.
        entropy = (seed % 2**32, self.run.first, int(online.num_steps))
        (drawn,) = np.random.SeedSequence(entropy).generate_state(1)
        episode_seed = int(drawn >> 1)  # of 31 bits, as some environments count with a sign
        rows = collect(policy, self.envs, seed=episode_seed, max_steps=self.max_steps)
        mean_return = float(rows.rewards.sum() / rows.ends.sum())
        buffer, num_steps = online.buffer, online.num_steps + len(rows)
        try:
            prepared = self._prepared(rows)
        except TooShortError:  # for a chunk, as an episode may be: the steps are played for all
            if int(buffer.size) == 0 and int(num_steps) >= self.num_steps:
                raise
        else:
            buffer = buffer.write(prepared)
        online = Online(online.state, buffer, num_steps, online.num_updates)
        return online, {"return": mean_return, "episode_seed": episode_seed}

    def _prepared(self, rows: Transitions) -> Transitions:
        """The rows as the agent is trained on them."""
        if self.normaliser is not None:
            rows = self.normaliser.transitions(rows)
        if self.prepare is not None:
            rows = self.prepare(rows)
        return checked_rows(rows, self.run.agent, self.run.transitions)

    def _learn(self, online: Online, seed: int) -> tuple[Online, dict[str, float]]:
        """Makes the updates that are due; the mean of their logs."""
        sampling = BalancedSampling(self.transitions, online.buffer, self.online_share)
        begin, due = int(online.num_updates), self._num_due(online)
        states, totals = [online.state], {}
        for start, stop in self.run.spans(begin, due):
            pieces = [(stop, sampling)]
            states, (means,) = self.run.advance(states, [seed], pieces, start, stop)
            for name, mean in finite_numbers(means, seed, stop).items():
                totals[name] = totals.get(name, 0.0) + mean * (stop - start) / (due - begin)
            self.run.evaluate(states[0], seed, stop)
        return Online(states[0], online.buffer, online.num_steps, jnp.asarray(due)), totals
