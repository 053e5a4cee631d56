"""How good the score of a learned flow is, by estimator and time, and what it does to the KL.

The behaviour is a two-dimensional Gaussian mixture whose score is known. A flow is trained on
samples of it; one seed is one mixture, one dataset and one training. Then a step of a fixed
radius is made with the fixed and with the calibrated score, and the KL that each measures is held
against the KL by the flow's own density, and by that of the mixture.
"""

from typing import Any

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jaxtyping import Array, Float, Scalar
from matplotlib.figure import Figure

import fisher_flow as ff

from .problems import claim, mean_and_interval, Mixture


TIMES = [0.7, 0.75, 0.8, 0.85, 0.9, 0.92, 0.94, 0.95, 0.96, 0.97, 0.98]
ESTIMATORS = {
    "paper": lambda t: ff.PaperScore(t),
    "rescaled (order 1)": lambda t: ff.PerturbedScore(t, order=1),
    "Richardson (order 2)": lambda t: ff.PerturbedScore(t, order=2),
}
RADIUS = 0.3


@eqx.filter_jit
def relative_error(
    score: ff.AbstractScore, policy: ff.FlowPolicy, mixture: Mixture, actions: Array
) -> Scalar:
    def squares(a):
        true = jax.grad(mixture.log_prob)(a)
        return jnp.sum((score(policy, jnp.zeros(1), a) - true) ** 2), jnp.sum(true**2)

    error, norm = jax.lax.map(squares, actions, batch_size=1024)
    return jnp.sqrt(jnp.mean(error) / jnp.mean(norm))


def errors(policy: ff.FlowPolicy, mixture: Mixture, actions: Array) -> dict[str, list[float]]:
    return {
        name: [float(relative_error(make(jnp.asarray(t)), policy, mixture, actions)) for t in TIMES]
        for name, make in ESTIMATORS.items()
    }


def critic(observation: Any, action: Float[Array, " 2"]) -> Scalar:
    return jnp.sin(1.2 * action[0]) + 0.5 * action[1] - 0.1 * action[1] ** 2


@eqx.filter_jit
def true_kls(
    refined: ff.RefinedPolicy, exact_flow: ff.FlowPolicy, mixture: Mixture, actions: Array
):
    """The KL of the transport map by the density of the flow, and by that of the mixture."""
    o = jnp.zeros(1)

    def terms(a):
        δ, push = jax.linearize(lambda a: refined.displacement(o, a), a)
        J = jax.vmap(push, out_axes=1)(jnp.eye(2))
        log_det = jnp.linalg.slogdet(jnp.eye(2) + J)[1]
        flow = exact_flow.log_prob(o, a) - exact_flow.log_prob(o, a + δ)
        return flow - log_det, mixture.log_prob(a) - mixture.log_prob(a + δ) - log_det

    return jax.lax.map(terms, actions, batch_size=256)


def run_seed(seed: int, num_updates: int, num_actions: int) -> dict[str, Any]:
    mixture_key, data_key, held_key, init_key, fit_key, key = jr.split(jr.key(seed), 6)
    mixture = Mixture(2, key=mixture_key)
    data = mixture.sample(50_000, key=data_key)
    held_out = mixture.sample(num_actions, key=held_key)
    observations = jnp.zeros((len(data), 1))
    velocity = ff.VelocityMLP(1, (2,), width_size=256, depth=3, key=init_key)
    policy = ff.FlowPolicy(velocity, (2,))
    policy = ff.fit_flow(
        policy, observations, data, num_updates=num_updates, progress=False, key=fit_key
    )
    row: dict[str, Any] = dict(seed=seed, errors=errors(policy, mixture, held_out))
    exact = ff.FlowPolicy(mixture.velocity(), (2,))
    row["exact_errors"] = errors(exact, mixture, held_out)

    calibrated = ff.calibrate_score(policy, observations[: len(held_out)], held_out, key=key)
    row["calibrated"] = dict(
        time=float(calibrated.time),
        order=int(calibrated.order),
        predicted_error=float(calibrated.relative_error),
        error=float(relative_error(calibrated, policy, mixture, held_out)),
        paper_error=float(relative_error(ff.PaperScore(0.8), policy, mixture, held_out)),
    )

    # Sampled finely, so that the actions follow the density of the flow.
    exact_flow = ff.FlowPolicy(policy.velocity_field, (2,), solver=diffrax.Tsit5(), num_steps=32)
    keys = jr.split(jr.key(seed + 1000), num_actions // 4)
    actions = jax.jit(jax.vmap(lambda k: exact_flow.draw(jnp.zeros(1), key=k)))(keys)
    row["kl"] = {}
    # By default `refine` calibrates on actions that it draws.
    for name, score in {
        "time 0.95": ff.PerturbedScore(time=0.95),
        "calibrated": ff.PerturbedScore(),
    }.items():
        step = ff.NaturalStep(ff.ObservedInformation(score), RADIUS)
        refined = ff.refine(exact_flow, critic, step, observations=observations, key=key)
        report = ff.certify(refined, critic, observations, key=jr.key(seed + 2000))
        by_flow, by_mixture = (
            float(x.mean()) for x in true_kls(refined, exact_flow, mixture, actions)
        )
        row["kl"][name] = dict(
            measured=float(report.kl),
            by_flow=by_flow,
            by_mixture=by_mixture,
            gain=float(report.improvement),
            stein=float(report.stein),
        )
    return row


def run(seeds: int, quick: bool) -> list[dict[str, Any]]:
    rows = []
    for seed in range(seeds):
        rows.append(run_seed(seed, 200 if quick else 15_000, 1024 if quick else 8192))
        print(f"score: seed {seed}", flush=True)
    return rows


def claims(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    chosen = [row["calibrated"] for row in rows]
    error = np.mean([x["error"] for x in chosen])
    ratio = np.mean([x["error"] / x["paper_error"] for x in chosen])
    miss = np.mean([abs(x["error"] - x["predicted_error"]) for x in chosen])
    return [
        claim("calibrated score: relative error at most 0.2", error, error <= 0.2),
        claim("at most a quarter of that of the paper's at 0.8", ratio, ratio <= 0.25),
        claim("predicted error within 0.05 of the true one", miss, miss <= 0.05),
    ]


def print_table(rows: list[dict[str, Any]]) -> None:
    print(f"\n{'relative error of the score':<34}" + "".join(f"{t:>7g}" for t in TIMES))
    for column, velocity in (("exact_errors", "exact velocity"), ("errors", "learned")):
        for name in ESTIMATORS:
            mean = np.mean([row[column][name] for row in rows], axis=0)
            print(f"{f'{velocity}, {name}':<34}" + "".join(f"{x:7.3f}" for x in mean))
    for key in ("time", "order", "error", "predicted_error", "paper_error"):
        mean, width = mean_and_interval([row["calibrated"][key] for row in rows])
        print(f"calibrated on held-out data, {key:<16}{mean:.3f} ± {width:.3f}")
    columns = ("measured KL", "by the flow", "by the mixture", "gain in Q", "Stein")
    print(f"\n{f'a step of {RADIUS} nats':<20}" + "".join(f"{column:>16}" for column in columns))
    for name in rows[0]["kl"]:
        print(f"{name:<20}", end="")
        for column in ("measured", "by_flow", "by_mixture", "gain", "stein"):
            mean, width = mean_and_interval([row["kl"][name][column] for row in rows])
            print(f"{f'{mean:.3f} ± {width:.3f}':>16}", end="")
        print()


def plot(rows: list[dict[str, Any]]) -> Figure:
    figure = Figure(figsize=(8.5, 3.6), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    for name, colour in zip(ESTIMATORS, ("C3", "C1", "C0"), strict=True):
        for i, row in enumerate(rows):
            options: dict[str, Any] = dict(color=colour, alpha=0.6)
            label = name if i == 0 else None
            axes[0].plot(TIMES, row["exact_errors"][name], "-", label=label, **options)
            axes[1].plot(TIMES, row["errors"][name], "-", **options)
    for i, row in enumerate(rows):
        chosen = row["calibrated"]
        label = "calibrate_score" if i == 0 else None
        axes[1].plot(chosen["time"], chosen["error"], "k*", markersize=11, label=label)
    titles = "exact velocity (one line a mixture)", "learned flow"
    for panel, title in zip(axes, titles, strict=True):
        panel.set(title=title, xlabel="time", ylim=(0, 1.5))
        panel.legend(loc="upper left", fontsize=8)
    axes[0].set_ylabel("relative error of the score")
    return figure
