import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from helpers import correlated, Critic, ShiftedVelocity

import fisher_flow as ff


pytestmark = pytest.mark.usefixtures("standard_promotion")
g = np.array([0.8, -0.5], np.float32)
radius = 0.2


@jax.custom_vjp
def tripwire(x):
    """The identity, unless a gradient reaches it."""
    return x


def _no_gradient(_, cotangent):
    raise AssertionError("a gradient reached what should be held fixed")


tripwire.defvjp(lambda x: (x, None), _no_gradient)


class Guarded(eqx.Module):
    """A function of which no array may be differentiated."""

    inner: eqx.Module

    def __call__(self, *inputs):
        arrays, static = eqx.partition(self.inner, eqx.is_inexact_array)
        return eqx.combine(jax.tree.map(tripwire, arrays), static)(*inputs)


def observations(num=256):
    return jr.normal(jr.key(7), (num, 2), jnp.float32)


def train(critic, key=jr.key(3), radius=radius):
    velocity = Guarded(ShiftedVelocity(correlated(jnp.float32).velocity()))
    policy = ff.FlowPolicy(velocity, (2,))
    method = ff.Residual(
        radius=radius, width_size=32, depth=2, num_updates=500, learning_rate=3e-3, damping=0.0,
        num_calibration=1024, num_witnesses=0, progress=False,
    )  # fmt: skip
    return policy, ff.refine(policy, critic, method, observations=observations(), key=key)


@pytest.fixture(scope="module")
def trained():
    critic = Guarded(Critic(g, jnp.float32))
    return *train(critic), critic


@pytest.fixture(scope="module")
def report(trained):
    policy, refined, critic = trained
    return ff.certify(
        refined, critic, observations() + 0.1, num_actions=4096, num_witnesses=0, key=jr.key(5)
    )


def test_measured_kl_meets_the_radius(report):
    # Calibrated on 1024 actions, certified on 4096 others.
    assert np.allclose(report.kl, radius, rtol=0.1)
    assert report.folded <= 0.03 and report.non_finite == 0


def test_gain_approaches_the_closed_form(report):
    best = np.sqrt(2 * radius * g @ correlated().covariances[0] @ g)
    assert report.improvement < 1.05 * best, "no policy within the radius gains more"
    assert report.improvement > 0.9 * best


def test_no_gradient_reaches_the_policy_or_the_critic(trained):
    policy, refined, critic = trained
    # The tripwires in both let the training pass; and they do trip:
    for guarded, inputs in (critic, ()), (policy.velocity_field, (jnp.float32(0.5),)):
        point = jnp.ones(2, jnp.float32)
        inputs = (*inputs, point, point)
        with pytest.raises(AssertionError, match="a gradient reached"):
            eqx.filter_grad(lambda f, *inputs: jnp.sum(f(*inputs)))(guarded, *inputs)  # noqa: B023
    assert eqx.tree_equal(refined.policy, policy) and eqx.tree_equal(refined.critic, critic)


def test_dtype_and_key(trained):
    _, refined, critic = trained
    _, same = train(critic)
    _, other = train(critic, key=jr.key(4))
    displace = eqx.filter_jit(jax.vmap(refined_displacement, in_axes=(None, 0)))
    actions = observations(20)
    first = displace(refined, actions)
    assert first.dtype == jnp.float32
    assert np.array_equal(first, displace(same, actions))
    assert not np.array_equal(first, displace(other, actions))


def refined_displacement(refined, action):
    return refined.displacement(jnp.zeros(2, jnp.float32), action)
