import enum
from typing import TYPE_CHECKING

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Float, Scalar

from .._geometry import AbstractScore, CalibratedScore, PerturbedScore
from ._witness import Witness


if TYPE_CHECKING:
    import matplotlib.figure


class Verdict(enum.Enum):
    """The last line of a certificate: the promise holds, or the likeliest reason why it may not
    hold, with what to do.

    The promise is that the KL stays within the radius, and that the critic's value rises.
    """

    holds = "The promise holds: the KL is within the radius, and independent estimates agree on it."
    critic_not_finite = (
        "The critic, or its gradient, is not finite at some actions. They were left in place. "
        "Mend the critic: look for a division by zero or a logarithm at these actions."
    )
    beyond_data = (
        "Some actions lie where the unrefined policy never acts: their KL is infinite or unknown. "
        "Lower the `radius`, or write a critic that ignores entries of the action that never vary."
    )
    folds = (
        "The map is not one-to-one at too many actions, and the KL does not hold there. Raise the "
        "`damping`, lower the `radius`, or take more steps: `NaturalStep(num_steps=4)`."
    )
    sampler_differs = (
        "The steps of the sampler are too long for the flow: the KL of what acts differs from the "
        "KL of the flow, or is not known at some actions. Raise `num_steps` of the policy, or give "
        "it another `solver` such as `diffrax.Heun()`, and refine again."
    )
    score_uncalibrated = (
        "The estimates of the KL disagree, and no good time was found for the score. Train the "
        "flow longer, or pass more `observations` to `refine`."
    )
    stein_residual = (
        "The Stein residual is not zero: the score is not the score of the actions, and the KL by "
        "scores is wrong. Train the flow longer, or raise `num_steps` of the policy."
    )
    witnesses_disagree = (
        "The estimates of the KL disagree, and the reason is not known. Train the flow longer, or "
        "look at the densities: `policy.log_prob(observation, action)` at some actions."
    )
    radius_exceeded = (
        "The KL is above the radius by more than its error. Refine with more `observations`, or a "
        "larger `num_calibration`."
    )
    estimated = (
        "One of the two policies has no density. The KL is an estimate from nearest neighbours and "
        "may be off by tens of per cent: compare it only with estimates of the same kind."
    )
    unchecked = (
        "No independent estimate of the KL was made, or the error of an estimate is too large. "
        "Pass a larger `num_witnesses` and `num_actions` to `certify`."
    )
    no_gain = (
        "The gain cannot be told from zero. The critic may be flat or noisy here: certify with "
        "more `num_actions`, or train the critic longer."
    )


class Certificate(eqx.Module):
    """What a refinement costs and gains, measured; made by [`fisher_flow.certify`][].

    It prints as a table whose last line is the verdict. What was not measured is left out of the
    table, and is NaN here. Standard errors are over observations (over actions if there is one
    observation only).
    """

    verdict: Verdict = eqx.field(static=True)
    """Whether the promise holds, and if not, what to do."""

    kl: Scalar
    """The measured KL from the unrefined policy, in nats, averaged over observations. In a chain it
    is the KL from the flow underneath."""

    kl_stderr: Scalar
    """Its standard error."""

    kl_by_score: Scalar
    """The KL by scores alone, on all `num_actions`. `kl` is this plus a correction: the part of its
    difference from the KL by densities that is larger than chance. NaN for a steered policy and for
    a pair."""

    kl_upper: Scalar
    """An upper confidence limit of `kl` at the `level` that was asked for. It assumes that the mean
    over the observations is normally distributed, as it is for many observations. Where scores and
    densities differ by no more than chance, it assumes that the scores are right."""

    by_density: Witness
    """The KL by the densities of the flow in continuous time, and how it differs from scores."""

    by_steps: Witness
    """The KL of the samplers that act, by the density of the actions that their steps make. It
    differs from `by_density` where the steps are too long for the flow."""

    kl_predicted: Scalar
    """The mean cost by the metric of the flow; near `kl` for metrics that predict a KL."""

    radius: Scalar
    """The KL that was asked for."""

    folded: Scalar
    """The share of actions at which the map is not one-to-one. There `kl` does not hold; more than
    a few per cent make it unreliable. Raise the damping or lower the radius."""

    folded_upper: Scalar
    """An upper confidence limit of `folded`, exact for independent actions."""

    improvement: Scalar
    """The mean gain in the critic's value, in the units of the critic."""

    improvement_stderr: Scalar
    """Its standard error."""

    total_kl: Scalar
    """The KL from the flow underneath, in nats, through all the transport maps of a chain. With a
    [`fisher_flow.BestOf`][] or [`fisher_flow.Resample`][] it includes the choice, and is an upper
    bound."""

    total_kl_stderr: Scalar
    """Its standard error."""

    total_improvement: Scalar
    """The mean gain in the critic's value over the flow underneath."""

    total_improvement_stderr: Scalar
    """Its standard error."""

    stein: Scalar
    """The mean Stein residual. It should be zero within a few standard errors. If it is not, the
    score is not the score of the actions, and `kl_by_score` is wrong."""

    stein_stderr: Scalar
    """Its standard error."""

    non_finite: Scalar
    """The share of actions that were left in place because the gradient of the critic, or the
    displacement, was not finite there. If it is not zero, the critic is broken."""

    score: AbstractScore
    """The estimate of the score by which the KL was measured."""

    level: float = eqx.field(static=True)
    """The level of the confidence limits."""

    num_actions: int = eqx.field(static=True)
    """The number of actions measured."""

    num_observations: int = eqx.field(static=True)
    """The number of observations they were drawn at."""

    fractions: Float[Array, " fractions"]
    """Fractions of the displacement, from 0 to 1.5, for the curves of `plot`."""

    kl_by_fraction: Float[Array, " fractions"]
    """The KL measured at each fraction."""

    kl_stderr_by_fraction: Float[Array, " fractions"]
    """Its standard error."""

    gains: Float[Array, " actions"]
    """The gain in the critic's value at each action."""

    @property
    def holds(self) -> bool:
        """Whether the verdict is that the promise holds."""
        return self.verdict is Verdict.holds

    def __str__(self) -> str:
        total_gain = f"{self.total_improvement:.4g} ± {self.total_improvement_stderr:.2g}"
        rows = [
            ("measured KL (nats)", f"{self.kl:.4g} ± {self.kl_stderr:.2g}"),
            ("  asked for", f"{self.radius:.4g}"),
            (f"  at most, {100 * self.level:.3g} %", f"{self.kl_upper:.4g}"),
            ("  by scores alone", f"{self.kl_by_score:.4g}"),
            ("  by densities alone", _measured(self.by_density)),
            ("  of the steps that act", _measured(self.by_steps)),
            ("  predicted by the metric", f"{self.kl_predicted:.4g}"),
            ("  of that asked for", _ratio(self.kl, self.kl_stderr, self.radius)),
            ("gain in Q", f"{self.improvement:.4g} ± {self.improvement_stderr:.2g}"),
            ("KL from the flow, in all", f"{self.total_kl:.4g} ± {self.total_kl_stderr:.2g}"),
            ("gain over the flow, in all", total_gain),
            ("folded", _share(self.folded, self.folded_upper)),
            ("score", "nan" if jnp.isnan(self.kl_by_score) else _describe(self.score)),
            ("Stein residual", f"{self.stein:.2g} ± {self.stein_stderr:.2g}"),
            ("not finite, left in place", f"{100 * self.non_finite:.2f} %"),
            ("actions, observations", f"{self.num_actions}, {self.num_observations}"),
        ]
        # What was not measured is left out, such as the KL by scores of a steered flow.
        rows = [(name, value) for name, value in rows if not value.startswith("nan")]
        width = max(len(name) for name, _ in rows)
        table = "\n".join(f"{name:<{width}}  {value}" for name, value in rows)
        return f"{table}\n{self.verdict.name}: {self.verdict.value}"

    def plot(self) -> "matplotlib.figure.Figure":
        """Draws the measured and the predicted KL along the displacement, and the gains.

        **Returns:**

        A Matplotlib figure. Needs Matplotlib: `pip install matplotlib`.
        """
        from matplotlib.figure import Figure

        figure = Figure(figsize=(9, 3.4), layout="constrained")
        left, right = figure.subplots(1, 2)
        left.plot(self.fractions, self.kl_by_fraction, color="C0", label="measured (95% interval)")
        left.fill_between(
            self.fractions,
            self.kl_by_fraction - 1.96 * self.kl_stderr_by_fraction,
            self.kl_by_fraction + 1.96 * self.kl_stderr_by_fraction,
            color="C0",
            alpha=0.25,
            linewidth=0,
        )
        if self.kl_by_fraction[0] == 0:
            predicted = self.kl_predicted * self.fractions**2
            left.plot(self.fractions, predicted, "--", color="C1", label="predicted by the metric")
        else:  # in a chain, what came before has a part in it
            left.plot(1, self.kl_predicted, "D", color="C1", label="predicted by the metric")
        radius = 0.0 if jnp.isnan(self.radius) else float(self.radius)
        left.axhline(radius, color="0.5", linewidth=1, label="radius")
        left.axvline(1.0, color="0.5", linewidth=1, linestyle=":")
        top = max(float(jnp.nanmax(self.kl_by_fraction)), radius)
        left.set(ylim=(0, 1.2 * top if top > 0 else 1))
        left.set(xlabel="fraction of the displacement", ylabel="KL (nats)")
        left.legend(frameon=False)
        # Gains that differ by rounding alone need a range for their bins.
        low, high = float(jnp.min(self.gains)), float(jnp.max(self.gains))
        margin = 1e-3 * max(abs(low), abs(high), 1e-3)
        right.hist(self.gains, bins=60, range=(low - margin, high + margin), color="C2")
        right.axvline(0.0, color="0.5", linewidth=1)
        right.axvline(float(self.improvement), color="k", linewidth=1, label="mean")
        right.set(xlabel="gain in Q of one action", ylabel="actions")
        right.legend(frameon=False)
        return figure


def _measured(witness: Witness) -> str:
    # A dash where there is nothing to measure.
    return "-" if jnp.isnan(witness.kl) else f"{witness.kl:.4g} ± {witness.kl_stderr:.2g}"


def _share(share, upper) -> str:
    if jnp.isnan(upper):  # there is no map that could fold
        return "nan"
    return f"{100 * share:.2f} %, at most {100 * upper:.2f} %"


def _ratio(kl, stderr, radius) -> str:
    return f"{kl / radius:.3f} ± {stderr / radius:.2g}" if radius > 0 else "nan"


def _describe(score: AbstractScore) -> str:
    if isinstance(score, CalibratedScore):
        error = f"predicted error {score.relative_error:.2f}"
        return f"calibrated: time {score.time:.3f}, order {score.order}, {error}"
    if isinstance(score, PerturbedScore):
        time = jnp.asarray(0.95 if score.time is None else score.time)
        return f"time {time:.3g}, order {score.order}"
    return type(score).__name__
