"""Among how many actions to choose by the critic.

    python examples/make_data.py pendulum --out data
    python benchmarks/offline_rl/candidates.py --data data --out candidates.csv --tasks pendulum

Trains `FisherDecorator` as it comes, on the tasks and with the networks of `study.py`, and plays it
as the best of 1, 2, 4, 8 and 16 actions, by the mean of the members of the critic and by the least
of them. One row a task, kind of choice and seed; those that the file holds are not made again.
Prints a table, and `table.py --compare` compares what it wrote with the rows of the study.
"""

import argparse
import csv
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from study import load_problem, methods, TASKS
from table import cell

import fisher_flow


COLUMNS = ["task", "method", "seed", "updates", "score"]
NUMBERS = (1, 2, 4, 8, 16)


def run(task: str, args: argparse.Namespace, done: set[tuple[str, int]]) -> None:
    missing = [seed for seed in range(args.seeds) if (task, seed) not in done]
    if len(missing) == 0:
        return
    transitions, _, play, envs = load_problem(task, args.data, args.episodes)
    size = int(np.prod(transitions.actions.shape[1:]))
    agent = methods(TASKS[task].width, size)["FiDec, Fisher-Rao, 0.5 nats"]
    for seed in missing:
        trained = fisher_flow.train(agent, transitions, args.updates, seeds=[seed], batch_size=128)
        critic = trained.states[0].critic.model
        rows = []
        for by, chooser in (("mean", critic), ("least", least(critic))):
            for n in NUMBERS if by == "mean" else NUMBERS[1:]:
                score = play(fisher_flow.BestOf(trained.policy(seed), chooser, n), seed)
                rows.append((task, label(n, by), seed, args.updates, f"{score:.1f}"))
                print(*rows[-1], sep=" | ", flush=True)
        args.out.parent.mkdir(parents=True, exist_ok=True)
        new = not args.out.exists()
        with open(args.out, "a", newline="", encoding="utf-8") as stream:
            csv.writer(stream).writerows([COLUMNS, *rows] if new else rows)
    envs.close()


def label(n: int, by: str) -> str:
    return "alone" if n == 1 else f"best of {n}, by the {by}"


def least(critic: fisher_flow.QEnsemble) -> Any:
    return lambda observation, action: jnp.min(critic.values(observation, action))


def print_table(results: fisher_flow.Results) -> None:
    print(f"\n| task | chosen by | {' | '.join(f'best of {n}' for n in NUMBERS)} |")
    print("| --- " * (2 + len(NUMBERS)) + "|")
    for task in results.tasks:
        of_task = fisher_flow.Results(row for row in results.rows if row["task"] == task)
        for by in ("mean", "least"):
            cells = [cell(of_task.scores(label(n, by))[0]) for n in NUMBERS]
            print(f"| {task} | {by} | {' | '.join(cells)} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--data", type=Path, default=Path("data"))
    parser.add_argument("--out", type=Path, default=Path("candidates.csv"))
    parser.add_argument("--tasks", nargs="+", default=list(TASKS)[:2], choices=list(TASKS))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--updates", type=int, default=10_000)
    parser.add_argument("--episodes", type=int, default=20)
    args = parser.parse_args()
    rows = fisher_flow.Results.read(args.out).rows if args.out.exists() else ()
    done = {(row["task"], row["seed"]) for row in rows}
    for task in args.tasks:
        run(task, args, done)
    print_table(fisher_flow.Results.read(args.out))


if __name__ == "__main__":
    main()
