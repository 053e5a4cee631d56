import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from helpers import bimodal, within

import fisher_flow as ff


def test_loss_of_a_velocity_of_zero(getkey):
    # Then the loss is E mean (a - x_0)² = mean a² + 1.
    policy = ff.FlowPolicy(lambda t, x, observation: jnp.zeros_like(x), (2,))
    action = jnp.asarray([1.0, -2.0])
    loss = jax.vmap(lambda key: ff.flow_matching_loss(policy, None, action, key=key))
    assert within(loss(jr.split(getkey(), 10_000)), 2.5 + 1)


def test_exact_velocity_is_the_minimum(getkey):
    # There the loss grows by exactly c² if the velocity is moved by c.
    mixture, c = bimodal(), 0.5
    velocity = mixture.velocity()
    moved = lambda t, x, observation: velocity(t, x, observation) + c

    @jax.vmap
    def growth(action, key):
        loss = lambda v: ff.flow_matching_loss(ff.FlowPolicy(v, (2,)), None, action, key=key)
        return loss(moved) - loss(velocity)

    actions = mixture.sample(20_000, getkey())
    assert within(jax.jit(growth)(actions, jr.split(getkey(), 20_000)), c**2)


@pytest.fixture(scope="module")
def fit(standard_promotion):
    """Fits N(observation, diag(0.04, 0.25)), in float32."""
    o_key, a_key, network_key = jr.split(jr.key(0), 3)
    observations = jr.uniform(o_key, (4096, 2), jnp.float32, -1, 1)
    noise = jr.normal(a_key, (4096, 2), jnp.float32)
    actions = observations + jnp.asarray([[0.2, 0.5]], jnp.float32) * noise
    velocity = ff.VelocityMLP(2, (2,), width_size=64, depth=2, dtype=jnp.float32, key=network_key)
    policy = ff.FlowPolicy(velocity, (2,), num_steps=20)

    def fit(key):
        return ff.fit_flow(
            policy, observations, actions, num_updates=2000, learning_rate=3e-3, progress=False,
            key=key,
        )  # fmt: skip

    return policy, fit


@pytest.fixture(scope="module")
def fitted(fit):
    return fit[1](jr.key(1))


def test_moments_of_the_fitted_policy(fitted, getkey):
    o = jnp.asarray([0.5, -0.3], jnp.float32)
    keys = jr.split(getkey(), 4000)
    samples = jax.jit(jax.vmap(lambda key: fitted.sample(o, key=key)))(keys)
    assert samples.dtype == jnp.float32
    # What a small network learns in a few seconds.
    assert np.allclose(samples.mean(axis=0), o, atol=0.1)
    assert np.allclose(samples.std(axis=0), [0.2, 0.5], rtol=0.2)


def test_fitting_repeats_and_leaves_its_arguments_alone(fit, fitted, capfd):
    policy, again = fit
    before = jax.tree.map(np.array, eqx.filter(policy, eqx.is_array))
    same = again(jr.key(1))
    assert eqx.tree_equal(same, fitted)
    assert not eqx.tree_equal(again(jr.key(2)), fitted)
    assert eqx.tree_equal(before, jax.tree.map(np.array, eqx.filter(policy, eqx.is_array)))
    assert capfd.readouterr() == ("", ""), "`progress=False` is silent"
