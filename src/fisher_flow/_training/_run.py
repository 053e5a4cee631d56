import itertools
import os
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import wadler_lindig

from .._agents import AbstractAgent
from .._checks import check_positive_integer
from .._data import checksum, Transitions
from .._flows import AbstractPolicy
from ._checkpoints import Checkpoints
from ._feed import Piece
from ._log import Log, Logger
from ._trained import Augment, make_policy, some_observations
from ._updates import make_updates, stack, unstack, update_all, update_one
from ._validation import checked_scores


# called as evaluate(policy, seed), returns names and numbers
Evaluate = Callable[[AbstractPolicy, int], dict[str, float]]


class Run:
    """What `train` and `fine_tune` share: an agent that learns from transitions, once for each
    seed, from update `first` to update `last`, and the folder that it writes to.

    Everything random comes from keys that depend on the seed and on the number of updates alone.
    So a run that was stopped goes on to the same numbers.
    """

    def __init__(
        self,
        agent: AbstractAgent,
        transitions: Transitions,
        seeds: tuple[int, ...],
        batch_size: int,
        augment: Augment | None,
        *,
        first: int,
        last: int,
        evaluate: Evaluate | None,
        evaluate_every: int | None,
        folder: str | os.PathLike[str] | None,
        checkpoint_every: int | None,
        loggers: Sequence[Logger],
        vectorise: bool = False,
    ):
        evaluate_every = last if evaluate_every is None else evaluate_every
        if checkpoint_every is None:
            checkpoint_every = max(1, (last - first) // 10)
        check_positive_integer("batch_size", batch_size, 256)
        check_positive_integer("evaluate_every", evaluate_every, 10_000)
        check_positive_integer("checkpoint_every", checkpoint_every, 10_000)
        self.agent = agent
        self.transitions = transitions
        self.seeds = seeds
        self.first = first
        self.last = last
        self.checkpoint_every = checkpoint_every
        self.log = Log(folder, loggers)
        self._checkpoints: Checkpoints | None = None
        self._batch_size = batch_size
        self._augment = augment
        self._evaluate = evaluate
        self._evaluate_every = evaluate_every
        self._folder = folder
        self._vectorise = vectorise
        self._settings = (*_numbers_as_arrays((agent, augment), transitions), batch_size)
        self._observations = some_observations(transitions, 0)
        self._settled = {x for x in (0, 100, 200, 400, 800, *range(1000, last, 1000)) if x < last}

    def resume(self, states: list[Any], **described: str) -> tuple[int, list[Any]]:
        """The number and the states of the last checkpoint in the folder. A folder without a
        checkpoint gives 0 and these states.

        **Arguments:**

        - `states`: what a checkpoint holds for each seed.
        - `described`: what has to be the same for a run to go on, beside `_description`.
        """
        if self._folder is None:
            return 0, states
        self._checkpoints = Checkpoints(self._folder, self._description() | described)
        restored = self._checkpoints.restore(states)
        return (0, states) if restored is None else restored

    def save(self, number: int, states: list[Any], since: int, updates: int) -> None:
        """Writes a checkpoint if one is due after the updates from `since` to `updates`.

        Call it when the rows of these updates are written, so that no row before a checkpoint is
        ever missing. Call it before evaluations that can be made later: they may fail.
        """
        passed = [(x - self.first) // self.checkpoint_every for x in (since, updates)]
        is_due = passed[0] < passed[1] or updates == self.last
        if self._checkpoints is not None and is_due:
            self._checkpoints.save(number, states)

    def spans(self, start: int, stop: int, *every: int) -> list[tuple[int, int]]:
        """The updates from `start` to `stop`, cut where the agent settles, where it is evaluated,
        and after every so many."""
        cuts = {stop, *self._settled}
        for each in (self._evaluate_every, *every):
            cuts |= set(range(self.first + each, stop, each))
        return list(itertools.pairwise([start, *sorted(x for x in cuts if start < x <= stop)]))

    def advance(
        self,
        states: list[Any],
        seeds: Sequence[int],
        pieces: Iterable[Piece],
        start: int,
        stop: int,
    ) -> tuple[list[Any], list[dict[str, Any]]]:
        """Makes the updates of a span; the new states, and the means of their logs."""
        if start in self._settled:
            states = [self._settle(*pair, start) for pair in zip(states, seeds, strict=True)]
        if not self._vectorise:
            arrays = [jnp.asarray(seed) for seed in seeds]
            return make_updates(update_one, self._settings, states, arrays, pieces, start, stop)
        (stacked,), (means,) = make_updates(
            update_all, self._settings, [stack(states)], [jnp.asarray(seeds)], pieces, start, stop
        )
        return unstack(stacked, len(seeds)), unstack(means, len(seeds))

    def _settle(self, state: Any, seed: int, updates: int) -> Any:
        key = jr.fold_in(jr.fold_in(jr.key(2), seed), updates)
        return self.agent.settle(state, self._observations, key=key)

    def policy(self, state: Any, seed: int) -> AbstractPolicy:
        """The policy of a state."""
        return make_policy(self.agent, state, self.transitions, seed)

    def evaluate(self, state: Any, seed: int, updates: int) -> None:
        """Evaluates the policy of a state if that is due, and has not been done."""
        is_due = (updates - self.first) % self._evaluate_every == 0 or updates == self.last
        if self._evaluate is None or not is_due or self.log.has_evaluation(seed, updates):
            return
        scores = checked_scores(self._evaluate(self.policy(state, seed), seed))
        self.log.write("evaluations", seed, updates, scores)

    def evaluate_all(self, states: list[Any], updates: int) -> None:
        for seed, state in zip(self.seeds, states, strict=True):
            self.evaluate(state, seed, updates)

    def _description(self) -> dict[str, str]:
        """What has to be the same for a run to go on."""
        return {
            "agent": described(self.agent),
            "transitions": f"{len(self.transitions)} rows, checksum {checksum(self.transitions)}",
            "seeds": str(list(self.seeds)),
            "batch_size": str(self._batch_size),
            "augment": _name_of(self._augment),
        }

    def progress_bar(self, done: int, total: int, progress: bool, suffix: str = "") -> Any:
        """A bar that counts updates, named after the agent."""
        from tqdm.auto import tqdm  # only here: it is slow to import

        name = type(self.agent).__name__ + suffix
        return tqdm(total=total, initial=done, desc=name, disable=not progress)

    def __enter__(self) -> "Run":
        return self

    def __exit__(self, *error: object) -> None:
        try:
            self.log.close()
        finally:
            if self._checkpoints is not None:
                self._checkpoints.close()


def _numbers_as_arrays(settings: Any, transitions: Transitions) -> Any:
    """Agents that differ in numbers alone share one compilation."""
    dtype = jax.dtypes.canonicalize_dtype(transitions.actions.dtype)
    return jax.tree.map(lambda x: jnp.asarray(x, dtype) if isinstance(x, float) else x, settings)


def described(module: Any) -> str:
    """A module with all its settings. Equinox leaves out a setting that is the default itself."""

    def unwrapped(x):  # else its address in memory would be shown
        is_wrapped = isinstance(x, jax.custom_jvp | jax.custom_vjp)
        return wadler_lindig.pdoc(x.__wrapped__) if is_wrapped else None

    return wadler_lindig.pformat(
        module, width=80, short_arrays=False, hide_defaults=False, custom=unwrapped
    )


def _name_of(augment: Augment | None) -> str:
    """What it is, without addresses in memory, which change from process to process."""
    if augment is None or isinstance(augment, eqx.Module):
        return described(augment)
    named = augment if hasattr(augment, "__qualname__") else type(augment)
    return f"{named.__module__}.{named.__qualname__}"
