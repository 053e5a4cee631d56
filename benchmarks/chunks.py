"""What refining a chunk of actions costs: time and memory, against a plain sample, by horizon.

Both samplers are compiled for one batch and timed in turn, so that a ratio is that of one run on
one machine. Memory is what the compiled program needs besides its arguments and results.
"""

import argparse
import json
import time
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np

import fisher_flow as ff


def compiled_sampler(policy, observations, keys):
    arrays, static = eqx.partition(policy, eqx.is_array)

    def sample(arrays, observations, keys):
        policy = eqx.combine(arrays, static)
        return jax.vmap(lambda o, key: policy.sample(o, key=key))(observations, keys)

    program = jax.jit(sample).lower(arrays, observations, keys).compile()
    analysis = program.memory_analysis()
    memory = float("nan") if analysis is None else analysis.temp_size_in_bytes / 2**20
    return (lambda: jax.block_until_ready(program(arrays, observations, keys))), memory


def of_horizon(horizon: int, options: argparse.Namespace, key) -> dict[str, float]:
    shape, size = (horizon, 7), 7 * horizon
    velocity_key, critic_key, observation_key, key = jr.split(key, 4)
    velocity = ff.VelocityMLP(10, shape, width_size=options.width, depth=4, key=velocity_key)
    policy = ff.FlowPolicy(velocity, shape)
    critic = ff.QEnsemble(10, size, key=critic_key)
    observations = jr.normal(observation_key, (options.batch, 10))
    metric = ff.ObservedInformation(ff.PerturbedScore(time=0.95))
    start = time.perf_counter()
    refined = ff.refine(
        policy, critic, ff.NaturalStep(metric, num_calibration=512), observations=observations
    )
    jax.block_until_ready(jax.tree.leaves(eqx.filter(refined.displacement_field, eqx.is_array)))
    seconds = time.perf_counter() - start

    keys = jr.split(key, options.batch)
    plain, plain_memory = compiled_sampler(policy, observations, keys)
    moved, moved_memory = compiled_sampler(refined, observations, keys)
    times = []
    for _ in range(options.repeats):
        laps = []
        for call in (plain, moved):
            start = time.perf_counter()
            call()
            laps.append(time.perf_counter() - start)
        times.append(laps)
    times = np.asarray(times)[1:]
    return dict(
        horizon=horizon,
        plain_ms=1e3 * float(np.median(times[:, 0])),
        ratio=float(np.median(times[:, 1] / times[:, 0])),
        plain_mib=plain_memory,
        refined_mib=moved_memory,
        fit_seconds=seconds,
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--horizons", type=int, nargs="+", default=[8, 16, 32, 64])
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--repeats", type=int, default=12)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--out", type=Path, default=Path("chunks.json"))
    options = parser.parse_args()

    rows = []
    print("| chunk | plain sample (ms) | refined / plain | memory, plain (MiB) | refined (MiB) |")
    print("| --- | --- | --- | --- | --- |")
    for horizon in options.horizons:
        runs = [of_horizon(horizon, options, jr.key(seed)) for seed in range(options.runs)]
        rows += runs
        ratios = [run["ratio"] for run in runs]
        spread = f"{np.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
        plain = jnp.median(jnp.array([run["plain_ms"] for run in runs]))
        memory = f"{runs[0]['plain_mib']:.1f} | {runs[0]['refined_mib']:.1f}"
        print(f"| {horizon} x 7 | {plain:.0f} | {spread} | {memory} |", flush=True)
    options.out.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
