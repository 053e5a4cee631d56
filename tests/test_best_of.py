import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from helpers import bimodal, dtypes, gaussian, within
from scipy import integrate, stats

import fisher_flow as ff


first = lambda observation, action: action[0]


@pytest.mark.parametrize("n", [1, 2, 5])
def test_kl_bound(n):
    # Best of n by a continuous value has density n F^(n - 1): KL = ∫ n u^(n-1) log(n u^(n-1)) du.
    policy = gaussian([0.0], [[1.0]]).policy()
    density = lambda u: n * u ** (n - 1)
    kl, _ = integrate.quad(lambda u: density(u) * np.log(density(u)), 0, 1)
    assert np.allclose(ff.BestOf(policy, first, n).kl_bound, kl)


@pytest.mark.parametrize("n", [1, 4])
def test_expected_maximum_of_gaussians(n, getkey):
    # Ten Euler steps carry N(0, 1) to itself with a factor: take the scale from the draws.
    policy = gaussian([0.0], [[1.0]]).policy()
    maximum, _ = integrate.quad(
        lambda x: x * n * stats.norm.pdf(x) * stats.norm.cdf(x) ** (n - 1), -np.inf, np.inf
    )
    scale = policy.flow(None, jnp.ones(1))[0]
    best = ff.BestOf(policy, first, n)
    samples = jax.jit(jax.vmap(lambda key: best.sample(None, key=key)))(jr.split(getkey(), 20_000))
    assert within(samples[:, 0], scale * maximum)


@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf, -jnp.inf])
def test_values_that_are_not_finite_are_never_preferred(bad, getkey):
    policy = bimodal().policy()
    critic = lambda observation, action: jnp.where(action[0] > 0, bad, action[1])
    draw = jax.jit(jax.vmap(lambda key: ff.BestOf(policy, critic, 16).draw(None, key=key)))
    # Of 16 draws, of which 4 in 10 are good, none is good in 0.03% of the cases.
    assert np.mean(draw(jr.split(getkey(), 200))[:, 0] > 0) < 0.03


@dtypes
def test_bounds_dtype_and_shape(dtype, getkey):
    policy = gaussian([0.0, 0.0], np.eye(2), dtype).policy(bounds=(-0.5, 0.5))
    best = ff.BestOf(policy, first, 8)
    assert best.action_shape == (2,) and best.bounds == policy.bounds
    sample = jax.vmap(lambda key: best.sample(None, key=key))(jr.split(getkey(), 100))
    assert sample.dtype == dtype and np.all(np.abs(sample) <= 0.5)


def test_the_critic_sees_the_action_that_is_executed(getkey):
    # Beyond the bound the critic promises the world; held to the bound it is all the same.
    policy = gaussian([0.0], [[1.0]]).policy(bounds=(-0.1, 0.1))
    critic = lambda observation, action: jnp.where(jnp.abs(action[0]) > 0.1, 1e6, -action[0])
    samples = jax.vmap(lambda key: ff.BestOf(policy, critic, 32).sample(None, key=key))(
        jr.split(getkey(), 100)
    )
    assert np.all(samples == -0.1)
