"""Transitions on disk: an array file for each column, and a record of what they are."""

import contextlib
import dataclasses
import io
import json
import mmap
import os
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any, BinaryIO

import equinox as eqx
import jax
import numpy as np
from jaxtyping import PyTree

from .._checks import check_instance
from ._transitions import Transitions


try:
    import fcntl
except ImportError:  # Windows
    fcntl = None


_RECORD = "transitions.json"


_UNFINISHED = "transitions.json.unfinished"  # there from the first byte to the last


_FORMAT = "fisher_flow.Transitions, version 1"


def save_transitions(
    folder: str | os.PathLike[str], parts: Transitions | Iterable[Transitions]
) -> None:
    """Writes transitions to a folder, from which [`fisher_flow.open_transitions`][] reads them.

    Parts are written one by one, so all of them together may be larger than memory. The last row of
    a part is the last row of a trajectory, as in `concatenate`.

    The folder holds one `.npy` file for each array, which any NumPy program reads, and
    `transitions.json`, which is written last. If the program is killed on the way, the folder does
    not open, and the same call starts again.

    !!! example

        ```python
        import fisher_flow
        import numpy as np

        def read(seed):  # or one of many files
            rng = np.random.default_rng(seed)
            observations, actions = rng.normal(size=(101, 3)), rng.uniform(-1, 1, (100, 2))
            return fisher_flow.Transitions.from_episodes(
                [observations], [actions], [rng.normal(size=100)], [True]
            )

        fisher_flow.save_transitions("stored", (read(seed) for seed in range(5)))
        transitions = fisher_flow.open_transitions("stored")
        assert len(transitions) == 500
        ```

    **Arguments:**

    - `folder`: where to write. It is made if it is not there.
    - `parts`: the transitions, or an iterable of parts of them. Parts may differ in length only.
        Observations are arrays, or dictionaries, lists and tuples of arrays. A named tuple is
        opened as a tuple, since its class is not in the folder.

    **Raises:**

    - `ValueError` if the folder holds other files, another call is writing to it, or the parts
        differ in more than their lengths.
    """
    folder = Path(folder).expanduser()
    with contextlib.closing(_claim(folder)):
        _write(folder, parts)


def open_transitions(folder: str | os.PathLike[str]) -> Transitions:
    """The transitions of a folder that [`fisher_flow.save_transitions`][] wrote, left on disk.

    The columns are memory maps that cannot be written to. Nothing is read before it is needed:
    `transitions[:1000]` costs nothing, and [`fisher_flow.train`][] reads batch by batch. A function
    that makes a new column of all rows (`n_step`, `chunks`, `Normaliser.transitions`,
    `dataclasses.replace`) reads the whole column: call it part by part, before saving.

    **Arguments:**

    - `folder`: the folder.

    **Returns:**

    The [`fisher_flow.Transitions`][].

    **Raises:**

    - `FileNotFoundError` if the folder does not exist.
    - `ValueError` if `save_transitions` did not write it, or did not write all of it.
    """
    folder = Path(folder).expanduser()
    if not folder.is_dir():
        raise FileNotFoundError(
            f"The folder `{folder}` is missing. Write "
            f"`fisher_flow.save_transitions({str(folder)!r}, transitions)` first."
        )
    record = _read_record(folder)
    if record is None:
        if (folder / _UNFINISHED).exists():
            why = "was not written to the end: the writer was stopped, or is at work still"
        else:
            there = ", ".join(sorted(path.name for path in folder.iterdir())[:5])
            why = f"was not written by this version of fisher_flow: it has {there or 'no files'}"
        raise ValueError(
            f"`folder={str(folder)!r}` {why}. Load files of other libraries with their reader, and "
            f"write `fisher_flow.save_transitions({str(folder)!r}, transitions)`."
        )
    try:
        return _open(folder, record["columns"], record["rows"])
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"`{folder / _RECORD}` must have the rows and the columns of the folder, but cannot be "
            f"read ({type(error).__name__}: {error}). Copy the folder again, or write it again: "
            f"`fisher_flow.save_transitions({str(folder) + '_2'!r}, transitions)`."
        ) from error


def is_mapped(leaf: Any) -> bool:
    """Whether an array lies on disk. A copy of a `np.memmap`, as `astype` makes one, has that class
    too and does not."""
    return isinstance(leaf, np.memmap) and getattr(leaf, "_mmap", None) is not None


def stored_record(transitions: Transitions) -> dict[str, Any] | None:
    """The record of a folder, if the transitions are all of its rows, else `None`."""
    leaves = jax.tree.leaves(_columns(transitions))
    # A part of a memory map is based on the whole of it, which is based on the map.
    if not all(isinstance(x, np.memmap) and isinstance(x.base, mmap.mmap) for x in leaves):
        return None
    paths = [Path(leaf.filename) for leaf in leaves]
    record = _read_record(paths[0].parent)
    if record is None or record["rows"] != len(transitions):
        return None
    names = jax.tree.leaves(_names(record["columns"]))
    return record if paths == [paths[0].parent / name for name in names] else None


def checksum(tree: Any) -> str:
    """A checksum of every bit of the arrays. That of transitions on disk is in their record."""
    record = stored_record(tree) if isinstance(tree, Transitions) else None
    if record is not None:
        return record["checksum"]
    value = 0
    for leaf in jax.tree.leaves(eqx.filter(tree, eqx.is_array_like)):
        # As bytes, since `bfloat16` has no buffer.
        value = zlib.crc32(np.ascontiguousarray(leaf).reshape(-1).view(np.uint8).data, value)
    return f"{value:08x}"


def _write(folder: Path, parts: Transitions | Iterable[Transitions]) -> None:
    layout, kind, rows = None, None, 0
    least, most = np.inf, -np.inf
    with contextlib.ExitStack() as stack:
        files = []
        for number, part in enumerate([parts] if isinstance(parts, Transitions) else parts):
            check_instance(f"parts[{number}]", part, Transitions, "Transitions.from_episodes(...)")
            part = dataclasses.replace(part)  # checks every column once more
            columns = _columns(jax.tree.map(np.asarray, part[:]))
            if kind is None:
                layout = {name: _layout(name, column) for name, column in columns.items()}
                kind = _kind(columns)
                names = jax.tree.leaves(_names(layout))
                files = [stack.enter_context(open(folder / name, "wb")) for name in names]
                for file, leaf in zip(files, jax.tree.leaves(columns), strict=True):
                    file.write(_header(0, leaf))
            elif _kind(columns) != kind:
                raise ValueError(
                    f"`parts[{number}]` must be like the parts before it, but got "
                    f"{_kind(columns)[0]} after {kind[0]}. Convert the columns of all parts to one "
                    "dtype, such as `actions=actions.astype(np.float32)`, and one shape."
                )
            for file, leaf in zip(files, jax.tree.leaves(columns), strict=True):
                np.ascontiguousarray(leaf).tofile(file)
            rows += len(part)
            least, most = min(least, part.actions.min()), max(most, part.actions.max())
        if layout is None:
            raise ValueError(
                "`parts` must hold at least one part, but got none. If it is a generator that was "
                "used before, make it again: `parts=(read(path) for path in paths)`."
            )
        for file, leaf in zip(files, jax.tree.leaves(columns), strict=True):
            file.seek(0)
            file.write(_header(rows, leaf))  # as long as before: NumPy leaves room for it
    record = {
        "format": _FORMAT,
        "rows": rows,
        "checksum": checksum(_open(folder, layout, rows)),
        "actions": [float(least), float(most)],
        "columns": layout,
    }
    unfinished = folder / _UNFINISHED
    unfinished.write_text(json.dumps(record, indent=1), encoding="utf-8")
    os.replace(unfinished, folder / _RECORD)


def _claim(folder: Path) -> BinaryIO:
    """Makes the folder, or clears what a killed writer has left in it. Returns the file that marks
    it as unfinished, locked until that file is closed."""
    folder.mkdir(parents=True, exist_ok=True)
    marker = folder / _UNFINISHED
    if not marker.exists():
        _refuse_files(folder, list(folder.iterdir()))
    with contextlib.ExitStack() as stack:
        lock = stack.enter_context(open(marker, "ab"))
        if not _lock(lock):
            raise ValueError(
                f"`folder={str(folder)!r}` must be written to by one call of `save_transitions` at "
                "a time, but another is at work in it. Wait for that to end, or write "
                f"`folder={str(folder) + '_2'!r}`."
            )
        if (folder / _RECORD).exists():  # another writer has ended since
            marker.unlink(missing_ok=True)
            _refuse_files(folder, [folder / _RECORD])
        for path in folder.glob("*.npy"):
            path.unlink()
        stack.pop_all()
    return lock


def _refuse_files(folder: Path, files: list[Path]) -> None:
    if files:
        raise ValueError(
            f"`folder={str(folder)!r}` must be empty, but has files in it already. Write "
            f"`folder={str(folder) + '_2'!r}`, or remove it first: "
            f"`shutil.rmtree({str(folder)!r})`."
        )


def _lock(file: BinaryIO) -> bool:
    """Locks a file; false if another process has locked it. A lock ends with its process. Where
    there are no locks, nothing is locked."""
    if fcntl is None:
        file.close()  # else it could not be renamed. Windows keeps the files of another writer.
        return True
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # some network file systems have no locks
        pass
    return True


def _read_record(folder: Path) -> dict[str, Any] | None:
    try:
        record = json.loads((folder / _RECORD).read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return None
    return record if isinstance(record, dict) and record.get("format") == _FORMAT else None


def _open(folder: Path, layout: Any, rows: Any) -> Transitions:
    known = [field.name for field in dataclasses.fields(Transitions)]
    layout = layout | {"action_masks": layout.get("action_masks")}  # not in older folders
    if sorted(layout) != sorted(known):
        raise ValueError(
            f"`{folder / _RECORD}` must have the columns {', '.join(known)}, but has "
            f"{', '.join(layout)}. Write the folder again: "
            f"`fisher_flow.save_transitions({str(folder) + '_2'!r}, transitions)`."
        )
    columns = jax.tree.map(lambda name: _map(folder / name, rows), _names(layout))
    # The checks of `Transitions` would read everything, so they see one row of these dtypes.
    example = jax.tree.map(lambda leaf: np.zeros((1, *leaf.shape[1:]), leaf.dtype), columns)
    structure = jax.tree.structure(Transitions(**example))
    return jax.tree.unflatten(structure, jax.tree.leaves([columns[name] for name in known]))


def _map(path: Path, rows: Any) -> np.ndarray:
    try:
        column = np.load(path, mmap_mode="r", allow_pickle=False)
        problem = None if len(column) == rows else f"has {len(column)} rows, not {rows}"
    except (OSError, ValueError, TypeError) as error:
        column, problem = None, f"cannot be read ({error})"
    if problem is not None or column is None:
        raise ValueError(
            f"`{path}` {problem}. If the folder was copied, copy it again; else write it again: "
            f"`fisher_flow.save_transitions({str(path.parent) + '_2'!r}, transitions)`."
        )
    return column


def _columns(transitions: Transitions) -> dict[str, Any]:
    return {
        field.name: getattr(transitions, field.name) for field in dataclasses.fields(Transitions)
    }


def _layout(name: str, tree: PyTree[Any]) -> Any:
    """A PyTree as JSON, with the name of a file for every array."""
    if tree is None:
        return None
    if type(tree) is dict and all(isinstance(key, str) for key in tree):
        parts = enumerate(sorted(tree.items()))
        return {"dict": {key: _layout(f"{name}.{i}", value) for i, (key, value) in parts}}
    if type(tree) is list or isinstance(tree, tuple):
        parts = [_layout(f"{name}.{i}", value) for i, value in enumerate(tree)]
        return {"list" if type(tree) is list else "tuple": parts}
    if isinstance(tree, np.ndarray) and _plain(tree.dtype):
        return f"{name}.npy"
    what = f"dtype {tree.dtype}" if isinstance(tree, np.ndarray) else f"`{type(tree).__name__}`"
    raise ValueError(
        f"`{name.partition('.')[0]}` must be numbers in arrays, or in dictionaries with strings as "
        f"keys, lists and tuples of arrays, but got {what}. Write, for example, "
        '`observations={"camera": camera.astype(np.uint8), "joints": joints}`.'
    )


def _names(layout: Any) -> PyTree[Any]:
    """The PyTree of a layout, with the names of the files for leaves."""
    if not isinstance(layout, dict):
        return layout
    if set(layout) == {"dict"}:
        return {key: _names(value) for key, value in layout["dict"].items()}
    if set(layout) in ({"list"}, {"tuple"}):
        ((name, values),) = layout.items()
        return (list if name == "list" else tuple)(map(_names, values))
    return {name: _names(column) for name, column in layout.items()}


def _plain(dtype: np.dtype) -> bool:
    """Whether a `.npy` file can hold the dtype. It cannot hold `bfloat16`, and it holds objects by
    pickle only."""
    known = np.lib.format.descr_to_dtype(np.lib.format.dtype_to_descr(dtype)) == dtype
    return known and dtype.kind in "biufc"


def _kind(columns: dict[str, Any]) -> Any:
    """What the parts have in common, once as text."""
    rows = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype), columns)
    return eqx.tree_pformat(rows), jax.tree.structure(rows), jax.tree.leaves(rows)


def _header(rows: int, leaf: np.ndarray) -> bytes:
    stream = io.BytesIO()
    description = {
        "descr": np.lib.format.dtype_to_descr(leaf.dtype),
        "fortran_order": False,
        "shape": (rows, *leaf.shape[1:]),
    }
    np.lib.format.write_array_header_1_0(stream, description)
    return stream.getvalue()
