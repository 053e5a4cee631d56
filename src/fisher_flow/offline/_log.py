import csv
import os
from collections.abc import Callable, Sequence
from pathlib import Path


# called as logger(seed, updates, values), where `values` maps names to numbers
Logger = Callable[[int, int, dict[str, float]], None]


class Log:
    """Rows of numbers in the CSV files of a folder, handed on to other loggers too."""

    def __init__(self, folder: str | os.PathLike[str] | None, loggers: Sequence[Logger]):
        self.folder = None if folder is None else Path(folder)
        self.loggers = tuple(loggers)
        if self.folder is not None:
            self.folder.mkdir(parents=True, exist_ok=True)

    def write(self, file: str, seed: int, updates: int, values: dict[str, float]) -> None:
        for logger in self.loggers:
            logger(seed, updates, values)
        if self.folder is None:
            return
        path = self.folder / f"{file}.csv"
        row = {"seed": seed, "updates": updates, **values}
        new = not path.exists()
        with open(path, "a", newline="", encoding="utf-8") as stream:
            writer = csv.DictWriter(stream, row)
            if new:
                writer.writeheader()
            writer.writerow(row)

    def forget_after(self, updates: dict[int, int]) -> None:
        """Removes the rows of updates that a resumed run is going to make again: of each seed those
        after a number of them."""
        if self.folder is None:
            return
        for name in ("train", "online", "evaluations"):
            path = self.folder / f"{name}.csv"
            if not path.exists():
                continue
            with open(path, newline="", encoding="utf-8") as stream:
                header, *rows = csv.reader(stream)
            # A run that was killed may have left half a row.
            whole = [row for row in rows if len(row) == len(header)]
            kept = [row for row in whole if int(row[1]) <= updates[int(row[0])]]
            rewritten = path.with_suffix(".tmp")
            with open(rewritten, "w", newline="", encoding="utf-8") as stream:
                csv.writer(stream).writerows([header, *kept])
            os.replace(rewritten, path)


class TensorBoard:
    """A logger for [`fisher_flow.train`][] that writes what TensorBoard shows, a folder a seed.

    Needs tensorboardX: `pip install tensorboardX`. Any function of a seed, a number of updates and
    a dictionary of numbers is a logger too: for Weights & Biases,
    `lambda seed, updates, values: wandb.log({f"{seed}/{key}": x for key, x in values.items()},
    step=updates)`.
    """

    def __init__(self, folder: str | os.PathLike[str]):
        """**Arguments:**

        - `folder`: where to write.
        """
        self.folder = Path(folder)
        self._writers = {}

    def __call__(self, seed: int, updates: int, values: dict[str, float]) -> None:
        """Writes one row."""
        from tensorboardX import SummaryWriter

        if seed not in self._writers:
            self._writers[seed] = SummaryWriter(str(self.folder / f"seed_{seed}"))
        for key, value in values.items():
            self._writers[seed].add_scalar(key, value, updates)
        self._writers[seed].flush()
