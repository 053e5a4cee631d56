"""How near the best policy each metric brings a map, as the temperature β doubles.

π* ∝ p exp(Q / β) maximises E[Q] - β KL over all policies. Here, on the line, is the displacement
that maximises E[Q'(a) δ] - β E[cost of δ]: for a metric that prices single steps, δ = G⁻¹ Q' / β
with the library's G; for `FisherRao`, the one whose flux p δ is the integral of p (E[Q] - Q) / β,
which the library's cost is checked to be stationary at. Then KL(T#p ‖ π*) by quadrature. One seed
is one mixture with its critic.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from matplotlib.figure import Figure

import fisher_flow as ff

from .problems import claim, Critic, mean_and_interval, Mixture


BETAS = [2.0**k for k in range(1, 7)]
DAMPING = 0.2  # of the mean eigenvalue, as by default in `NaturalStep`; of single steps only
SCORE = ff.PerturbedScore(time=0.999)  # of an exact velocity, in float64
METRICS = {
    "FisherRao": ff.FisherRao(SCORE),
    "ObservedInformation, damped": ff.ObservedInformation(SCORE),
    "ScoreOuterProduct, damped": ff.ScoreOuterProduct(SCORE, normalise=False),
    "AveragedFisher": ff.AveragedFisher(SCORE, num_samples=512, damping=0.0, normalise=False),
    "Euclidean": ff.Euclidean(),
    "no refinement": None,
}


class Line:
    """A mixture on the line with a critic, at the nodes of a quadrature over nearly all of it."""

    def __init__(self, mixture: Mixture, critic: Critic):
        self.mixture, self.critic = mixture, critic
        self.policy, self.o = mixture.policy(num_steps=50), jnp.zeros(1)
        ends = mixture.means[:, 0], 8.5 * mixture.deviations[:, 0]
        low, high = jnp.min(ends[0] - ends[1]), jnp.max(ends[0] + ends[1])
        self.a = jnp.linspace(low, high, 4001)[:, None]
        self.log_p = jax.vmap(mixture.log_prob)(self.a)
        # The trapezium rule converges faster than any power where all derivatives vanish.
        self.mass = jnp.exp(self.log_p) * (self.a[1, 0] - self.a[0, 0])
        self.q = jax.vmap(lambda a: critic(self.o, a))(self.a)

    def mean(self, values: Any) -> Any:
        return jnp.sum(self.mass * values)

    def minimiser(self, name: str) -> tuple[Any, Any]:
        """β δ and its derivative, at the nodes."""
        if name == "no refinement":
            return jnp.zeros_like(self.q), jnp.zeros_like(self.q)
        if name == "FisherRao":
            # s δ + δ' = u, that is (p δ)' = p u
            u = self.q - self.mean(self.q)
            # From the nearer end, lest the tail drown in rounding.
            flux = jnp.cumsum(self.mass * u) - 0.5 * self.mass * u
            from_right = jnp.cumsum((self.mass * u)[::-1])[::-1] - 0.5 * self.mass * u
            middle = jnp.arange(len(u)) < jnp.argmax(jnp.cumsum(self.mass) > 0.5)
            δ = -jnp.where(middle, flux, -from_right) / jnp.exp(self.log_p)
            s = jax.vmap(jax.grad(self.mixture.log_prob))(self.a)[:, 0]
            return δ, -u - s * δ

        def operator(a):
            return METRICS[name].operator(self.policy, self.o, a, key=jr.key(0)).as_matrix()[0, 0]

        damping = DAMPING * self.mean(jax.vmap(operator)(self.a)) if "damped" in name else 0.0

        def step(a):
            return jax.grad(self.critic, 1)(self.o, a) / (operator(a) + damping)

        δ, slope = jax.vmap(lambda a: jax.jvp(step, (a,), (jnp.ones_like(a),)))(self.a)
        return δ[:, 0], slope[:, 0]

    def stationarity(self, name: str) -> float:
        """2 E[cost] / E[Q' δ] by the library's cost: 1 where a quadratic is stationary."""
        δ, slope = self.minimiser(name)

        def cost(a, δ, slope):
            field = lambda x: δ + slope * (x - a)
            return METRICS[name].cost(self.policy, self.o, a, field, key=jr.key(0))

        costs = jax.vmap(cost)(self.a, δ, slope)
        gradients = jax.vmap(jax.grad(self.critic, 1), (None, 0))(self.o, self.a)[:, 0]
        return float(2 * self.mean(costs) / self.mean(gradients * δ))

    def kl_to_the_best(self, name: str, beta: float) -> float:
        """KL(T#p ‖ π*), NaN if the map folds where more than 1e-9 of the mass is."""
        δ, slope = (x / beta for x in self.minimiser(name))
        moved = self.a + δ[:, None]
        log_p_moved = jax.vmap(self.mixture.log_prob)(moved)
        q_moved = jax.vmap(lambda a: self.critic(self.o, a))(moved)
        log_ratio = self.log_p - jnp.log1p(slope) - log_p_moved - q_moved / beta
        folds = slope <= -1
        if self.mean(folds) > 1e-9:
            return float("nan")
        log_z = jnp.log(self.mean(jnp.exp(self.q / beta)) / self.mean(1.0))
        return float(self.mean(jnp.where(folds, 0, log_ratio)) / self.mean(~folds) + log_z)


def run(seeds: int, quick: bool) -> list[dict[str, Any]]:
    rows = []
    with jax.enable_x64(True):
        for seed in range(seeds):
            mixture_key, critic_key = jr.split(jr.key(seed))
            mixture, critic = Mixture(1, 1.0, 0.5, key=mixture_key), Critic(1, key=critic_key)
            line = Line(mixture, critic)
            for name in METRICS:
                stationarity = line.stationarity(name) if name == "FisherRao" else math.nan
                for beta in BETAS[:3] if quick else BETAS:
                    kl = line.kl_to_the_best(name, beta)
                    row = dict(seed=seed, metric=name, beta=beta, kl=kl, stationarity=stationarity)
                    rows.append(row)
            print(f"optimality: seed {seed}", flush=True)
    return rows


def factors(rows: list[dict[str, Any]], name: str) -> list[float]:
    """By how much the KL falls at the last doubling of β, of each seed."""
    last = sorted({row["beta"] for row in rows})[-2:]
    kls = [[row["kl"] for row in rows if (row["metric"], row["beta"]) == (name, b)] for b in last]
    return [before / after for before, after in zip(*kls, strict=True)]


def claims(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    # NumPy's, which a NaN does not pass.
    least = np.min(factors(rows, "FisherRao"))
    miss = np.max([abs(row["stationarity"] - 1) for row in rows if row["metric"] == "FisherRao"])
    found = [
        claim("KL to π* falls at least 12-fold per doubling with FisherRao", least, least >= 12),
        claim("the library's FisherRao cost is stationary there", miss, miss <= 1e-5),
    ]
    for name in METRICS:
        if name != "FisherRao":
            most = np.max(factors(rows, name))
            found.append(claim(f"and at most 6-fold with {name}", most, most <= 6))
    return found


def geometric_means(rows: list[dict[str, Any]], name: str) -> list[float]:
    """Over problems, at every β; NaN where the map of one of them folds."""
    return [
        float(np.exp(np.mean([np.log(r["kl"]) for r in rows if (r["metric"], r["beta"]) == key])))
        for key in [(name, beta) for beta in sorted({row["beta"] for row in rows})]
    ]


def print_table(rows: list[dict[str, Any]]) -> None:
    betas = sorted({row["beta"] for row in rows})
    print("\nKL(T#p || π*) by β: geometric mean over problems, nan where one folds; the last fall")
    print(f"{'':<28}" + "".join(f"{beta:>10g}" for beta in betas) + f"{'fall':>20}")
    for name in METRICS:
        mean, width = mean_and_interval(factors(rows, name))
        cells = "".join(f"{x:>10.1e}" for x in geometric_means(rows, name))
        print(f"{name:<28}{cells}{f'{mean:.1f} ± {width:.1f}':>20}")


def plot(rows: list[dict[str, Any]]) -> Figure:
    figure = Figure(figsize=(6, 4.4), layout="constrained")
    axes = figure.subplots()
    betas = sorted({row["beta"] for row in rows})
    for i, name in enumerate(METRICS):
        colour = "0.5" if name == "no refinement" else f"C{i}"
        mean = geometric_means(rows, name)
        axes.plot(betas, mean, "o-", markersize=4, color=colour, label=name)
    for order, style in ((2, ":"), (4, "--")):
        end = geometric_means(rows, "FisherRao" if order == 4 else "Euclidean")[-1]
        line = 2 * end * (np.array(betas) / betas[-1]) ** -float(order)
        axes.plot(betas, line, style, color="k", linewidth=1, label=f"$\\beta^{{-{order}}}$")
    axes.set(xlabel="temperature β", ylabel="KL(refined ‖ π*), nats")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.legend(frameon=False, fontsize=8)
    return figure
