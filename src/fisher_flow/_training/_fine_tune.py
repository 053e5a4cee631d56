import math
import os
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp

from .._checks import check_instance, check_positive_integer, check_vector_environment
from .._data import checksum, Normaliser, Transitions
from ._checkpoints import recorded_in
from ._log import Logger
from ._rounds import Online, Rounds
from ._run import Evaluate, Run
from ._trained import Trained
from ._validation import (
    check_observations,
    check_online_share,
    check_prepare,
    checked_num_updates,
)


if TYPE_CHECKING:
    import gymnasium


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

    It works in rounds. The policy plays an episode in each environment, and the episodes go into a
    replay buffer. Then the agent is updated `updates_per_step` times for every step. One part of
    each batch comes from the buffer, the other from the logged transitions. Nothing else changes:
    the whole agent, with its behaviour flow, learns from both. So the policy stays near to what has
    been done, which is more with every round.

    With a `folder`, a run that was stopped at any moment goes on from its last checkpoint when the
    same call is made again. It ends with the same numbers as a run that was not stopped. No
    environment has to be saved for that: every round starts with `envs.reset(seed=...)`, and an
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
        if they were streamed before. Batches are augmented as before.
    - `envs`: a Gymnasium vector environment, in any autoreset mode, of the task that the data are
        of. If the actions of the data were rescaled, rescale the actions of the environments too.
    - `num_steps`: the number of steps to play with each seed, with those of an earlier run in
        `folder`. Episodes are played to their end; steps beyond this number call for no updates.

    **Other arguments:**

    - `normaliser`: the normaliser of the observations of `trained.transitions`; `None` if they are
        as the environment returns them. There is no default, since a wrong one goes unnoticed.
    - `prepare`: what else was done to the transitions before the training. It is done to the
        transitions of each round too, after the normaliser. For rewards that were divided by
        `scale`, `prepare=lambda t: dataclasses.replace(t, rewards=t.rewards / scale)`. A run in a
        `folder` does not notice if it is another function than before.
    - `updates_per_step`: the number of updates for each step.
    - `online_share`: the share of each batch that comes from the buffer; `None` to draw from the
        union of buffer and logged transitions.
    - `batch_size`: the number of transitions in an update, drawn with replacement.
    - `capacity`: the number of rows of the buffer, on the device; by default `num_steps`. In a
        `folder` it is fixed, and by default what it was. When the buffer is full, new rows replace
        the oldest. To go on with more steps later and keep them all, make it larger from the start.
    - `evaluate`: called as `evaluate(policy, seed)` for every seed, with the policy as `train`
        does; returns a dictionary of numbers, which are logged.
    - `evaluate_every`: the number of updates between evaluations, counted from the end of the
        training; by default once, at the end.
    - `folder`: where to write `online.csv`, `evaluations.csv` and checkpoints. It is not the folder
        of the training. The count of updates goes on from the training. A row of `online.csv` is a
        round that made updates: the statistics that the agent logs, averaged over these updates,
        `return` (the mean undiscounted return of its episodes, with the rewards of the environment;
        should rise), `steps` (the number of steps played so far), `buffer_size` (the number of rows
        in the buffer) and `episode_seed` (`collect(policy, envs, seed=episode_seed)` plays the
        episodes again).
    - `checkpoint_every`: the number of updates after which the next round ends with a checkpoint;
        by default a tenth of all. A checkpoint holds the buffers. The last two are kept.
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
    - `FloatingPointError` if the training diverges. Earlier checkpoints are kept.
    - `RuntimeError` if an episode does not end within `max_steps`.

    ??? cite "Reference"

        Batches that are half logged and half new come from

        ```bibtex
        @inproceedings{ball2023efficient,
            title={Efficient online reinforcement learning with offline data},
            author={Ball, Philip J. and Smith, Laura and Kostrikov, Ilya and Levine, Sergey},
            booktitle={International Conference on Machine Learning},
            year={2023},
        }
        ```

        The authors start from scratch, with an ensemble of normalised critics. Here learning goes
        on from what was learned offline, with the networks of the agent.
    """
    check_instance("trained", trained, Trained, "fisher_flow.train(agent, transitions, 100_000)")
    if normaliser is not None:
        check_instance("normaliser", normaliser, Normaliser, "Normaliser.of(transitions)")
    check_vector_environment(envs)
    check_positive_integer("num_steps", num_steps, 100_000)
    first = trained.num_updates
    last = first + checked_num_updates(updates_per_step, num_steps)
    check_prepare(prepare)
    check_online_share(online_share)
    capacity = _capacity_in(folder, num_steps) if capacity is None else capacity
    check_positive_integer("capacity", capacity, num_steps)
    transitions, seeds = trained.transitions, trained.seeds
    check_observations(envs.reset(seed=0)[0], transitions.observations, normaliser)
    run = Run(
        trained.agent,
        transitions,
        seeds,
        batch_size,
        trained.augment,
        first=first,
        last=last,
        evaluate=evaluate,
        evaluate_every=evaluate_every,
        folder=folder,
        checkpoint_every=checkpoint_every,
        loggers=loggers,
    )
    data = jax.tree.map(jnp.asarray, transitions)
    rounds = Rounds(
        run, envs, data, normaliser, prepare, num_steps, updates_per_step, online_share, max_steps
    )
    number, online = run.resume(
        [Online.begin(state, data, capacity, first) for state in trained.states],
        **_description(trained, envs, normaliser, updates_per_step, online_share, capacity),
    )
    made = [int(x.num_updates) for x in online]
    if max(made) > last:
        raise ValueError(
            f"`num_steps` must be at least that of the run in `{folder}`, which has already made "
            f"{max(made)} updates, but got `{num_steps}`, which is {last}. Write "
            f"`num_steps={math.ceil((max(made) - first) / updates_per_step)}`, or name a new "
            "`folder`."
        )
    run.log.forget_after(dict(zip(seeds, made, strict=True)))
    done, total = sum(made) - len(seeds) * first, len(seeds) * (last - first)
    with run.progress_bar(done, total, progress, " online") as bar, run:
        while (slowest := min(made)) < last:
            for i, seed in enumerate(seeds):
                if made[i] < last:
                    online[i], row = rounds.play_one(online[i], seed)
                    before, made[i] = made[i], int(online[i].num_updates)
                    if row is not None:
                        run.log.write("online", seed, made[i], row)
                        bar.set_postfix({"return": f"{row['return']:.4g}", "steps": row["steps"]})
                    bar.update(made[i] - before)
            number += 1
            run.save(number, online, slowest, min(made))
    states = tuple(x.state for x in online)
    return Trained(trained.agent, seeds, states, transitions, last, trained.augment)


def _capacity_in(folder: str | os.PathLike[str] | None, num_steps: int) -> int:
    """The number of rows of the buffer of the run in a folder; of a new one, `num_steps`."""
    recorded = None if folder is None else recorded_in(folder, "capacity")
    return num_steps if recorded is None else int(recorded)


def _description(trained, envs, normaliser, updates_per_step, online_share, capacity):
    """What else has to be the same for a run to go on."""
    return {
        "trained": f"{trained.num_updates} updates, checksum {checksum(trained.states)}",
        "normaliser": "None" if normaliser is None else f"checksum {checksum(normaliser)}",
        "updates_per_step": str(float(updates_per_step)),
        "online_share": str(None if online_share is None else float(online_share)),
        "capacity": str(capacity),
        "number of environments": str(envs.num_envs),
    }
