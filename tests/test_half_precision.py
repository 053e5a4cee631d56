"""Parameters of half precision, fits that break, and programs in which a NaN is an error."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from helpers import gaussian

import fisher_flow as ff


halves = pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16], ids=["bfloat16", "float16"])


class Linear(eqx.Module):
    """Carries N(0, I) to N(mean, I)."""

    mean: jax.Array

    def __call__(self, t, x, observation):
        # Like a convolution, it takes no other dtype than that of the parameters.
        mean = jax.lax.dot(jnp.eye(2, dtype=x.dtype), self.mean)
        return mean + (2 * t - 1) / (t**2 + (1 - t) ** 2) * (x - t * mean)


@halves
def test_refined_in_float32(dtype, getkey):
    mean = jnp.asarray([0.5, -1.0], dtype)  # exact in half precision
    policy = ff.FlowPolicy(Linear(mean), (2,), num_steps=64)
    assert policy.sample(None, key=getkey()).dtype == dtype
    action = jnp.asarray([0.25, 0.5], dtype)
    exact = gaussian(mean.astype(float), jnp.eye(2))
    log_p = policy.log_prob(None, action)
    assert log_p.dtype == jnp.float32
    assert np.isclose(log_p, exact.log_prob(action.astype(float)), atol=1e-3)
    # Under a linear critic the best policy of this KL is moved by sqrt(2 KL).
    critic = lambda observation, action: action[0]
    refined = ff.refine(policy, critic, ff.NaturalStep(radius=0.5, num_auxiliary=8))
    action = action.astype(jnp.float32)
    moved = refined.displacement(None, action)
    assert moved.dtype == refined.sample(None, key=getkey()).dtype == jnp.float32
    assert np.allclose(moved, [1, 0], atol=0.05)
    assert refined.flow_policy.velocity_field.mean.dtype == dtype


@halves
@pytest.mark.usefixtures("standard_promotion")
def test_fitted_in_float32(dtype, getkey):
    # Steps of a thousandth would be lost beside parameters of one.
    policy = ff.FlowPolicy(Linear(jnp.ones(2, dtype)), (2,))
    actions = jnp.asarray([[2.0, 0.0]], dtype) + jr.normal(getkey(), (512, 2), dtype)
    fitted = ff.fit_flow(
        policy,
        jnp.zeros((512, 1), dtype),
        actions,
        num_updates=600,
        learning_rate=5e-3,
        progress=False,
        key=getkey(),
    )
    assert fitted.velocity_field.mean.dtype == dtype
    assert np.allclose(fitted.velocity_field.mean, [2, 0], atol=0.15)


@pytest.mark.usefixtures("standard_promotion")
def test_a_fit_that_ends_in_nan_raises(getkey):
    class Explosive(eqx.Module):
        weight: jax.Array

        def __call__(self, t, x, observation):
            return self.weight * x / jnp.where(jnp.isfinite(self.weight), 0 * self.weight, 1)

    policy = ff.FlowPolicy(Explosive(jnp.ones(())), (2,))
    data = jnp.zeros((8, 1)), jnp.ones((8, 2))
    with pytest.raises(FloatingPointError, match="learning_rate=1e-4"):
        ff.fit_flow(policy, *data, num_updates=2, batch_size=4, progress=False, key=getkey())


@pytest.mark.slow
@pytest.mark.usefixtures("standard_promotion")
def test_no_nan_is_made_on_purpose_in_a_program(getkey):
    policy = ff.FlowPolicy(Linear(jnp.asarray([0.5, -1.0])), (2,), num_steps=4)
    critic = lambda observation, action: action[0]
    observations = jnp.zeros((4, 1))
    best = ff.BestOf(policy, critic, 2)
    fitting: dict[str, Any] = dict(num_samples=16, num_updates=2, batch_size=4, progress=False)
    with jax.debug_nans(True):
        absorbed, fidelity = ff.absorb(best, observations, **fitting, key=getkey())
        assert np.isnan(fidelity.kl) and np.isnan(fidelity.distance) and 0 <= fidelity.energy < 1
        sizes: dict[str, Any] = dict(num_actions=8, num_witnesses=32)
        pair = ff.certify(absorbed, critic, observations, base=policy, **sizes, key=getkey())
        assert np.isnan(pair.by_density.difference) and np.isfinite(pair.by_density.kl)
        unchecked = ff.certify(
            absorbed, critic, observations, base=policy, num_witnesses=0, key=getkey()
        )
        assert unchecked.verdict is ff.Verdict.unchecked
        # A single action has no standard error.
        refined = ff.refine(policy, critic, ff.NaturalStep(num_auxiliary=4))
        one: dict[str, Any] = dict(num_actions=1, num_witnesses=0)
        single = ff.certify(refined, critic, observations[:1], **one, key=getkey())
        assert np.isinf(single.kl_stderr) and not single.holds
