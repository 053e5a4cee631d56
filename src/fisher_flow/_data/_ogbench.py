import contextlib
import glob
import operator
import os
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from .._checks import short
from ._columns import check_actions, check_ends, check_flags, open_whole, read_columns
from ._transitions import Transitions


_state_names = ("qpos", "button_states")


_sizes = frozenset({"100m", "1b"})  # of the large datasets, after the kind of the data


def load_ogbench(
    name: str,
    folder: str | os.PathLike = "~/.ogbench/data",
    *,
    validation: bool = False,
    shards: Any = None,
) -> Transitions:
    """The transitions of a file of OGBench that is on this machine. Nothing is ever downloaded.

    A name with `singletask`, such as `cube-single-play-singletask-v0` (the default task) or
    `cube-single-play-singletask-task3-v0`, gives them the rewards and masks of that task, which
    OGBench computes. A name without it, `cube-single-play-v0`, reads the same file as goal-free
    play: the rewards are 0 and the masks 1. So does a name with `oraclerep`, whose observations and
    actions are the same: only goals are represented otherwise, and transitions have no goals.

    The large datasets of OGBench are split into files that are called shards here, such as
    `cube-triple-play-v0-000.npz` to `cube-triple-play-v0-099.npz`, with
    `cube-triple-play-v0-000-val.npz` and so on for validation. They are found in `folder`, or in a
    folder of the name in it: `cube-triple-play-100m-v0` is read from
    `folder/cube-triple-play-100m-v0`. All of them become one object, and beside it no more than one
    shard is in memory. What is larger than memory goes to disk shard by shard:
    `save_transitions("stored", (load_ogbench(name, folder, shards=[i]) for i in range(100)))`.

    The last row of a trajectory in the file only says where the row before it led, and what was
    done there. So 1001 rows give 1000 transitions, all of them with a next action.

    **Arguments:**

    - `name`: the name of the dataset and its task.
    - `folder`: where the files are, such as `cube-single-play-v0.npz`, or the shards.

    **Other arguments:**

    - `validation`: reads the file of held-out trajectories, `cube-single-play-v0-val.npz`.
    - `shards`: the numbers of the shards to read, such as `range(10)`; `None` for all that are
        there, of which none may be missing in between.

    **Returns:**

    The [`fisher_flow.Transitions`][], row by row those of `ogbench.make_env_and_datasets`.

    **Raises:**

    - `FileNotFoundError` if the file, or a shard, is missing. `examples/make_data.py` makes some of
        the files.
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
    paths = _find(name, Path(folder).expanduser(), validation, shards)
    required = ["observations", "actions", "terminals"]
    if single_task:  # what the rewards depend on
        has_buttons = not {"scene", "puzzle"}.isdisjoint(words)
        required += _state_names if has_buttons else _state_names[:1]
    with contextlib.ExitStack() as stack:
        relabel = _goal_free
        if single_task:
            # The name of an environment has neither the kind of the data nor their size.
            position = words.index("singletask")
            before = [word for word in words[:position] if word not in _sizes][:-1]
            relabel = stack.enter_context(_task("-".join([*before, *words[position:]])))
        if len(paths) == 1:
            return Transitions(**_read(paths[0], required, relabel))
        return Transitions(**_read_shards(paths, required, relabel))


def _find(name: str, folder: Path, validation: bool, shards: Any) -> list[Path]:
    """The file of a dataset, or its shards in their order."""
    words = name.split("-")
    long_stem = [word for word in words if word != "oraclerep"]
    if "singletask" in words:
        long_stem = [*long_stem[: long_stem.index("singletask")], words[-1]]
    # The folder tells the size of a large dataset, its files do not.
    stem = "-".join(word for word in long_stem if word not in _sizes)
    suffix = "-val" if validation else ""
    path = folder / f"{'-'.join(long_stem)}{suffix}.npz"
    if path.is_file() and shards is None:
        return [path]
    for place in (folder / "-".join(long_stem), folder):
        found = _shards(place, stem, suffix)
        if found:
            return _chosen(name, place, stem, suffix, found, shards)
    if path.is_file():
        raise ValueError(
            f"`shards` must be `None` for `{name}`, which is one file, `{path}`, but got "
            f"`{short(shards)}`. Write `load_ogbench({name!r}, folder)`."
        )
    if stem != "-".join(long_stem):
        path = folder / "-".join(long_stem) / f"{stem}-000{suffix}.npz"
    raise FileNotFoundError(_missing(name, path, stem))


def _shards(folder: Path, stem: str, suffix: str) -> dict[tuple[int, int | None], Path]:
    """The shards in a folder by their numbers, with the number of shards where the names tell."""
    pattern = re.compile(re.escape(stem) + r"-(\d+)(?:-of-(\d+))?" + re.escape(suffix) + r"\.npz")
    found = {}
    for path in sorted(folder.glob(f"{glob.escape(stem)}-*.npz")):
        match = pattern.fullmatch(path.name)
        if match and path.is_file():
            found[int(match[1]), match[2] and int(match[2])] = path
    return found


def _chosen(
    name: str, folder: Path, stem: str, suffix: str, found: dict[Any, Path], shards: Any
) -> list[Path]:
    """The shards to read. Refuses gaps: the data would be others than the name says."""
    totals = {total for _, total in found}
    numbers = sorted(number for number, _ in found)
    example = "range(10)"
    if len(totals) > 1 or len(set(numbers)) < len(numbers):
        raise ValueError(
            f"`folder` must hold the shards of `{name}` once, but `{folder}` has "
            f"{', '.join(sorted(path.name for path in found.values())[:6])} and others. Put each "
            f"set into a folder of its own, and write `load_ogbench({name!r}, folder)`."
        )
    (total,) = totals
    first = 1 if total is not None and total in numbers and 0 not in numbers else 0
    if shards is None:
        expected = range(first, first + total if total is not None else numbers[-1] + 1)
    else:
        try:
            expected = [int(operator.index(shard)) for shard in shards]
            valid = len(expected) > 0 and len(set(expected)) == len(expected)
        except TypeError:
            expected, valid = [], False
        if not valid:
            raise ValueError(
                "`shards` must be `None` or the numbers of some shards, each of them once, but got "
                f"`{short(shards)}`. Write `shards={example}`."
            )
    missing = [number for number in expected if number not in numbers]
    if missing:
        digits = max(len(re.findall(r"\d+", path.name[len(stem) :])[0]) for path in found.values())
        end = f"-of-{total:0{digits}d}" if total is not None else ""
        lost = [f"{stem}-{number:0{digits}d}{end}{suffix}.npz" for number in missing]
        names = ", ".join(f"`{file}`" for file in lost[:5]) + (" and others" if lost[5:] else "")
        rest = [number for number in expected if number in numbers]
        raise FileNotFoundError(
            f"`{name}` is read from the shards in `{folder}`, of which {names} "
            f"{'are' if lost[1:] else 'is'} missing. Put {'them' if lost[1:] else 'it'} there, or "
            f"read only those that are there: `load_ogbench({name!r}, {str(folder)!r}, "
            f"shards={short(rest)})`."
        )
    return [found[number, total] for number in expected]


def _read(path: Path, required: list[str], relabel: Any) -> dict[str, Any]:
    """The columns of the transitions of a file."""
    with open_whole(path, ".npz", _open) as file:
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
    for name in ("terminals", "valids"):
        if name in columns:
            columns[name] = check_flags(path, name, columns[name])
    check_ends(
        path,
        "terminals",
        columns["terminals"],
        "Write `terminals = np.arange(len(observations)) % 1001 == 1000` if all of them have 1001.",
    )
    rows = _rows(columns)
    if len(rows["ends"]) == 0:
        raise ValueError(
            f"`terminals` of `{path}` must leave a row that leads to another, but all "
            f"{len(columns['terminals'])} rows are the last of their trajectory. Mark the last row "
            "of each trajectory only, and write the file again: "
            "`terminals = np.arange(len(observations)) % 1001 == 1000`."
        )
    rewards, masks = relabel(path, rows)
    names = ("observations", "actions", "next_observations", "next_actions", "ends")
    return {name: rows[name] for name in names} | {"rewards": rewards, "masks": masks}


def _open(path: Path) -> Any:
    with zipfile.ZipFile(path):  # NumPy would take anything else for a pickle, and not close it
        pass
    return np.load(path, allow_pickle=False)


def _read_shards(paths: list[Path], required: list[str], relabel: Any) -> dict[str, Any]:
    """The columns of the transitions of all shards, one of which is in memory beside them."""
    room = sum(_length(path) for path in paths)
    columns: dict[str, np.ndarray] = {}
    count = 0
    for path in paths:
        part = _read(path, required, relabel)
        if not columns:
            # Memory that is not written to is not taken, so the last rows that stay free are.
            columns = {k: np.empty((room, *x.shape[1:]), x.dtype) for k, x in part.items()}
        for name, column in part.items():
            whole = columns[name]
            if (column.shape[1:], column.dtype) != (whole.shape[1:], whole.dtype):
                raise ValueError(
                    f"`{name}` of `{path}` must be like that of `{paths[0]}`, with rows of shape "
                    f"{whole.shape[1:]} and {whole.dtype}, but has shape {column.shape[1:]} and "
                    f"{column.dtype}. Keep the shards of one dataset in the folder: "
                    "`load_ogbench(name, folder)`."
                )
            whole[count : count + len(column)] = column
        count += len(part["ends"])
    return {name: column[:count] for name, column in columns.items()}


def _length(path: Path) -> int:
    """The number of rows of a shard, by its smallest column; `_read` says what is wrong with it."""
    try:
        with _open(path) as file:
            return len(file["terminals"])
    except Exception:
        _read(path, ["observations", "actions", "terminals"], _goal_free)
        raise


def _rows(columns: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Those rows of a file that are transitions, with what follows each of them."""
    last = columns["terminals"]
    # What `ogbench.load_dataset` returns may have been saved as well. As a compact dataset it marks
    # the last two rows of a trajectory. As a regular one it has lost the last row, and so has its
    # last transition no next action: it is dropped like the last row of a file of OGBench.
    if "valids" in columns:
        last = ~columns["valids"]
    kept = np.flatnonzero(~last)
    kept = kept[kept + 1 < len(last)]
    rows = {name: columns[name][kept] for name in columns}
    rows["next_observations"] = columns["observations"][kept + 1]
    rows["next_actions"] = columns["actions"][kept + 1]
    rows["ends"] = last[kept + 1]
    rows["ends"][-1:] = True
    return rows


def _goal_free(path: Path, columns: dict[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Play without a goal: no rewards, and no end."""
    del path
    rewards = np.zeros(len(columns["ends"]), np.float32)
    return rewards, np.ones_like(rewards)


@contextlib.contextmanager
def _task(env_name: str) -> Iterator[Any]:
    """A function that gives the rewards and masks of a task, which depend on the states before each
    action."""
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
    env = None

    def relabel(path: Path, columns: dict[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        nonlocal env
        env = env or gymnasium.make(env_name, disable_env_checker=True)
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
        return labelled["rewards"], labelled["masks"]

    try:
        yield relabel
    finally:
        if env is not None:
            env.close()


def _missing(name: str, path: Path, stem: str) -> str:
    made = {
        f"{task}-play-v0": task for task in ("cube-single", "cube-double", "scene", "puzzle-3x3")
    }
    made["pointmaze-medium-navigate-v0"] = "pointmaze"
    there = sorted(file.name for file in path.parent.glob("*.npz"))
    shards = sorted({str(file.parent) for file in path.parent.glob(f"*/{glob.escape(stem)}-*.npz")})
    if shards:
        return (
            f"`{name}` is read from the file `{path}`, which is missing, but there are shards in "
            f"{', '.join(shards)}. Write `load_ogbench({name!r}, {shards[0]!r})`."
        )
    message = (
        f"`{name}` is read from the file `{path}`, which is missing; `{path.parent}` holds "
        f"{', '.join(there) or 'no .npz file'}. Put the file `{path.name}` of OGBench there"
    )
    if stem not in made:
        return f"{message}, or name its folder: `load_ogbench({name!r}, FOLDER)`."
    return (
        f"{message}, or make one: `python examples/make_data.py {made[stem]} --out {path.parent}`."
    )
