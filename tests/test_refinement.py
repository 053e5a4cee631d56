"""The laws of a refinement, whichever way it finds a displacement."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from helpers import correlated, Critic, refinements, shifted_policy

import fisher_flow as ff


pytestmark = pytest.mark.usefixtures("standard_promotion")
every_refinement = pytest.mark.parametrize("name", refinements)
policy, critic = shifted_policy(correlated(jnp.float32)), Critic([0.8, -0.5], jnp.float32)
observations = jr.normal(jr.key(7), (64, 2), jnp.float32)


def refine(name, radius):
    return ff.refine(policy, critic, refinements[name](radius), observations=observations)


@every_refinement
def test_zero_radius_is_the_identity(name, getkey):
    refined, keys = refine(name, 0.0), jr.split(getkey(), 20)
    o = observations[0]
    before, after = (
        jax.jit(jax.vmap(lambda key, p=p: p.sample(o, key=key)))(keys) for p in (policy, refined)
    )
    assert np.array_equal(before, after)


@every_refinement
def test_the_radius_is_spent_from_the_flow_underneath(name, getkey):
    refined = refine(name, 0.1)
    assert isinstance(refined, ff.RefinedPolicy | ff.SteeredPolicy)
    steered = isinstance(refined, ff.SteeredPolicy)  # is itself a flow
    underneath = refined.policy if steered else refined.flow_policy
    assert eqx.tree_equal(underneath, policy) and refined.bounds == policy.bounds
    assert refined.reached is not None and 0 < refined.reached.kl < 0.1 * 1.01
    o, b = observations[0], jr.normal(getkey(), (2,), jnp.float32)
    a = eqx.filter_jit(refined.from_flow)(o, b)
    assert a.shape == (2,) and a.dtype == jnp.float32
    assert np.all(np.isfinite(a)) and np.any(a != b) != steered
