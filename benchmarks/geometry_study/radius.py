"""Whether the measured KL meets the radius, and the true KL with it, over two and a half decades.

Of five-dimensional mixtures with their exact velocity. One seed is one mixture with its critic.
"""

from typing import Any

import diffrax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from matplotlib.figure import Figure

import fisher_flow as ff

from .problems import claim, Critic, mean_and_interval, Mixture, true_terms


RADII = [0.001, 0.003, 0.01, 0.03, 0.1, 0.3]


def methods(radius: Any, num_updates: int) -> dict[str, ff.NaturalStep | ff.Residual]:
    return {
        "step, ObservedInformation": ff.NaturalStep(radius=radius),
        "residual, FisherRao": ff.Residual(
            ff.FisherRao(), radius, num_updates=num_updates, width_size=64, progress=False
        ),
    }


def run(seeds: int, quick: bool) -> list[dict[str, Any]]:
    rows = []
    for seed in range(seeds):
        mixture_key, critic_key, sample_key, fit_key, certify_key = jr.split(jr.key(seed), 5)
        mixture, critic = Mixture(5, key=mixture_key), Critic(5, key=critic_key)
        policy = mixture.policy(solver=diffrax.Heun(), num_steps=32)
        observations = jnp.zeros((256, 1))  # the velocity ignores them
        actions = mixture.sample(4096 if quick else 65536, key=sample_key)
        for radius in RADII[:1] if quick else RADII:
            for name, method in methods(jnp.asarray(radius), 50 if quick else 1500).items():
                refined = ff.refine(policy, critic, method, observations=observations, key=fit_key)
                report = ff.certify(
                    refined, critic, observations, num_actions=16384, key=certify_key
                )
                log_ratio, stein, *_ = true_terms(refined, mixture, critic, actions)
                kl = np.mean(np.asarray(log_ratio + stein))
                row = dict(seed=seed, radius=radius, method=name, folded=float(report.folded))
                row |= dict(measured=float(report.kl) / radius, true=float(kl) / radius)
                rows.append(row | dict(measured_stderr=float(report.kl_stderr) / radius))
        print(f"radius: seed {seed}", flush=True)
    return rows


def of(rows, method, radius, column) -> list[float]:
    return [r[column] for r in rows if (r["method"], r["radius"]) == (method, radius)]


def claims(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    found = []
    for method in dict.fromkeys(row["method"] for row in rows):
        for column in ("measured", "true"):
            radii = {row["radius"] for row in rows}
            worst = max(abs(np.mean(of(rows, method, r, column)) - 1) for r in radii)
            found.append(claim(f"{method}: {column} KL within 10%", worst, worst <= 0.1))
    return found


def print_table(rows: list[dict[str, Any]]) -> None:
    radii = sorted({row["radius"] for row in rows})
    print("\nKL / radius, mean over mixtures ± 95% interval")
    print(f"{'':<40}" + "".join(f"{r:>18g}" for r in radii))
    for method in dict.fromkeys(row["method"] for row in rows):
        for column in ("measured", "true"):
            cells = (mean_and_interval(of(rows, method, r, column)) for r in radii)
            line = "".join(f"{f'{mean:.3f} ± {width:.3f}':>18}" for mean, width in cells)
            print(f"{f'{method}, {column}':<40}{line}")


def plot(rows: list[dict[str, Any]]) -> Figure:
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    axes.axhspan(0.9, 1.1, color="k", alpha=0.12, linewidth=0)
    radii = np.array(sorted({row["radius"] for row in rows}))
    lines = [(m, c) for m in dict.fromkeys(r["method"] for r in rows) for c in ("measured", "true")]
    for i, (method, column) in enumerate(lines):
        cells = [mean_and_interval(of(rows, method, r, column)) for r in radii]
        mean, width = np.array(cells).T
        axes.errorbar(
            radii * 1.04 ** (i - 1.5), mean, width, fmt="o" if column == "measured" else "s",
            markersize=4, capsize=2, color=f"C{i // 2}", label=f"{method}, {column}",
            markerfacecolor=None if column == "measured" else "none",
        )  # fmt: skip
    axes.set(xscale="log", xlabel="radius (nats)", ylabel="KL / radius", ylim=(0.5, 1.5))
    axes.legend(frameon=False, fontsize=8)
    return figure
