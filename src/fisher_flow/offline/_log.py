import contextlib
import csv
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal


# called as logger(seed, updates, values), where `values` maps names to numbers
Logger = Callable[[int, int, dict[str, float]], None]


class Log:
    """Rows of numbers in the CSV files of a folder, handed on to other loggers too."""

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
        """Removes the rows of updates that a resumed run is going to make again: of each seed those
        after a number of them."""
        if self.folder is None:
            return
        for name in ("train", "online", "evaluations"):
            path = self.folder / f"{name}.csv"
            if not path.exists():
                continue
            # A run that was killed may have left half a row, or of the header half or nothing. It
            # may lack no more than the end of the last number: only the end of the line tells.
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
        with contextlib.ExitStack() as stack:  # all of them, though one of them fails
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


class TensorBoard:
    """A logger for [`fisher_flow.train`][] that writes what TensorBoard shows, a folder a seed.

    Needs tensorboardX: `pip install tensorboardX`. Any function of a seed, a number of updates and
    a dictionary of numbers is a logger too.
    """

    def __init__(self, folder: str | os.PathLike[str]):
        """**Arguments:**

        - `folder`: where to write.

        **Raises:**

        - `ImportError` if tensorboardX is not installed.
        """
        try:
            from tensorboardX import SummaryWriter
        except ImportError as error:
            raise ImportError(
                "`TensorBoard` needs tensorboardX, which is not installed. Write "
                '`pip install "fisher_flow[offline]"`.'
            ) from error
        self.folder = Path(folder)
        self._make_writer = SummaryWriter
        self._writers = {}

    def __call__(self, seed: int, updates: int, values: dict[str, float]) -> None:
        """Writes one row."""
        if seed not in self._writers:
            # What a run that was stopped has written beyond is made again, and hidden.
            folder = str(self.folder / f"seed_{seed}")
            self._writers[seed] = self._make_writer(folder, purge_step=updates + 1)
        for key, value in values.items():
            self._writers[seed].add_scalar(key, value, updates)
        self._writers[seed].flush()

    def close(self) -> None:
        """Closes the files. The next row opens others beside them."""
        while self._writers:
            self._writers.popitem()[1].close()


class WeightsAndBiases:
    """A logger for [`fisher_flow.train`][] that writes to Weights & Biases, a run a seed.

    The runs of one training form the group `name`. Made again with the same name they go on where
    they were, as the training itself does from its `folder`; online, rows that were written before
    the training was stopped, and are made again, are not written twice. An evaluation that failed,
    and is made up for when the training goes on, is in `evaluations.csv` only.

    Needs wandb, `pip install wandb`, and an account, unless `mode="offline"`: the runs are then
    kept in a folder `wandb`, which `wandb sync` uploads.

    `fisher_flow.train(agent, transitions, 100_000, folder="one-step",
    loggers=[fisher_flow.WeightsAndBiases("one-step", project="pendulum")])` is all it takes.
    """

    def __init__(
        self,
        name: str,
        *,
        project: str,
        config: dict[str, Any] | None = None,
        mode: Literal["online", "offline", "disabled"] | None = None,
        **options: Any,
    ):
        """**Arguments:**

        - `name`: what the group is called. No other training of the project may have the name.
        - `project`: the project.

        **Other arguments:**

        - `config`: settings to keep with the runs. The seed is added.
        - `mode`: `"online"`, `"offline"`, or `"disabled"` to write nothing; by default what the
            variable `WANDB_MODE` says, else online.
        - `options`: any others of `wandb.init`, such as `entity`, `dir` or `tags`.

        **Raises:**

        - `ValueError` if `name` is not one that Weights & Biases allows.
        - `ImportError` if wandb is not installed.
        """
        allowed = re.sub(r"[/\\#?%:]", "-", name)
        if name != allowed or name == "":
            raise ValueError(
                "`name` must be of one or more characters, none of them one of `/\\#?%:`, but got "
                f"`{name!r}`. Write `name={allowed or 'first'!r}`."
            )
        try:
            import wandb  # pyright: ignore
        except ImportError as error:
            raise ImportError(
                "`WeightsAndBiases` needs wandb, which is not installed. Write "
                '`pip install "fisher_flow[wandb]"`.'
            ) from error
        self._wandb = wandb
        self._name = name
        self._config = dict(config or {})
        self._options = dict(project=project, group=name, mode=mode) | options
        self._runs = {}

    def __call__(self, seed: int, updates: int, values: dict[str, float]) -> None:
        """Writes one row, at the step `updates`."""
        if seed not in self._runs:
            name = f"{self._name}-{seed}"
            self._runs[seed] = self._wandb.init(
                id=name,
                name=name,
                resume="allow",
                reinit="create_new",  # beside those of the other seeds
                config=self._config | {"seed": seed},
                **self._options,
            )
        run = self._runs[seed]
        if updates >= run.step:  # else it is there, from before the training was stopped
            run.log(values, step=updates)

    def close(self) -> None:
        """Ends the runs, so that all of it is uploaded. The next row goes on with them."""
        while self._runs:
            self._runs.popitem()[1].finish()
