import contextlib
import dataclasses
import numbers
import os
from collections.abc import Callable, Sequence
from typing import Any, TYPE_CHECKING

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jaxtyping import Array, Int, PyTree

from .._acting import collect
from .._agents import AbstractAgent, NormalisedPolicy
from .._checks import (
    check_at_least,
    check_instance,
    check_positive_integer,
    check_vector_environment,
    short,
)
from .._data import checksum, Normaliser, TooShortError, Transitions
from .._fit import run_chunk
from ._checkpoints import Checkpoints, recorded_in
from ._feed import check_num_rows
from ._log import Log, Logger
from ._sampling import BalancedSampling, ReplayBuffer
from ._train import (
    describe,
    Evaluate,
    make_policy,
    numbers_as_arrays,
    settle,
    some_observations,
    Trained,
    update,
    when_to_settle,
)
from ._validation import check_bounds, checked_scores, finite_numbers


if TYPE_CHECKING:
    import gymnasium


class _Run(eqx.Module):
    """What a seed has come to: all that a checkpoint has to hold."""

    state: PyTree[Any]
    buffer: ReplayBuffer
    num_steps: Int[Array, ""]
    num_updates: Int[Array, ""]


def fine_tune(
    trained: Trained,
    envs: "gymnasium.vector.VectorEnv",
    num_steps: int,
    *,
    normaliser: Normaliser | None,
    prepare: Callable[[Transitions], Transitions] | None = None,
    updates_per_step: float = 1.0,
    online_share: float | None = 0.5,
    batch_size: int = 256,
    capacity: int | None = None,
    evaluate: Evaluate | None = None,
    evaluate_every: int | None = None,
    folder: str | os.PathLike[str] | None = None,
    checkpoint_every: int | None = None,
    max_steps: int = 100_000,
    loggers: Sequence[Logger] = (),
    progress: bool = True,
) -> Trained:
    """Goes on online with what [`fisher_flow.train`][] has learned offline.

    In rounds: the policy plays an episode in each environment, which go into a replay buffer, and
    then the agent is updated `updates_per_step` times for every step, with batches of which one
    part comes from the buffer and the other from the logged transitions. Nothing else changes: the
    agent, its flow of the behaviour among the rest, learns from both. So the policy stays near to
    what has been done, which is more with every round.

    With a `folder`, a run that was stopped, at whatever moment, goes on from its last checkpoint
    when the same call is made again, and ends with the same numbers as if it had not been stopped.
    For that no environment has to be saved: every round starts with `envs.reset(seed=...)`, and an
    episode depends on its seed and on the policy alone (but see the warning in
    [`fisher_flow.rollout`][]).

    !!! example

        ```python
        import functools
        import fisher_flow
        import gymnasium

        make = functools.partial(gymnasium.make, "Pendulum-v1", max_episode_steps=50)
        envs = gymnasium.vector.SyncVectorEnv([make] * 4)
        velocity = lambda t, x, observation: (2 * t - 1) / (t**2 + (1 - t) ** 2) * x
        behaviour = fisher_flow.FlowPolicy(velocity, action_shape=(1,), bounds=(-2, 2))
        transitions = fisher_flow.collect(behaviour, envs, num_episodes=20)

        agent = fisher_flow.FlowQLearning(
            flow=fisher_flow.BehaviourFlow(width_size=32, depth=2, bounds=(-2.0, 2.0)),
            critic=fisher_flow.TemporalDifference(width_size=32, depth=2),
        )
        trained = fisher_flow.train(agent, transitions, 100, batch_size=32)
        trained = fisher_flow.fine_tune(
            trained, envs, 400, normaliser=None, updates_per_step=0.1, batch_size=32
        )
        policy = trained.policy()
        ```

    **Arguments:**

    - `trained`: what [`fisher_flow.train`][] returned. Each of its seeds goes on by itself, with
        episodes and a buffer of its own. All the logged transitions are moved to the device, even
        if they were streamed before; batches are augmented as they were.
    - `envs`: a Gymnasium vector environment, in any autoreset mode, of the task as the data have
        it. If their actions were rescaled, so must be those of the environments.
    - `num_steps`: the number of steps to play with each seed, those of an earlier run in `folder`
        included. Episodes are played to their end, and those beyond it are not learned for.

    **Other arguments:**

    - `normaliser`: the normaliser of the observations of `trained.transitions`; `None` if they are
        as the environment returns them. There is no default, since a wrong one goes unnoticed.
    - `prepare`: what else was done to the transitions before the training, to be done to those of
        each round too, after the normaliser. For rewards that were divided by `scale`,
        `prepare=lambda t: dataclasses.replace(t, rewards=t.rewards / scale)`. A run in a `folder`
        does not notice if it is another one than before.
    - `updates_per_step`: the number of updates for each step.
    - `online_share`: the share of each batch that comes from the buffer; `None` to draw from the
        union of buffer and logged transitions.
    - `batch_size`: the number of transitions in an update, drawn with replacement.
    - `capacity`: the number of rows of the buffer, on the device; by default `num_steps`, or what
        it was in the `folder`, where it is fixed. When it is full the oldest make way. To go on
        with more steps later and keep them all, make it larger from the first.
    - `evaluate`: called as `evaluate(policy, seed)` for every seed, with the policy as `train`
        does; returns a dictionary of numbers, which are logged.
    - `evaluate_every`: the number of updates between evaluations, from those of the training on;
        by default once, at the end.
    - `folder`: where to write `online.csv`, `evaluations.csv` and checkpoints; another one than
        that of the training. Updates are counted on from those of the training. A row of
        `online.csv` is a round that made updates: the statistics that the agent logs, averaged
        over them, `return` (the mean undiscounted return of its episodes, in rewards as they come;
        should rise), `steps` (the number of steps played so far), `buffer_size` (the number of rows
        in the buffer) and `episode_seed` (`collect(policy, envs, seed=episode_seed)` plays them
        again).
    - `checkpoint_every`: the number of updates after which the next round ends with a checkpoint;
        by default a tenth of all. Each holds the buffers, and the last two are kept.
    - `max_steps`: the number of steps after which an episode that has not ended raises.
    - `loggers`: called as `logger(seed, updates, values)` with every row of either file, and
        closed at the end, as in `train`.
    - `progress`: whether to show a progress bar.

    **Returns:**

    A [`fisher_flow.Trained`][].

    **Raises:**

    - `ValueError` if an argument is not of its kind, the transitions of the environments do not
        match those of the training, actions are outside the agent's bounds, or `folder` holds
        another run.
    - `FloatingPointError` if the training diverges; checkpoints from before are kept.
    - `RuntimeError` if an episode does not end within `max_steps`.

    ??? cite "Reference"

        Batches of which half are logged and half are new are those of

        ```bibtex
        @inproceedings{ball2023efficient,
            title={Efficient online reinforcement learning with offline data},
            author={Ball, Philip J. and Smith, Laura and Kostrikov, Ilya and Levine, Sergey},
            booktitle={International Conference on Machine Learning},
            year={2023},
        }
        ```

        who start from scratch, with an ensemble of normalised critics. Here learning goes on from
        what was learned offline, and the networks are those of the agent.
    """
    check_instance("trained", trained, Trained, "fisher_flow.train(agent, transitions, 100_000)")
    if normaliser is not None:
        check_instance("normaliser", normaliser, Normaliser, "Normaliser.of(transitions)")
    check_vector_environment(envs)
    check_positive_integer("num_steps", num_steps, 100_000)
    check_at_least("updates_per_step", updates_per_step, 0, 1.0)
    first = trained.num_updates
    last = first + round(updates_per_step * num_steps)
    if last == first:
        raise ValueError(
            f"`updates_per_step` must make at least one update of the {num_steps} steps, but got "
            f"`{updates_per_step}`. Write `updates_per_step=1.0`."
        )
    if prepare is not None and not callable(prepare):
        raise ValueError(
            "`prepare` must be a function of transitions that returns transitions, but got "
            f"`{short(prepare)}`. Write "
            "`prepare=lambda t: dataclasses.replace(t, rewards=t.rewards / scale)`."
        )
    is_number = isinstance(online_share, numbers.Real) and not isinstance(online_share, bool)
    if online_share is not None and not (is_number and 0 <= online_share <= 1):
        raise ValueError(
            "`online_share` must be a number from 0 to 1, or `None` for the union of both, but "
            f"got `{online_share!r}`. Write `online_share=0.5`."
        )
    if capacity is None:
        recorded = None if folder is None else recorded_in(folder, "capacity")
        capacity = num_steps if recorded is None else int(recorded)
    evaluate_every = last if evaluate_every is None else evaluate_every
    if checkpoint_every is None:
        checkpoint_every = max(1, (last - first) // 10)
    for name, value, example in (
        ("batch_size", batch_size, 256),
        ("capacity", capacity, num_steps),
        ("evaluate_every", evaluate_every, 10_000),
        ("checkpoint_every", checkpoint_every, 10_000),
    ):
        check_positive_integer(name, value, example)

    agent, transitions, seeds = trained.agent, trained.transitions, trained.seeds
    augment = trained.augment
    _check_observations(envs.reset(seed=0)[0], transitions.observations, normaliser)
    data = jax.tree.map(jnp.asarray, transitions)
    runs = [
        _Run(state, ReplayBuffer.empty(data, capacity), jnp.asarray(0), jnp.asarray(first))
        for state in trained.states
    ]
    number = 0
    log = Log(folder, loggers)
    checkpoints = None
    if folder is not None:
        described = describe(agent, transitions, seeds, batch_size, augment) | {
            "trained": f"{first} updates, checksum {checksum(trained.states)}",
            "normaliser": "None" if normaliser is None else f"checksum {checksum(normaliser)}",
            "updates_per_step": str(float(updates_per_step)),
            "online_share": str(None if online_share is None else float(online_share)),
            "capacity": str(capacity),
            "number of environments": str(envs.num_envs),
        }
        checkpoints = Checkpoints(folder, described)
        restored = checkpoints.restore(runs)
        if restored is not None:
            number, runs = restored
            made = max(int(run.num_updates) for run in runs)
            if made > last:
                raise ValueError(
                    f"`num_steps` must be at least that of the run in `{folder}`, which has "
                    f"already made {made} updates, but got `{num_steps}`, which is {last}. Write "
                    f"`num_steps={int(np.ceil((made - first) / updates_per_step))}`, or name a "
                    "new `folder`."
                )
    log.forget_after({seed: int(run.num_updates) for seed, run in zip(seeds, runs, strict=True)})

    settings, augment = numbers_as_arrays((agent, augment), transitions)
    settled = when_to_settle(last)
    observations = some_observations(transitions, 0)
    stops = sorted(settled | set(range(first + evaluate_every, last, evaluate_every)))

    def play(run: _Run, seed: int) -> tuple[Transitions, int]:
        """The episodes of a round, as they come, and the seed of the first of them."""
        policy = make_policy(agent, run.state, transitions, seed)
        if normaliser is not None:
            policy = NormalisedPolicy(policy, normaliser)
        # Other episodes for every seed and round, and for a run that goes on from this one.
        entropy = (seed % 2**32, first, int(run.num_steps))
        (state,) = np.random.SeedSequence(entropy).generate_state(1)
        episode_seed = int(state >> 1)  # of 31 bits, as some environments count with a sign
        return collect(policy, envs, seed=episode_seed, max_steps=max_steps), episode_seed

    def make_updates(run: _Run, seed: int, stop: int) -> tuple[_Run, dict[str, float]]:
        """Makes updates until there are `stop` of them; the mean of the logs."""
        sampling = BalancedSampling(data, run.buffer, online_share)
        args = (settings, sampling, augment, batch_size, jnp.asarray(seed))
        start = begin = int(run.num_updates)
        state, totals = run.state, {}
        for end in [*(x for x in stops if start < x < stop), stop]:
            if start in settled:
                state = settle(agent, state, observations, seed, start)
            span = (jnp.asarray(start), jnp.asarray(end), jr.key(1))
            state, means = run_chunk(update, args, state, *span)
            for name, mean in finite_numbers(means, seed, end).items():
                totals[name] = totals.get(name, 0.0) + mean * (end - start) / (stop - begin)
            start = end
            is_due = (end - first) % evaluate_every == 0 or end == last
            if evaluate is not None and is_due:
                policy = make_policy(agent, state, transitions, seed)
                log.write("evaluations", seed, end, checked_scores(evaluate(policy, seed)))
        return _Run(state, run.buffer, run.num_steps, jnp.asarray(stop)), totals

    def make_round(run: _Run, seed: int) -> _Run:
        episodes = {"return": np.nan, "episode_seed": np.nan}
        due = first + round(updates_per_step * min(int(run.num_steps), num_steps))
        # Unless a run that had been finished goes on, which owes updates.
        if due == int(run.num_updates) or int(run.buffer.size) == 0:
            rows, episode_seed = play(run, seed)
            mean_return = float(rows.rewards.sum() / rows.ends.sum())
            episodes = {"return": mean_return, "episode_seed": episode_seed}
            buffer = run.buffer
            try:
                prepared = _prepared(rows, normaliser, prepare, agent, transitions)
            except TooShortError:  # for a chunk, as an episode may be: the steps are played for all
                if int(buffer.size) == 0 and int(run.num_steps) + len(rows) >= num_steps:
                    raise
            else:
                buffer = buffer.write(prepared)
            run = _Run(run.state, buffer, run.num_steps + len(rows), run.num_updates)
            due = first + round(updates_per_step * min(int(run.num_steps), num_steps))
        # With less than one update for all of its steps, or nothing to learn from yet.
        if due == int(run.num_updates) or int(run.buffer.size) == 0:
            return run
        run, means = make_updates(run, seed, due)
        counts = {"steps": int(run.num_steps), "buffer_size": int(run.buffer.size)}
        log.write("online", seed, due, means | episodes | counts)
        bar.set_postfix({"return": f"{episodes['return']:.4g}", "steps": counts["steps"]})
        return run

    from tqdm.auto import tqdm  # only here: it is slow to import

    name = f"{type(agent).__name__} online"
    made = [int(run.num_updates) for run in runs]
    done = sum(made) - len(seeds) * first
    total = len(seeds) * (last - first)
    bar = tqdm(total=total, initial=done, desc=name, disable=not progress)
    with bar, contextlib.ExitStack() as stack:
        for opened in (checkpoints, log):
            if opened is not None:
                stack.callback(opened.close)
        while (slowest := min(made)) < last:
            for i, seed in enumerate(seeds):
                if made[i] < last:
                    runs[i] = make_round(runs[i], seed)
                    bar.update(int(runs[i].num_updates) - made[i])
                    made[i] = int(runs[i].num_updates)
            number += 1
            passed = (min(made) - first) // checkpoint_every > (slowest - first) // checkpoint_every
            # After the rows of this round, so that no row before a checkpoint is ever missing.
            if checkpoints is not None and (passed or min(made) == last):
                checkpoints.save(number, runs)
    states = tuple(run.state for run in runs)
    return Trained(agent, seeds, states, transitions, last, trained.augment)


def _check_observations(observations: Any, expected: Any, normaliser: Normaliser | None) -> None:
    means = None if normaliser is None else jax.tree.map(lambda x: x[None], normaliser.mean)
    if normaliser is not None and not _fits(means, expected):
        raise ValueError(
            "`normaliser` must be that of the observations of the training, but got one of "
            f"{eqx.tree_pformat(normaliser.mean)} for {eqx.tree_pformat(expected)}. Write "
            "`normaliser=Normaliser.of(transitions)`, of the transitions before they were "
            "normalised, or `normaliser=None`."
        )
    if not _fits(observations, expected):
        raise ValueError(
            f"`envs` must return observations like those of the training, but got "
            f"{eqx.tree_pformat(observations)} for {eqx.tree_pformat(expected)}. Write "
            "`envs=gymnasium.vector.SyncVectorEnv([make_env] * 10)`, with the wrappers in "
            "`make_env` that the data were recorded with."
        )


def _prepared(
    rows: Transitions,
    normaliser: Normaliser | None,
    prepare: Callable[[Transitions], Transitions] | None,
    agent: AbstractAgent,
    transitions: Transitions,
) -> Transitions:
    """The rows as the agent is trained on them."""
    if normaliser is not None:
        rows = normaliser.transitions(rows)
    if prepare is not None:
        rows = prepare(rows)
        if not isinstance(rows, Transitions):
            raise ValueError(
                f"`prepare` must return `Transitions`, but returned `{short(rows)}`. Write "
                "`prepare=lambda t: dataclasses.replace(t, rewards=t.rewards / scale)`."
            )
    if transitions.next_actions is None:
        rows = dataclasses.replace(rows, next_actions=None)
    if not _fits(rows, transitions):
        raise ValueError(
            "`envs` must give transitions with the columns of those of the training, but got "
            f"{eqx.tree_pformat(rows)} for {eqx.tree_pformat(transitions)}. If these were changed "
            "before the training, the others must be too: for chunks of actions write "
            "`prepare=lambda t: t.chunks(5, 0.99)`."
        )
    check_num_rows(rows)
    check_bounds(agent, rows)
    return rows


def _fits(rows: PyTree[Any], expected: PyTree[Any]) -> bool:
    leaves, structure = jax.tree.flatten(rows)
    expected_leaves, expected_structure = jax.tree.flatten(expected)
    return structure == expected_structure and all(
        x.shape[1:] == y.shape[1:] and np.can_cast(x.dtype, y.dtype, "same_kind")
        for x, y in zip(leaves, expected_leaves, strict=True)
    )
