"""Among how many actions to choose by the critic.

    python examples/make_data.py pendulum --out data
    python benchmarks/offline_rl/candidates.py --data data --out candidates.csv --tasks pendulum

Trains `FisherDecorator` as it comes, on the tasks and with the networks of `study.py`, and plays it
as the best of 1, 2, 4, 8 and 16 actions, by the mean of the members of the critic and by the least
of them. One row a task, seed, number and kind of choice; those that the file holds are not made
again. Prints a table.
"""

import argparse
import csv
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from study import load_problem, methods, TASKS

import fisher_flow


COLUMNS = ["task", "seed", "updates", "candidates", "by", "score"]
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
                rows.append((task, seed, args.updates, n, by, f"{score:.1f}"))
                print(*rows[-1], sep=" | ", flush=True)
        args.out.parent.mkdir(parents=True, exist_ok=True)
        new = not args.out.exists()
        with open(args.out, "a", newline="", encoding="utf-8") as stream:
            writer = csv.writer(stream)
            writer.writerows([COLUMNS, *rows] if new else rows)
    envs.close()


def least(critic: fisher_flow.QEnsemble) -> Any:
    return lambda observation, action: jnp.min(critic.values(observation, action))


def print_table(path: Path) -> None:
    scores: dict[tuple[str, str], dict[int, list[float]]] = {}
    for row in read(path):
        of_task = scores.setdefault((row["task"], row["by"]), {})
        of_task.setdefault(int(row["candidates"]), []).append(float(row["score"]))
    print(f"\n| task | chosen by | {' | '.join(f'best of {n}' for n in NUMBERS)} |")
    print("| --- " * (2 + len(NUMBERS)) + "|")
    for (task, by), of_task in scores.items():
        cells = [cell(np.array(of_task[n])) if n in of_task else "" for n in NUMBERS]
        print(f"| {task} | {by} | {' | '.join(cells)} |")


def cell(scores: np.ndarray) -> str:
    if len(scores) == 1:
        return f"{scores[0]:.0f}"
    low, high = fisher_flow.bootstrap_interval(scores[None])
    return f"{scores.mean():.0f} [{low:.0f}, {high:.0f}]"


def read(path: Path) -> list[dict[str, str]]:
    if not path.exists():
        return []
    with open(path, newline="", encoding="utf-8") as stream:
        return list(csv.DictReader(stream))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--data", type=Path, default=Path("data"))
    parser.add_argument("--out", type=Path, default=Path("candidates.csv"))
    parser.add_argument("--tasks", nargs="+", default=list(TASKS)[:2], choices=list(TASKS))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--updates", type=int, default=10_000)
    parser.add_argument("--episodes", type=int, default=20)
    args = parser.parse_args()
    done = {(row["task"], int(row["seed"])) for row in read(args.out)}
    for task in args.tasks:
        run(task, args, done)
    print_table(args.out)


if __name__ == "__main__":
    main()
