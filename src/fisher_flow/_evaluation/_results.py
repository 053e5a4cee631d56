import csv
import math
import os
from collections.abc import Iterable, Mapping
from typing import Any, TYPE_CHECKING

import numpy as np

from .._checks import check_positive_integer
from ._intervals import (
    bootstrap_interval,
    interquartile_mean,
    paired_difference,
    PairedDifference,
    performance_profile,
)


if TYPE_CHECKING:
    import matplotlib.figure


_columns = ("task", "method", "seed", "updates", "score")


class Results:
    """The scores of every evaluation of every run, with tables, comparisons and figures of them.

    The raw results are a CSV file that any other program can read, with a row for each evaluation:

    | column | meaning |
    | --- | --- |
    | `task`, `method` | names |
    | `seed` | the seed of the training: an integer |
    | `updates` | the number of updates made when the evaluation was done: an integer |
    | `score` | the mean over the episodes of the evaluation; more is better |
    | any others | kept as they are |

    A run counts with its last evaluation, or with the mean of the last few (`last=3`), never with
    its best. The maximum over checkpoints rewards noise, and who learns from logged data has no
    simulator to choose a checkpoint with.

    !!! example

        ```python
        import fisher_flow
        import numpy as np

        rng = np.random.default_rng(0)
        results = fisher_flow.Results(
            dict(task=task, method=method, seed=seed, updates=updates, score=score)
            for task in ("hopper-medium-v2", "walker2d-medium-v2")
            for method, gain in (("flow", 0.0), ("refined", 5.0))
            for seed in range(5)
            for updates in (1000, 2000, 3000)
            for score in [rng.normal(60 + gain + updates / 200, 4)]
        )
        results.write("results.csv")
        results = fisher_flow.Results.read("results.csv")
        print(results.table(last=3))
        print(results.compare("refined", "flow", last=3))
        figure = results.plot_learning_curves()
        ```
    """

    def __init__(self, rows: Iterable[Mapping[str, Any]]):
        """**Arguments:**

        - `rows`: the evaluations, in any order: dictionaries with the keys above. Write
            `Results([*first.rows, *second.rows])` to join two experiments.

        **Raises:**

        - `ValueError` if there are no rows, a key is missing, an entry is not a number, a score is
            not finite, or one evaluation is there twice.
        """
        self.rows = tuple(_as_row(row, i) for i, row in enumerate(rows))
        if len(self.rows) == 0:
            raise ValueError(
                "`rows` must hold at least one evaluation, but is empty. Write "
                '`Results.read("results.csv")`, with the path of a file that has rows.'
            )
        # For each run (a task, a method and a seed) its evaluations, by the number of updates.
        self._runs: dict[tuple[str, str, int], dict[int, float]] = {}
        for row in self.rows:
            run = self._runs.setdefault((row["task"], row["method"], row["seed"]), {})
            if row["updates"] in run:
                raise ValueError(
                    f"`rows` hold two evaluations of method `{row['method']}` on "
                    f"`{row['task']}` with seed {row['seed']} after {row['updates']} updates. Was "
                    "a file read twice, or a run repeated? Write `Results(rows)` with one of them."
                )
            run[row["updates"]] = row["score"]

    @classmethod
    def read(cls, *paths: str | os.PathLike[str], **columns: Any) -> "Results":
        """Reads CSV files.

        **Arguments:**

        - `paths`: the files. If several processes train, let each write a file of its own.
        - `columns`: values of columns that the files lack. The evaluations that
            [`fisher_flow.train`][] logs lack two: `Results.read("logs/evaluations.csv",
            task="hopper", method="FQL")`. Its `evaluate` must return a `"score"`.

        **Raises:**

        - `ValueError` as for `Results`.
        """
        rows = []
        for path in paths:
            if os.path.isdir(path):
                raise ValueError(
                    f"`paths` must be CSV files, but `{path}` is a folder. Write "
                    f"`Results.read({os.path.join(path, 'evaluations.csv')!r}, ...)`."
                )
            with open(path, newline="", encoding="utf-8") as stream:
                for row in csv.DictReader(stream):
                    if None in row or None in row.values():
                        raise ValueError(
                            f"`paths` must be CSV files whose rows are as long as their header, "
                            f"but a row of `{path}` is not: {list(row.values())}. A run that was "
                            "killed may have left half a row: delete it."
                        )
                    rows.append(columns | row)
        return cls(rows)

    def write(self, path: str | os.PathLike[str]) -> None:
        """Writes one CSV file.

        **Arguments:**

        - `path`: the file. One that is there already is replaced.
        """
        header = dict.fromkeys([*_columns, *(key for row in self.rows for key in row)])
        with open(path, "w", newline="", encoding="utf-8") as stream:
            writer = csv.DictWriter(stream, header)
            writer.writeheader()
            writer.writerows(self.rows)

    @property
    def tasks(self) -> tuple[str, ...]:
        """The tasks, in order of their first row."""
        return tuple(dict.fromkeys(task for task, _, _ in self._runs))

    @property
    def methods(self) -> tuple[str, ...]:
        """The methods, in order of their first row."""
        return tuple(dict.fromkeys(method for _, method, _ in self._runs))

    def scores(self, method: str, *, last: int = 1) -> np.ndarray:
        """The scores of a method, as the functions of statistics take them.

        **Arguments:**

        - `method`: one of `methods`.
        - `last`: over how many evaluations at the end of each run to average.

        **Returns:**

        An array of shape `(tasks, seeds)`: a row for each of `tasks`, seeds in rising order.

        **Raises:**

        - `ValueError` if the method lacks a task, its tasks differ in their seeds, runs ended after
            different numbers of updates, or have fewer than `last` evaluations.
        """
        return np.array([list(scores.values()) for scores in self._complete(method, last)])

    def compare(self, first: str, second: str, *, last: int = 1) -> PairedDifference:
        """Compares two methods by [`fisher_flow.paired_difference`][], paired by task and seed.

        **Arguments:**

        - `first`, `second`: two of `methods`.
        - `last`: as for `scores`.

        **Raises:**

        - `ValueError` if they did not run with the same seeds, and as for `scores`.
        """
        seeds = {name: list(self._complete(name, last)[0]) for name in (first, second)}
        if seeds[first] != seeds[second]:
            raise ValueError(
                f"`first` and `second` must have run with the same seeds, but got {seeds}. Run "
                "the seeds that are missing; without pairs, compare the intervals of `table()`."
            )
        return paired_difference(self.scores(first, last=last), self.scores(second, last=last))

    def table(self, *, last: int = 1, decimals: int = 1) -> str:
        """A Markdown table of means over seeds with 95% bootstrap intervals.

        Of several tasks the last row is the interquartile mean over all of them, which needs scores
        on one scale ([`fisher_flow.normalised_score`][]).

        **Arguments:**

        - `last`: over how many evaluations at the end of each run to average.
        - `decimals`: the digits after the point.

        **Returns:**

        A line that states the protocol, and the table: a row for each task and a column for each
        method. A dash stands where a method was not run on a task; and for an interquartile mean,
        where it has not the same seeds on all of them.

        **Raises:**

        - `ValueError` as for `scores`.
        """
        check_positive_integer("last", last, 1)
        cells = {
            (task, method): list(scores.values())
            for method in self.methods
            for task in self.tasks
            if (scores := self._final(task, method, last))
        }
        lengths = {len(scores) for scores in cells.values()}
        seeds = " to ".join(str(x) for x in sorted({min(lengths), max(lengths)}))
        seeds += " seed" if lengths == {1} else " seeds"
        intervals = "" if lengths == {1} else " [95% bootstrap interval]"
        ends = "the last evaluation" if last == 1 else f"the mean of the last {last} evaluations"
        ends += self._after()
        rows = [["task", *self.methods], ["---"] * (1 + len(self.methods))]
        for task in self.tasks:
            scores = [cells.get((task, method)) for method in self.methods]
            rows.append([task, *(_cell(x and [x], np.mean, decimals) for x in scores)])
        if len(self.tasks) > 1:
            row = ["interquartile mean"]
            for method in self.methods:
                runs = [self._final(task, method, last) for task in self.tasks]
                complete = all(list(x) == list(runs[0]) for x in runs)
                scores = [list(x.values()) for x in runs] if complete else None
                row.append(_cell(scores, interquartile_mean, decimals))
            rows.append(row)
        protocol = f"Mean{intervals} over {seeds}; of each run {ends}, never the best."
        return "\n".join([protocol, "", *("| " + " | ".join(row) + " |" for row in rows)])

    def plot_learning_curves(self) -> "matplotlib.figure.Figure":
        """Draws the score over the updates: a panel for each task, a curve for each method.

        Curves are means over seeds, bands their 95% bootstrap intervals at each point. A method
        evaluated once is a level line with a dot.

        **Returns:**

        A Matplotlib figure. Needs Matplotlib: `pip install matplotlib`.
        """
        from matplotlib.figure import Figure
        from matplotlib.ticker import EngFormatter

        tasks = len(self.tasks)
        width = tasks if tasks <= 3 else min(math.ceil(math.sqrt(tasks)), 4)
        height = math.ceil(tasks / width)
        figure = Figure(figsize=(max(3.2 * width, 5), 2.7 * height + 0.5), layout="constrained")
        panels = figure.subplots(height, width, squeeze=False).ravel()
        for axes, task in zip(panels, self.tasks, strict=False):
            for color, method in enumerate(self.methods):
                updates, mean, low, high = self._curve(task, method)
                style: Any = dict(color=f"C{color}")
                if len(updates) == 1:
                    axes.axhline(mean[0], linestyle="--", label=method, **style)
                    axes.errorbar(updates, mean, [mean - low, high - mean], fmt="o", **style)
                elif len(updates) > 1:
                    axes.plot(updates, mean, label=method, **style)
                    axes.fill_between(updates, low, high, alpha=0.2, linewidth=0, **style)
            axes.set_title(task, fontsize="medium")
            axes.xaxis.set_major_formatter(EngFormatter(sep=""))
            axes.grid(alpha=0.3)
        for axes in panels[tasks:]:
            axes.remove()
        figure.supxlabel("updates", fontsize="medium")
        figure.supylabel("score", fontsize="medium")
        self._add_legend(figure)
        return figure

    def plot_performance_profiles(self, *, last: int = 1) -> "matplotlib.figure.Figure":
        """Draws the [`fisher_flow.performance_profile`][] of each method, over all tasks.

        **Arguments:**

        - `last`: as for `scores`.

        **Returns:**

        A Matplotlib figure. Needs Matplotlib: `pip install matplotlib`.

        **Raises:**

        - `ValueError` as for `scores`.
        """
        from matplotlib.figure import Figure

        scores = {method: self.scores(method, last=last) for method in self.methods}
        # The curves step at scores and nowhere else.
        thresholds = np.unique(np.concatenate([x.ravel() for x in scores.values()]))
        margin = 0.05 * (thresholds[-1] - thresholds[0]) or 1.0
        thresholds = np.r_[thresholds[0] - margin, thresholds, thresholds[-1] + margin]
        figure = Figure(figsize=(5, 3.6), layout="constrained")
        axes = figure.subplots()
        for color, method in enumerate(self.methods):
            share, (low, high) = performance_profile(scores[method], thresholds)
            style: Any = dict(step="post", color=f"C{color}", alpha=0.2, linewidth=0)
            axes.fill_between(thresholds, low, high, **style)
            axes.step(thresholds, share, where="post", color=f"C{color}", label=method)
        axes.set(xlabel="score", ylabel="share of runs above", ylim=(-0.02, 1.02))
        axes.set(xlim=(thresholds[0], thresholds[-1]))
        axes.grid(alpha=0.3)
        self._add_legend(figure)
        return figure

    def _add_legend(self, figure: "matplotlib.figure.Figure") -> None:
        """One for all panels, since they share their methods."""
        entries = {}
        for axes in figure.axes:
            handles, labels = axes.get_legend_handles_labels()
            entries |= dict(zip(labels, handles, strict=True))
        names = [method for method in self.methods if method in entries]
        handles = [entries[name] for name in names]
        figure.legend(handles, names, loc="outside upper center", ncols=3, frameon=False)

    def _final(self, task: str, method: str, last: int) -> dict[int, float]:
        """The score that counts of each seed. Empty if there was no such run."""
        runs = {run[2]: x for run, x in sorted(self._runs.items()) if run[:2] == (task, method)}
        ends = {seed: sorted(evaluations)[-last:] for seed, evaluations in runs.items()}
        for seed, end in ends.items():
            if len(end) < last:
                raise ValueError(
                    f"`last` must be at most the {len(end)} evaluations of method `{method}` on "
                    f"`{task}` with seed {seed}, but got `{last}`. Write `last={len(end)}`."
                )
        # A run that was cut short would be judged by an earlier policy.
        if len(set(map(tuple, ends.values()))) > 1:
            raise ValueError(
                f"The seeds of method `{method}` on `{task}` must end alike, but their last "
                f"evaluations are after these numbers of updates: {ends}. Finish the runs, or "
                f'leave the method out: `Results(row for row in results.rows if row["method"] != '
                f'"{method}")`.'
            )
        return {
            seed: float(np.mean([runs[seed][updates] for updates in end]))
            for seed, end in ends.items()
        }

    def _after(self) -> str:
        """How many updates the runs made: a run that was cut short shows."""
        made: dict[str, set[int]] = {method: set() for method in self.methods}
        for (_, method, _), evaluations in self._runs.items():
            made[method].add(max(evaluations))
        if len(set().union(*made.values())) == 1:
            return f", after {max(made[self.methods[0]])} updates"
        counts = {m: " to ".join(str(x) for x in sorted({min(n), max(n)})) for m, n in made.items()}
        return f", after {', '.join(f'{n} updates ({m})' for m, n in counts.items())}"

    def _complete(self, method: str, last: int) -> list[dict[int, float]]:
        """The scores that count on each task, where all tasks have the same seeds."""
        check_positive_integer("last", last, 1)
        if method not in self.methods:
            raise ValueError(
                f"`method` must be one of {self.methods}, but got `{method}`. Write "
                f'`"{next(iter(self.methods), "method")}"`.'
            )
        runs = {task: self._final(task, method, last) for task in self.tasks}
        if len({tuple(x) for x in runs.values()}) > 1:
            seeds = {task: list(x) for task, x in runs.items()}
            raise ValueError(
                f"Method `{method}` must have run on all tasks with the same seeds, but ran with "
                f"{seeds}. Run what is missing, or keep to some tasks: `Results(row for row in "
                f'results.rows if row["task"] == "{self.tasks[0]}")`.'
            )
        return list(runs.values())

    def _curve(self, task: str, method: str) -> tuple[np.ndarray, ...]:
        """The updates, and at each the mean over the seeds that got there, with its interval."""
        runs = [x for run, x in sorted(self._runs.items()) if run[:2] == (task, method)]
        updates = sorted(set().union(*runs))
        points = [[run[u] for run in runs if u in run] for u in updates]
        intervals = [
            bootstrap_interval([x], num_resamples=2000) if len(x) > 1 else np.array([x[0], x[0]])
            for x in points
        ]
        low, high = np.reshape(intervals, (-1, 2)).T
        return np.array(updates), np.array([np.mean(x) for x in points]), low, high


def _as_row(row: Mapping[str, Any], index: int) -> dict[str, Any]:
    missing = [name for name in _columns if name not in row]
    if "score" in missing:
        others = [name for name in row if name not in _columns]
        raise ValueError(
            f"`rows` must have a column `score`, but row {index} has {', '.join(row)}. Write "
            f'`dict(row, score=row["{others[0] if others else "return"}"])` for each row, or let '
            'what evaluates return `{"score": float(returns.mean())}`.'
        )
    if missing:
        raise ValueError(
            f"`rows` must have the columns {', '.join(_columns)}, but row {index} has "
            f"{', '.join(row)}. Write `Results.read(path, {missing[0]}=...)` if it is the same for "
            "all rows of a file."
        )
    try:
        numbers = {name: int(str(row[name])) for name in ("seed", "updates")}  # nothing cut off
        score = float(row["score"])
    except (TypeError, ValueError):
        numbers, score = {}, math.nan
    if not math.isfinite(score):
        raise ValueError(
            "`rows` must have integers for `seed` and `updates` and a finite number for `score`, "
            f"but row {index} is {dict(row)}. A run that failed is a result too: write what a "
            "policy that does nothing scores."
        )
    names = dict(task=str(row["task"]), method=str(row["method"]))
    return {**names, **numbers, "score": score, **{k: row[k] for k in row if k not in _columns}}


def _cell(scores: Any, statistic: Any, decimals: int) -> str:
    if not scores:
        return "—"
    scores = np.asarray(scores, float)
    text = f"{statistic(scores):.{decimals}f}"
    if scores.shape[1] == 1:
        return text
    low, high = bootstrap_interval(scores, statistic)
    return f"{text} [{low:.{decimals}f}, {high:.{decimals}f}]"
