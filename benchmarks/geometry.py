"""What each metric of fisher_flow buys, where everything is known exactly.

The behaviour is a Gaussian mixture with its exact velocity, the critic a formula, and one seed is
one mixture with its critic. Every method is given the same radius, and judged by the true KL and
the gain in E[Q] that the mixture's own density and samples say it has.
"""

import argparse
import importlib.metadata
import json
import math
import time
from pathlib import Path
from typing import Any

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import scipy.optimize
import scipy.stats
from jaxtyping import Array, Float, PRNGKeyArray, Scalar
from matplotlib.figure import Figure

import fisher_flow as ff


STEPS = [ff.Euclidean(), ff.AveragedFisher(), ff.ScoreOuterProduct(), ff.ObservedInformation()]
# With the damping: the published method has none, and the Euclidean metric is its own.
RESIDUALS = [(ff.Euclidean(), 0.0), (ff.ScoreOuterProduct(), 0.0), (ff.FisherRao(), 0.1)]
OURS = ("step, ObservedInformation", "residual, FisherRao")
COLUMNS = dict(measured_kl=4, true_kl=4, folded=2, gain=3, efficiency=2, ratio=2)  # and digits
MIN_RATIO = 1.4  # claim 1 of ours: the gain over that of Euclidean at the same measured KL
MAX_MISS = 0.1  # claim 2 of ours: the relative distance of the measured KL from the radius


class Mixture(eqx.Module):
    """Three Gaussians, each rotated and stretched at random; equally likely."""

    means: Float[Array, "3 d"]
    deviations: Float[Array, "3 d"]
    rotations: Float[Array, "3 d d"]

    def __init__(self, dimension: int, *, key: PRNGKeyArray):
        mean_key, deviation_key, rotation_key = jr.split(key, 3)
        self.means = 1.5 * jr.normal(mean_key, (3, dimension))
        low, high = math.log(0.15), math.log(1.0)
        self.deviations = jnp.exp(jr.uniform(deviation_key, (3, dimension), None, low, high))
        self.rotations = jr.orthogonal(rotation_key, dimension, (3,))

    def velocity(self) -> ff.GaussianMixtureVelocity:
        factors = self.rotations * self.deviations[:, None]
        return ff.GaussianMixtureVelocity(self.means, factors @ factors.mT)

    def sample(self, num: int, *, key: PRNGKeyArray) -> Float[Array, "num d"]:
        component_key, noise_key = jr.split(key)
        k = jr.randint(component_key, (num,), 0, 3)
        noise = self.deviations[k] * jr.normal(noise_key, (num, self.means.shape[1]))
        return self.means[k] + jnp.einsum("nij,nj->ni", self.rotations[k], noise)

    def log_prob(self, a: Float[Array, " d"]) -> Scalar:
        z = jnp.einsum("kji,kj->ki", self.rotations, a - self.means) / self.deviations
        exponents = -0.5 * jnp.sum(z**2, axis=1) - jnp.sum(jnp.log(self.deviations), axis=1)
        log_normaliser = 0.5 * a.size * math.log(2 * math.pi) + math.log(3)
        return jax.scipy.special.logsumexp(exponents) - log_normaliser


class Critic(eqx.Module):
    """A linear slope under waves in random directions: smooth, with many local maxima."""

    slope: Float[Array, " d"]
    frequencies: Float[Array, "waves d"]
    phases: Float[Array, " waves"]

    def __init__(self, dimension: int, frequency: float, *, key: PRNGKeyArray):
        slope_key, frequency_key, phase_key = jr.split(key, 3)
        self.slope = jr.normal(slope_key, (dimension,)) / math.sqrt(dimension)
        self.frequencies = frequency * jr.normal(frequency_key, (8, dimension))
        self.phases = jr.uniform(phase_key, (8,), maxval=2 * math.pi)

    def __call__(self, observation: Any, action: Float[Array, " d"]) -> Scalar:
        waves = jnp.sin(self.frequencies @ action + self.phases)
        return self.slope @ action + jnp.sum(waves) / math.sqrt(waves.size)


@eqx.filter_jit
def true_terms(refined: ff.RefinedPolicy, mixture: Mixture, critic: Critic, actions: Array):
    """The integrand of the KL, the gain in Q and whether the map folds, at each exact sample.

    KL(T#p || p) = E[log p(a) - log|det(I + J)| - log p(T(a))], with the density of the mixture.
    """
    o = jnp.zeros(1)
    identity = jnp.eye(actions.shape[1])

    def terms(a):
        δ, push = jax.linearize(lambda a: refined.displacement(o, a), a)
        J = jax.vmap(push, out_axes=1)(identity)
        sign, log_det = jnp.linalg.slogdet(identity + J)
        kl = mixture.log_prob(a) - log_det - mixture.log_prob(a + δ)
        return kl, critic(o, a + δ) - critic(o, a), sign <= 0

    return jax.lax.map(terms, actions, batch_size=256)


def best_gain(q: Float[np.ndarray, " num"], kl: float) -> float:
    """The gain in E[Q] of p exp(Q / β), the best of all policies at this KL from p.

    Self-normalised importance weights on exact samples, and β by bisection.
    """

    def tilted(log_inverse_beta):
        tilt = math.exp(log_inverse_beta) * (q - q.max())
        weights = np.exp(tilt)
        log_mean = math.log(weights.mean())
        weights /= weights.sum()
        return float(weights @ tilt) - log_mean, float(weights @ q - q.mean())

    if kl <= 0:
        return math.nan
    root = scipy.optimize.bisect(lambda x: tilted(x)[0] - kl, -12.0, 5.0, xtol=1e-6)
    return tilted(root)[1]


def methods(radius: float, num_updates: int) -> dict[str, ff.NaturalStep | ff.Residual]:
    r = jnp.asarray(radius)  # an array, so that one compilation serves all the radii
    steps = {f"step, {type(metric).__name__}": ff.NaturalStep(metric, r) for metric in STEPS}
    steps["step, ObservedInformation, 4 short"] = ff.NaturalStep(radius=r, num_steps=4)
    options: dict[str, Any] = dict(num_updates=num_updates, width_size=64, progress=False)
    residuals = {
        f"residual, {type(metric).__name__}": ff.Residual(metric, r, damping=damping, **options)
        for metric, damping in RESIDUALS
    }
    return steps | residuals


def run_seed(seed: int, args: argparse.Namespace) -> list[dict[str, Any]]:
    mixture_key, critic_key, sample_key, tilt_key, fit_key, certify_key = jr.split(jr.key(seed), 6)
    mixture = Mixture(args.dimension, key=mixture_key)
    critic = Critic(args.dimension, args.frequency, key=critic_key)
    policy = ff.FlowPolicy(
        mixture.velocity(), (args.dimension,), solver=diffrax.Heun(), num_steps=args.num_steps
    )
    observations = jnp.zeros((256, 1))  # the velocity ignores them
    actions = mixture.sample(args.num_samples, key=sample_key)
    q = jax.vmap(lambda a: critic(None, a))(mixture.sample(4 * args.num_samples, key=tilt_key))
    q = np.asarray(q, np.float64)

    rows = []
    for radius in args.radius:
        gains_of_euclidean = {}
        for name, method in methods(radius, args.num_updates).items():
            start = time.perf_counter()
            refined = ff.refine(policy, critic, method, observations=observations, key=fit_key)
            jax.block_until_ready(eqx.filter(refined, eqx.is_array))
            seconds = time.perf_counter() - start
            report = ff.certify(refined, critic, observations, num_actions=8192, key=certify_key)
            terms = true_terms(refined, mixture, critic, actions)
            (kl, gain, folded), (kl_stderr, gain_stderr, _) = (
                [float(f(np.asarray(x, np.float64))) for x in terms]
                for f in (np.mean, scipy.stats.sem)
            )
            row = dict(seed=seed, radius=radius, method=name, seconds=seconds)
            row |= dict(measured_kl=float(report.kl), measured_kl_stderr=float(report.kl_stderr))
            row |= dict(true_kl=kl, true_kl_stderr=kl_stderr, folded=100 * folded)
            row |= dict(gain=gain, gain_stderr=gain_stderr, efficiency=gain / best_gain(q, kl))
            row["ratio"] = gain / gains_of_euclidean.setdefault(name.split(",")[0], gain)
            rows.append(row)
            print(
                f"seed {seed}  radius {radius:<5g} {name:<34} true KL {kl:.4f}  gain {gain:.4f}  "
                f"efficiency {row['efficiency']:.2f}  {seconds:.1f} s",
                flush=True,
            )
    return rows


def mean_and_interval(values: list[float]) -> tuple[float, float]:
    """The mean, and the half-width of its 95% t-interval."""
    n = len(values)
    width = scipy.stats.t.ppf(0.975, n - 1) * scipy.stats.sem(values) if n > 1 else math.nan
    return float(np.mean(values)), float(width)


def summarise(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Means over seeds, each with the half-width of its 95% t-interval; the median of seconds."""
    summary = []
    for radius, name in dict.fromkeys((row["radius"], row["method"]) for row in rows):
        group = [row for row in rows if (row["radius"], row["method"]) == (radius, name)]
        seconds = float(np.median([row["seconds"] for row in group]))
        mean = dict(radius=radius, method=name, seconds=seconds)
        for column in COLUMNS:
            mean[column], mean[column + "_interval"] = mean_and_interval(
                [row[column] for row in group]
            )
        summary.append(mean)
    return summary


def print_table(summary: list[dict[str, Any]]) -> None:
    print(
        f"\n{'method':<36}{'radius':>6}{'measured KL':>17}{'true KL':>17}{'folded %':>13}"
        f"{'gain in E[Q]':>15}{'efficiency':>13}{'/ Euclidean':>13}{'seconds':>9}"
    )
    print(f"{'behaviour':<42}{'0':>17}{'0':>17}{'0':>13}{'0':>15}")
    for row in summary:
        print(f"{row['method']:<36}{row['radius']:>6g}", end="")
        for (column, digits), width in zip(COLUMNS.items(), (17, 17, 13, 15, 13, 13), strict=True):
            cell = f"{row[column]:.{digits}f} ± {row[column + '_interval']:.{digits}f}"
            print(f"{cell:>{width}}", end="")
        print(f"{row['seconds']:>9.1f}")


def check_claims(summary: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Both claims at every radius, from the means over seeds."""
    claims = []
    for row in summary:
        if row["method"] in OURS:
            claim = f"{row['method']} gains at least {MIN_RATIO} times Euclidean"
            holds = row["ratio"] >= MIN_RATIO
            claims.append(dict(claim=claim, radius=row["radius"], value=row["ratio"], holds=holds))
            miss = abs(row["measured_kl"] / row["radius"] - 1)
            claim = f"{row['method']} measures a KL within {100 * MAX_MISS:g}% of the radius"
            holds = miss <= MAX_MISS
            claims.append(dict(claim=claim, radius=row["radius"], value=miss, holds=holds))
    return claims


def plot(rows: list[dict[str, Any]], summary: list[dict[str, Any]]) -> Figure:
    figure = Figure(figsize=(10.5, 4.4), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=[1.5, 1])
    names = list(dict.fromkeys(row["method"] for row in rows))
    radii = sorted({row["radius"] for row in rows})
    for i, radius in enumerate(radii):
        at_radius = [row for row in summary if row["radius"] == radius]
        y = [-names.index(row["method"]) - 0.2 * (i - (len(radii) - 1) / 2) for row in at_radius]
        ratio, width = ([row[x] for row in at_radius] for x in ("ratio", "ratio_interval"))
        left.errorbar(ratio, y, xerr=width, fmt="o", capsize=3, label=f"{radius:g} nats")
        measured, true = (
            [row[column] for row in rows if row["radius"] == radius]
            for column in ("measured_kl", "true_kl")
        )
        right.plot(measured, true, "o", alpha=0.6)
    left.axvline(1.0, color="0.5", linewidth=1)
    left.set_yticks(-np.arange(len(names)), names)
    left.set(xlabel="gain in E[Q] / gain of Euclidean", xlim=(0, None))
    left.set_title("Gain at one radius (mean over mixtures, 95% interval)")
    left.legend(title="radius", frameon=False, loc="upper right")
    ends = np.array([radii[0] / 4, radii[-1] * 1.6])
    right.plot(ends, ends, color="k", linewidth=1)
    right.fill_between(ends, 0.9 * ends, 1.1 * ends, color="k", alpha=0.1, linewidth=0)
    right.set(xscale="log", yscale="log", xlim=ends, ylim=ends, aspect="equal")
    right.set(xlabel="measured KL (nats)", ylabel="true KL (nats)")
    right.set_title("True KL (band ± 10%)")
    for axis in (right.xaxis, right.yaxis):
        axis.set_ticks(radii, [f"{radius:g}" for radius in radii])
        axis.set_ticks([], minor=True)
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=2, help="number of mixtures")
    parser.add_argument("--dimension", type=int, default=5, help="of an action")
    parser.add_argument("--radius", type=float, nargs="+", default=[0.05, 0.5], help="KLs in nats")
    parser.add_argument("--num-updates", type=int, default=1500, help="of a residual")
    parser.add_argument("--frequency", type=float, default=0.45, help="of the waves of the critic")
    parser.add_argument("--num-samples", type=int, default=65536, help="for the true KL and gain")
    parser.add_argument("--num-steps", type=int, default=32, help="Heun steps of the policy")
    parser.add_argument("--out", type=Path, default="geometry.json", help="the JSON to write")
    parser.add_argument("--figure", type=Path, help="the PNG to write; by default beside --out")
    parser.add_argument("--quick", action="store_true", help="a smoke test: little of everything")
    args = parser.parse_args()
    if args.quick:
        args.seeds, args.radius = 1, args.radius[:1]
        args.num_updates, args.num_samples = 50, 4096
    figure_path = args.figure or args.out.with_suffix(".png")

    rows = [row for seed in range(args.seeds) for row in run_seed(seed, args)]
    summary = summarise(rows)
    claims = check_claims(summary)
    print_table(summary)
    print(f"\n{args.seeds} mixtures: means ± 95% intervals; the median of seconds.\n")
    for claim in claims:
        verdict = "holds" if claim["holds"] else "DOES NOT HOLD"
        print(f"{verdict:<15}radius {claim['radius']:<6g}{claim['claim']}: {claim['value']:.3g}")
    try:
        version = importlib.metadata.version("fisher_flow")
    except importlib.metadata.PackageNotFoundError:
        version = "not installed"
    results = dict(
        versions=dict(jax=jax.__version__, fisher_flow=version),
        settings={k: v for k, v in vars(args).items() if k not in ("out", "figure", "seeds")},
        seeds=list(range(args.seeds)),
        claims=claims,
        summary=summary,
        rows=rows,
    )
    for path in (args.out, figure_path):
        path.parent.mkdir(parents=True, exist_ok=True)
    # JSON knows no NaN, which an interval over one seed is.
    text = json.dumps(results, indent=1).replace("NaN", "null")
    args.out.write_text(text + "\n", encoding="utf-8")
    plot(rows, summary).savefig(figure_path, dpi=110)
    print(f"\nWrote {args.out} and {figure_path}.")


if __name__ == "__main__":
    main()
