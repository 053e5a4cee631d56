import os
import zipfile
from pathlib import Path
from typing import Any

import numpy as np

from ._columns import check_actions, check_ends, read_columns
from ._transitions import Transitions


_state_names = ("qpos", "button_states")


def load_ogbench(
    name: str, folder: str | os.PathLike = "~/.ogbench/data", *, validation: bool = False
) -> Transitions:
    """The transitions of a file of OGBench that is on this machine. Nothing is ever downloaded.

    A name with `singletask`, such as `cube-single-play-singletask-v0` (the default task) or
    `cube-single-play-singletask-task3-v0`, gives them the rewards and masks of that task, which
    OGBench computes. A name without it, `cube-single-play-v0`, reads the same file as goal-free
    play: the rewards are 0 and the masks 1.

    The last row of a trajectory in the file only says where the row before it led, and what was
    done there. So 1001 rows give 1000 transitions, all of them with a next action.

    **Arguments:**

    - `name`: the name of the dataset and its task.
    - `folder`: where the files are, such as `cube-single-play-v0.npz`.

    **Other arguments:**

    - `validation`: reads the file of held-out trajectories, `cube-single-play-v0-val.npz`.

    **Returns:**

    The [`fisher_flow.Transitions`][], row by row those of `ogbench.make_env_and_datasets`.

    **Raises:**

    - `FileNotFoundError` if the file is missing. `examples/make_data.py` makes some of them.
    - `ValueError` if the file is not in OGBench's format.
    - `ImportError` if the rewards of a task are asked for and OGBench is not installed.

    ??? cite "Reference"

        The format, the tasks and their rewards are those of OGBench:

        ```bibtex
        @inproceedings{park2025ogbench,
            title={{OGBench}: Benchmarking Offline Goal-Conditioned {RL}},
            author={Park, Seohong and Frans, Kevin and Eysenbach, Benjamin and Levine, Sergey},
            booktitle={International Conference on Learning Representations},
            year={2025},
        }
        ```
    """
    words = name.split("-")
    single_task = "singletask" in words
    stem = name
    if single_task:
        stem = "-".join([*words[: words.index("singletask")], words[-1]])
    path = Path(folder).expanduser() / f"{stem}{'-val' if validation else ''}.npz"
    if not path.is_file():
        raise FileNotFoundError(_missing(name, path, stem))
    required = ["observations", "actions", "terminals"]
    if single_task:  # what the rewards depend on
        has_buttons = not {"scene", "puzzle"}.isdisjoint(words)
        required += _state_names if has_buttons else _state_names[:1]
    if not zipfile.is_zipfile(path):
        raise ValueError(
            f"`{path}` must be an .npz file, but is not, or was copied in part only. Copy it "
            "again; for an HDF5 file in the layout of D4RL write `load_d4rl(path)`."
        )
    with np.load(path) as file:
        columns = read_columns(path, file, required, ("valids",))

    check_actions(
        f"`{path}`",
        columns["actions"],
        (-1.0, 1.0),
        "Divide the column by the bounds of the environment, and write the file again.",
    )
    columns["actions"] = columns["actions"].astype(np.float32, copy=False)
    if columns["observations"].dtype != np.uint8:  # images stay as they are
        columns["observations"] = columns["observations"].astype(np.float32, copy=False)
    check_ends(
        path,
        "terminals",
        columns["terminals"].astype(bool),
        "Write `terminals = np.arange(len(observations)) % 1001 == 1000` if all of them have 1001.",
    )
    transitions = _rows(columns)
    if single_task:
        env_words = [word for i, word in enumerate(words) if i != words.index("singletask") - 1]
        rewards, masks = _relabel("-".join(env_words), path, transitions)
    else:
        rewards = np.zeros(len(transitions["ends"]), np.float32)
        masks = np.ones_like(rewards)
    return Transitions(
        transitions["observations"],
        transitions["actions"],
        rewards,
        masks,
        transitions["next_observations"],
        transitions["next_actions"],
        transitions["ends"],
    )


def _rows(columns: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Those rows of a file that are transitions, with what follows each of them."""
    last = columns["terminals"].astype(bool)
    # What `ogbench.load_dataset` returns may have been saved as well. As a compact dataset it marks
    # the last two rows of a trajectory. As a regular one it has lost the last row, and so has its
    # last transition no next action: it is dropped like the last row of a file of OGBench.
    if "valids" in columns:
        last = columns["valids"] == 0
    kept = np.flatnonzero(~last)
    kept = kept[kept + 1 < len(last)]
    rows = {name: columns[name][kept] for name in columns}
    rows["next_observations"] = columns["observations"][kept + 1]
    rows["next_actions"] = columns["actions"][kept + 1]
    rows["ends"] = last[kept + 1]
    rows["ends"][-1:] = True
    return rows


def _relabel(
    env_name: str, path: Path, columns: dict[str, np.ndarray]
) -> tuple[np.ndarray, np.ndarray]:
    """The rewards and masks of a task, which depend on the states before each action."""
    try:
        import gymnasium
        import ogbench  # noqa: F401  (registers its environments)
        from ogbench.relabel_utils import relabel_dataset
    except ImportError as error:
        raise ImportError(
            f"The rewards of `{env_name}` need OGBench, which is not installed "
            f'({error}). Write `pip install "fisher_flow[data]"`, or on Python '
            "3.13 `pip install dm-env lxml && pip install --no-deps ogbench==1.2.2 dm_control`."
        ) from error
    env = gymnasium.make(env_name, disable_env_checker=True)
    try:
        expected = env.observation_space.shape
        if columns["observations"].shape[1:] != expected:
            raise ValueError(
                f"`{path}` must hold observations of shape {expected}, as `{env_name}` does, but "
                f"got {columns['observations'].shape[1:]}. Name the file after the environment "
                "that it was made in."
            )
        labelled: dict[str, Any] = dict(columns)
        try:
            relabel_dataset(env_name, env, labelled)
        except (ValueError, IndexError) as error:
            shapes = [f"`{x}` {columns[x].shape}" for x in _state_names if x in columns]
            raise ValueError(
                f"`{path}` must hold the states of `{env_name}`, but has {', '.join(shapes)}, in "
                f"which OGBench finds no task ({error}). Name the file after the environment that "
                "it was made in."
            ) from error
    finally:
        env.close()
    return labelled["rewards"], labelled["masks"]


def _missing(name: str, path: Path, stem: str) -> str:
    made = {
        f"{task}-play-v0": task for task in ("cube-single", "cube-double", "scene", "puzzle-3x3")
    }
    made["pointmaze-medium-navigate-v0"] = "pointmaze"
    there = sorted(file.name for file in path.parent.glob("*.npz"))
    message = (
        f"`{name}` is read from the file `{path}`, which is missing; `{path.parent}` holds "
        f"{', '.join(there) or 'no .npz file'}. Put the file `{path.name}` of OGBench there"
    )
    if stem not in made:
        return f"{message}, or name its folder: `load_ogbench({name!r}, FOLDER)`."
    return (
        f"{message}, or make one: `python examples/make_data.py {made[stem]} --out {path.parent}`."
    )
