import os
import re
import warnings
from pathlib import Path

import numpy as np

from ._columns import (
    check_actions,
    check_ends,
    check_flags,
    open_whole,
    read_columns,
    single_precision,
)
from ._transitions import Transitions


def load_d4rl(
    path: str | os.PathLike,
    *,
    maze_rewards: bool | None = None,
    max_episode_steps: int | None = None,
) -> Transitions:
    r"""The transitions of an HDF5 file in the layout of D4RL.

    The file has the columns `observations`, `actions`, `rewards`, `terminals` and, as a rule,
    `timeouts`, one row a step. As in `d4rl.qlearning_dataset`, the next observation is in the row
    below, and rows at which an episode was cut off by its time limit are left out: the row
    below them belongs to another episode. So is the last row of the file. The package `d4rl` is
    not needed.

    Actions are moved into $\pm (1 - 10^{-5})$, where every squashed policy has a finite density.

    !!! warning

        The rewards of an antmaze are 0, and 1 at the goal. Published results are trained on
        $r - 1$: a reward of -1 until the goal is reached. Say whether you want that.

    **Arguments:**

    - `path`: the file.

    **Other arguments:**

    - `maze_rewards`: whether to subtract 1 from rewards of 0 and 1. By default they are left as
        they are, but a file called antmaze is refused until you have decided.
    - `max_episode_steps`: for old files without `timeouts`, the time limit of the environment.
        Without it, a file whose last row is not terminal is read with a warning.

    **Returns:**

    The [`fisher_flow.Transitions`][]. The masks are 0 where `terminals` says so, else 1.

    **Raises:**

    - `FileNotFoundError` if the file is missing.
    - `ValueError` if the file is damaged or not in D4RL's layout, or its rewards do not fit
        `maze_rewards`.
    - `ImportError` if h5py is not installed.

    ??? cite "Reference"

        ```bibtex
        @article{fu2020d4rl,
            title={{D4RL}: Datasets for Deep Data-Driven Reinforcement Learning},
            author={Fu, Justin and Kumar, Aviral and Nachum, Ofir and Tucker, George and
                Levine, Sergey},
            journal={arXiv preprint arXiv:2004.07219},
            year={2020},
        }
        ```
    """
    try:
        import h5py
    except ImportError as error:
        raise ImportError(
            "`load_d4rl` reads its file with h5py, which is not installed. Write "
            '`pip install "fisher_flow[data]"`.'
        ) from error
    path = Path(path).expanduser()
    if not path.is_file():
        task = "pendulum" if "pendulum" in path.name.lower() else "halfcheetah"
        raise FileNotFoundError(
            f"The file `{path}` is missing. Put an HDF5 file in the layout of D4RL there, or make "
            f"one: `python examples/make_data.py {task} --out {path.parent}`."
        )
    with open_whole(path, "HDF5", lambda path: h5py.File(path, "r")) as file:
        required = ("observations", "actions", "rewards", "terminals")
        columns = read_columns(path, file, required, ("timeouts",))

    o, a = single_precision(columns["observations"]), columns["actions"]
    rewards = columns["rewards"].reshape(len(o), -1)
    if rewards.shape[1] != 1:
        raise ValueError(
            f"`rewards` of `{path}` must have one entry a row, but got shape "
            f"{columns['rewards'].shape}. Write `rewards=column[:, 0]`."
        )
    rewards = rewards[:, 0].astype(np.float32)
    terminals = check_flags(path, "terminals", columns["terminals"])
    rewards = _maze_rewards(path, rewards, maze_rewards)
    limit = 1 - 1e-5
    check_actions(
        f"`{path}`",
        a,
        (-1.0, 1.0),
        "Divide the column by the bounds of the environment, and write the file again.",
    )
    a = np.clip(a, -limit, limit).astype(np.float32)

    if "timeouts" in columns:
        timeouts = check_flags(path, "timeouts", columns["timeouts"])
    else:
        timeouts = _count_steps(terminals, max_episode_steps)
    check_ends(
        path,
        "terminals",
        terminals | timeouts,
        "If the file has no `timeouts`, write `max_episode_steps=1000`, or whatever the time limit "
        "of the environment is; else `timeouts[-1] = True`.",
    )
    if "timeouts" not in columns and max_episode_steps is None and not terminals[-1]:
        warnings.warn(
            f"`{path}` has no `timeouts`: what a time limit has cut off there runs on into the "
            "next episode. Write `max_episode_steps=1000`, or whatever the limit of the "
            "environment is.",
            stacklevel=2,
        )
    kept = np.flatnonzero(~timeouts[:-1])
    ends = terminals[kept] | timeouts[kept + 1]
    ends[-1:] = True
    return Transitions(
        o[kept],
        a[kept],
        rewards[kept],
        1 - terminals[kept].astype(np.float32),
        o[kept + 1],
        a[kept + 1],
        ends,
    )


def _maze_rewards(path: Path, rewards: np.ndarray, maze_rewards: bool | None) -> np.ndarray:
    sparse = bool(np.isin(rewards, (0, 1)).all())
    # D4RL's own files are called `Ant_maze_u-maze_noisy_...`.
    is_antmaze = re.sub("[^a-z]", "", path.name.lower()).startswith("antmaze")
    if maze_rewards is None and sparse and is_antmaze:
        raise ValueError(
            f"`maze_rewards` must be given for `{path.name}`, whose rewards are 0 and 1. Write "
            "`maze_rewards=True` for rewards of -1 until the goal is reached, which published "
            "results are trained on, or `maze_rewards=False` for the rewards as they are."
        )
    if maze_rewards and not sparse:
        raise ValueError(
            f"`maze_rewards=True` is for rewards of 0 and 1, but those of `{path}` range from "
            f"{rewards.min():.4g} to {rewards.max():.4g}. Write `maze_rewards=False`."
        )
    return rewards - 1 if maze_rewards else rewards


def _count_steps(terminals: np.ndarray, max_episode_steps: int | None) -> np.ndarray:
    """Whether each row is the last that the time limit allows."""
    timeouts = np.zeros(len(terminals), bool)
    if max_episode_steps is None:
        return timeouts
    step = 0
    for row, terminal in enumerate(terminals):
        timeouts[row] = step == max_episode_steps - 1
        step = 0 if terminal or timeouts[row] else step + 1
    return timeouts
