"""Going on online from data that never show the task done.

    python benchmarks/offline_rl/online.py --out online

Ten episodes of Pendulum with random torques of a quarter of the limit, in which it never swings up;
an agent trained on them for 3000 updates; and 8000 updates more, offline or while it plays 16,000
steps. Prints the mean return of 20 episodes from start states that are not in the data.
"""

import argparse
import dataclasses
import functools
from pathlib import Path
from typing import Any

import gymnasium
import jax.random as jr

import fisher_flow


class Weak:
    """Torques of a quarter of the limit."""

    def sample(self, observation, *, key):
        return jr.uniform(key, (1,), minval=-0.5, maxval=0.5)


def main(out: Path, seeds: int) -> None:
    make = functools.partial(gymnasium.make, "Pendulum-v1")
    envs = gymnasium.vector.SyncVectorEnv([make] * 4)
    test_envs = gymnasium.vector.SyncVectorEnv([make] * 20)
    transitions = fisher_flow.collect(Weak(), envs, num_episodes=10)
    normaliser = fisher_flow.Normaliser.of(transitions)
    scale = float(transitions.rewards.std())

    def rescale(transitions: fisher_flow.Transitions) -> fisher_flow.Transitions:
        return dataclasses.replace(transitions, rewards=transitions.rewards / scale)

    def evaluate(policy: fisher_flow.AbstractPolicy, seed: int) -> dict[str, float]:
        policy = fisher_flow.NormalisedPolicy(policy, normaliser)
        returns = fisher_flow.evaluate(policy, test_envs, seed=1000 * (seed + 1))
        return {"score": float(returns.mean())}

    data = rescale(normaliser.transitions(transitions))
    sizes: Any = dict(width_size=64, depth=2)
    agent = fisher_flow.FisherDecorator(
        flow=fisher_flow.BehaviourFlow(**sizes, bounds=(-2.0, 2.0), learning_rate=1e-3),
        critic=fisher_flow.TemporalDifference(**sizes),
        learning_rate=1e-3,
    )
    options: Any = dict(batch_size=128, evaluate=evaluate)
    trained = fisher_flow.train(
        agent, data, 3000, seeds=range(seeds), folder=out / "offline", **options
    )
    fisher_flow.fine_tune(
        trained,
        envs,
        16_000,
        normaliser=normaliser,
        prepare=rescale,
        updates_per_step=0.5,
        evaluate_every=2000,
        folder=out / "online",
        **options,
    )
    fisher_flow.train(agent, data, 11_000, seeds=range(seeds), folder=out / "longer", **options)

    rows = []
    for folder, method in (
        ("offline", "3000 updates offline"),
        ("longer", "11,000 updates offline"),
        ("online", "3000 offline, 8000 online"),
    ):
        file = out / folder / "evaluations.csv"
        rows += fisher_flow.Results.read(file, task="pendulum", method=method).rows
    print(fisher_flow.Results(rows).table())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("online"))
    parser.add_argument("--seeds", type=int, default=5)
    arguments = parser.parse_args()
    main(arguments.out, arguments.seeds)
