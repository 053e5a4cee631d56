from typing import Any, TYPE_CHECKING

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from jax import lax
from jaxtyping import Array, Float, PRNGKeyArray, PyTree, Scalar

from .._checks import batch_length, check_instance, check_positive_integer
from .._custom_types import Critic
from .._flows import FlowPolicy
from .._geometry import AbstractScore, CalibratedScore, PerturbedScore
from ._executed_critic import check_critic, critic_value
from ._method import draw_from_flow
from ._refined_policy import RefinedPolicy
from ._selections import AbstractSelection


if TYPE_CHECKING:
    import matplotlib.figure


class Certificate(eqx.Module):
    """What a refinement costs and gains, measured; made by [`fisher_flow.certify`][].

    Standard errors are over observations (over actions if there is one observation only).
    """

    kl: Scalar
    """The measured KL from the unrefined policy, in nats, averaged over observations. In a chain,
    where the measure of the method is of the whole chain, that from the flow underneath."""

    kl_stderr: Scalar
    """Its standard error."""

    kl_predicted: Scalar
    """The mean cost by the metric of the flow; near `kl` for metrics that predict a KL."""

    radius: Scalar
    """The KL that was asked for."""

    folded: Scalar
    """The share of actions at which the map is not one-to-one. There `kl` does not hold; more than
    a few per cent make it unreliable. Raise the damping or lower the radius."""

    improvement: Scalar
    """The mean gain in the critic's value, in its own units."""

    improvement_stderr: Scalar
    """Its standard error."""

    total_kl: Scalar
    """The KL from the flow underneath, in nats, through all the transport maps of a chain and the
    choice of a [`fisher_flow.BestOf`][] or [`fisher_flow.Resample`][], of which it is an upper
    bound."""

    total_kl_stderr: Scalar
    """Its standard error."""

    total_improvement: Scalar
    """The mean gain in the critic's value over that flow."""

    total_improvement_stderr: Scalar
    """Its standard error."""

    stein: Scalar
    """The mean Stein residual. It should be zero within a few standard errors; if it is not, the
    score is not that of the actions and `kl` is off: try another `time` of the score."""

    stein_stderr: Scalar
    """Its standard error."""

    non_finite: Scalar
    """The share of actions that were left in place because the gradient of the critic, or the
    displacement, was not finite there. It should be zero; if it is not, the critic is broken."""

    score: AbstractScore
    """The estimate of the score by which the KL was measured."""

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

    def __str__(self) -> str:
        total_gain = f"{self.total_improvement:.4g} ± {self.total_improvement_stderr:.2g}"
        rows = [
            ("measured KL (nats)", f"{self.kl:.4g} ± {self.kl_stderr:.2g}"),
            ("  asked for", f"{self.radius:.4g}"),
            ("  predicted by the metric", f"{self.kl_predicted:.4g}"),
            ("  of that asked for", _ratio(self.kl, self.kl_stderr, self.radius)),
            ("gain in Q", f"{self.improvement:.4g} ± {self.improvement_stderr:.2g}"),
            ("KL from the flow, in all", f"{self.total_kl:.4g} ± {self.total_kl_stderr:.2g}"),
            ("gain over the flow, in all", total_gain),
            ("folded", f"{100 * self.folded:.2f} %"),
            ("score", _describe(self.score)),
            ("Stein residual", f"{self.stein:.2g} ± {self.stein_stderr:.2g}"),
            ("not finite, left in place", f"{100 * self.non_finite:.2f} %"),
            ("actions, observations", f"{self.num_actions}, {self.num_observations}"),
        ]
        width = max(len(name) for name, _ in rows)
        return "\n".join(f"{name:<{width}}  {value}" for name, value in rows)

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
        left.axhline(float(self.radius), color="0.5", linewidth=1, label="radius")
        left.axvline(1.0, color="0.5", linewidth=1, linestyle=":")
        top = max(float(jnp.nanmax(self.kl_by_fraction)), float(self.radius))
        left.set(ylim=(0, 1.2 * top if top > 0 else 1))
        left.set(xlabel="fraction of the displacement", ylabel="KL (nats)")
        left.legend(frameon=False)
        # Gains that are all alike but for rounding leave no room for bins of their own.
        low, high = float(jnp.min(self.gains)), float(jnp.max(self.gains))
        margin = 1e-3 * max(abs(low), abs(high), 1e-3)
        right.hist(self.gains, bins=60, range=(low - margin, high + margin), color="C2")
        right.axvline(0.0, color="0.5", linewidth=1)
        right.axvline(float(self.improvement), color="k", linewidth=1, label="mean")
        right.set(xlabel="gain in Q of one action", ylabel="actions")
        right.legend(frameon=False)
        return figure


def _ratio(kl, stderr, radius) -> str:
    return f"{kl / radius:.3f} ± {stderr / radius:.2g}" if radius > 0 else "-"


def _describe(score: AbstractScore) -> str:
    if isinstance(score, CalibratedScore):
        error = f"predicted error {score.relative_error:.2f}"
        return f"calibrated: time {score.time:.3f}, order {score.order}, {error}"
    if isinstance(score, PerturbedScore):
        time = jnp.asarray(0.95 if score.time is None else score.time)
        return f"time {time:.3g}, order {score.order}"
    return type(score).__name__


def certify(
    policy: RefinedPolicy | AbstractSelection,
    critic: Critic,
    observations: PyTree[Any],
    *,
    num_actions: int = 4096,
    key: PRNGKeyArray,
) -> Certificate:
    r"""Measures what a refined policy costs and gains, on actions drawn afresh.

    **Arguments:**

    - `policy`: the policy that `refine` returned, or a [`fisher_flow.BestOf`][] or
        [`fisher_flow.Resample`][] of it. The certificate is of the last refinement, from the policy
        that it refined; its `total_...` entries are of all that happened since the flow.
    - `critic`: called as `critic(observation, action)`; the judge of the gain, which may be another
        than the one that refined.
    - `observations`: the observations to measure at, any PyTree of arrays with a leading axis. Take
        ones that the refinement has not seen.

    **Other arguments:**

    - `num_actions`: about how many actions to draw, spread evenly over the observations; of more
        observations than that, as many are chosen at random.
    - `key`: a `jax.random.key`.

    **Returns:**

    A [`fisher_flow.Certificate`][], which prints as a table.

    **Raises:**

    - `ValueError` if `policy` is not a refined policy.
    """
    check_critic(critic)
    if isinstance(policy, AbstractSelection) and not isinstance(policy.policy, RefinedPolicy):
        name = type(policy).__name__
        raise ValueError(
            f"`policy` must choose among the actions of a refined policy, but got a `{name}` of a "
            f"`{type(policy.policy).__name__}`. Write "
            f"`policy={name}(refine(policy, critic), critic, ...)`."
        )
    check_instance("policy", _refined(policy), RefinedPolicy, "fisher_flow.refine(policy, critic)")
    check_positive_integer("num_actions", num_actions, 4096)
    length = batch_length("observations", observations)
    row_key, key = jr.split(key)
    rows = jr.permutation(row_key, length)[:num_actions]
    observations = jax.tree.map(lambda leaf: jnp.asarray(leaf)[rows], observations)
    return _certify(policy, critic, observations, -(-num_actions // len(rows)), key)


def _refined(policy: Any) -> Any:
    """The policy of which a choice is made, if it is."""
    return policy.policy if isinstance(policy, AbstractSelection) else policy


@eqx.filter_jit
def _certify(certified, critic, observations, num_per_observation, key) -> Certificate:
    refined = _refined(certified)
    policy, method = refined.policy, refined.method
    length = batch_length("observations", observations)
    fractions = jnp.linspace(0, 1.5, 7)
    whole = 4  # fractions[4] == 1

    def of_action(o, key):
        action_key, metric_key = jr.split(key)
        a, flow_action = draw_from_flow(policy, o, action_key)

        def scaled_terms(fraction):
            return method.measure.terms(policy, o, a, fraction * δ, fraction * J, flow_action)

        δ, J, finite = method.measure.linearise(
            policy, lambda a: refined.checked_displacement(o, a), a, has_aux=True
        )
        moved = jnp.any(δ != 0)
        terms = jax.vmap(scaled_terms)(fractions.astype(a.dtype))
        field = lambda a: refined.checked_displacement(o, a)[0]
        # After other maps, too, the metric is that of the flow.
        predicted = method.metric.cost(policy.flow_policy, o, a, field, key=metric_key)
        gain = critic_value(policy, critic, o, a + δ) - critic_value(policy, critic, o, a)
        return dict(
            terms=terms,
            predicted=jnp.where(jnp.isfinite(predicted), predicted, 0),
            gain=jnp.where(moved, gain, 0),
            non_finite=~finite,
        )

    def of_observation(row):
        o, key = row
        keys = jr.split(key, num_per_observation + 1)
        keys, total_key = keys[:-1], keys[-1]
        results = lax.map(lambda key: of_action(o, key), keys, batch_size=256)
        if not isinstance(certified, AbstractSelection) and isinstance(policy, FlowPolicy):
            # One map and no choice: the totals are those of the map.
            totals = results["terms"].kl[:, whole], results["gain"]
        else:
            num_choices = certified.n if isinstance(certified, AbstractSelection) else 1
            num_totals = max(2 if length == 1 else 1, -(-num_per_observation // num_choices))
            totals = lax.map(
                lambda key: _total(certified, critic, o, key),
                jr.split(total_key, num_totals),
                batch_size=max(1, 256 // num_choices),
            )
        return results, totals

    rows_at_once = max(1, 256 // num_per_observation)
    results, (total_kls, total_gains) = lax.map(
        of_observation, (observations, jr.split(key, length)), batch_size=rows_at_once
    )

    def mean_and_stderr(values):
        # Actions of one observation are correlated; observations are not.
        means = jnp.mean(values, axis=1) if length > 1 else values[0]
        stderr = jnp.std(means, axis=0, ddof=1) / jnp.sqrt(means.shape[0])
        return jnp.mean(means, axis=0), stderr

    terms = results["terms"]
    kls, kl_stderrs = mean_and_stderr(terms.kl)
    stein, stein_stderr = mean_and_stderr(terms.stein[..., whole])
    improvement, improvement_stderr = mean_and_stderr(results["gain"])
    total_kl, total_kl_stderr = mean_and_stderr(total_kls)
    total_improvement, total_improvement_stderr = mean_and_stderr(total_gains)
    return Certificate(
        kl=kls[whole],
        kl_stderr=kl_stderrs[whole],
        kl_predicted=jnp.mean(results["predicted"]),
        radius=jnp.asarray(method.radius, kls.dtype),
        folded=jnp.mean(terms.folded[..., whole], dtype=kls.dtype),
        improvement=improvement,
        improvement_stderr=improvement_stderr,
        total_kl=total_kl,
        total_kl_stderr=total_kl_stderr,
        total_improvement=total_improvement,
        total_improvement_stderr=total_improvement_stderr,
        stein=stein,
        stein_stderr=stein_stderr,
        non_finite=jnp.mean(results["non_finite"], dtype=kls.dtype),
        score=method.measure.score,
        num_actions=length * num_per_observation,
        num_observations=length,
        fractions=fractions.astype(kls.dtype),
        kl_by_fraction=kls,
        kl_stderr_by_fraction=kl_stderrs,
        gains=results["gain"].reshape(-1),
    )


def _total(certified, critic, o, key) -> tuple[Scalar, Scalar]:
    """What one action costs and gains from the flow on, or one choice among several."""
    refined = _refined(certified)
    flow, measure = refined.flow_policy, refined.method.measure

    def of_one(key):
        b = flow.draw(o, key=key)
        δ, J = measure.linearise(flow, lambda b: refined.from_flow(o, b) - b, b)
        terms = measure.terms(flow, o, b, δ, J)
        moved = jnp.any(δ != 0)
        value = critic_value(refined, critic, o, b + δ)
        gain = jnp.where(moved, value - critic_value(flow, critic, o, b), 0)
        return terms, value, gain, b + δ

    if not isinstance(certified, AbstractSelection):
        terms, _, gain, _ = of_one(key)
        return terms.kl, gain

    terms, values, gains, actions = jax.vmap(of_one)(jr.split(key, certified.n))
    chooser = lambda a: critic_value(refined, certified.critic, o, a)
    p = certified.probabilities(jax.vmap(chooser)(actions))
    tilt = p - 1 / certified.n
    # KL(π''‖π) = KL(π''‖π') + E_π''[log π'/π], of which the last is known at every single action;
    # under π' its mean is the KL of the map, for which there is a better estimate.
    log_ratio = terms.kl - terms.stein
    total_kl = certified.kl(p) + jnp.mean(terms.kl) + jnp.sum(tilt * log_ratio)
    # Where the critic is not finite it can tell of no gain.
    finite = jnp.isfinite(values)
    chosen = jnp.sum(jnp.where(finite, p * values, 0))
    before = jnp.where(finite, values, chosen)
    return total_kl, jnp.mean(gains) + chosen - jnp.mean(before)
