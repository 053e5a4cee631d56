"""The laws of a choice among several actions, whichever way it is made."""

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from helpers import bimodal, dtypes, gaussian, selections

import fisher_flow as ff


every_selection = pytest.mark.parametrize("make", selections.values(), ids=selections)


def drawn(policy, method, key, num=200):
    draw = getattr(policy, method)
    return jax.jit(jax.vmap(lambda key: draw(None, key=key)))(jr.split(key, num))


@every_selection
def test_values_that_are_not_finite_are_never_preferred(make, getkey):
    # What is bad is an argument of the program, so that all of them share it.
    def draw(bad, key):
        critic = lambda observation, action: jnp.where(action[0] > 0, bad, action[1])
        return make(bimodal().policy(), critic, 16).draw(None, key=key)

    keys, draw = jr.split(getkey(), 200), jax.jit(jax.vmap(draw, in_axes=(None, 0)))
    for bad in jnp.nan, jnp.inf, -jnp.inf:
        # Of 16 draws, of which 4 in 10 are good, none is good in 0.03% of the cases.
        assert np.mean(draw(jnp.asarray(bad), keys)[:, 0] > 0) < 0.03
        probabilities = make(bimodal().policy(), lambda o, a: a[0], 16).probabilities
        among_bad = probabilities(jnp.full(16, bad))
        assert np.isclose(among_bad.sum(), 1) and np.all(among_bad >= 0)
        assert probabilities(jnp.zeros(16).at[3].set(bad))[3] == 0


@every_selection
@dtypes
def test_bounds_dtype_and_shape(make, dtype, getkey):
    policy = gaussian([0.0, 0.0], np.eye(2), dtype).policy(bounds=(-0.5, 0.5))
    chosen = make(policy, lambda observation, action: action[0], 8)
    assert chosen.action_shape == (2,) and chosen.bounds == policy.bounds
    assert np.isfinite(chosen.kl_bound) and chosen.kl_bound > 0
    actions = drawn(chosen, "sample", getkey())
    assert actions.dtype == dtype and np.all(np.abs(actions) <= 0.5)


def test_the_critic_sees_the_action_that_is_executed(getkey):
    # Beyond the bound the critic promises the world; held to the bound it is all the same.
    policy = gaussian([0.0], [[1.0]]).policy(bounds=(-0.1, 0.1))
    critic = lambda observation, action: jnp.where(jnp.abs(action[0]) > 0.1, 1e6, -action[0])
    assert np.all(drawn(ff.BestOf(policy, critic, 32), "sample", getkey(), 100) == -0.1)


def test_resampling_is_uniform_where_nothing_is_finite():
    policy = ff.Resample(bimodal().policy(), lambda o, a: a[0], 0.5, 16)
    for bad in jnp.nan, jnp.inf, -jnp.inf:
        assert np.allclose(policy.probabilities(jnp.full(16, bad)), 1 / 16)
