"""The tables of the documentation, from the rows that `study.py` wrote.

    python benchmarks/offline_rl/table.py benchmarks/results/offline_rl.csv

A row a method: the mean over seeds with its 95% bootstrap interval, alone and as the best of 8,
and the mean of the measured KL.
"""

import argparse
import csv
from collections import defaultdict

import numpy as np

import fisher_flow


def cell(scores: np.ndarray) -> str:
    low, high = fisher_flow.bootstrap_interval(scores[None])
    return f"{scores.mean():.0f} [{low:.0f}, {high:.0f}]"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("path")
    args = parser.parse_args()
    rows: dict[str, dict[str, list[dict[str, str]]]] = defaultdict(lambda: defaultdict(list))
    with open(args.path, newline="", encoding="utf-8") as stream:
        for row in csv.DictReader(stream):
            rows[row["task"]][row["method"]].append(row)
    for task, methods in rows.items():
        print(f"\n| {task} | seeds | return | best of 8 | KL (nats) |")
        print("| --- | --- | --- | --- | --- |")
        for method, runs in methods.items():
            column = {
                name: np.array([float(run[name]) for run in runs])
                for name in ("score", "best_of_8", "kl")
            }
            kl = "" if np.isnan(column["kl"]).any() else f"{column['kl'].mean():.2f}"
            print(f"| {method} | {len(runs)} | {cell(column['score'])} | "
                  f"{cell(column['best_of_8'])} | {kl} |")  # fmt: skip


if __name__ == "__main__":
    main()
