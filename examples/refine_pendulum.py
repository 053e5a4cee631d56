"""Improves a behaviour policy that was learned from logged data, and plays it in the real task.

Makes a dataset in Gymnasium's Pendulum-v1, fits a flow policy and a critic to it, refines the flow
in four ways, and evaluates each of them, alone and as the best of 8, from the same start states:

    python examples/refine_pendulum.py --seed 0 --out pendulum

It prints a table, and writes it to the folder `--out` together with a figure and the raw returns.
"""

import argparse
import functools
import json
import time
from pathlib import Path
from typing import NamedTuple

import diffrax
import equinox as eqx
import gymnasium
import jax
import jax.numpy as jnp
import jax.random as jr
import matplotlib.pyplot as plt
import numpy as np
import scipy.stats
from tqdm.auto import tqdm

import fisher_flow


EPISODE_STEPS = 200
OBSERVATION_SCALE = np.array([1.0, 1.0, 8.0], np.float32)  # cos θ, sin θ, angular velocity
COLOURS = {
    "behaviour flow": "C7",
    "steering": "C3",
    "natural step": "C0",
    "residual, FisherRao": "C2",
    "residual, Euclidean": "C1",
}
NAMES = list(COLOURS)


def make_env() -> gymnasium.Env:
    """Pendulum-v1 with observations and actions of order one."""
    env = gymnasium.make("Pendulum-v1")
    space = gymnasium.spaces.Box(-1.0, 1.0, (3,), np.float32)
    env = gymnasium.wrappers.TransformObservation(env, lambda o: o / OBSERVATION_SCALE, space)
    return gymnasium.wrappers.RescaleAction(env, np.float32(-1), np.float32(1))


def make_envs(num: int) -> gymnasium.vector.VectorEnv:
    return gymnasium.vector.SyncVectorEnv([make_env] * num)


# --- The data ---------------------------------------------------------------------------------


class Dataset(NamedTuple):
    observations: np.ndarray
    actions: np.ndarray
    rewards: np.ndarray
    next_observations: np.ndarray
    next_actions: np.ndarray
    masks: np.ndarray


def swing_up(observations: np.ndarray) -> np.ndarray:
    """Pumps energy until the pendulum can reach the top, and balances it there."""
    cos, sin, velocity = (observations * OBSERVATION_SCALE).T
    angle = np.arctan2(sin, cos)  # zero is upright
    missing_energy = 5.0 * (1.0 - cos) - velocity**2 / 6.0
    pump = np.sign(velocity) * missing_energy
    balance = -(10.0 * angle + 2.0 * velocity)
    return np.where(np.abs(angle) < 0.4, balance, pump) / 2.0  # the torque is at most 2


def make_dataset(num_episodes: int, seed: int) -> Dataset:
    """Episodes of the controller, of which a share of the steps, 0 to 1, is random instead."""
    rng = np.random.default_rng(seed)
    envs = make_envs(num_episodes)
    random_share = np.resize([0.0, 0.3, 0.6, 1.0], num_episodes)
    observations, _ = envs.reset(seed=seed)
    columns: dict[str, list[np.ndarray]] = {"observations": [], "actions": [], "rewards": []}
    for _ in tqdm(range(EPISODE_STEPS), desc="dataset"):
        actions = swing_up(observations) + 0.15 * rng.normal(size=num_episodes)
        explore = rng.random(num_episodes) < random_share
        actions = np.where(explore, rng.uniform(-1, 1, num_episodes), np.clip(actions, -1, 1))
        actions = actions[:, None].astype(np.float32)
        columns["observations"].append(observations)
        columns["actions"].append(actions)
        observations, rewards, _, _, _ = envs.step(actions)
        columns["rewards"].append(rewards)
    envs.close()
    o, a, r = (np.stack(column).astype(np.float32) for column in columns.values())

    def flatten(column):  # (step, episode, ...) -> (row, ...)
        return column.reshape(-1, *column.shape[2:])

    # The last step of an episode has no next action in the data. No episode ever terminates.
    o, next_o, a, next_a, r = map(flatten, (o[:-1], o[1:], a[:-1], a[1:], r[:-1]))
    return Dataset(o, a, r / r.std(), next_o, next_a, np.ones_like(r))


# --- Evaluation -------------------------------------------------------------------------------


def interval(returns: np.ndarray) -> tuple[float, float]:
    """The 95% bootstrap interval of the mean."""
    result = scipy.stats.bootstrap((returns,), np.mean, n_resamples=10_000, rng=0)
    return float(result.confidence_interval.low), float(result.confidence_interval.high)


def describe(returns: np.ndarray) -> str:
    low, high = interval(returns)
    return f"{returns.mean():6.0f} [{low:5.0f}, {high:5.0f}]"


def make_table(results: dict[str, dict]) -> str:
    header = ["policy", "return [95%]", "best of 8 [95%]", "KL (nats)", "verdict", "seconds"]
    rows = [header]
    for name, result in results.items():
        certificate = result["certificate"]
        rows.append(
            [
                name,
                describe(result["returns"]),
                describe(result["best_of_returns"]),
                f"{certificate.kl:.3f} ± {certificate.kl_stderr:.3f}" if certificate else "0",
                certificate.verdict.name if certificate else "",
                f"{result['seconds']:.0f}",
            ]
        )
    widths = [max(len(row[i]) for row in rows) for i in range(len(header))]
    lines = [" | ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)) for row in rows]
    lines.insert(1, " | ".join("-" * width for width in widths))
    return "\n".join(f"| {line} |" for line in lines)


# --- The figure -------------------------------------------------------------------------------


@eqx.filter_jit
def draw_many(policy, observation):
    return jax.vmap(lambda key: policy.sample(observation, key=key))(jr.split(jr.key(0), 8192))


def make_figure(policies, critic, results, radius: float):
    """Actions over the Q curve at three states, and the returns."""
    states = {
        "hanging, swinging": (2.8, 2.0),
        "halfway up, rising": (1.6, -4.0),
        "nearly upright, falling": (0.5, 0.5),
    }
    figure, panels = plt.subplot_mosaic(
        [list(states), ["returns"] * len(states)],
        figsize=(11, 6.6),
        layout="constrained",
        height_ratios=[1.15, 1],
    )
    for title, (angle, velocity) in states.items():
        axes = panels[title]
        observation = jnp.array([np.cos(angle), np.sin(angle), velocity]) / OBSERVATION_SCALE
        observation = observation.astype(jnp.float32)
        for name in NAMES[:3]:  # more would hide each other
            axes.hist(
                2 * np.asarray(draw_many(policies[name], observation))[:, 0],
                bins=20,
                range=(-2, 2),
                density=True,
                histtype="stepfilled" if name == "behaviour flow" else "step",
                color=COLOURS[name],
                alpha=0.45 if name == "behaviour flow" else 1.0,
                linewidth=1.6,
                label=name,
            )
        grid = jnp.linspace(-1, 1, 101)[:, None]
        curve = axes.twinx()
        q = jax.vmap(lambda a, o=observation: critic(o, a))(grid)
        curve.plot(2 * grid[:, 0], q, color="k", linestyle="--", linewidth=1.2, label="Q")
        curve.set_yticks([])
        curve.set_ylabel("Q (dashed)", fontsize="small")
        axes.set(title=title, xlabel="torque", xlim=(-2, 2))
    first = panels[next(iter(states))]
    first.set_ylabel("density of the action")
    first.legend(loc="upper center", fontsize="small", framealpha=0.9)

    axes = panels["returns"]
    ticks, labels = [], []
    for group, (key, suffix) in enumerate(
        {"returns": "", "best_of_returns": ", best of 8"}.items()
    ):
        for i, name in enumerate(NAMES):
            returns = results[name][key]
            y = -(i + (len(NAMES) + 0.6) * group)
            jitter = np.random.default_rng(0).uniform(-0.25, 0.25, returns.size)
            axes.plot(returns, y + jitter, ".", color=COLOURS[name], markersize=4, alpha=0.7)
            axes.plot(interval(returns), [y, y], color="k", linewidth=3, solid_capstyle="butt")
            axes.plot(returns.mean(), y, "D", color="k", markersize=6)
            axes.text(1.01, y, f"{returns.mean():.0f}", transform=axes.get_yaxis_transform(),
                      va="center")  # fmt: skip
            ticks.append(y)
            labels.append(name + suffix)
    axes.set_yticks(ticks, labels)
    axes.grid(axis="x", alpha=0.3)
    axes.set_xlabel("return of an episode (dots), the mean (diamonds) and its 95% interval (lines)")
    figure.suptitle(f"Pendulum-v1: a behaviour flow refined within {radius:g} nats")
    return figure


# --- The main job -----------------------------------------------------------------------------


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("refine_pendulum_results"))
    parser.add_argument("--radius", type=float, default=0.5, help="the KL to spend, in nats")
    parser.add_argument("--episodes", type=int, default=50, help="for the evaluation")
    parser.add_argument("--data-episodes", type=int, default=500)
    parser.add_argument("--updates", type=int, default=5000, help="of the flow and the critic")
    parser.add_argument("--residual-updates", type=int, default=1500)
    args = parser.parse_args()
    start = time.perf_counter()
    keys = dict(zip(["flow", "critic", "fit flow", "fit critic", "refine", "certify"],
                    jr.split(jr.key(args.seed), 6), strict=True))  # fmt: skip

    data = make_dataset(args.data_episodes, args.seed)
    print(f"{len(data.actions)} transitions of {args.data_episodes} episodes")

    velocity = fisher_flow.VelocityMLP(3, (1,), width_size=128, key=keys["flow"])
    # Steps that are short enough for the jumps between the modes of the learned flow.
    behaviour = fisher_flow.FlowPolicy(
        velocity, action_shape=(1,), solver=diffrax.Heun(), num_steps=30, bounds=(-1.0, 1.0)
    )
    fitted = time.perf_counter()
    behaviour = fisher_flow.fit_flow(
        behaviour, data.observations, data.actions, num_updates=args.updates, key=keys["fit flow"]
    )
    seconds = {"behaviour flow": time.perf_counter() - fitted}
    critic = fisher_flow.QEnsemble(3, 1, width_size=128, key=keys["critic"])
    critic = fisher_flow.fit_critic(
        critic, *data, num_updates=args.updates, learning_rate=1e-3, key=keys["fit critic"]
    )

    train = functools.partial(
        fisher_flow.Residual, radius=args.radius, num_updates=args.residual_updates
    )
    methods = {
        "steering": fisher_flow.Steering(radius=args.radius),
        "natural step": fisher_flow.NaturalStep(radius=args.radius),
        "residual, FisherRao": train(fisher_flow.FisherRao()),
        "residual, Euclidean": train(fisher_flow.Euclidean()),
    }
    # The last 2% of the observations are kept from the refinement, for the certificates.
    num_held_out = len(data.observations) // 50
    order = np.random.default_rng(args.seed).permutation(len(data.observations))
    observations = data.observations[order[num_held_out:]]
    held_out = data.observations[order[:num_held_out]]
    policies: dict[str, fisher_flow.AbstractPolicy] = {"behaviour flow": behaviour}
    certificates: dict[str, fisher_flow.Certificate | None] = {"behaviour flow": None}
    for name, method in methods.items():
        began = time.perf_counter()
        refined = fisher_flow.refine(
            behaviour, critic, method, observations=observations, key=keys["refine"]
        )
        jax.block_until_ready(eqx.filter(refined, eqx.is_array))
        seconds[name] = time.perf_counter() - began
        certificates[name] = fisher_flow.certify(refined, critic, held_out, key=keys["certify"])
        policies[name] = refined

    results = {}
    envs = make_envs(args.episodes)
    start_seed = 1_000_000 + args.seed  # start states that are not in the data
    for name in tqdm(NAMES, desc="evaluation"):
        best = fisher_flow.BestOf(policies[name], critic, 8)
        results[name] = dict(
            returns=fisher_flow.evaluate(policies[name], envs, seed=start_seed),
            best_of_returns=fisher_flow.evaluate(best, envs, seed=start_seed),
            certificate=certificates[name],
            seconds=seconds[name],
        )
    envs.close()

    table = make_table(results)
    print(f"\n{table}\n\nbest of 8 spends up to {best.kl_bound:.2f} nats more.")
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "table.md").write_text(table + "\n")
    raw = {
        name: {key: result[key].tolist() for key in ("returns", "best_of_returns")}
        for name, result in results.items()
    }
    (args.out / "returns.json").write_text(json.dumps(raw, indent=1))
    figure = make_figure(policies, critic, results, args.radius)
    figure.savefig(args.out / "figure.png", dpi=110)
    print(f"Wrote {args.out}/figure.png, table.md and returns.json; "
          f"{time.perf_counter() - start:.0f} s in all.")  # fmt: skip


if __name__ == "__main__":
    main()
