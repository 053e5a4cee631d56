from collections.abc import Callable
from typing import Any

import diffrax
import equinox as eqx
import jax
import jax.core
import jax.numpy as jnp
import jax.random as jr
from jax import lax
from jaxtyping import Array, PRNGKeyArray, PyTree, Scalar

from .._custom_types import Action, Observation
from .._flows import AbstractFlowPolicy, changed, FlowPolicy, given
from .._linalg import whiten_samples
from .._trees import constant


# In standard deviations: ten Euler steps of a flow that they follow well miss it by 0.1 or so.
_MOST_ERROR = 0.25


class StoppedVelocity(eqx.Module):
    """A velocity that stays as it is from `latest` on: at time 1 itself it may be infinite."""

    network: Callable[[Scalar, Any, Any], Any]
    latest: Scalar

    def __call__(self, t: Scalar, x: Action, observation: Observation) -> Action:
        return self.given(observation)(t, x)

    def given(self, observation: Observation) -> Callable[[Scalar, Action], Action]:
        velocity = given(self.network, observation)
        return lambda t, x: velocity(jnp.minimum(t, self.latest.astype(x.dtype)), x)


def smallest_deviation(dtype: Any) -> float:
    """Entries that vary by less than this are constant, beside noise of deviation one."""
    return 1e-8 if dtype == jnp.float64 else 1e-5


def smallest_followed(dtype: Any) -> float:
    """The same for a continuous flow: its solver leaves a few times its tolerance of that noise."""
    return 5 * _tolerance(dtype)


def _tolerance(dtype: Any) -> float:
    return 1e-7 if dtype == jnp.float64 else 1e-5


def with_flow(policy: Any, flow: FlowPolicy) -> Any:
    """A policy with another flow underneath its transport maps."""
    return (
        flow
        if policy is policy.flow_policy
        else eqx.tree_at(lambda policy: policy.flow_policy, policy, flow)
    )


def continuous_flow(flow: FlowPolicy, dtype: Any) -> FlowPolicy:
    """The flow with steps as short as needed, instead of the steps of its sampler."""
    latest = flow.path.time_at_noise_ratio(jnp.asarray(0.1 * smallest_deviation(dtype), dtype))
    tol = _tolerance(dtype)
    return changed(
        flow,
        velocity=StoppedVelocity(flow.velocity_field, latest),
        solver=diffrax.Tsit5(),
        stepsize_controller=diffrax.PIDController(rtol=tol, atol=0.1 * tol),
        dtype=dtype,
        throw=False,
    )


def in_continuous_time(
    policy: AbstractFlowPolicy, observations: PyTree[Any], *, key: PRNGKeyArray
) -> AbstractFlowPolicy:
    """The policy as its velocity defines it, where the steps of its sampler are too long for that.

    A few long steps may be far from the flow in continuous time: in directions in which the actions
    vary little they end with almost no variation at all. Scores, costs and KLs are about the flow.
    So its actions are then drawn with steps as short as needed. Inside `jax.jit` the policy is
    returned as it is.
    """
    flow = policy.flow_policy
    if not isinstance(flow, FlowPolicy):  # a steered flow: its steps have the densities
        return policy
    leaves = jax.tree.leaves(eqx.filter((flow, observations), eqx.is_array))
    if any(isinstance(leaf, jax.core.Tracer) for leaf in leaves):
        return policy
    observation = jax.tree.map(lambda leaf: jnp.asarray(leaf)[0], observations)
    dtype = eqx.filter_eval_shape(flow.noise, observation, key=key).dtype
    finer = continuous_flow(flow, dtype)
    if _error_of_sampler(flow, finer, observations, key) > _MOST_ERROR:
        return with_flow(policy, finer)
    return policy


@eqx.filter_jit
def _error_of_sampler(flow, finer, observations, key) -> Scalar:
    """The distance between the sampler and the flow from the same noise, in the direction where it
    is largest and in standard deviations. Zero where the flow cannot be followed."""
    num = 256
    length = jnp.shape(jax.tree.leaves(observations)[0])[0]
    rows = jnp.arange(num) % length
    observations = jax.tree.map(lambda leaf: jnp.asarray(leaf)[rows], constant(observations))

    def pair(row):
        o, key = row

        def both(key):
            noise = flow.noise(o, key=key)
            return flow.flow(o, noise).reshape(-1), finer.flow(o, noise).reshape(-1)

        return jax.vmap(both)(jr.split(key))

    drawn, followed = lax.map(pair, (observations, jr.split(key, num)), batch_size=256)
    whitening = whiten_samples(
        (followed[:, 0] - followed[:, 1]) / 2**0.5,
        jnp.max(jnp.abs(followed), axis=(0, 1)),
        smallest_followed(drawn.dtype),
    )
    error: Array = jax.vmap(whitening.whiten)((drawn - followed)[:, 0])
    squared = jnp.max(jnp.mean(error**2, axis=0))
    return jnp.where(jnp.isfinite(squared), jnp.sqrt(squared), 0)
