import contextlib
import os
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import jax.random as jr

from .._agents import AbstractAgent
from .._checks import check_instance, check_positive_integer
from .._data import is_mapped, Transitions
from ._feed import check_num_rows, Resident, Streamed
from ._log import Logger
from ._run import Evaluate, Run
from ._sampling import key_of_updates
from ._trained import Augment, Trained
from ._validation import check_augment, check_bounds, checked_seeds, finite_numbers


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

    The data lie on the device, and chunks of updates run there. Or the data stay on disk, and the
    batches are read ahead of the updates, with the same results. With a `folder`, a run that was
    stopped at any moment goes on from its last checkpoint when the same call is made again. It ends
    with the same numbers as a run that was not stopped.

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
    - `num_updates`: the number of updates, with those of an earlier run in `folder`.

    **Other arguments:**

    - `seeds`: there is one training for each seed. The seed decides the initial parameters and
        everything else that is random. Other seeds beside it change its result by rounding alone.
    - `batch_size`: the number of transitions in an update, drawn with replacement.
    - `augment`: called as `augment(batch, key=key)` on every batch, on the device; returns the
        transitions to learn from instead, for example [`fisher_flow.RandomCrop`][]. A run in a
        `folder` goes on with a function of the same name; its code is not compared.
    - `evaluate`: called as `evaluate(policy, seed)` for every seed; returns a dictionary of
        numbers, always with the same names, which are logged. If a run in a `folder` was stopped
        between a checkpoint and its evaluations, they are made when the run goes on.
    - `evaluate_every`: the number of updates between evaluations; by default once, at the end.
    - `folder`: where to write `train.csv` (the statistics that the agent logs, averaged over the
        updates since the last row), `evaluations.csv` and checkpoints.
    - `checkpoint_every`: the number of updates between checkpoints; by default a tenth of all.
    - `log_every`: the number of updates between rows of the log. There are more rows: at the first
        hundreds, at every thousand, and where the run is evaluated or saved.
    - `loggers`: called as `logger(seed, updates, values)` with every row of either file, for
        example [`fisher_flow.TensorBoard`][] or [`fisher_flow.WeightsAndBiases`][]. A logger that
        has a `close()` is closed when the training ends, also by an error.
    - `vectorise`: whether all seeds are trained at once, by `vmap`: faster on accelerators, but
        not on CPUs, where by default they take turns.
    - `stream`: whether the data stay where they are, and each batch is read a few updates before
        its turn. Otherwise all the data are moved to the device. By default data on disk stay
        there. With JAX's default generator the same rows are drawn either way, and on a CPU every
        bit of the result is the same. Needs Grain: `pip install grain`.
    - `progress`: whether to show a progress bar.

    **Returns:**

    A [`fisher_flow.Trained`][].

    **Raises:**

    - `ValueError` if an argument is not of its kind, actions are outside the agent's bounds, or
        `folder` holds another run.
    - `FloatingPointError` if the training diverges. Earlier checkpoints are kept.
    """
    check_instance("agent", agent, AbstractAgent, "fisher_flow.OneStep()")
    check_instance("transitions", transitions, Transitions, "Transitions.from_episodes(...)")
    check_positive_integer("num_updates", num_updates, 100_000)
    check_positive_integer("log_every", log_every, 1000)
    seeds = checked_seeds(seeds)
    check_augment(augment)
    check_num_rows(transitions)
    check_bounds(agent, transitions)
    if vectorise is None:
        vectorise = len(seeds) > 1 and jax.default_backend() != "cpu"
    if stream is None:
        stream = any(map(is_mapped, jax.tree.leaves(transitions)))

    run = Run(
        agent,
        transitions,
        seeds,
        batch_size,
        augment,
        first=0,
        last=num_updates,
        evaluate=evaluate,
        evaluate_every=evaluate_every,
        folder=folder,
        checkpoint_every=checkpoint_every,
        loggers=loggers,
        vectorise=vectorise,
    )
    if stream:
        feed = Streamed(transitions, key_of_updates(), seeds, batch_size, num_updates)
    else:
        feed = Resident(transitions)
    row = jax.tree.map(jnp.asarray, transitions[:1])
    states = [agent.init(row, key=jr.fold_in(jr.key(0), seed)) for seed in seeds]
    start, states = run.resume(states)
    if start > num_updates:
        raise ValueError(
            f"`num_updates` must be at least the {start} updates that the run in `{folder}` has "
            f"already made, but got `{num_updates}`. Write `num_updates={start}`, or name a new "
            "`folder`."
        )
    run.log.forget_after(dict.fromkeys(seeds, start))
    with run.progress_bar(start, num_updates, progress) as bar, run, contextlib.closing(feed):
        if start > 0:  # a run that was stopped in the midst of its evaluations
            run.evaluate_all(states, start)
        for begin, stop in run.spans(start, num_updates, log_every, run.checkpoint_every):
            states, means = run.advance(states, seeds, feed.pieces(begin, stop), begin, stop)
            bar.update(stop - begin)
            for seed, values in zip(seeds, means, strict=True):
                run.log.write("train", seed, stop, finite_numbers(values, seed, stop))
            bar.set_postfix({key: f"{float(value):.3g}" for key, value in means[0].items()})
            run.save(stop, states, begin, stop)
            run.evaluate_all(states, stop)
    return Trained(agent, seeds, tuple(states), transitions, num_updates, augment)
