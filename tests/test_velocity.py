import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from helpers import bimodal, dtypes, every_path, tree_allclose

import fisher_flow as ff


@every_path
def test_mixture_velocity_obeys_the_continuity_equation(path, getkey):
    # ∂ₜ log p + ∇·v + v·∇ log p = 0 characterises the velocity, up to fields that move no mass.
    mixture = bimodal()
    velocity = mixture.velocity(path)

    @jax.jit
    @jax.vmap
    def residual(t, x):
        log_p = lambda t, x: mixture.at_time(path, t).log_prob(x)
        v = velocity(t, x, None)
        divergence = jnp.trace(jax.jacfwd(lambda x: velocity(t, x, None))(x))
        return jax.grad(log_p)(t, x) + divergence + v @ jax.grad(log_p, argnums=1)(t, x)

    t = jnp.linspace(0, 0.98, 50)
    assert np.allclose(residual(t, 2 * jr.normal(getkey(), (50, 2))), 0, atol=1e-8)


@dtypes
def test_mixture_velocity_is_the_mean_over_pairs(dtype):
    # At time 0 the pair is independent, so E[ẋ | x_0 = x] = E[x_1] - x.
    mixture = bimodal(dtype)
    mean = (mixture.weights / mixture.weights.sum()) @ mixture.means
    x = jnp.asarray([0.4, -1.0], dtype)
    v = mixture.velocity()(jnp.zeros((), dtype), x, None)
    assert tree_allclose(v, mean - x, rtol=1e-5, atol=1e-6)


@dtypes
@pytest.mark.parametrize("action_shape", [(), (3,), (2, 3)], ids=str)
def test_mlp_keeps_shape_and_dtype_and_sees_all_its_inputs(action_shape, dtype, getkey):
    observation = dict(position=jnp.ones((2, 2), dtype), speed=jnp.ones((), dtype))
    velocity = ff.VelocityMLP(5, action_shape, width_size=8, depth=1, dtype=dtype, key=getkey())
    inputs = (jnp.asarray(0.5, dtype), jr.normal(getkey(), action_shape, dtype), observation)
    v = velocity(*inputs)
    assert v.shape == action_shape and v.dtype == dtype
    for leaf in jax.tree.leaves(jax.jit(jax.jacrev(velocity, argnums=(0, 1, 2)))(*inputs)):
        assert np.any(leaf != 0)


def test_mlp_without_observation(getkey):
    velocity = ff.VelocityMLP(0, (2,), width_size=8, depth=1, key=getkey())
    assert velocity(jnp.asarray(0.5), jnp.ones(2), None).shape == (2,)
