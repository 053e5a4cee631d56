import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from helpers import gaussian, within
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
