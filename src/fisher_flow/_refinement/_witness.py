"""An independent estimate of a KL, from densities instead of scores."""

import math
from collections.abc import Callable
from typing import Any, TypeAlias

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int, Key, PRNGKeyArray, PyTree, Scalar

from .._flows import AbstractFlowPolicy, FlowPolicy
from .._geometry import (
    constant_entries,
    constants_at,
    continuous_flow,
    executed_draw,
    executed_log_prob,
    free_constant_entries,
    has_executed_steps,
    mean_log_ratio,
    with_flow,
)
from .._linalg import value_and_jacobian
from .._trees import as_entries
from ._method import AbstractDisplacement
from ._refined_policy import RefinedPolicy


LogRatios: TypeAlias = tuple[Float[Array, " actions"], Float[Array, " actions"]]

# `by_scores(observation, action)`: the KL by scores at an action of the flow. `None` if there is no
# estimate by scores.
ByScores: TypeAlias = Callable[[Any, Any], Scalar] | None

# Densities of larger actions take a product for every entry and every step.
largest_size = 64

# The standard error to reach, as a share of the KL.
RELATIVE_ERROR = 0.025

# Two estimates of a KL that differ by more than this share of it, beyond chance, disagree.
LARGEST_DIFFERENCE = 0.06

# Scores that are off by more than this share of the KL are not corrected but doubted.
MOST_CORRECTED = 0.3

# The share of actions whose density may be unknown, in addition to the share that folds.
MOST_UNKNOWN = 0.01

# A larger error, as a share of the KL, leaves the KL unchecked.
LARGEST_ERROR = 1.5 * RELATIVE_ERROR

# How many times as many actions as were asked for are used at most.
MOST_PARTS = 8


class Witness(eqx.Module):
    """A KL that was measured by densities. The witnesses of one certificate share their noise, and
    the estimate by scores has noise of its own."""

    kl: Scalar
    """Nats; NaN if it was not measured."""

    kl_stderr: Scalar
    """Its standard error."""

    difference: Scalar
    """How much larger it is than the estimate by scores on the same actions; NaN without one."""

    difference_stderr: Scalar
    """Its standard error."""

    unknown: Scalar
    """The share of actions at which one of the two densities is not known: the base would draw the
    action from no noise that was found, or a map folds there."""

    normalisation: Scalar
    """The mean of the inverse ratio of the two densities. It is 1 if both densities are right."""

    normalisation_stderr: Scalar
    """Its standard error."""


def absent_witness(dtype: Any) -> Witness:
    return Witness(*(as_entries(np.nan, dtype) for _ in range(7)))


@eqx.filter_jit
def summarise(
    log_ratios: Float[Array, " actions"],
    by_scores: Float[Array, " actions"],
    num_drawn: Int[Array, ""],
) -> Witness:
    """The KL from the log-ratios of single actions, and its difference from the KL by scores. The
    log-ratios after the first `num_drawn` are infinite."""
    kl, stderr = mean_log_ratio(log_ratios)
    difference, difference_stderr = mean_log_ratio(log_ratios, minus=by_scores)
    known = jnp.isfinite(log_ratios)
    inverse = jnp.where(known, jnp.exp(-jnp.where(known, log_ratios, 0)), 0)
    num_known = jnp.sum(known, dtype=log_ratios.dtype)
    count = jnp.maximum(num_known, 2)
    mean = jnp.sum(inverse) / count
    variance = jnp.sum(jnp.where(known, (inverse - mean) ** 2, 0)) / (count - 1)
    return Witness(
        kl=kl,
        kl_stderr=stderr,
        difference=difference,
        difference_stderr=difference_stderr,
        unknown=1 - num_known / num_drawn.astype(num_known.dtype),
        normalisation=mean,
        normalisation_stderr=jnp.sqrt(variance / count),
    )


def in_continuous_time_log_ratios(
    policy: AbstractFlowPolicy,
    base: AbstractFlowPolicy,
    observations: PyTree[Any],
    keys: Key[Array, " actions"],
    by_scores: ByScores,
) -> LogRatios:
    r"""$\log q(a) - \log p(a)$ at actions of a policy $q$, by the densities of two policies in
    continuous time; and the estimate by scores there. The log-ratio uses no score.
    """
    share_flow = policy.flow_policy is base.flow_policy
    return _in_continuous_time(policy, base, observations, keys, by_scores, share_flow)


@eqx.filter_jit
def _in_continuous_time(policy, base, observations, keys, by_scores, share_flow) -> LogRatios:
    def one(row):
        o, key = row
        flow, base_flow = policy.flow_policy, base.flow_policy
        b = flow.draw(o, key=key)
        action, log_det = _mapped(policy, o, b)
        c = base.to_flow(o, action)
        _, base_log_det = _mapped(base, o, c)
        found = jnp.all(jnp.isfinite(c))
        c = jnp.where(found, c, b)  # solvers raise at what is not finite
        if share_flow:  # one solve for both
            log_p, base_log_p = jax.vmap(lambda b: flow.log_prob(o, b))(jnp.stack([b, c]))
        else:
            log_p, base_log_p = flow.log_prob(o, b), base_flow.log_prob(o, c)
        log_ratio: Array = log_p - log_det - (base_log_p - base_log_det)
        log_ratio = known_or_inf(jnp.where(found, log_ratio, jnp.nan))
        return log_ratio, estimate_by_scores(by_scores, o, b)

    return lax.map(one, (observations, keys), batch_size=64)


@eqx.filter_jit
def executed_log_ratios(
    policy: AbstractFlowPolicy,
    base: AbstractFlowPolicy,
    observations: PyTree[Any],
    keys: Key[Array, " actions"],
    by_scores: ByScores,
) -> LogRatios:
    r"""The same for the samplers that act. The density follows from the steps of the flow of each
    policy, one by one, and from its transport maps.
    """

    def one(row):
        o, key = row
        flow, base_flow = policy.flow_policy, base.flow_policy
        b, log_p, points = executed_draw(flow, flow.given(o), flow.noise(o, key=key))
        action, log_det = _mapped(policy, o, b)
        c = base.to_flow(o, action)
        _, base_log_det = _mapped(base, o, c)
        base_log_p = executed_log_prob(base_flow, base_flow.given(o), c, points)
        log_ratio = known_or_inf(log_p - log_det - (base_log_p - base_log_det))
        return log_ratio, estimate_by_scores(by_scores, o, b)

    return lax.map(one, (observations, keys), batch_size=64)


def known_or_inf(log_ratio: Scalar) -> Scalar:
    """A log-ratio, infinite where it is not known: `jax_debug_nans` takes a NaN for a fault."""
    return jnp.where(jnp.isnan(log_ratio), jnp.inf, log_ratio)


def estimate_by_scores(by_scores: ByScores, observation: Any, action: Array) -> Scalar:
    """The estimate by scores at an action of the flow, or zero without one."""
    return jnp.zeros(()) if by_scores is None else by_scores(observation, action)


def _mapped(policy, observation, action) -> tuple[Array, Scalar]:
    """Where the transport maps of a policy carry an action of its flow, and their log-determinant;
    NaN where they fold."""
    if isinstance(policy, FlowPolicy):
        return action, jnp.zeros((), action.dtype)
    moved, J = value_and_jacobian(lambda b: policy.from_flow(observation, b), action)
    sign, log_det = jnp.linalg.slogdet(J)
    return moved, log_det + jnp.where(sign > 0, 0, jnp.nan)


def witness(
    log_ratios: Callable[..., LogRatios],
    policy: AbstractFlowPolicy,
    base: AbstractFlowPolicy,
    observations: PyTree[Any],
    by_scores: ByScores,
    *,
    num_actions: int,
    tick: Callable[[], Any] = lambda: None,
    key: PRNGKeyArray,
) -> Witness:
    """Measures a KL by one of the two functions above, on as many actions as are needed.

    **Arguments:**

    - `log_ratios`: one of the two functions above.
    - `policy`, `base`: the two policies.
    - `observations`: a batch of observations.
    - `by_scores`: the estimate by scores to compare with.
    - `num_actions`: the number of actions to begin with; at most eight times as many are used.
    - `tick`: called after each part of so many actions.
    - `key`: a `jax.random.key`.
    """
    length = jnp.shape(jax.tree.leaves(observations)[0])[0]
    columns: Any = None
    # In chunks of one size, and filled into columns of one length, so that all is compiled once.
    for i in range(MOST_PARTS):
        rows = (i * num_actions + np.arange(num_actions)) % length
        o = jax.tree.map(lambda leaf, rows=rows: leaf[rows], observations)
        keys = jr.split(jr.fold_in(key, i), num_actions)
        chunk = [np.asarray(x) for x in log_ratios(policy, base, o, keys, by_scores)]
        if columns is None:
            columns = [np.full(MOST_PARTS * num_actions, np.inf, x.dtype) for x in chunk]
        for column, part in zip(columns, chunk, strict=True):
            column[i * num_actions : (i + 1) * num_actions] = part
        tick()
        num_drawn = jnp.asarray((i + 1) * num_actions)
        result = summarise(jnp.asarray(columns[0]), jnp.asarray(columns[1]), num_drawn)
        stderr = result.kl_stderr if by_scores is None else result.difference_stderr
        if float(stderr) <= RELATIVE_ERROR * abs(float(result.kl)):
            break
    if by_scores is None:
        nothing = as_entries(np.nan, result.kl.dtype)
        entries = lambda result: (result.difference, result.difference_stderr)
        result = eqx.tree_at(entries, result, (nothing, nothing))
    return result


def witnesses(
    refined: RefinedPolicy,
    observations: PyTree[Any],
    num_witnesses: int,
    tick: Callable[[], Any] = lambda: None,
    *,
    key: PRNGKeyArray,
) -> tuple[Witness, Witness]:
    """The KL of a refined policy by densities: of the flow in continuous time, and of its steps."""
    policy, measure = refined.policy, refined.method.measure
    flow = refined.flow_policy
    observation = jax.tree.map(lambda leaf: leaf[0], observations)
    action = eqx.filter_eval_shape(lambda o: policy.draw(o, key=key), observation)
    absent = absent_witness(action.dtype)
    possible = isinstance(flow, FlowPolicy) and action.size <= largest_size
    if num_witnesses == 0 or not possible:
        return absent, absent
    original = refined
    fixed = constant_entries(measure.score.whitening, policy.action_shape)
    if fixed is not None and policy is flow:
        free = free_constant_entries(flow, fixed)
        field = _FreedDisplacement(refined, fixed)
        refined = RefinedPolicy(free, refined.critic, field, refined.method)
        policy = flow = free
    # A chain whose KL is measured from the flow is compared with the flow.
    base = flow if measure.whole_chain else policy
    # The same noise for both, so that chance does not tell them apart.
    key = jr.fold_in(key, 1)
    by_steps = absent
    executed = has_executed_density(refined, base)
    exact = continuous_flow(flow, action.dtype)
    arguments: Any = dict(observations=observations, num_actions=num_witnesses, tick=tick)
    if executed:
        by_steps = witness(
            executed_log_ratios,
            refined,
            base,
            by_scores=_ByScores(original, fixed),
            key=key,
            **arguments,
        )
    by_density = witness(
        in_continuous_time_log_ratios,
        with_flow(refined, exact),
        with_flow(base, exact),
        by_scores=_ByScores(
            with_flow(original, continuous_flow(original.flow_policy, action.dtype)), fixed
        ),
        key=key,
        **arguments,
    )
    return by_density, by_steps


class _FreedDisplacement(AbstractDisplacement):
    """The displacement of a policy whose constant entries carry noise."""

    refined: RefinedPolicy
    is_constant: Bool[Array, "..."]

    def __call__(self, policy: Any, critic: Any, observation: Any, action: Any) -> Any:
        flow = self.refined.flow_policy
        constants = constants_at(flow, observation)
        action = jnp.where(self.is_constant, constants, action)
        return jnp.where(self.is_constant, 0, self.refined.displacement(observation, action))


class _ByScores(eqx.Module):
    """The contribution of one action of the flow to the KL of a refined policy, by scores."""

    refined: RefinedPolicy
    is_constant: Bool[Array, "..."] | None

    def __call__(self, observation: Any, action: Any) -> Scalar:
        policy, measure = self.refined.policy, self.refined.method.measure
        b: Array = action
        if self.is_constant is not None:
            b = jnp.where(self.is_constant, constants_at(policy.flow_policy, observation), b)
        a = policy.from_flow(observation, b)
        field = lambda a: self.refined.displacement(observation, a)
        δ, J = measure.linearise(policy, field, a)
        return measure.terms(policy, observation, a, δ, J, b).kl


def has_executed_density(policy: AbstractFlowPolicy, base: AbstractFlowPolicy) -> bool:
    """Whether the steps of both samplers are maps that can be written down one by one."""
    flows = policy.flow_policy, base.flow_policy
    if not all(isinstance(flow, FlowPolicy) and has_executed_steps(flow) for flow in flows):
        return False
    times, base_times = (flow.step_times(None) for flow in flows)
    return times is not None and base_times is not None and len(times) == len(base_times)


def differs(witness: Witness, share: float = LARGEST_DIFFERENCE) -> bool:
    """Whether a witness disagrees with the estimate by scores by more than a share of the KL,
    beyond chance."""
    excess = abs(float(witness.difference)) - _two_errors(witness)
    return not excess <= share * abs(float(witness.kl))


def beyond_chance(witness: Witness) -> float:
    r"""The part of the difference $D$ from the estimate by scores that chance $c$, two standard
    errors, cannot account for: $D \max(0, 1 - c^2 / D^2)$, which grows from zero without a jump."""
    difference = float(witness.difference)
    chance = _two_errors(witness)
    return difference - chance**2 / difference if abs(difference) > chance else 0.0


def _two_errors(witness: Witness) -> float:
    """What chance and rounding may make of no difference."""
    rounding = 64 * float(jnp.finfo(witness.kl.dtype).eps)
    return 2 * float(witness.difference_stderr) + rounding


def is_normalised(witness: Witness) -> bool:
    """Whether the mean of the inverse ratio is 1, up to chance. Where the policies are far apart
    actions that are rarely drawn make up that mean, so it is not used there."""
    off = abs(float(witness.normalisation) - 1) - 4 * float(witness.normalisation_stderr)
    return float(witness.kl) > 1 or off <= LARGEST_DIFFERENCE


def are_apart(one: Witness, other: Witness) -> bool:
    """Whether two witnesses disagree beyond chance. False if one of them is NaN. Their errors are
    added as if their noise were not the same, which allows more than chance does."""
    larger = max(abs(float(one.kl)), abs(float(other.kl)))
    error = math.hypot(float(one.kl_stderr), float(other.kl_stderr))
    return abs(float(one.kl) - float(other.kl)) > LARGEST_DIFFERENCE * larger + 2 * error


def is_vague(witness: Witness) -> bool:
    """Whether the error of a witness is too large to check the KL by scores."""
    return not float(witness.difference_stderr) <= LARGEST_ERROR * abs(float(witness.kl))
