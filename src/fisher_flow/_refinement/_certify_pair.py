"""Certificates of any two policies, also if one was not refined from the other."""

import math
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jax import lax
from jaxtyping import Scalar

from .._checks import batch_length
from .._flows import AbstractFlowPolicy, AbstractPolicy, as_flow_policy
from .._geometry import (
    continuous_flow,
    ExecutedLogRatio,
    measure_whitening,
    PerturbedScore,
    with_flow,
)
from .._linalg import Whitening
from .._trees import as_entries
from ._certificate import Certificate, Verdict
from ._executed_critic import critic_value
from ._limits import mean_and_stderr, normal_quantile, standard_error
from ._steering import SteeredPolicy
from ._witness import (
    absent_witness,
    are_apart,
    estimate_by_scores,
    executed_log_ratios,
    has_executed_density,
    in_continuous_time_log_ratios,
    is_normalised,
    known_or_inf,
    largest_size,
    LogRatios,
    MOST_UNKNOWN,
    RELATIVE_ERROR,
    Witness,
    witness,
)


def certify_pair(given: Any, base: Any, critic, observations, settings, key) -> Certificate:
    """The certificate of a policy against another policy."""
    num_actions, num_witnesses, level, tick = settings
    steered = base is None
    policy: Any = _policy(given)
    base = _policy(policy.policy if steered else base)
    if policy.action_shape != base.action_shape:
        raise ValueError(
            f"`base` must draw actions of the shape of `policy`, {policy.action_shape}, but got "
            f"{base.action_shape}. Write `base=policy_before`, the policy to compare with."
        )
    length = batch_length("observations", observations)
    observation = jax.tree.map(lambda leaf: leaf[0], observations)
    action = eqx.filter_eval_shape(lambda o: base.draw(o, key=key), observation)
    absent = absent_witness(action.dtype)
    gain_key, key = jr.split(key)
    gains, finite = _gains(policy, base, critic, observations, -(-num_actions // length), gain_key)
    tick()
    arguments: Any = dict(
        observations=observations, num_actions=max(num_witnesses, 32), tick=tick, by_scores=None
    )
    by_density = by_steps = absent
    dense = action.size <= largest_size and num_witnesses > 0
    has_densities = all(isinstance(x, AbstractFlowPolicy) for x in (policy, base))
    executed = steered and isinstance(policy.log_ratio, ExecutedLogRatio)
    # The steps of a steered policy know their density, and it is dear in continuous time.
    if has_densities and dense and not executed:
        q, p = (_in_continuous_time(_plain(x), action.dtype) for x in (policy, base))
        by_density = witness(in_continuous_time_log_ratios, q, p, key=key, **arguments)
    if executed:
        by_steps = witness(_steered_log_ratios, policy, base, key=key, **arguments)
    elif has_densities and dense and has_executed_density(_plain(policy), _plain(base)):
        by_steps = witness(
            executed_log_ratios,
            _plain(policy),
            _plain(base),
            key=key,
            **arguments,
        )
    # The radius of a steering is the KL of the steps that act.
    measured = by_steps if steered and not jnp.isnan(by_steps.kl) else by_density
    if has_densities:
        kl, kl_stderr = measured.kl, measured.kl_stderr
    else:
        kl, kl_stderr = _nearest_neighbours(policy, base, observations, key)
    radius = as_entries(policy.method.radius if steered else np.nan, action.dtype)
    gain = mean_and_stderr(gains)
    if not finite:
        verdict = Verdict.critic_not_finite
    elif not has_densities:
        verdict = Verdict.estimated
    else:
        gained = bool(gain[0] > 2 * gain[1])
        verdict = _judge(measured, by_density, by_steps, radius, gained)
    witnesses = dict(by_density=by_density, by_steps=by_steps)
    return _certificate(verdict, (kl, kl_stderr), witnesses, radius, gains, gain, level)


def _certificate(verdict, kl, witnesses, radius, gains, gain, level) -> Certificate:
    """A certificate without the entries that only a transport map has, such as folds."""
    kl, kl_stderr = kl
    improvement, improvement_stderr = gain
    nan, zero = as_entries(np.nan, kl.dtype), jnp.zeros_like(kl)
    return Certificate(
        verdict=verdict,
        kl=kl,
        kl_stderr=kl_stderr,
        kl_by_score=nan,
        kl_upper=as_entries(float(kl) + normal_quantile(level) * float(kl_stderr), kl.dtype),
        kl_predicted=nan,
        radius=radius,
        folded=zero,
        folded_upper=nan,
        improvement=improvement,
        improvement_stderr=improvement_stderr,
        total_kl=kl,
        total_kl_stderr=kl_stderr,
        total_improvement=improvement,
        total_improvement_stderr=improvement_stderr,
        stein=nan,
        stein_stderr=nan,
        non_finite=nan if verdict is Verdict.critic_not_finite else zero,
        score=PerturbedScore(),
        level=level,
        num_actions=gains.size,
        num_observations=gains.shape[0],
        fractions=jnp.ones_like(kl)[None],
        kl_by_fraction=as_entries([float(kl)], kl.dtype),
        kl_stderr_by_fraction=as_entries([float(kl_stderr)], kl.dtype),
        gains=gains.reshape(-1),
        **witnesses,
    )


def _policy(policy: Any) -> AbstractPolicy:
    if isinstance(policy, AbstractFlowPolicy) or not isinstance(policy, AbstractPolicy):
        return as_flow_policy(policy)
    return policy


def _plain(policy: Any) -> AbstractFlowPolicy:
    return policy.steered_flow if isinstance(policy, SteeredPolicy) else policy


def _in_continuous_time(policy: AbstractFlowPolicy, dtype: Any) -> AbstractFlowPolicy:
    return with_flow(policy, continuous_flow(policy.flow_policy, dtype))


@eqx.filter_jit
def _steered_log_ratios(policy, base, observations, keys, by_scores) -> LogRatios:
    """The log-ratios that a steered policy computes as it draws."""

    def one(row):
        o, key = row
        action, log_ratio = policy.draw_and_log_ratio(o, key=key)
        return known_or_inf(log_ratio), estimate_by_scores(by_scores, o, action)

    return lax.map(one, (observations, keys), batch_size=64)


@eqx.filter_jit
def _gains(policy, base, critic, observations, num_per_observation, key):
    """The gain in the critic's value at every action, and whether all gains are finite. Both
    policies get the same key, so that policies with the same noise are compared at the same
    noise."""

    def one(o, key):
        a, b = policy.draw(o, key=key), base.draw(o, key=key)
        return critic_value(policy, critic, o, a) - critic_value(base, critic, o, b)

    def of_observation(row):
        o, key = row
        return jax.vmap(lambda key: one(o, key))(jr.split(key, num_per_observation))

    keys = jr.split(key, batch_length("observations", observations))
    rows_at_once = max(1, 256 // num_per_observation)
    gains = lax.map(of_observation, (observations, keys), batch_size=rows_at_once)
    return gains, jnp.all(jnp.isfinite(gains))


def _judge(
    measured: Witness, by_density: Witness, by_steps: Witness, radius: Scalar, gained: bool
) -> Verdict:
    kl, stderr = float(measured.kl), float(measured.kl_stderr)
    if math.isnan(kl):
        return Verdict.unchecked
    if float(measured.unknown) > MOST_UNKNOWN:
        # Steps that fold have no density.
        return Verdict.beyond_data if math.isnan(float(by_steps.kl)) else Verdict.sampler_differs
    if not is_normalised(measured):
        return Verdict.witnesses_disagree
    if are_apart(by_density, by_steps):
        return Verdict.sampler_differs
    if not math.isnan(float(radius)) and kl - 2 * stderr > 1.05 * float(radius):
        return Verdict.radius_exceeded
    if not stderr <= 2 * RELATIVE_ERROR * abs(kl) and kl > 0:
        return Verdict.unchecked
    return Verdict.holds if gained else Verdict.no_gain


@eqx.filter_jit
def _nearest_neighbours(policy, base, observations, key) -> tuple[Scalar, Scalar]:
    r"""The KL at each of some observations, from the distances of the actions of a policy to their
    nearest neighbours among other actions of the policy and among actions of the base.

    ??? cite "Reference"

        ```bibtex
        @article{wang2009divergence,
            title={Divergence estimation for multidimensional densities via {k}-nearest-neighbor
                   distances},
            author={Wang, Qing and Kulkarni, Sanjeev R. and Verd{\'u}, Sergio},
            journal={IEEE Transactions on Information Theory},
            volume={55},
            year={2009},
        }
        ```
    """
    num_observations = min(128, batch_length("observations", observations))
    num, k = 128, 4
    observations = jax.tree.map(lambda leaf: leaf[:num_observations], observations)
    scale_key, key = jr.split(key)
    whitening: Whitening = measure_whitening(base, observations, key=scale_key)

    def of_observation(row):
        o, key = row
        keys = jr.split(key, (2, num))
        x, y = (
            jax.vmap(lambda key, π=π: whitening.whiten(π.draw(o, key=key).reshape(-1)))(ks)
            for π, ks in zip((policy, base), keys, strict=True)
        )

        def kth_distance(points, skip):
            squares = jnp.sum((x[:, None] - points[None]) ** 2, axis=-1)
            return jnp.sqrt(jnp.sort(squares, axis=1)[:, k - 1 + skip])

        own, other = kth_distance(x, 1), kth_distance(y, 0)
        ratio = jnp.log(jnp.maximum(other, 1e-12)) - jnp.log(jnp.maximum(own, 1e-12))
        return whitening.rank * jnp.mean(ratio) + math.log(num / (num - 1))

    kls = lax.map(of_observation, (observations, jr.split(key, num_observations)))
    return jnp.mean(kls), standard_error(kls)
