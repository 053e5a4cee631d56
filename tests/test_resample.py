import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from helpers import dtypes, gaussian, tree_allclose

import fisher_flow as ff


first = lambda observation, action: action[0]


base = gaussian([0.0], [[1.0]]).policy()


def resample(n, radius=0.3, dtype=jnp.float64):
    return ff.Resample(gaussian([0.0], [[1.0]], dtype).policy(), first, radius, n)


@dtypes
@pytest.mark.parametrize("n, radius", [(4, 0.2), (32, 0.5), (32, 1.5)])
def test_spends_the_radius_at_every_choice(n, radius, dtype, getkey):
    policy = resample(n, radius, dtype)
    values = jr.normal(getkey(), (100, n), dtype)
    p = jax.vmap(policy.probabilities)(values)
    assert p.dtype == dtype and np.allclose(p.sum(1), 1, rtol=1e-5)
    assert np.allclose(jax.vmap(policy.kl)(p), radius, rtol=1e-3)
    # A tilt: the logarithms are linear in the values, and increase.
    differences, logs = values - values[:, :1], jnp.log(p) - jnp.log(p[:, :1])
    slope = jnp.sum(differences * logs, axis=1) / jnp.sum(differences**2, axis=1)
    assert np.all(slope > 0) and np.allclose(logs, slope[:, None] * differences, atol=2e-3)


def test_scale_and_offset_of_the_critic_change_nothing(getkey):
    policy, values = resample(16), jr.normal(getkey(), (16,))
    p = policy.probabilities(values)
    assert tree_allclose(policy.probabilities(1e3 * values - 1e5), p, rtol=1e-6)


def test_tends_to_the_tilted_gaussian(getkey):
    # N(0, σ²) exp(Q / β) with Q linear is a translation by σ sqrt(2 radius).
    radius = 0.3
    policy = resample(256, radius)
    scale = base.flow(None, jnp.ones(1))[0]  # of the ten Euler steps
    samples = jax.jit(jax.vmap(lambda key: policy.sample(None, key=key)))(jr.split(getkey(), 4000))
    # 4000 samples leave a standard error of 0.016, and 256 draws waste a little.
    assert np.allclose(samples.mean() / scale, np.sqrt(2 * radius), atol=0.07)
    assert np.allclose(samples.std() / scale, 1, atol=0.06)


@pytest.mark.parametrize("n", [2, 8])
def test_kl_is_within_the_radius(n, getkey):
    # In bins that are equally likely under the policy; binning can only lower a KL.
    policy = resample(n, radius=0.3)
    keys = jr.split(getkey(), 100_000)
    before, chosen = (
        np.asarray(jax.jit(jax.vmap(lambda key, p=p: p.draw(None, key=key)))(keys))[:, 0]
        for p in (base, policy)
    )
    edges = np.quantile(before, np.linspace(0, 1, 41)[1:-1])
    share = np.bincount(np.searchsorted(edges, chosen), minlength=40) / len(chosen)
    kl = np.sum(share * np.log(40 * np.maximum(share, 1e-12)))
    # 40 bins of 100,000 samples bias the estimate by 39 / 200,000.
    assert 0.05 < kl <= 0.3 + 0.002


@pytest.mark.parametrize("size", [1e3, 1e6, 1e9])
def test_one_value_that_is_very_bad_does_not_matter(size, getkey):
    policy, values = resample(32, radius=0.5), jr.normal(getkey(), (32,)).at[0].set(-size)
    p = policy.probabilities(values)
    assert p[0] < 1e-6 and np.allclose(policy.kl(p), 0.5, rtol=1e-3)


def test_equal_values_leave_the_policy_as_it_is():
    assert np.allclose(resample(8).probabilities(jnp.full(8, 3.0)), 1 / 8)
