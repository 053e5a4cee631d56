import contextlib
import csv
import os
from collections.abc import Callable, Sequence
from pathlib import Path


# called as logger(seed, updates, values), where `values` maps names to numbers
Logger = Callable[[int, int, dict[str, float]], None]


class Log:
    """Rows of numbers, written to the CSV files of a folder and given to the loggers."""

    def __init__(self, folder: str | os.PathLike[str] | None, loggers: Sequence[Logger]):
        self.folder = None if folder is None else Path(folder)
        self.loggers = tuple(loggers)
        self._evaluated: set[tuple[int, int]] = set()  # seeds and updates of a run taken up
        if self.folder is not None:
            self.folder.mkdir(parents=True, exist_ok=True)

    def write(self, file: str, seed: int, updates: int, values: dict[str, float]) -> None:
        row = {"seed": seed, "updates": updates, **values}
        path, new = None, False
        if self.folder is not None:
            path = self.folder / f"{file}.csv"
            new = not path.exists() or path.stat().st_size == 0  # killed before its first row
            if not new:
                _check_columns(path, row)
        for logger in self.loggers:  # only now: a row that is refused goes nowhere
            logger(seed, updates, values)
        if path is None:
            return
        with open(path, "a", newline="", encoding="utf-8") as stream:
            writer = csv.DictWriter(stream, row)
            if new:
                writer.writeheader()
            writer.writerow(row)

    def has_evaluation(self, seed: int, updates: int) -> bool:
        return (seed, updates) in self._evaluated

    def forget_after(self, updates: dict[int, int]) -> None:
        """Removes the rows of updates that a resumed run will make again: for each seed, the rows
        after a number of updates."""
        if self.folder is None:
            return
        for name in ("train", "online", "evaluations"):
            path = self.folder / f"{name}.csv"
            if not path.exists():
                continue
            # A run that was killed may have left a part of a row, or of the header. Where only the
            # end of the last number is missing, nothing but the missing end of the line shows it.
            lines = path.read_bytes().decode("utf-8", "ignore").splitlines(keepends=True)
            lines = [line for line in lines if line.endswith("\n")]
            header, *rows = list(csv.reader(lines)) or [[]]
            whole = [row for row in rows if len(row) == len(header)]
            kept = [row for row in whole if int(row[1]) <= updates[int(row[0])]]
            if name == "evaluations":
                self._evaluated = {(int(row[0]), int(row[1])) for row in kept}
            if len(kept) == 0:
                path.unlink()
                continue
            rewritten = path.with_suffix(".tmp")
            with open(rewritten, "w", newline="", encoding="utf-8") as stream:
                csv.writer(stream).writerows([header, *kept])
            os.replace(rewritten, path)

    def close(self) -> None:
        with contextlib.ExitStack() as stack:  # closes all of them, also if one fails
            for logger in reversed(self.loggers):
                close = getattr(logger, "close", None)
                if close is not None:
                    stack.callback(close)


def _check_columns(path: Path, row: dict[str, float]) -> None:
    with open(path, newline="", encoding="utf-8") as stream:
        header = next(csv.reader(stream))
    if header != list(row):
        cause = (
            "Write an `evaluate` that returns the same names, in one order, every time; for others"
            if path.stem == "evaluations"
            else "The folder is that of another version of the agent:"
        )
        raise ValueError(
            f"The rows of `{path}` must all have the columns {header[2:]}, but one of seed "
            f"{row['seed']} after {row['updates']} updates has {list(row)[2:]}. {cause} name a new "
            f"`folder={str(path.parent) + '_2'!r}`."
        )
