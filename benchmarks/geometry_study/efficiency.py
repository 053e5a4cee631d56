"""What each metric buys: the gain in E[Q] over that of the best policy at the same true KL.

Mixtures in 2, 5 and 21 dimensions whose modes are near or far, with their exact velocity; with and
without training, and with and without reweighting. One seed is one mixture with its critic.
"""

import math
import time
from typing import Any

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jaxtyping import Array
from matplotlib.figure import Figure

import fisher_flow as ff

from .problems import best_gain, claim, Critic, mean_and_interval, Mixture, true_terms


DIMENSIONS = [2, 5, 21]
DISTANCES = {"near": 1.5, "far": 6.0}  # between two modes, whose deviations are at most 1
RADII = [0.05, 0.5]
STEPS = {
    "step, Euclidean": ff.Euclidean(),
    "step, AveragedFisher": ff.AveragedFisher(),
    "step, ScoreOuterProduct": ff.ScoreOuterProduct(),
    "step, ObservedInformation": ff.ObservedInformation(),
}
# With the damping: the published method has none, and the Euclidean metric is its own.
RESIDUALS = {
    "residual, Euclidean": (ff.Euclidean(), 0.0),
    "residual, ScoreOuterProduct": (ff.ScoreOuterProduct(), 0.0),
    "residual, FisherRao": (ff.FisherRao(), 0.1),
}
SELECTIONS = {
    "resampling alone": None,
    "resampling of the step": "step, ObservedInformation",
    "resampling of the residual": "residual, FisherRao",
    "best of 8": None,
}
NAMES = [*STEPS, *RESIDUALS, *SELECTIONS]


@eqx.filter_jit
def selected(
    selection: ff.AbstractSelection, log_ratio: Array, stein: Array, values: Array, key: Any
):
    """The true KL from the mixture, and the mean of Q, of a choice among several actions.

    `log_ratio` is log π'/p and `values` is Q, at exact samples of the policy π' that is chosen
    from. An action with the value q is kept r(q) = E[n p] times as often as it is drawn, over the
    other n - 1 actions; so KL = E[r (log r + log π'/p)].
    """

    def r_of(row):
        value, key = row
        others = jr.choice(key, values, (512, selection.n - 1))
        sets = jnp.concatenate([jnp.full((512, 1), value), others], axis=1)
        return selection.n * jnp.mean(jax.vmap(selection.probabilities)(sets)[:, 0])

    r = jax.lax.map(r_of, (values, jr.split(key, len(values))), batch_size=32)
    r = r / jnp.mean(r)
    kl = jax.scipy.special.xlogy(r, r) + r * log_ratio + stein
    return jnp.mean(kl), jnp.mean(r * values)


def run_problem(seed: int, d: int, kind: str, quick: bool) -> list[dict[str, Any]]:
    keys = jr.split(jr.key(seed), 6)
    mixture_key, critic_key, sample_key, tilt_key, fit_key, choice_key = keys
    mixture = Mixture(d, DISTANCES[kind], key=mixture_key)
    critic = Critic(d, key=critic_key)
    policy = mixture.policy(solver=diffrax.Heun(), num_steps=32)
    observations = jnp.zeros((256, 1))  # the velocity ignores them
    num = 4096 if quick else 32768
    actions = mixture.sample(num, key=sample_key)
    q = jax.vmap(lambda a: critic(None, a))(mixture.sample(8 * num, key=tilt_key))
    q = np.asarray(q, np.float64)
    rows = []

    def record(name, radius, kl, gain, folded, seconds):
        row = dict(seed=seed, dimension=d, modes=kind, method=name, radius=radius)
        row |= dict(true_kl=float(kl), gain=float(gain), folded=100 * float(folded))
        rows.append(row | dict(efficiency=gain / best_gain(q, kl), seconds=seconds))

    def make(name: str, radius: Array) -> ff.NaturalStep | ff.Residual:
        if name in STEPS:
            return ff.NaturalStep(STEPS[name], radius)
        metric, damping = RESIDUALS[name]
        num_updates = 50 if quick else 1000
        return ff.Residual(
            metric, radius, damping=damping, num_updates=num_updates, width_size=64, progress=False
        )

    def refine(name: str, radius: Array) -> ff.RefinedPolicy:
        method = make(name, radius)
        return ff.refine(policy, critic, method, observations=observations, key=fit_key)

    few = actions[: num // 8]
    for radius in RADII[:1] if quick else RADII:
        r = jnp.asarray(radius)
        for name in [*STEPS, *RESIDUALS]:
            start = time.perf_counter()
            refined = refine(name, r)
            jax.block_until_ready(eqx.filter(refined, eqx.is_array))
            seconds = time.perf_counter() - start
            log_ratio, stein, after, before, folded = (
                np.asarray(x, np.float64) for x in true_terms(refined, mixture, critic, actions)
            )
            gain = (after - before).mean()
            record(name, radius, (log_ratio + stein).mean(), gain, folded.mean(), seconds)
        for name, of in SELECTIONS.items():
            if name == "best of 8" and radius != RADII[-1]:
                continue  # it has no radius of its own
            if of is None:
                zeros = jnp.zeros(len(few))
                terms = zeros, zeros, jax.vmap(lambda a: critic(None, a))(few)
            else:  # half of the KL for the map, and half for the choice
                terms = true_terms(refine(of, r / 2), mixture, critic, few)[:3]
            if name == "best of 8":
                selection: ff.AbstractSelection = ff.BestOf(policy, critic, 8)
            else:
                selection = ff.Resample(policy, critic, r if of is None else r / 2, n=32)
            log_ratio, stein, values = terms
            kl, value = selected(selection, log_ratio, stein, values, choice_key)
            record(name, radius, float(kl), float(value) - q.mean(), 0.0, math.nan)
    return rows


def run(seeds: int, quick: bool) -> list[dict[str, Any]]:
    rows = []
    for d in DIMENSIONS[:1] if quick else DIMENSIONS:
        for kind in DISTANCES:
            for seed in range(seeds):
                rows += run_problem(seed, d, kind, quick)
                print(f"efficiency: {d} dimensions, {kind} modes, seed {seed}", flush=True)
    return rows


def of(rows, d, kind, method, radius, column) -> list[float]:
    return [
        row[column]
        for row in rows
        if (row["dimension"], row["modes"], row["method"], row["radius"])
        == (d, kind, method, radius)
    ]


def ratios_to_euclidean(rows, d, kind, method, radius) -> list[float]:
    """The gain over that of the Euclidean metric, both at the radius that was measured."""
    euclidean = of(rows, d, kind, method.split(",")[0] + ", Euclidean", radius, "gain")
    return [
        x / y for x, y in zip(of(rows, d, kind, method, radius, "gain"), euclidean, strict=True)
    ]


def claims(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    found = []
    settings = dict.fromkeys((row["dimension"], row["radius"]) for row in rows)
    for d, radius in settings:
        best = max(
            np.mean(of(rows, d, "far", name, radius, "efficiency"))
            for name in SELECTIONS
            if name != "best of 8"
        )
        text = f"with reweighting, far modes, d = {d}, {radius:g} nats: 0.85 of the gain of π*"
        found.append(claim(text, best, best >= 0.85))
        for method in ("step, ObservedInformation", "residual, FisherRao"):
            for kind in DISTANCES:
                mean, width = mean_and_interval(ratios_to_euclidean(rows, d, kind, method, radius))
                text = (
                    f"{method}, {kind} modes, d = {d}, {radius:g} nats: gains more than Euclidean, "
                    "outside the interval"
                )
                found.append(claim(text, mean, mean - width > 1))
    return found


def print_table(rows: list[dict[str, Any]]) -> None:
    for d, kind in dict.fromkeys((row["dimension"], row["modes"]) for row in rows):
        for radius in sorted({row["radius"] for row in rows}):
            print(f"\nd = {d}, {kind} modes, {radius:g} nats: mean over mixtures ± 95% interval")
            print(
                f"{'':<30}{'true KL':>16}{'gain in E[Q]':>16}{'/ gain of π*':>16}"
                f"{'/ Euclidean':>16}{'folded %':>10}{'seconds':>9}"
            )
            for name in NAMES:
                if len(of(rows, d, kind, name, radius, "gain")) == 0:
                    continue
                line = ""
                for column in ("true_kl", "gain", "efficiency"):
                    mean, width = mean_and_interval(of(rows, d, kind, name, radius, column))
                    line += f"{f'{mean:.3f} ± {width:.3f}':>16}"
                cell = ""
                if name not in SELECTIONS:
                    mean, width = mean_and_interval(
                        ratios_to_euclidean(rows, d, kind, name, radius)
                    )
                    cell = f"{mean:.2f} ± {width:.2f}"
                folded, seconds = (
                    np.median(of(rows, d, kind, name, radius, x)) for x in ("folded", "seconds")
                )
                print(f"{name:<30}{line}{cell:>16}{folded:>10.2f}{seconds:>9.1f}")


def plot(rows: list[dict[str, Any]]) -> Figure:
    problems = list(dict.fromkeys((row["dimension"], row["modes"]) for row in rows))
    figure = Figure(figsize=(3.1 * len(problems) / 2 + 3, 8), layout="constrained")
    panels = figure.subplots(2, -(-len(problems) // 2), sharex=True, sharey=True, squeeze=False)
    names = [name for name in NAMES if any(row["method"] == name for row in rows)]
    radii = sorted({row["radius"] for row in rows})
    for panel, (d, kind) in zip(panels.T.reshape(-1), problems, strict=False):
        for i, radius in enumerate(radii):
            cells, y = [], []
            for j, name in enumerate(names):
                values = of(rows, d, kind, name, radius, "efficiency")
                if len(values) > 0:
                    cells.append(mean_and_interval(values))
                    y.append(-j - 0.25 * (i - 0.5))
            mean, width = np.array(cells).T
            panel.errorbar(
                mean, y, xerr=width, fmt="o", markersize=4, capsize=2, label=f"{radius:g} nats"
            )
        panel.axvline(1.0, color="0.5", linewidth=1)
        panel.set_yticks(-np.arange(len(names)), names)
        panel.set(title=f"d = {d}, {kind} modes", xlim=(0, 1.15))
    for panel in panels[-1]:
        panel.set_xlabel("gain / gain of π* at the same KL")
    panels[0, 0].legend(frameon=False, loc="lower left", fontsize=8)
    return figure
