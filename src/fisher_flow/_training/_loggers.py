import os
import re
from pathlib import Path
from typing import Any, Literal


class TensorBoard:
    """A logger for [`fisher_flow.train`][] that writes files for TensorBoard, in a folder for each
    seed.

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
            # Rows beyond this one, from before the run was stopped, are made again: hide them.
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
    """A logger for [`fisher_flow.train`][] that writes to Weights & Biases, in a run for each seed.

    The runs of one training form the group `name`. A logger with the same name goes on with these
    runs, as the training itself goes on from its `folder`. Online, a row that was written before
    the training was stopped is not written again. If an evaluation failed and is made when the
    training goes on, it is in `evaluations.csv` only.

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
        - `options`: other arguments of `wandb.init`, such as `entity`, `dir` or `tags`.

        **Raises:**

        - `ValueError` if `name` is not one that Weights & Biases allows.
        - `ImportError` if wandb is not installed.
        """
        allowed = re.sub(r"[/\\#?%:]", "-", name)
        if name != allowed or name == "":
            raise ValueError(
                "`name` must have at least one character, and none of `/\\#?%:`, but got "
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
        if updates >= run.step:  # otherwise it was written before the training was stopped
            run.log(values, step=updates)

    def close(self) -> None:
        """Ends the runs, so that everything is uploaded. The next row goes on with them."""
        while self._runs:
            self._runs.popitem()[1].finish()
