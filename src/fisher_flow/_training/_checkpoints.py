import json
import os
from pathlib import Path
from typing import Any

import equinox as eqx
import jax


def recorded_in(folder: str | os.PathLike[str], name: str) -> str | None:
    """An entry of the description of the run in a folder; `None` if it has no checkpoint."""
    path, checkpoints = Path(folder) / "run.json", Path(folder) / "checkpoints"
    if not path.exists() or not checkpoints.exists() or not any(checkpoints.iterdir()):
        return None
    return json.loads(path.read_text(encoding="utf-8")).get(name)


class Checkpoints:
    """The last two checkpoints of a run, in a folder. Each is written whole or not at all."""

    def __init__(self, folder: str | os.PathLike[str], description: dict[str, str]):
        try:
            import orbax.checkpoint as ocp
        except ImportError as error:
            raise ImportError(
                "Checkpoints are written with Orbax, which is not installed. Write "
                '`pip install "fisher_flow[offline]"`, or train with `folder=None`.'
            ) from error
        self.folder = Path(folder).absolute()
        self._check_same_run(description)
        self._ocp = ocp
        self._manager = ocp.CheckpointManager(
            self.folder / "checkpoints", options=ocp.CheckpointManagerOptions(max_to_keep=2)
        )

    def _check_same_run(self, description: dict[str, str]) -> None:
        path = self.folder / "run.json"
        if path.exists():
            there = json.loads(path.read_text(encoding="utf-8"))
            for name in description | there:
                if name == "trained" and (name in there) != (name in description):
                    raise ValueError(
                        f"`folder={str(self.folder)!r}` holds a run of "
                        f"`{'fine_tune' if name in there else 'train'}`, which is another "
                        f"function. Write `folder={str(self.folder) + '_2'!r}`."
                    )
                if there.get(name) != description.get(name):
                    raise ValueError(
                        f"`folder={str(self.folder)!r}` holds a run with other `{name}`:\n"
                        f"{there.get(name)}\nwhere this one has\n{description.get(name)}\n"
                        "To go on with it make the same call again; to start afresh write "
                        f"`folder={str(self.folder) + '_2'!r}`."
                    )
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        written = path.with_suffix(".tmp")
        written.write_text(json.dumps(description, indent=1), encoding="utf-8")
        os.replace(written, path)

    def save(self, number: int, states: list[Any]) -> None:
        """Writes the states, under a number that is larger than the one before."""
        leaves = jax.tree.leaves(eqx.filter(states, eqx.is_array))
        tree = {f"{i:05d}": leaf for i, leaf in enumerate(leaves)}
        self._manager.save(number, args=self._ocp.args.StandardSave(tree))
        self._manager.wait_until_finished()

    def close(self) -> None:
        """Ends the threads that wrote them."""
        self._manager.close()

    def restore(self, states: list[Any]) -> tuple[int, list[Any]] | None:
        """The last number and the states then; `None` if nothing was saved."""
        number = self._manager.latest_step()
        if number is None:
            return None
        arrays, static = eqx.partition(states, eqx.is_array)
        leaves, structure = jax.tree.flatten(arrays)
        tree = {
            f"{i:05d}": jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)
            for i, leaf in enumerate(leaves)
        }
        restored = self._manager.restore(number, args=self._ocp.args.StandardRestore(tree))
        leaves = [restored[name] for name in sorted(restored)]
        return number, eqx.combine(jax.tree.unflatten(structure, leaves), static)
