"""What is asked of every column: numbers in an array, finite, and of one length."""

import zipfile
import zlib
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from .._checks import short
from .._custom_types import Data
from .._trees import plain


# Simulators store actions in single precision, and some let them overshoot by a rounding error.
_TOLERANCE = 1e-3  # as a share of half the distance between the bounds


# What h5py, NumPy, `zipfile` and `zlib` raise where a part of a file is damaged.
_DAMAGE = (
    OSError,
    RuntimeError,  # and so `NotImplementedError`
    ValueError,
    TypeError,
    KeyError,
    EOFError,
    MemoryError,
    zipfile.BadZipFile,
    zlib.error,
)


def as_column(name: str, value: Any) -> Data:
    """An array of numbers from anything array-like, with its rows by position.

    Tables, series and tensors are copied or viewed as NumPy arrays, so that no index of labels is
    left. Booleans and integers stay so. Everything else is refused here, and not in training.
    """
    if isinstance(value, jax.Array):
        column: Data = value
    elif type(value) in (np.ndarray, np.memmap):
        column = value
    elif isinstance(value, np.ma.MaskedArray):
        if np.ma.is_masked(value):
            raise ValueError(
                f"`{name}` must have no masked entries, but {np.ma.count_masked(value)} of "
                f"{value.size} are. Fill them or drop their rows: `{name}={name}.filled(0.0)`."
            )
        column = np.asarray(value)
    else:
        try:
            column = np.asarray(value)
        except Exception as error:  # whatever a library raises whose object this is
            raise ValueError(
                f"`{name}` must be an array of numbers, or be convertible to one, but got "
                f"`{short(value)}` of type `{type(value).__name__}`, which NumPy cannot convert "
                f"({short(str(error))}). {_advice_of_type(name, value)}"
            ) from error
        if column.dtype.kind == "O":
            column = _frame(value, column)
    dtype = column.dtype
    if getattr(dtype, "kind", "key") not in "biuf" and not jnp.issubdtype(dtype, np.floating):
        raise ValueError(
            f"`{name}` must be an array of real numbers, but got {_arrived(value, column)}. "
            f"{_advice(name, value, column)}"
        )
    if isinstance(column, np.ndarray):
        if not dtype.isnative:  # JAX reads no other byte order
            column = column.astype(dtype.newbyteorder("="))
        elif dtype.kind == "f" and dtype.itemsize > 8:
            column = column.astype(np.float64)
        _check_range(name, column)
    return column


def as_columns(name: str, tree: PyTree[Any]) -> PyTree[Data]:
    """A PyTree of columns, in which every mapping is a dictionary. Lists of plain numbers, and
    lists of such lists, are columns too."""
    try:
        return jax.tree_util.tree_map_with_path(
            lambda path, leaf: as_column(name + jax.tree_util.keystr(path), leaf),
            plain(tree),
            is_leaf=_holds_scalars,
        )
    except ValueError as error:
        if "dictionary keys" not in str(error):
            raise
        raise ValueError(
            f"`{name}` must have keys of one type in each dictionary, since JAX sorts them, but "
            f"got `{short(tree)}`. Write strings: `{{str(key): x for key, x in {name}.items()}}`."
        ) from error


def _holds_scalars(node: Any) -> bool:
    if type(node) not in (list, tuple) or len(node) == 0:
        return False
    if all(isinstance(x, bool | int | float | str | bytes | np.generic) for x in node):
        return True
    return type(node) is list and all(map(_holds_scalars, node))


def _frame(value: Any, column: np.ndarray) -> np.ndarray:
    """The columns of a table side by side, where each is numeric and only together they are not."""
    if not (column.ndim == 2 and hasattr(value, "iloc")):
        return column
    parts = [np.asarray(value.iloc[:, i]) for i in range(column.shape[1])]
    return column if any(part.dtype.kind not in "biuf" for part in parts) else np.stack(parts, 1)


def _check_range(name: str, column: np.ndarray) -> None:
    """Refuses integers that would be other numbers on the device."""
    if column.dtype.kind not in "iu" or column.dtype.itemsize < 8 or column.size == 0:
        return
    limits = np.iinfo(jax.dtypes.canonicalize_dtype(column.dtype))
    if column.min() < limits.min or column.max() > limits.max:
        raise ValueError(
            f"`{name}` must have integers from {limits.min} to {limits.max}, which JAX can hold, "
            f"but they range from {column.min()} to {column.max()}. Write "
            f"`{name}={name}.astype(np.float32)`."
        )


def _arrived(value: Any, column: Data) -> str:
    if column.ndim == 0:
        return f"`{short(value)}` of type `{type(value).__name__}`"
    kinds = {"O": "Python objects", "U": "strings", "S": "bytes", "V": "records"}
    dtype = column.dtype
    kind = getattr(dtype, "kind", "key")  # that of random keys has none
    what = kinds.get(kind, f"dtype {dtype}")
    if kind == "O" and column.size > 0:
        what += f" such as `{short(column.reshape(-1)[0])}`"
    return f"{what} in shape {column.shape}"


def _advice(name: str, value: Any, column: Data) -> str:
    kind = getattr(column.dtype, "kind", "key")
    if column.ndim == 0:
        return _advice_of_type(name, value)
    if kind == "O":
        try:
            stacked = np.stack([np.asarray(row) for row in np.asarray(column).reshape(-1)])
        except _DAMAGE:
            stacked = None
        if stacked is not None and stacked.ndim > 1 and stacked.dtype.kind in "biuf":
            return f"The rows have one shape. Write `{name}=np.stack({name})`."
        if stacked is not None and stacked.dtype.kind in "biuf":
            return f"Write `{name}=np.asarray({name}, np.float32)`."
        if stacked is not None and stacked.dtype.kind in "US":
            kind = "U"
    if kind in "US":
        return (
            f"Write numbers in the place of names: `names, codes = np.unique({name}, "
            f"return_inverse=True)`, then `{name}=np.eye(len(names), dtype=np.float32)[codes]`."
        )
    if kind in "Mm":
        unit = "np.timedelta64(1, 's')"
        since = name if kind == "m" else f"({name} - {name}.min())"
        return f"Write seconds: `{name}=({since} / {unit}).astype(np.float32)`."
    if kind == "c":
        return f"Write `{name}=np.stack([{name}.real, {name}.imag], axis=-1)`."
    if kind == "key":
        return "Leave random keys out of the data."
    if kind == "V" and column.dtype.names:
        return (
            f"Write `{name}=np.stack([{name}[field] for field in {name}.dtype.names], axis=-1)`, "
            "or a dictionary of the fields."
        )
    return (
        "Drop the rows with missing entries, give all rows one shape, and write "
        f"`{name}=np.stack([np.asarray(row, np.float32) for row in {name}])`."
    )


def _advice_of_type(name: str, value: Any) -> str:
    if hasattr(value, "detach"):
        return f"Write `{name}={name}.detach().cpu().numpy()`."
    if hasattr(value, "__next__") or isinstance(value, set | frozenset):
        return f"Write `{name}=np.stack(list({name}))`."
    if hasattr(value, "toarray"):
        return f"Write `{name}={name}.toarray()`."
    if hasattr(value, "collect"):
        return f"Write `{name}={name}.collect()`."
    if isinstance(value, list | tuple):
        return (
            "Give all rows one shape, and write "
            f"`{name}=np.stack([np.asarray(row, np.float32) for row in {name}])`."
        )
    return f"Write `{name}=np.asarray({name}, np.float32)`, or a dictionary of such arrays."


def open_whole(path: Path, kind: str, open_file: Callable[[Path], Any]) -> Any:
    """An open file, or an error that names it."""
    try:
        return open_file(path)
    except _DAMAGE as error:
        fix = "an HDF5 file in the layout of D4RL write `load_d4rl(path)`"
        if kind == "HDF5":
            fix = "an .npz file of OGBench write `load_ogbench(name, folder)`"
        raise ValueError(
            f"`{path}` must be an {kind} file, but is not, or was copied in part only "
            f"({short(str(error))}). Copy it again; for {fix}."
        ) from error


def read_columns(
    path: Path, file: Any, required: Collection[str], optional: Collection[str] = ()
) -> dict[str, np.ndarray]:
    """The columns of an open file, checked for names, lengths and numbers that are not finite."""
    there = open_whole(path, "HDF5" if hasattr(file, "id") else ".npz", lambda _: [*file])
    missing = [name for name in required if name not in there]
    if missing:
        raise ValueError(
            f"`{path}` must have the keys {', '.join(required)}, but {', '.join(missing)} is "
            f"missing: it has {', '.join(sorted(there)) or 'none'}. Rename the columns, such as "
            f"`file[{missing[0]!r}] = file.pop(name)`, and write the file again."
        )
    names = [*required, *(name for name in optional if name in there)]
    columns = {name: _read(path, file, name) for name in names}
    lengths = {name: len(column) if column.ndim else 0 for name, column in columns.items()}
    shortest = min(lengths.values())
    if len(set(lengths.values())) > 1 or shortest < 2:
        raise ValueError(
            f"The columns of `{path}` must have the same length, of at least 2 rows, but got "
            f"{lengths}. Write the file again, with `columns = {{name: column[:{shortest}] for "
            "name, column in columns.items()}` if the rows that match come first."
        )
    for name, column in columns.items():
        check_finite(name, column, f" of `{path}`")
    return columns


def _link(file: Any, name: str) -> str | None:
    """Where a name of an HDF5 file links to."""
    try:
        link: Any = file.get(name, getlink=True) if hasattr(file, "id") else None
    except _DAMAGE:
        return None
    if not hasattr(link, "path"):
        return None
    source = f" of `{link.filename}`" if hasattr(link, "filename") else ""
    return f"`{link.path}`{source}"


def _read(path: Path, file: Any, name: str) -> np.ndarray:
    """One column of an open file, of numbers."""
    try:
        entry = file[name]
        if hasattr(entry, "keys"):
            raise ValueError(
                f"`{name}` of `{path}` must be a dataset, but is a group that holds "
                f"{', '.join(sorted(entry)) or 'nothing'}. Write its parts side by side: "
                f"`file[{name!r}] = np.concatenate([...], axis=-1)`."
            )
        column = entry[...] if hasattr(entry, "shape") else entry
    except _DAMAGE as error:
        if isinstance(error, ValueError) and str(error).startswith(f"`{name}`"):
            raise
        link = _link(file, name)
        if link is not None:
            raise ValueError(
                f"`{name}` of `{path}` is a link to {link}, which cannot be read. Put what it "
                f"links to there, or write the column itself: `file[{name!r}] = column`."
            ) from error
        if "pickle" in str(error):
            raise ValueError(
                f"`{name}` of `{path}` holds Python objects, which only pickle reads, and pickle "
                "can run any code, so they are not read. Write the file again with numbers: "
                f"`{name}=np.stack({name}).astype(np.float32)`."
            ) from error
        raise ValueError(
            f"`{name}` of `{path}` cannot be read ({short(str(error))}): the file is damaged, or "
            "was copied in part only. Copy it again, or write the column again as plain numbers: "
            f"`{name}=np.asarray({name}, np.float32)`."
        ) from error
    try:
        return np.asarray(as_column(name, column))
    except ValueError as error:
        raise ValueError(
            f"{error} The column is one of `{path}`; write that file again, such as "
            f"`file[{name!r}] = {name}`."
        ) from error


def check_finite(name: str, column: PyTree[Any], source: str = "") -> None:
    for keys, leaf in jax.tree.leaves_with_path(column):
        array = np.asarray(leaf)
        inexact = jnp.issubdtype(array.dtype, np.inexact)
        if inexact and not np.isfinite(array).all():
            bad = ~np.isfinite(array).reshape(len(array), -1).all(axis=1)
            leaf_name = name + jax.tree_util.keystr(keys)
            raise ValueError(
                f"`{leaf_name}`{source} must be finite, but {bad.sum()} of {len(array)} rows are "
                f"not, the first of them row {bad.argmax()}. Drop those rows before: "
                f"`keep = np.isfinite({leaf_name}).reshape(len({leaf_name}), -1).all(1)`."
            )


def check_flags(path: Path, name: str, flags: np.ndarray) -> np.ndarray:
    """Flags of a file as booleans. Refuses what is neither 0 nor 1, or more than one a row."""
    if flags.size != len(flags):
        raise ValueError(
            f"`{name}` of `{path}` must have one entry a row, but got shape {flags.shape}. Write "
            f"`{name}=column[:, 0]`."
        )
    if not np.isin(flags, (0, 1)).all():
        raise ValueError(
            f"`{name}` of `{path}` must be 0 or 1, but ranges from {flags.min():.4g} to "
            f"{flags.max():.4g}. Write `{name}=column > 0` if that is what it means."
        )
    return flags.reshape(-1).astype(bool)


def check_ends(path: Path, name: str, ends: np.ndarray, fix: str) -> None:
    """Refuses a file of which every row would belong to one trajectory."""
    if not ends.any():
        raise ValueError(
            f"`{name}` of `{path}` must mark the last row of each trajectory, but none of its "
            f"{len(ends)} rows is marked. {fix}"
        )


def check_actions(source: str, actions: np.ndarray, bounds: Any, fix: str) -> np.ndarray:
    """The actions as floating point numbers, none of which is out of bounds: a pair of numbers or
    of arrays of the shape of an action, which may be infinite or equal."""
    if not np.issubdtype(actions.dtype, np.floating):
        raise ValueError(
            f"`actions` of {source} must be continuous, but got {actions.dtype}. Flow policies "
            "have no discrete actions; if these are meant to be continuous, write "
            "`actions=actions.astype(np.float32)`."
        )
    shape = actions.shape[1:]
    low, high = (np.broadcast_to(np.asarray(bound, np.float64), shape) for bound in bounds)
    finite = np.isfinite(low) & np.isfinite(high)
    with np.errstate(invalid="ignore", over="ignore"):
        half = np.where(low < high, 0.5 * high - 0.5 * low, np.abs(low))
    tolerance = _TOLERANCE * np.where(finite, half, 0)
    least, most = (np.asarray(x, np.float64) for x in (actions.min(0), actions.max(0)))
    outside = (least < low - tolerance) | (most > high + tolerance)
    if outside.any():
        if np.all(low == low.flat[0]) and np.all(high == high.flat[0]):
            name, low, high, least, most = "actions", low.min(), high.max(), least.min(), most.max()
            verb = "they range"
        else:
            entry = tuple(map(int, np.argwhere(outside)[0]))
            name = f"actions[:, {', '.join(map(str, entry))}]"
            low, high, least, most = (x[entry] for x in (low, high, least, most))
            verb = "the entry ranges"
        raise ValueError(
            f"`{name}` of {source} must lie between {low:g} and {high:g}, but {verb} from "
            f"{least:.4g} to {most:.4g}. {fix}"
        )
    return actions


def single_precision(column: PyTree[Any]) -> PyTree[Any]:
    """Double precision serves no network, and takes twice the memory."""
    return jax.tree.map(
        lambda leaf: leaf.astype(np.float32) if leaf.dtype == np.float64 else leaf, column
    )
