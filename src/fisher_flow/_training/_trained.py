import contextlib
import dataclasses
import os
from collections.abc import Callable, Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np

from .._agents import AbstractAgent
from .._checks import check_instance, check_positive_integer, short
from .._data import checksum, is_mapped, Transitions
from .._fit import add_chunk, no_logs
from .._flows import AbstractPolicy
from ._checkpoints import Checkpoints
from ._feed import check_num_rows, Resident, Streamed
from ._log import Log, Logger
from ._sampling import keys_of_update
from ._validation import check_augment, check_bounds, checked_scores, checked_seeds, finite_numbers


# called as evaluate(policy, seed), returns names and numbers
Evaluate = Callable[[AbstractPolicy, int], dict[str, float]]


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
    """The number of updates made in all, those online included."""

    augment: Augment | None = None
    """What is done to every batch."""

    def policy(self, seed: int | None = None) -> Any:
        """The policy learned with a seed, by default the first: an `AbstractPolicy`, of which kind
        depends on the agent.

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
    # The same observations and key at every call, so that a policy is a function of the state.
    return agent.policy(state, some_observations(transitions, seed), key=jr.key(seed))


def some_observations(transitions: Transitions, seed: int) -> Any:
    # Not by a permutation, which would take memory for every row there is; of images fewer.
    row = sum(leaf[:1].nbytes for leaf in jax.tree.leaves(transitions.observations))
    num = min(len(transitions), 10_000, max(1, 2**27 // max(1, row)))
    rows = np.random.default_rng(seed).choice(len(transitions), num, replace=False)
    return jax.tree.map(lambda leaf: jnp.asarray(leaf[rows]), transitions.observations)


def train(
    agent: AbstractAgent,
    transitions: Transitions,
    num_updates: int,
    *,
    seeds: Sequence[int] = (0,),
    batch_size: int = 256,
    augment: Augment | None = None,
    evaluate: Evaluate | None = None,
    evaluate_every: int | None = None,
    folder: str | os.PathLike[str] | None = None,
    checkpoint_every: int | None = None,
    log_every: int = 1000,
    loggers: Sequence[Logger] = (),
    vectorise: bool | None = None,
    stream: bool | None = None,
    progress: bool = True,
) -> Trained:
    """Trains an agent on logged transitions.

    The data lie on the device, and chunks of updates run there; or they stay on disk, and the
    batches are read ahead of the updates, with the same results. With a `folder`, a run that was
    stopped, at whatever moment, goes on from its last checkpoint when the same call is made again,
    and ends with the same numbers as if it had not been stopped.

    !!! example

        ```python
        import fisher_flow
        import numpy as np

        rng = np.random.default_rng(0)
        actions = rng.uniform(-1, 1, (500, 1)).astype(np.float32)
        observations = np.cumsum(np.append(np.zeros((1, 1)), 0.1 * actions, axis=0), axis=0)
        transitions = fisher_flow.Transitions.from_episodes(
            [observations.astype(np.float32)], [actions], [-np.abs(observations[1:, 0])], [False]
        )
        agent = fisher_flow.OneStep(
            flow=fisher_flow.BehaviourFlow(width_size=32, depth=2),
            critic=fisher_flow.TemporalDifference(width_size=32, depth=2),
        )
        trained = fisher_flow.train(agent, transitions, 100, batch_size=32)
        policy = trained.policy()
        ```

    **Arguments:**

    - `agent`: what to train, for example [`fisher_flow.OneStep`][].
    - `transitions`: the data, in memory or as [`fisher_flow.open_transitions`][] opens them.
    - `num_updates`: the number of updates, those of an earlier run in `folder` included.

    **Other arguments:**

    - `seeds`: one training a seed, of the initial parameters and of all that is random. A seed
        gives the same result whichever others it is trained beside, but for rounding.
    - `batch_size`: the number of transitions in an update, drawn with replacement.
    - `augment`: called as `augment(batch, key=key)` on every batch, on the device; returns the
        transitions to learn from instead, for example [`fisher_flow.RandomCrop`][]. A run in a
        `folder` goes on with a function of the same name; its code is not compared.
    - `evaluate`: called as `evaluate(policy, seed)` for every seed; returns a dictionary of
        numbers, always of the same names, which are logged. An evaluation that a run in a `folder`
        still owes where it is taken up, finished or not, is made up for.
    - `evaluate_every`: the number of updates between evaluations; by default once, at the end.
    - `folder`: where to write `train.csv` (the statistics that the agent logs, averaged over the
        updates since the last row), `evaluations.csv` and checkpoints.
    - `checkpoint_every`: the number of updates between checkpoints; by default a tenth of all.
    - `log_every`: the number of updates between rows of the log. There are others at the first
        hundreds, at every thousand and where the run is evaluated or saved.
    - `loggers`: called as `logger(seed, updates, values)` with every row of either file, for
        example [`fisher_flow.TensorBoard`][] or [`fisher_flow.WeightsAndBiases`][]. One that has a
        `close()` is closed when the training ends, in whichever way.
    - `vectorise`: whether all seeds are trained at once, by `vmap`: faster on accelerators, but
        not on CPUs, where by default they take turns.
    - `stream`: whether the data are left where they are, and each batch is read from there a few
        updates before its turn; else all of them are moved to the device. By default those are
        left that lie on disk. With JAX's default generator the rows drawn are the same, and on a
        CPU so is every bit of the result. Needs Grain: `pip install grain`.
    - `progress`: whether to show a progress bar.

    **Returns:**

    A [`fisher_flow.Trained`][].

    **Raises:**

    - `ValueError` if an argument is not of its kind, actions are outside the agent's bounds, or
        `folder` holds another run.
    - `FloatingPointError` if the training diverges; checkpoints from before are kept.
    """
    check_instance("agent", agent, AbstractAgent, "fisher_flow.OneStep()")
    check_instance("transitions", transitions, Transitions, "Transitions.from_episodes(...)")
    if evaluate_every is None:
        evaluate_every = num_updates
    if checkpoint_every is None:
        checkpoint_every = max(1, num_updates // 10)
    for name, value, example in (
        ("num_updates", num_updates, 100_000),
        ("batch_size", batch_size, 256),
        ("evaluate_every", evaluate_every, 10_000),
        ("checkpoint_every", checkpoint_every, 10_000),
        ("log_every", log_every, 1000),
    ):
        check_positive_integer(name, value, example)
    seeds = checked_seeds(seeds)
    check_augment(augment)
    check_num_rows(transitions)
    check_bounds(agent, transitions)
    if vectorise is None:
        vectorise = len(seeds) > 1 and jax.default_backend() != "cpu"
    if stream is None:
        stream = any(map(is_mapped, jax.tree.leaves(transitions)))

    key = jr.key(1)
    if stream:
        feed = Streamed(transitions, key, seeds, batch_size, num_updates)
    else:
        feed = Resident(transitions)
    example = jax.tree.map(jnp.asarray, transitions[:1])
    states = [agent.init(example, key=jr.fold_in(jr.key(0), seed)) for seed in seeds]
    start = 0
    log = Log(folder, loggers)
    checkpoints = None
    if folder is not None:
        described = describe(agent, transitions, seeds, batch_size, augment)
        checkpoints = Checkpoints(folder, described)
        restored = checkpoints.restore(states)
        if restored is not None:
            start, states = restored
            if start > num_updates:
                raise ValueError(
                    f"`num_updates` must be at least the {start} updates that the run in "
                    f"`{folder}` has already made, but got `{num_updates}`. Write "
                    f"`num_updates={start}`, or name a new `folder`."
                )
    log.forget_after(dict.fromkeys(seeds, start))

    given_augment = augment
    settings, augment = numbers_as_arrays((agent, augment), transitions)
    settled = when_to_settle(num_updates)
    observations = some_observations(transitions, 0)
    stops = {num_updates, *settled} - {0}
    for every in (log_every, evaluate_every, checkpoint_every):
        stops |= set(range(every, num_updates, every))

    from tqdm.auto import tqdm  # only here: it is slow to import

    def evaluate_all(stop: int) -> None:
        if evaluate is None or not (stop % evaluate_every == 0 or stop == num_updates):
            return
        for seed, state in zip(seeds, states, strict=True):
            if not log.has_evaluation(seed, stop):
                policy = make_policy(agent, state, transitions, seed)
                scores = checked_scores(evaluate(policy, seed))
                log.write("evaluations", seed, stop, scores)

    name = type(agent).__name__
    bar = tqdm(total=num_updates, initial=start, desc=name, disable=not progress)
    with bar, contextlib.ExitStack() as stack:
        for opened in (checkpoints, log, feed):
            if opened is not None:
                stack.callback(opened.close)
        if start > 0:  # a run that was stopped in the midst of its evaluations
            evaluate_all(start)
        for stop in sorted(stop for stop in stops if stop > start):
            if start in settled:
                states = [
                    settle(agent, state, observations, seed, start)
                    for state, seed in zip(states, seeds, strict=True)
                ]
            args = (settings, feed, augment, batch_size, seeds)
            span = (start, stop, key)
            if vectorise:
                (stacked,), (means,) = _advance(_update_all, args, [_stack(states)], *span)
                states = [_entry(stacked, i) for i in range(len(seeds))]
                logs = [_entry(means, i) for i in range(len(seeds))]
            else:
                states, logs = _advance(update, args, states, *span)
            bar.update(stop - start)
            start = stop
            for seed, values in zip(seeds, logs, strict=True):
                log.write("train", seed, stop, finite_numbers(values, seed, stop))
            bar.set_postfix({key: f"{float(value):.3g}" for key, value in logs[0].items()})
            # After the rows of this update, so that no row before a checkpoint is ever missing; and
            # before its evaluations, which may fail and are made up for.
            if checkpoints is not None and (stop % checkpoint_every == 0 or stop == num_updates):
                checkpoints.save(stop, states)
            evaluate_all(stop)
    return Trained(agent, seeds, tuple(states), transitions, num_updates, given_augment)


def _advance(update, args, learners, start, stop, key):
    """Updates `start` to `stop - 1` of a state for each seed, or of one that holds those of all;
    returns the new states and the means of their logs."""
    agent, feed, augment, batch_size, seeds = args
    seeds = [jnp.asarray(seeds)] if update is _update_all else [jnp.asarray(x) for x in seeds]
    count = jnp.asarray(stop - start)
    learners, running = list(learners), None
    totals: list[Any] = [None for _ in learners]
    for last, sampling in feed.pieces(start, stop):
        for i, (state, seed) in enumerate(zip(learners, seeds, strict=True)):
            args = (agent, sampling, augment, batch_size, seed)
            if totals[i] is None:
                totals[i] = no_logs(update, args, state, key)
            span = (jnp.asarray(start), jnp.asarray(last), key)
            learners[i], totals[i] = add_chunk(update, args, state, totals[i], *span)
        start = last
        # One piece is learned from while the next is fetched; more of them would fill the memory.
        jax.block_until_ready(running)
        running = list(totals)
    means = [{name: np.asarray(total / count) for name, total in logs.items()} for logs in totals]
    return learners, means


def update(args, state, key, step):
    agent, sampling, augment, batch_size, seed = args
    row_key, update_key, augment_key = keys_of_update(key, seed)
    batch = sampling.draw(batch_size, seed, step, key=row_key)
    if augment is not None:
        batch = augment(batch, key=augment_key)
        if not isinstance(batch, Transitions):
            raise ValueError(
                f"`augment` must return `Transitions`, but returned `{short(batch)}`. Write "
                "`augment=fisher_flow.RandomCrop()`."
            )
    return agent.update(state, batch, key=update_key)


def _update_all(args, states, key, step):
    agent, sampling, augment, batch_size, seeds = args

    def one(state, seed):
        return update((agent, sampling, augment, batch_size, seed), state, key, step)

    return eqx.filter_vmap(one)(states, seeds)


def numbers_as_arrays(settings: Any, transitions: Transitions) -> Any:
    """Agents that differ in numbers alone share one compilation."""
    dtype = jax.dtypes.canonicalize_dtype(transitions.actions.dtype)
    return jax.tree.map(lambda x: jnp.asarray(x, dtype) if isinstance(x, float) else x, settings)


def when_to_settle(num_updates: int) -> set[int]:
    return {0, 100, 200, 400, 800, *range(1000, num_updates, 1000)} & set(range(num_updates))


def settle(agent: AbstractAgent, state: Any, observations: Any, seed: int, updates: int) -> Any:
    key = jr.fold_in(jr.fold_in(jr.key(2), seed), updates)
    return agent.settle(state, observations, key=key)


def _stack(states: list[Any]) -> Any:
    return jax.tree.map(
        lambda *leaves: jnp.stack(leaves) if eqx.is_array(leaves[0]) else leaves[0], *states
    )


def _entry(stacked: Any, i: int) -> Any:
    arrays = (jax.Array, np.ndarray)  # what `_stack` has stacked, and its means
    return jax.tree.map(lambda leaf: leaf[i] if isinstance(leaf, arrays) else leaf, stacked)


def describe(
    agent: AbstractAgent,
    transitions: Transitions,
    seeds: tuple[int, ...],
    batch_size: int,
    augment: Augment | None,
) -> dict[str, str]:
    """What has to be the same for a run to go on."""
    return {
        "agent": eqx.tree_pformat(agent, short_arrays=False),
        "transitions": f"{len(transitions)} rows, checksum {checksum(transitions)}",
        "seeds": str(list(seeds)),
        "batch_size": str(batch_size),
        "augment": _name_of(augment),
    }


def _name_of(augment: Augment | None) -> str:
    """What it is, without addresses in memory, which change from process to process."""
    if augment is None or isinstance(augment, eqx.Module):
        return eqx.tree_pformat(augment, short_arrays=False)
    named = augment if hasattr(augment, "__qualname__") else type(augment)
    return f"{named.__module__}.{named.__qualname__}"
