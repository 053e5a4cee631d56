import math
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jax import lax
from jaxtyping import Array, PRNGKeyArray, PyTree, Scalar

from .._checks import (
    batch_length,
    check_at_least,
    check_count,
    check_instance,
    check_positive_integer,
)
from .._custom_types import Critic
from .._flows import FlowPolicy
from .._geometry import CalibratedScore, in_continuous_time
from ._certificate import Certificate, Verdict
from ._certify_pair import certify_pair
from ._executed_critic import check_critic, critic_value
from ._limits import (
    binomial_limit,
    error_at_these_observations,
    mean_and_stderr,
    normal_quantile,
)
from ._method import draw_from_flow
from ._refined_policy import RefinedPolicy
from ._selections import AbstractSelection
from ._steering import SteeredPolicy
from ._witness import (
    are_apart,
    beyond_chance,
    differs,
    is_normalised,
    is_vague,
    LARGEST_DIFFERENCE,
    LARGEST_ERROR,
    MOST_CORRECTED,
    MOST_PARTS,
    MOST_UNKNOWN,
    RELATIVE_ERROR,
    witnesses,
)


# The fractions of a displacement at which its KL is measured; the whole of it is one of them.
_fractions, _index_of_whole = np.linspace(0, 1.5, 7), 4


def certify(
    policy: Any,
    critic: Critic,
    observations: PyTree[Any],
    *,
    base: Any = None,
    num_actions: int = 4096,
    num_witnesses: int = 512,
    level: float = 0.95,
    throw: bool = False,
    progress: bool = True,
    key: PRNGKeyArray,
) -> Certificate:
    r"""Measures what a policy costs and gains, on actions drawn afresh.

    The KL is measured more than once: by the score of the flow, by the densities of the flow in
    continuous time, and by the density of the actions that the steps of the sampler make. The last
    is the KL of what acts. The certificate ends with a verdict, [`fisher_flow.Verdict`][]: the
    promise holds if the estimates agree and stay within the radius.

    **Arguments:**

    - `policy`: the policy that `refine` returned, or a [`fisher_flow.BestOf`][] or
        [`fisher_flow.Resample`][] of it. The certificate describes the last refinement, from the
        policy that it refined; its `total_...` entries describe all refinements since the flow.
        It may be a steered policy, and with a `base` any policy.
    - `critic`: called as `critic(observation, action)`; the judge of the gain. It may be another
        critic than the one that refined.
    - `observations`: the observations to measure at, any PyTree of arrays with a leading axis. Take
        ones that the refinement has not seen.

    **Other arguments:**

    - `base`: the policy to compare with, by default the policy that was refined. Any pair works: a
        flow that was fine-tuned and the flow before it, a guided flow and its flow, two checkpoints
        of one training. A one-step policy and a choice among several actions have no density. Then
        the KL is estimated from the distances of actions to their nearest neighbours, and the
        verdict says that it is an estimate.
    - `num_actions`: about how many actions to begin with, spread evenly over the observations. For
        a refined policy up to eight times as many are used, until the error of the KL by scores is
        small; for a pair and for a steered policy they measure the gain alone. If there are more
        observations, this many of them are chosen at random.
    - `num_witnesses`: the number of actions to begin with for the estimates by densities; up to
        eight times as many are used, until their error is small. With 0 no such estimate is made.
        Each action costs two solves of the flow, both with a Jacobian. Actions may have up to 64
        entries.
    - `level`: the level of the upper confidence limits.
    - `throw`: whether to raise an error if the promise does not hold.
    - `progress`: whether to show progress, after three seconds: every `num_actions` actions of the
        estimate by scores are one part, and so are every `num_witnesses` actions of an estimate by
        densities.
    - `key`: a `jax.random.key`.

    **Returns:**

    A [`fisher_flow.Certificate`][], which prints as a table.

    **Raises:**

    - `ValueError` if `policy` is not a refined policy and there is no `base`.
    - `RuntimeError` with the certificate, if `throw` and its promise does not hold.
    """
    check_critic(critic)
    check_positive_integer("num_actions", num_actions, 4096)
    check_count("num_witnesses", num_witnesses, 512)
    check_at_least("level", level, 0.5, 0.95, maximum=0.9999)
    length = batch_length("observations", observations)
    row_key, key = jr.split(key)
    rows = jr.permutation(row_key, length)[:num_actions]
    observations = jax.tree.map(lambda leaf: jnp.asarray(leaf)[rows], observations)
    from tqdm.auto import tqdm  # only here: it is slow to import

    with tqdm(desc="certify", unit=" parts", delay=3, disable=not progress) as bar:
        settings = num_actions, num_witnesses, float(level), bar.update
        if base is None and not isinstance(policy, SteeredPolicy):
            certificate = _certify_refined(policy, critic, observations, settings, key)
        else:
            certificate = certify_pair(policy, base, critic, observations, settings, key)
    if throw and not certificate.holds:
        raise RuntimeError(f"The promise of the policy does not hold.\n{certificate}")
    return certificate


def _certify_refined(policy, critic, observations, settings, key) -> Certificate:
    """The certificate of a policy followed by a transport map, and of a choice of its actions."""
    if isinstance(policy, AbstractSelection) and not isinstance(policy.policy, RefinedPolicy):
        name = type(policy).__name__
        raise ValueError(
            f"`policy` must choose among the actions of a refined policy, but got a `{name}` of a "
            f"`{type(policy.policy).__name__}`. Write "
            f"`policy={name}(refine(policy, critic), critic, ...)`."
        )
    refined = _refined(policy)
    check_instance("policy", refined, RefinedPolicy, "fisher_flow.refine(policy, critic)")
    num_actions, num_witnesses, level, tick = settings
    length = batch_length("observations", observations)
    sampler_key, draw_key, witness_key = jr.split(key, 3)
    measured = in_continuous_time(refined, observations, key=sampler_key)
    certified = measured
    if isinstance(policy, AbstractSelection):
        certified = eqx.tree_at(lambda policy: policy.policy, policy, measured)
    found = _measured_with_enough(certified, critic, observations, num_actions, tick, draw_key)
    if _is_still(found):
        num_witnesses = 0  # nothing was moved, and nothing can be wrong
    by_density, by_steps = witnesses(refined, observations, num_witnesses, tick, key=witness_key)
    num_drawn = found["gains"].size
    folded = float(found["folded"])
    upper = binomial_limit(round(folded * num_drawn), num_drawn, level)
    method = refined.method
    found["kl_by_score"] = found["kl"]
    # A difference beyond chance is an error of the scores; a smaller difference is noise. The
    # densities are known at fewer actions, so the difference is taken and not their KL itself.
    difference = beyond_chance(by_density)
    if difference != 0:
        share = difference / by_density.difference
        found["kl"] = found["kl"] + difference
        found["kl_stderr"] = jnp.hypot(found["kl_stderr"], share * by_density.difference_stderr)
    verdict = _judge(found, by_density, by_steps, method, num_drawn)
    del found["outside"], found["error_here"]
    return Certificate(
        verdict=verdict,
        kl_upper=found["kl"] + normal_quantile(level) * found["kl_stderr"],
        by_density=by_density,
        by_steps=by_steps,
        folded_upper=jnp.asarray(upper, found["kl"].dtype),
        score=method.measure.score,
        level=level,
        num_actions=num_drawn,
        num_observations=length,
        **found,
    )


def _refined(policy: Any) -> Any:
    """The refined policy, without the choice among its actions if there is one."""
    return policy.policy if isinstance(policy, AbstractSelection) else policy


def _is_still(found) -> bool:
    """Whether no action was moved."""
    return float(found["kl"]) == 0 and not np.any(found["gains"])


def _judge(found, by_density, by_steps, method, num_drawn) -> Verdict:
    """The first reason why the promise may not hold, the likeliest first."""
    kl, kl_stderr, radius = (float(found[name]) for name in ("kl", "kl_stderr", "radius"))
    folded, stein = float(found["folded"]), float(found["stein"])
    if float(found["non_finite"]) > 0:
        return Verdict.critic_not_finite
    if float(found["outside"]) > 0:
        return Verdict.beyond_data
    # More folds than the method allows, beyond chance.
    least_folded = 1 - binomial_limit(num_drawn - round(folded * num_drawn), num_drawn, 0.99)
    if least_folded > float(method.max_folded):
        return Verdict.folds
    if _is_still(found):
        return Verdict.holds if radius == 0 else Verdict.no_gain
    witnesses = [w for w in (by_density, by_steps) if not np.isnan(float(w.kl))]
    if any(float(w.unknown) > folded + MOST_UNKNOWN for w in witnesses):
        return Verdict.beyond_data
    if not np.isnan(float(by_density.kl)):
        # Scores and densities that are far apart: one of them is wrong.
        if differs(by_density, MOST_CORRECTED) or not is_normalised(by_density):
            score = method.measure.score
            if isinstance(score, CalibratedScore) and not bool(score.settled):
                return Verdict.score_uncalibrated
            off = abs(stein) > 4 * float(found["stein_stderr"])
            return Verdict.stein_residual if off else Verdict.witnesses_disagree
    # The part of the mean Stein residual in the KL, beyond chance.
    elif abs(stein) - 3 * float(found["stein_stderr"]) > LARGEST_DIFFERENCE * abs(kl):
        return Verdict.stein_residual
    if are_apart(by_density, by_steps):
        return Verdict.sampler_differs
    if kl - 2 * kl_stderr > 1.05 * radius:
        return Verdict.radius_exceeded
    is_exact = float(found["error_here"]) <= LARGEST_ERROR * abs(kl)
    if len(witnesses) == 0 or not is_exact or any(map(is_vague, witnesses)):
        return Verdict.unchecked
    if not float(found["improvement"]) > 2 * float(found["improvement_stderr"]):
        return Verdict.no_gain
    return Verdict.holds


def _measured_with_enough(certified, critic, observations, num_actions, tick, key):
    """The entries of a certificate that come from scores, on as many actions as are needed."""
    length = batch_length("observations", observations)
    draw = lambda i: _draw(
        certified, critic, observations, -(-num_actions // length), jr.fold_in(key, i)
    )
    drawn = draw(0)
    found = _summarise(drawn)
    tick()
    share = float(found["error_here"]) / max(abs(float(found["kl"])), 1e-30)
    if RELATIVE_ERROR < share < math.inf:  # a single action has no error to go by
        # Enough for the error that is wanted, if the rest is like the first part.
        num_parts = math.ceil(min(MOST_PARTS, (share / RELATIVE_ERROR) ** 2))
        parts = [drawn]
        for i in range(1, num_parts):
            parts.append(draw(i))
            tick()
        drawn = jax.tree.map(lambda *leaves: jnp.concatenate(leaves, axis=1), *parts)
        found = _summarise(drawn)
    radius = jnp.asarray(_refined(certified).method.radius, found["kl"].dtype)
    return found | dict(radius=radius)


@eqx.filter_jit
def _draw(certified, critic, observations, num_per_observation, key) -> dict[str, Any]:
    """What some actions at every observation contribute to a certificate."""
    refined = _refined(certified)
    policy = refined.policy
    length = batch_length("observations", observations)

    def of_observation(row):
        o, key = row
        keys = jr.split(key, num_per_observation + 1)
        keys, total_key = keys[:-1], keys[-1]
        of_action = lambda key: _of_action(refined, critic, o, key)
        results = lax.map(of_action, keys, batch_size=256)
        if not isinstance(certified, AbstractSelection) and isinstance(policy, FlowPolicy):
            # One map and no choice: the totals are the cost and the gain of the map.
            totals = results["terms"].kl[:, _index_of_whole], results["gain"]
        else:
            num_choices = certified.n if isinstance(certified, AbstractSelection) else 1
            num_totals = max(2 if length == 1 else 1, -(-num_per_observation // num_choices))
            totals = lax.map(
                lambda key: _total(certified, critic, o, key),
                jr.split(total_key, num_totals),
                batch_size=max(1, 256 // num_choices),
            )
        return results | dict(totals=totals)

    rows_at_once = max(1, 256 // num_per_observation)
    keys = jr.split(key, length)
    return lax.map(of_observation, (observations, keys), batch_size=rows_at_once)


@eqx.filter_jit
def _summarise(drawn) -> dict[str, Any]:
    """The entries of a certificate, from the contributions of single actions."""
    terms = drawn["terms"]
    total_kls, total_gains = drawn["totals"]
    kls, kl_stderrs = mean_and_stderr(terms.kl)
    stein, stein_stderr = mean_and_stderr(terms.stein[..., _index_of_whole])
    improvement, improvement_stderr = mean_and_stderr(drawn["gain"])
    total_kl, total_kl_stderr = mean_and_stderr(total_kls)
    total_improvement, total_improvement_stderr = mean_and_stderr(total_gains)
    return dict(
        kl=kls[_index_of_whole],
        kl_stderr=kl_stderrs[_index_of_whole],
        error_here=error_at_these_observations(terms.kl[..., _index_of_whole]),
        kl_predicted=jnp.mean(drawn["predicted"]),
        folded=jnp.mean(terms.folded[..., _index_of_whole], dtype=kls.dtype),
        improvement=improvement,
        improvement_stderr=improvement_stderr,
        total_kl=total_kl,
        total_kl_stderr=total_kl_stderr,
        total_improvement=total_improvement,
        total_improvement_stderr=total_improvement_stderr,
        stein=stein,
        stein_stderr=stein_stderr,
        non_finite=jnp.mean(drawn["non_finite"], dtype=kls.dtype),
        outside=jnp.mean(drawn["outside"], dtype=kls.dtype),
        fractions=jnp.asarray(_fractions, kls.dtype),
        kl_by_fraction=kls,
        kl_stderr_by_fraction=kl_stderrs,
        gains=drawn["gain"].reshape(-1),
    )


def _of_action(refined, critic, o, key) -> dict[str, Any]:
    """The contribution of one action of the policy before the map."""
    policy, method = refined.policy, refined.method
    action_key, metric_key = jr.split(key)
    a, flow_action = draw_from_flow(policy, o, action_key)
    δ, J, finite = method.measure.linearise(
        policy, lambda a: refined.checked_displacement(o, a), a, has_aux=True
    )
    moved = jnp.any(δ != 0)

    def scaled_terms(fraction):
        return method.measure.terms(policy, o, a, fraction * δ, fraction * J, flow_action)

    field = lambda a: refined.checked_displacement(o, a)[0]
    # After other maps, too, the metric is the metric of the flow.
    predicted = method.metric.cost(policy.flow_policy, o, a, field, key=metric_key)
    gain = critic_value(policy, critic, o, a + δ) - critic_value(policy, critic, o, a)
    return dict(
        terms=jax.vmap(scaled_terms)(jnp.asarray(_fractions, a.dtype)),
        predicted=jnp.where(jnp.isfinite(predicted), predicted, 0),
        gain=jnp.where(moved, gain, 0),
        non_finite=~finite,
        outside=_leaves_support(method.measure.score, a, δ),
    )


def _leaves_support(score, action, displacement) -> Array:
    """Whether an action is moved in a direction in which the actions do not vary."""
    if score.whitening is None:
        return jnp.asarray(False)
    δ = displacement.reshape(-1)
    rest = δ - score.whitening.colour(score.whitening.whiten(δ))
    constant = ~jnp.any(jnp.atleast_2d(score.whitening.factor) != 0, axis=-1)
    if score.whitening.factor.ndim == 1:
        constant = score.whitening.factor == 0
    ε = 8 * jnp.finfo(δ.dtype).eps
    return jnp.any(constant & (jnp.abs(rest) > ε * (1 + jnp.abs(action.reshape(-1)))))


def _total(certified, critic, o, key) -> tuple[Scalar, Scalar]:
    """The cost and the gain over the flow of one action, or of one choice among several."""
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
    # KL(π''‖π) = KL(π''‖π') + E_π''[log π'/π]. The last log-ratio is known at every single action;
    # its mean under π' is the KL of the map, for which there is a better estimate.
    log_ratio = terms.kl - terms.stein
    total_kl = certified.kl(p) + jnp.mean(terms.kl) + jnp.sum(tilt * log_ratio)
    # Where the critic is not finite the gain is unknown.
    finite = jnp.isfinite(values)
    chosen = jnp.sum(jnp.where(finite, p * values, 0))
    before = jnp.where(finite, values, chosen)
    return total_kl, jnp.mean(gains) + chosen - jnp.mean(before)
