"""Agents of offline RL on real tasks: trains them all, plays them, and writes every number.

    python examples/make_data.py pendulum --out data
    python examples/make_data.py halfcheetah --out data
    python examples/make_data.py cube-single --out data --transitions 200000
    python benchmarks/offline_rl/study.py --data data --out offline_rl.csv

One row a task, method and seed: the mean return of 20 episodes, or the share of them that succeed
in per cent, alone and as the best of 8 by the critic of the agent, the KL from the behaviour flow,
and the seconds that the training took. Rows that the file holds already are not made again, so a
study that was stopped goes on. All methods are tried with the same settings on all tasks.
"""

import argparse
import csv
import dataclasses
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import gymnasium
import jax.numpy as jnp
import jax.random as jr
import numpy as np

import fisher_flow


sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))
from offline_rl import load_task  # noqa: E402  # pyright: ignore


COLUMNS = ["task", "method", "seed", "updates", "score", "best_of_8", "kl", "seconds"]


class Sizes(NamedTuple):
    """What depends on the task: small networks, of two hidden layers, for small tasks."""

    width: int
    num_steps: int = 1  # of a target: the sparse rewards of manipulation need to be seen from afar


TASKS = {
    "pendulum": Sizes(64),
    "halfcheetah": Sizes(128),
    "cube-single-play-singletask-v0": Sizes(256, num_steps=10),
    "cube-double-play-singletask-v0": Sizes(256, num_steps=10),
    "scene-play-singletask-v0": Sizes(256, num_steps=10),
    "puzzle-3x3-play-singletask-v0": Sizes(256, num_steps=10),
}
RADII = (0.5, 2.0)  # nats


def methods(width: int, action_size: int) -> dict[str, fisher_flow.AbstractAgent]:
    """Every agent with every coefficient, all with the same networks, critic and updates."""
    networks: Any = dict(width_size=width, depth=2)
    options: Any = dict(
        flow=fisher_flow.BehaviourFlow(**networks, learning_rate=1e-3),
        critic=fisher_flow.TemporalDifference(**networks),
        learning_rate=1e-3,
        num_candidates=1,
    )
    FiDec = fisher_flow.FisherDecorator
    agents: dict[str, fisher_flow.AbstractAgent] = {}
    for radius in RADII:
        refinement = fisher_flow.NaturalStep(radius=radius)
        agents[f"one step, {radius} nats"] = fisher_flow.OneStep(refinement=refinement, **options)
        agents[f"FiDec, Fisher-Rao, {radius} nats"] = FiDec(radius=radius, **options)
    agents["FiDec, Fisher-Rao, 0.5 nats, from the data"] = FiDec(from_data=True, **options)
    agents["IFQL"] = fisher_flow.ImplicitQLearning(**options)
    for α in (0.03, 0.3, 3.0, 10.0):
        agents[f"FQL, α = {α}"] = fisher_flow.FlowQLearning(coefficient=α, **options)
    for ε in (0.001, 0.003, 0.03, 0.3):
        agents[f"DeFlow, ε = {ε}"] = FiDec.deflow(action_size, ε, **options)
    if action_size == 1:  # where every Fisher matrix, divided by its trace, is the identity
        return agents
    for ε in (0.001, 0.01):
        agents[f"FiDec, paper, ε = {ε}"] = FiDec.paper(ε, **options)
        agents[f"FiDec, released, ε = {ε}"] = FiDec.released(ε, **options)
    return agents


def measured_kl(policy: fisher_flow.AbstractPolicy, critic: Any, observations: Any) -> float:
    if not isinstance(policy, fisher_flow.RefinedPolicy):
        return float("nan")
    return float(fisher_flow.certify(policy, critic, observations, key=jr.key(0)).total_kl)


class Problem(NamedTuple):
    """A task: what to learn from, and what a policy that was learned scores."""

    transitions: fisher_flow.Transitions
    observations: Any  # some of them, to measure a KL on
    play: Callable[[fisher_flow.AbstractPolicy, int], float]  # of a policy and a training seed
    envs: gymnasium.vector.VectorEnv


def load_problem(task: str, folder: Path, num_episodes: int) -> Problem:
    transitions, make_env, is_success = load_task(task, folder)
    transitions = transitions.n_step(TASKS[task].num_steps, discount=0.99)
    normaliser = fisher_flow.Normaliser.of(transitions)
    transitions = normaliser.transitions(transitions)
    scale = transitions.rewards.std()
    transitions = dataclasses.replace(transitions, rewards=transitions.rewards / scale)
    rows = np.random.default_rng(0).permutation(len(transitions))[:512]
    observations = jnp.asarray(transitions.observations[rows])
    # An environment of OGBench takes 150 MB.
    envs = gymnasium.vector.SyncVectorEnv([make_env] * min(num_episodes, 20))

    def play(policy: fisher_flow.AbstractPolicy, seed: int) -> float:
        policy = fisher_flow.NormalisedPolicy(policy, normaliser)
        # Start states that are the same for all methods, and not in the data.
        options = dict(num_episodes=num_episodes, seed=1_000_000 * (seed + 1))
        episodes = fisher_flow.rollout(policy, envs, **options)
        return float(100 * episodes.successes.mean() if is_success else episodes.returns.mean())

    return Problem(transitions, observations, play, envs)


def study(task: str, args: argparse.Namespace, done: set[tuple[str, str, int]]) -> None:
    """Trains and plays every agent on a task, and writes a row for each as soon as it is known."""
    transitions, observations, play, envs = load_problem(task, args.data, args.episodes)

    def record(method: str, seed: int, policy: Any, critic: Any, seconds: float) -> None:
        row = dict(
            task=task, method=method, seed=seed, updates=args.updates,
            score=f"{play(policy, seed):.1f}",
            best_of_8=f"{play(fisher_flow.BestOf(policy, critic, 8), seed):.1f}",
            kl=f"{measured_kl(policy, critic, observations):.4f}",
            seconds=f"{seconds:.1f}",
        )  # fmt: skip
        args.out.parent.mkdir(parents=True, exist_ok=True)
        new = not args.out.exists()
        with open(args.out, "a", newline="", encoding="utf-8") as stream:
            writer = csv.DictWriter(stream, COLUMNS)
            if new:
                writer.writeheader()
            writer.writerow(row)
        print(*row.values(), sep=" | ", flush=True)

    size = int(np.prod(transitions.actions.shape[1:]))
    for method, agent in methods(TASKS[task].width, size).items():
        missing = [x for x in range(args.seeds) if (task, method, x) not in done]
        if len(missing) == 0 or (args.methods and method not in args.methods):
            continue
        began = time.perf_counter()
        trained = fisher_flow.train(agent, transitions, args.updates, seeds=missing, batch_size=128)
        seconds = (time.perf_counter() - began) / len(missing)
        for seed, state in zip(missing, trained.states, strict=True):
            critic = state.critic.model
            record(method, seed, trained.policy(seed), critic, seconds)
            # Its flow is the behaviour's.
            if isinstance(agent, fisher_flow.OneStep) and method.endswith(f" {RADII[0]} nats"):
                record("behaviour flow", seed, agent.flow.policy(state.flow), critic, seconds)
    envs.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--data", type=Path, default=Path("data"))
    parser.add_argument("--out", type=Path, default=Path("offline_rl.csv"))
    parser.add_argument("--tasks", nargs="+", default=list(TASKS)[:3], choices=list(TASKS))
    parser.add_argument("--methods", nargs="+", choices=list(methods(64, 2)), metavar="METHOD",
                        help="by the names in the table; by default all")  # fmt: skip
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--updates", type=int, default=10_000)
    parser.add_argument("--episodes", type=int, default=20)
    args = parser.parse_args()
    done = set()
    if args.out.exists():
        with open(args.out, newline="", encoding="utf-8") as stream:
            done = {
                (row["task"], row["method"], int(row["seed"])) for row in csv.DictReader(stream)
            }

    for task in args.tasks:
        study(task, args, done)


if __name__ == "__main__":
    main()
