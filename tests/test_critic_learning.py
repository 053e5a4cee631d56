"""The ways to learn a critic: their laws, and a bandit whose returns are known."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
import pytest
from helpers import dtypes
from scipy.stats import norm

import fisher_flow as ff


sizes: Any = dict(width_size=32, depth=2)


@dtypes
def test_histogram(dtype):
    learning = ff.HLGauss((-2.0, 3.0), 51)
    targets = jnp.asarray([-1.5, 0.03, 2.5, 9.0], dtype)
    p = jax.vmap(learning.histogram)(targets)
    assert p.dtype == dtype and np.allclose(p.sum(axis=1), 1, atol=1e-5)
    atoms = np.linspace(-2, 3, 51)
    assert np.allclose(np.asarray(p[:3]) @ atoms, targets[:3], atol=1e-4)
    edges = np.append(atoms - 0.05, 3.05)
    expected = np.diff(norm.cdf(edges, 0.03, 0.075))
    assert np.allclose(p[1], expected, atol=1e-5)
    assert jnp.all(p[3] == learning.histogram(jnp.asarray(3.0, dtype))), "clipped"


def test_cross_entropy_has_the_gradient_of_a_softmax(getkey):
    learning = ff.HLGauss((-2.0, 3.0), 11, num_members=2, width_size=8, depth=1)
    o, a = jr.normal(getkey(), (4, 3)), jr.normal(getkey(), (4, 2))
    critic = learning.init(o[0], a[0], key=getkey())
    y = jnp.asarray([0.0, 1.0, -1.0, 7.0])

    def loss(critic):
        return learning.loss(critic, o, a, y, key=getkey())

    gradient, logs = eqx.filter_grad(loss, has_aux=True)(critic)
    error = jax.nn.softmax(jax.vmap(critic.logits)(o, a)) - jax.vmap(learning.histogram)(y)[:, None]
    assert np.allclose(gradient.members.layers[-1].bias, error.mean(axis=0), atol=1e-10)
    assert logs["target_clipped"] == 0.25


def learned(learning, key):
    """A bandit that pays -1 or 2, each half of the time."""

    @eqx.filter_jit
    def run(key):
        o = jnp.zeros((256, 1), jnp.float32)
        critic = learning.init(o[0], o[0], key=key)
        optimiser = optax.adam(3e-3)

        def step(state, key):
            critic, adam = state
            pay_key, loss_key = jr.split(key)
            y = jnp.where(jr.bernoulli(pay_key, shape=(256,)), 2.0, -1.0).astype(jnp.float32)
            grads, _ = eqx.filter_grad(
                lambda c: learning.loss(c, o, o, y, key=loss_key), has_aux=True
            )(critic)
            updates, adam = optimiser.update(grads, adam)
            return (eqx.apply_updates(critic, updates), adam), None

        arrays, static = eqx.partition(critic, eqx.is_array)

        def body(carry, key):
            (critic, adam), _ = step((eqx.combine(carry[0], static), carry[1]), key)
            return (eqx.filter(critic, eqx.is_array), adam), None

        carry, _ = jax.lax.scan(body, (arrays, optimiser.init(arrays)), jr.split(key, 800))
        return eqx.combine(carry[0], static)

    return run(key)


@pytest.mark.parametrize("learning", [ff.HLGauss((-3.0, 4.0), 51, **sizes), ff.ValueFlow(**sizes)])
def test_returns_of_a_bandit(learning, getkey, standard_promotion):
    critic = learned(learning, getkey())
    zero = jnp.zeros(1, jnp.float32)
    assert abs(critic(zero, zero) - 0.5) < 0.2
    assert np.isfinite(jax.grad(lambda a: critic(zero, a))(zero)).all()
    if isinstance(learning, ff.ValueFlow):
        z = jr.normal(getkey(), (512,), jnp.float32)
        returns = jax.vmap(lambda z: critic.returns(zero, zero, z))(z)
        assert np.allclose(returns.std(axis=0), 1.5, atol=0.3)


def test_no_gradient_through_the_target(getkey):
    learning = ff.ValueFlow(width_size=8, depth=1)
    o, a = jr.normal(getkey(), (4, 3)), jr.normal(getkey(), (4, 2))
    critic = learning.init(o[0], a[0], key=getkey())

    def target(critic):
        next_values = learning.next_values(critic, o, a, key=jr.key(0))
        return jnp.sum(learning.target(jnp.ones(4), jnp.ones(4), next_values))

    gradient = eqx.filter_grad(target)(critic)
    assert all(jnp.all(g == 0) for g in jax.tree.leaves(gradient))


def test_support_is_checked():
    with pytest.raises(ValueError, match="`support` must be an increasing pair.*support="):
        ff.HLGauss((1.0, -1.0))
