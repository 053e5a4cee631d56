import math
from typing import Any, TYPE_CHECKING

import equinox as eqx
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, Float, PRNGKeyArray, PyTree

from .._checks import batch_length, check_equal_lengths, check_instance, check_positive_integer
from .._custom_types import Critic
from .._flows import AbstractFlowPolicy, as_flow_policy
from .._geometry import calibrate, TransportKL
from ._certificate import Certificate
from ._certify import certify
from ._executed_critic import check_critic
from ._fidelity import checked_held_out
from ._method import AbstractTransport, method_example
from ._natural_step import NaturalStep
from ._refine import refine
from ._refined_policy import RefinedPolicy


if TYPE_CHECKING:
    import matplotlib.figure


class RefinementChain(eqx.Module):
    """Several refinements, each of the policy before it; made by [`fisher_flow.refine_chain`][].

    Prints as a table of its steps.
    """

    policy: AbstractFlowPolicy
    """The policy after the last step; the unrefined policy if no step was taken."""

    certificates: tuple[Certificate, ...]
    """The certificate of every step that was taken, on `held_out` observations. In each, `kl`, like
    `total_kl`, is the KL from the flow underneath, `radius` is the KL that this step was to reach,
    and `improvement` is the gain of this step alone. They are measured by scores alone."""

    start: Certificate | None
    """The certificate of the policy that the chain started from, if that was refined already."""

    rejected: Certificate | None
    """The certificate of a step that was not taken because it gained nothing, if there was one:
    its `improvement` is not above zero by two standard errors."""

    def __str__(self) -> str:
        header = f"{'step':<10}{'KL from the flow':<22}{'gain of the step':<22}{'in all':<22}folded"
        rows = [header]
        if self.start is not None:
            rows.append(_row("start", self.start))
        for i, report in enumerate(self.certificates):
            rows.append(_row(f"{i + 1}", report))
        if self.rejected is not None:
            rows.append(_row("rejected", self.rejected))
        return "\n".join(rows)

    def plot(self) -> "matplotlib.figure.Figure":
        """Draws the gain in the critic's value over the KL from the flow, step by step.

        **Returns:**

        A Matplotlib figure. Needs Matplotlib: `pip install matplotlib`.
        """
        from matplotlib.figure import Figure

        figure = Figure(figsize=(5, 3.6), layout="constrained")
        axes = figure.subplots()

        def column(name, reports):
            return [float(getattr(report, name)) for report in reports]

        start = () if self.start is None else (self.start,)
        kl, gain = (
            [0.0, *column(name, (*start, *self.certificates))]
            for name in ("total_kl", "total_improvement")
        )
        axes.plot(kl, gain, "-", color="C0")

        def draw(reports, fmt, color, label):
            gain_width, kl_width = (
                [1.96 * stderr for stderr in column(name, reports)]
                for name in ("total_improvement_stderr", "total_kl_stderr")
            )
            kl, gain = column("total_kl", reports), column("total_improvement", reports)
            axes.errorbar(
                kl, gain, gain_width, kl_width, fmt=fmt, color=color, label=label, capsize=3
            )

        if len(self.certificates) > 0:
            draw(self.certificates, "o", "C0", "steps taken (95% intervals)")
        if self.rejected is not None:
            draw([self.rejected], "x", "C3", "gained nothing: not taken")
        axes.set(xlabel="KL from the flow (nats)", ylabel="gain in Q over the flow")
        axes.set(xlim=(0, None))
        axes.legend(frameon=False)
        return figure


def _row(name: str, report: Certificate) -> str:
    cells = [
        f"{report.total_kl:.4g} ± {report.total_kl_stderr:.2g}",
        f"{report.improvement:.4g} ± {report.improvement_stderr:.2g}",
        f"{report.total_improvement:.4g} ± {report.total_improvement_stderr:.2g}",
    ]
    return f"{name:<10}" + "".join(f"{cell:<22}" for cell in cells) + f"{100 * report.folded:.2f} %"


def refine_chain(
    policy: Any,
    critic: Critic,
    method: AbstractTransport = NaturalStep(),
    *,
    num_steps: int = 4,
    observations: PyTree[Any],
    actions: Float[Array, "batch ..."] | None = None,
    held_out: PyTree[Any] | None = None,
    key: PRNGKeyArray | None = None,
) -> RefinementChain:
    r"""Spends a KL in several refinements, each of the policy that the one before it made.

    A long correction is better made of short ones: each finds its direction anew where the one
    before it ended. The KL is bounded where it matters, between the whole chain and the flow
    underneath. Distances of policies, not KLs, add up along a line, and to second order a distance
    is the root of a KL. So step $i$ of $n$ brings the KL from a flow to $\epsilon\, (i / n)^2$. If
    the policy has spent some KL already, the steps divide the rest of the distance equally.

    The chain ends early at a step whose certificate shows no gain: that step is not taken. This is
    decided by what is measured, so a chain cannot be made inside `jax.jit`.

    **Arguments:**

    - `policy`: the flow policy, as for [`fisher_flow.refine`][]. The KL that a refined policy has
        spent already counts.
    - `critic`: called as `critic(observation, action)`; returns a scalar; more is better.
    - `method`: how each step is made. Its radius $\epsilon$ and its share of actions that may fold
        hold for the whole chain. Where the maps before a step fold at more of the actions that
        settle it, the step may not add folds.

    **Other arguments:**

    - `num_steps`: the number $n$ of steps.
    - `observations`, `actions`: as for [`fisher_flow.refine`][]. The score is calibrated once.
    - `held_out`: the observations on which each step is certified; by default `observations`, with
        actions drawn afresh.
    - `key`: a `jax.random.key`. The same key gives the same chain; so does none.

    **Returns:**

    A [`fisher_flow.RefinementChain`][].

    **Raises:**

    - `ValueError` if an argument is not of its kind, or the policy has spent the radius already.

    !!! tip

        Every step adds to the cost of a sample. [`fisher_flow.absorb`][] turns a chain into a flow
        again; `NaturalStep(num_steps=4)` splits one step with no certificate in between, and
        settles in a fraction of the time.
    """
    refined = as_flow_policy(policy)
    check_critic(critic)
    check_instance("method", method, AbstractTransport, method_example(method))
    check_positive_integer("num_steps", num_steps, 4)
    batch_length("observations", observations)
    if actions is not None:
        check_equal_lengths(observations=observations, actions=actions)
    held_out = checked_held_out(held_out, observations)
    calibration_key, steps_key = jr.split(jr.key(0) if key is None else key)
    method = calibrate(method, refined, observations, actions, calibration_key)
    measure = method.measure
    measure = TransportKL(measure.score, measure.num_nodes, measure.num_probes, whole_chain=True)
    start, spent, total = None, 0.0, jnp.asarray(method.radius)
    if isinstance(refined, RefinedPolicy):
        start = certify(
            refined, critic, held_out, num_witnesses=0, key=jr.fold_in(steps_key, num_steps)
        )
        spent = max(float(start.total_kl), 0.0)
        if 0 < total <= spent:
            raise ValueError(
                "`method` must have a radius above what the policy has spent since its flow, "
                f"{spent:.3g} nats, but got `radius={total:.3g}`. Write "
                f"`{type(method).__name__}(radius={spent + total:.2g})`."
            )
    certificates, rejected = [], None
    for i in range(num_steps):
        refine_key, certify_key = jr.split(jr.fold_in(steps_key, i))
        share = (i + 1) / num_steps
        radius = (math.sqrt(spent) * (1 - share) + jnp.sqrt(total) * share) ** 2
        of_step = lambda method: (method.radius, method.measure)
        step = eqx.tree_at(of_step, method, (radius, measure))
        candidate = refine(refined, critic, step, observations=observations, key=refine_key)
        report = certify(candidate, critic, held_out, num_witnesses=0, key=certify_key)
        if not report.improvement > 2 * report.improvement_stderr:
            rejected = report
            break
        refined = candidate
        certificates.append(report)
    return RefinementChain(refined, tuple(certificates), start, rejected)
