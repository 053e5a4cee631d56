"""What every loader asks of the columns of a file."""

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import PyTree


# Simulators store actions in single precision, and some let them overshoot by a rounding error.
_TOLERANCE = 1e-3


def read_columns(
    path: Path, file: Mapping[str, Any], required: Collection[str], optional: Collection[str] = ()
) -> dict[str, np.ndarray]:
    """The columns of an open file, checked for names, lengths and numbers that are not finite."""
    missing = [name for name in required if name not in file]
    if missing:
        raise ValueError(
            f"`{path}` must have the keys {', '.join(required)}, but {', '.join(missing)} is "
            f"missing: it has {', '.join(sorted(file)) or 'none'}. Rename the columns, such as "
            f"`file[{missing[0]!r}] = file.pop(name)`, and write the file again."
        )
    names = [*required, *(name for name in optional if name in file)]
    columns = {name: np.asarray(file[name][...]) for name in names}
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


def check_finite(name: str, column: PyTree[Any], source: str = "") -> None:
    for keys, leaf in jax.tree.leaves_with_path(column):
        array = np.asarray(leaf)
        if np.issubdtype(array.dtype, np.inexact) and not np.isfinite(array).all():
            bad = ~np.isfinite(array).reshape(len(array), -1).all(axis=1)
            leaf_name = name + jax.tree_util.keystr(keys)
            raise ValueError(
                f"`{leaf_name}`{source} must be finite, but {bad.sum()} of {len(array)} rows are "
                f"not, the first of them row {bad.argmax()}. Drop those rows before: "
                f"`keep = np.isfinite({leaf_name}).reshape(len({leaf_name}), -1).all(1)`."
            )


def check_ends(path: Path, name: str, ends: np.ndarray, fix: str) -> None:
    """Refuses a file of which every row would belong to one trajectory."""
    if not ends.any():
        raise ValueError(
            f"`{name}` of `{path}` must mark the last row of each trajectory, but none of its "
            f"{len(ends)} rows is marked. {fix}"
        )


def check_actions(
    source: str, actions: np.ndarray, bounds: tuple[float, float], fix: str
) -> np.ndarray:
    """The actions as floating point numbers, none of which is out of bounds."""
    if not np.issubdtype(actions.dtype, np.floating):
        raise ValueError(
            f"`actions` of {source} must be continuous, but got {actions.dtype}. Flow policies "
            "have no discrete actions; if these are meant to be continuous, write "
            "`actions=actions.astype(np.float32)`."
        )
    low, high = bounds
    least, most = float(actions.min()), float(actions.max())
    if least < low - _TOLERANCE or most > high + _TOLERANCE:
        raise ValueError(
            f"`actions` of {source} must lie between {low:g} and {high:g}, but they range from "
            f"{least:.4g} to {most:.4g}. {fix}"
        )
    return actions


def single_precision(column: PyTree[Any]) -> PyTree[Any]:
    """Double precision serves no network, and takes twice the memory."""
    return jax.tree.map(
        lambda leaf: leaf.astype(np.float32) if leaf.dtype == np.float64 else leaf, column
    )
