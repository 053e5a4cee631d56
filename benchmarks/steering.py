"""Steering on exact mixtures: what it gains at its true KL, beside the best policy at that KL.

    python benchmarks/steering.py --out benchmarks/results/steering.json

prints the table and writes the raw rows. The velocity is exact, the mixtures and their critics are
random, and none of them was used to choose anything in the library. "pass" is the KL measured in
the pass that draws the actions, "true" the one by the density of the mixture; "efficiency" is the
gain in E[Q] over that of the best policy at the true KL. "one of four" keeps one of four steered
actions by exact weights; its KL is an upper bound, so its efficiency is a lower one.
"""

import argparse
import importlib.metadata
import json
import time
from pathlib import Path
from typing import Any

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from geometry_study.problems import best_gain, Critic, mean_and_interval, Mixture, true_terms

import fisher_flow as ff


DISTANCES = {"near": 1.5, "far": 6.0}  # between two modes, whose deviations are at most 1
FREQUENCIES = {"smooth": 0.45, "rough": 1.5}
POTENTIALS = {
    "steering": ff.TiltedAction(),
    "steering, projected action": ff.ProjectedAction(),
}
FOUR, STEP = "steering, one of four", "NaturalStep"


@eqx.filter_jit
def steered_terms(steered: ff.SteeredPolicy, mixture: Mixture, critic: Critic, keys: Any):
    """Of every action: the log-ratio in the pass, the true one, and the value of the critic of it
    and of the unsteered action from the same noise."""
    o = jnp.zeros(1)

    def terms(key):
        z = steered.noise(o, key=key)
        action, push = jax.linearize(lambda z: steered.flow(o, z), z)
        _, log_det = jnp.linalg.slogdet(jax.vmap(push, out_axes=1)(jnp.eye(z.size)))
        log_q = jnp.sum(jax.scipy.stats.norm.logpdf(z)) - log_det
        _, in_pass = steered.draw_and_log_ratio(o, key=key)
        true = log_q - mixture.log_prob(action)
        before = critic(o, steered.policy.draw(o, key=key))
        return in_pass, true, critic(o, action), before

    return jax.lax.map(terms, keys, batch_size=128)


def run_problem(seed, dimension, modes, critics, radii, num) -> list[dict[str, Any]]:
    mixture_key, critic_key, tilt_key, fit_key, draw_key = jr.split(jr.key(1000 + seed), 5)
    mixture = Mixture(dimension, DISTANCES[modes], key=mixture_key)
    critic = Critic(dimension, FREQUENCIES[critics], key=critic_key)
    options = dict(solver=diffrax.Heun(), num_steps=32, adjoint=diffrax.ForwardMode())
    policy = mixture.policy(**options)
    observations = jnp.zeros((16, 1))  # the velocity ignores them
    q = jax.vmap(lambda a: critic(None, a))(mixture.sample(100_000, key=tilt_key))
    q = np.asarray(q, np.float64)
    rows = []

    def record(method, radius, in_pass, true, gain, share, seconds):
        row = dict(seed=seed, dimension=dimension, modes=modes, critic=critics, method=method)
        efficiency = gain / best_gain(q, true)
        row |= dict(radius=radius, in_pass=in_pass, true_kl=true, gain=gain, share=share)
        rows.append(row | dict(efficiency=efficiency, seconds=seconds))

    for radius in radii:
        for name, potential in POTENTIALS.items():
            start = time.perf_counter()
            method = ff.Steering(
                jnp.asarray(radius),
                potential,
                log_ratio=ff.PathLogRatio(),
                num_calibration=num // 2,
            )
            steered = ff.refine(policy, critic, method, observations=observations, key=fit_key)
            k = float(steered.strength)
            seconds = time.perf_counter() - start
            terms = steered_terms(steered, mixture, critic, jr.split(draw_key, num))
            in_pass, true, after, before = (np.asarray(x, np.float64) for x in terms)
            log_w = k * after - true
            w = np.exp(log_w - log_w.max())
            share = w.sum() ** 2 / (w**2).sum() / num
            kl = float(ff.mean_log_ratio(jnp.asarray(true))[0])
            said = float(ff.mean_log_ratio(jnp.asarray(in_pass))[0])
            record(name, radius, said, kl, (after - before).mean(), share, seconds)
            if name != "steering":
                continue
            log_w, r, values = (x.reshape(-1, 4) for x in (log_w, true, after))
            p = np.exp(log_w - log_w.max(axis=1, keepdims=True))
            p /= p.sum(axis=1, keepdims=True)
            # Under uniform choice the mean of r is the KL, for which there is a better estimate.
            spent = np.sum(p * np.log(4 * p + 1e-300) + (p - 0.25) * r, axis=1).mean() + kl
            gain = np.sum(p * values, axis=1).mean() - before.mean()
            record(FOUR, radius, np.nan, spent, gain, share, seconds)
        start = time.perf_counter()
        refined = ff.refine(
            policy,
            critic,
            ff.NaturalStep(radius=jnp.asarray(radius), num_calibration=2 * num),
            observations=observations,
            key=fit_key,
        )
        actions = mixture.sample(4 * num, key=draw_key)
        terms = true_terms(refined, mixture, critic, actions)
        log_ratio, stein, after, before, _ = (np.asarray(x, np.float64) for x in terms)
        seconds = time.perf_counter() - start
        kl = (log_ratio + stein).mean()
        record(STEP, radius, np.nan, kl, (after - before).mean(), np.nan, seconds)
    return rows


def print_table(rows: list[dict[str, Any]]) -> None:
    keys = ("dimension", "modes", "critic", "radius", "method")
    print(
        f"\n{'d':>3} {'modes':<5} {'critic':<7}{'nats':>5}  {'method':<28}"
        f"{'pass / true':>12}{'true KL':>9}{'efficiency':>15}{'share':>7}"
    )
    for group in dict.fromkeys(tuple(row[key] for key in keys) for row in rows):
        chosen = [row for row in rows if tuple(row[key] for key in keys) == group]
        d, modes, critic, radius, method = group
        mean, width = mean_and_interval([row["efficiency"] for row in chosen])
        ratio = np.mean([row["in_pass"] / row["true_kl"] for row in chosen])
        kl, share = (np.mean([row[key] for row in chosen]) for key in ("true_kl", "share"))
        print(
            f"{d:>3} {modes:<5} {critic:<7}{radius:>5g}  {method:<28}{ratio:>12.3f}{kl:>9.3f}"
            f"{f'{mean:.3f} ± {width:.2f}':>15}{share:>7.2f}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dimensions", type=int, nargs="+", default=[2, 5, 10, 21])
    parser.add_argument("--radii", type=float, nargs="+", default=[0.3])
    parser.add_argument("--seeds", type=int, default=2, help="mixtures of each kind (default: 2)")
    parser.add_argument("--actions", type=int, default=2048, help="of each (default: 2048)")
    parser.add_argument("--out", type=Path, help="a JSON file for the rows")
    args = parser.parse_args()
    rows = []
    for dimension in args.dimensions:
        for modes in DISTANCES:
            for critic in FREQUENCIES:
                for seed in range(args.seeds):
                    problem = seed, dimension, modes, critic
                    rows += run_problem(*problem, args.radii, args.actions)
                    print(f"{dimension} dimensions, {modes}, {critic}, seed {seed}", flush=True)
                    if args.out is not None:
                        settings = vars(args) | dict(out=None, jax=jax.__version__)
                        settings |= dict(fisher_flow=importlib.metadata.version("fisher_flow"))
                        args.out.parent.mkdir(parents=True, exist_ok=True)
                        text = json.dumps(dict(settings=settings, rows=rows), indent=1)
                        args.out.write_text(text.replace("NaN", "null") + "\n", encoding="utf-8")
    print_table(rows)


if __name__ == "__main__":
    main()
