"""The tables of the documentation, from the rows that `study.py` and `candidates.py` wrote.

    python benchmarks/offline_rl/table.py benchmarks/results/offline_rl.csv

A row a method: the mean over seeds with its 95% bootstrap interval, alone and as the best of 8,
and the mean of the measured KL. With `--compare METHOD` instead, how much better that method is
than each of the others, paired by seed:

    python benchmarks/offline_rl/table.py benchmarks/results/{offline_rl,candidates}.csv \\
        --compare "best of 2, by the mean"
"""

import argparse
from typing import Any

import numpy as np

import fisher_flow


def cell(values: np.ndarray) -> str:
    if len(values) == 1:
        return f"{values[0]:.0f}"
    low, high = fisher_flow.bootstrap_interval(values[None])
    return f"{values.mean():.0f} [{low:.0f}, {high:.0f}]"


def print_methods(task: str, results: fisher_flow.Results) -> None:
    print(f"\n| {task} | seeds | score | best of 8 | KL (nats) |")
    print("| --- | --- | --- | --- | --- |")
    for method in results.methods:
        runs: list[Any] = [row for row in results.rows if row["method"] == method]
        # `candidates.py` measures neither.
        best, kl = (
            np.array([float(run.get(name, "nan")) for run in runs]) for name in ("best_of_8", "kl")
        )
        best = "" if np.isnan(best).any() else cell(best)
        kl = "" if np.isnan(kl).any() else f"{kl.mean():.2f}"
        score = cell(results.scores(method)[0])
        print(f"| {method} | {len(runs)} | {score} | {best} | {kl} |")


def print_pairs(task: str, results: fisher_flow.Results, method: str) -> None:
    print(f"\n{task}: {method}")
    seeds = {row["seed"] for row in results.rows if row["method"] == method}
    for other in results.methods:
        rows = [row for row in results.rows if row["method"] in (method, other)]
        common = seeds & {row["seed"] for row in rows if row["method"] == other}
        if other != method and len(common) > 1:
            paired = fisher_flow.Results(row for row in rows if row["seed"] in common)
            print(f"  against {other}: {paired.compare(method, other)}")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("paths", nargs="+")
    parser.add_argument("--compare", metavar="METHOD")
    args = parser.parse_args()
    results = fisher_flow.Results.read(*args.paths)
    if args.compare not in (None, *results.methods):
        parser.error(f"--compare must be one of {list(results.methods)}, but got {args.compare!r}")
    for task in results.tasks:
        of_task = fisher_flow.Results(row for row in results.rows if row["task"] == task)
        if args.compare is None:
            print_methods(task, of_task)
        elif args.compare in of_task.methods:
            print_pairs(task, of_task, args.compare)


if __name__ == "__main__":
    main()
