"""What several steps gain over one, at the same KL from the flow in all.

Of five-dimensional mixtures with their exact velocity, and critics that vary over longer scales
than the behaviour, or on its own. One seed is one mixture with its critics.
"""

import time
from typing import Any

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from matplotlib.figure import Figure

import fisher_flow as ff

from .problems import claim, Critic, mean_and_interval, Mixture, true_terms


RADIUS = 0.5
# No fold at all among the actions that settle the step: more of them than by default, and a damping
# from which few rungs are left to climb.
WITHOUT_FOLDS: Any = dict(max_folded=0.0, damping=1.0, num_calibration=65_536)
FREQUENCIES = {"smooth critic": 0.45, "rough critic": 1.0}
METHODS = ["one step", "one step in 4 (num_steps)", "chain of 2", "chain of 4"]


def refine(name: str, policy, critic, observations, key) -> tuple[Any, int]:
    one = name.startswith("one")
    num_steps = 4 if one and "4" in name else 1
    method = ff.NaturalStep(radius=jnp.asarray(RADIUS), num_steps=num_steps, **WITHOUT_FOLDS)
    options: Any = dict(observations=observations, key=key)
    if one:
        return ff.refine(policy, critic, method, **options), 1
    chain = ff.refine_chain(policy, critic, method, num_steps=int(name[-1]), **options)
    return chain.policy, len(chain.certificates)


def run(seeds: int, quick: bool) -> list[dict[str, Any]]:
    rows = []
    for seed in range(seeds):
        for kind, frequency in FREQUENCIES.items():
            mixture_key, critic_key, sample_key, key = jr.split(jr.key(seed), 4)
            mixture, critic = Mixture(5, key=mixture_key), Critic(5, frequency, key=critic_key)
            policy = mixture.policy(solver=diffrax.Heun(), num_steps=32)
            observations = jnp.zeros((256, 1))
            actions = mixture.sample(4096 if quick else 65_536, key=sample_key)
            for name in METHODS[:3] if quick else METHODS:
                start = time.perf_counter()
                refined, steps = refine(name, policy, critic, observations, key)
                jax.block_until_ready(eqx.filter(refined, eqx.is_array))
                seconds = time.perf_counter() - start
                log_ratio, stein, after, before, folded = true_terms(
                    refined, mixture, critic, actions
                )
                gain = np.mean(np.asarray(after) - np.asarray(before))
                row = dict(seed=seed, critic=kind, method=name, steps=steps, seconds=seconds)
                row |= dict(true_kl=float(np.mean(np.asarray(log_ratio + stein))), gain=float(gain))
                rows.append(row | dict(folded=100 * float(np.mean(np.asarray(folded)))))
        print(f"chains: seed {seed}", flush=True)
    return rows


def of(rows, kind, method, column) -> list[float]:
    return [r[column] for r in rows if (r["critic"], r["method"]) == (kind, method)]


def relative_gains(rows, kind, method) -> list[float]:
    """The gain over that of one step, at equal KL: gains grow as the root of a small KL."""
    gain, kl = (np.array(of(rows, kind, method, column)) for column in ("gain", "true_kl"))
    one, one_kl = (np.array(of(rows, kind, METHODS[0], column)) for column in ("gain", "true_kl"))
    return list(gain / one * np.sqrt(one_kl / kl))


def claims(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    found, last = [], [m for m in METHODS if any(r["method"] == m for r in rows)][-1]
    for kind in FREQUENCIES:
        mean, width = mean_and_interval(relative_gains(rows, kind, last))
        text = f"{last}, {kind}: gains more than one step at equal KL, outside the interval"
        found.append(claim(text, mean, mean - width > 1))
        kl = max(of(rows, kind, last, "true_kl"))
        found.append(claim("and its true KL is at most 0.5 within 5%", kl, kl <= 1.05 * RADIUS))
        kl = min(of(rows, kind, last, "true_kl"))
        found.append(claim("and at least 0.5 within 5%", kl, kl >= 0.95 * RADIUS))
        folded = max(of(rows, kind, last, "folded"))
        found.append(claim("and less than 0.01% of its actions fold", folded, folded < 0.01))
    return found


def print_table(rows: list[dict[str, Any]]) -> None:
    print(f"\n{RADIUS} nats: mean over mixtures ± 95% interval; the most folds; median seconds")
    print(f"{'':<42}{'true KL':>17}{'gain':>17}{'/ one step':>17}{'folded %':>10}{'seconds':>9}")
    for kind in FREQUENCIES:
        for method in METHODS:
            if len(of(rows, kind, method, "gain")) == 0:
                continue
            columns = of(rows, kind, method, "true_kl"), of(rows, kind, method, "gain")
            columns = *columns, relative_gains(rows, kind, method)
            cells = (mean_and_interval(values) for values in columns)
            line = "".join(f"{f'{mean:.3f} ± {width:.3f}':>17}" for mean, width in cells)
            folded = max(of(rows, kind, method, "folded"))
            seconds = np.median(of(rows, kind, method, "seconds"))
            print(f"{f'{kind}, {method}':<42}{line}{folded:>10.4f}{seconds:>9.1f}")


def plot(rows: list[dict[str, Any]]) -> Figure:
    figure = Figure(figsize=(6.5, 3), layout="constrained")
    axes = figure.subplots()
    names = [m for m in METHODS[1:] if any(r["method"] == m for r in rows)]
    for i, kind in enumerate(FREQUENCIES):
        cells = [mean_and_interval(relative_gains(rows, kind, name)) for name in names]
        mean, width = np.array(cells).T
        y = -np.arange(len(names)) - 0.15 * (i - 0.5)
        axes.errorbar(mean, y, xerr=width, fmt="o", capsize=3, label=kind)
    axes.axvline(1.0, color="0.5", linewidth=1)
    axes.set_yticks(-np.arange(len(names)), names)
    axes.set(xlabel="gain in E[Q] / that of one step, at the same KL (95% interval)")
    figure.legend(loc="outside upper center", ncols=2, frameon=False)
    return figure
