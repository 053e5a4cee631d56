import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from helpers import dtypes, every_path, tree_allclose, UserPath

import fisher_flow as ff


@every_path
@dtypes
def test_starts_at_noise_and_ends_at_data(path, dtype):
    start, end = jnp.zeros((), dtype), jnp.ones((), dtype)
    x0, x1 = jnp.asarray([1.0, 2.0], dtype), jnp.asarray([3.0, -1.0], dtype)
    # A diffusion model keeps a trace of the data at time 0.
    trace = 0.03 if isinstance(path, ff.VariancePreservingPath) else 1e-6
    assert tree_allclose(path.interpolate(start, x0, x1)[0], x0, atol=trace)
    assert tree_allclose(path.interpolate(end, x0, x1)[0], x1, atol=5e-6)


@every_path
@dtypes
def test_velocity_of_a_pair_is_the_derivative_of_its_point(path, dtype, getkey):
    x0, x1 = jr.normal(getkey(), (2, 3), dtype)
    t, one = jnp.asarray(0.3, dtype), jnp.ones((), dtype)
    derivative = jax.jvp(lambda t: path.interpolate(t, x0, x1)[0], (t,), (one,))[1]
    assert tree_allclose(path.interpolate(t, x0, x1)[1], derivative)


def test_schedule_of_a_path_of_two_functions():
    t = jnp.asarray(0.3)
    angle = jnp.pi / 2 * t
    sin, cos = jnp.sin(angle), jnp.cos(angle)
    expected = (sin, cos, jnp.pi / 2 * cos, -jnp.pi / 2 * sin)
    assert tree_allclose(UserPath().schedule(t), expected, rtol=1e-12)
    assert tree_allclose(ff.CosinePath().schedule(t), expected, rtol=1e-12)


def test_variance_preserving_path_adds_noise_at_its_rates():
    # dx = -½ β x ds + sqrt(β) dw with β from 0.1 to 20: d log α / ds = -½ β.
    path, t = ff.VariancePreservingPath(), jnp.asarray([0.0, 0.3, 0.999])
    slopes = jax.vmap(jax.grad(lambda t: jnp.log(path.alpha(t))))(t)
    β = 0.1 + 19.9 * (1 - np.asarray(t))
    assert np.allclose(slopes, 0.5 * β)
    α, σ = jax.vmap(path.alpha)(t), jax.vmap(path.sigma)(t)
    assert np.allclose(α**2 + σ**2, 1)


@every_path
@dtypes
def test_score_of_standard_normal_data(path, dtype):
    # Then x_t is N(0, (α² + σ²) I), whose velocity is ½ d/dt log(α² + σ²) x.
    t, x = jnp.asarray(0.6, dtype), jnp.asarray([1.0, -2.0], dtype)
    variance = lambda t: path.alpha(t) ** 2 + path.sigma(t) ** 2
    velocity = 0.5 * jax.grad(lambda t: jnp.log(variance(t)))(t) * x
    assert tree_allclose(path.score(t, x, velocity), -x / variance(t))


def test_score_of_the_linear_path(getkey):
    x, v = jr.normal(getkey(), (2, 3))
    assert tree_allclose(ff.LinearPath().score(0.7, x, v), (0.7 * v - x) / 0.3, rtol=1e-12)


@every_path
@dtypes
def test_time_at_noise_ratio_is_the_inverse(path, dtype):
    t = jnp.asarray([0.01, 0.3, 0.5, 0.9, 0.95, 0.999], dtype)
    there_and_back = lambda t: path.time_at_noise_ratio(path.noise_ratio(t))
    ε = float(jnp.finfo(dtype).eps)
    expected = t
    assert tree_allclose(jax.vmap(there_and_back)(t), expected, rtol=10 * ε, atol=10 * ε)
    assert tree_allclose(eqx.filter_jit(there_and_back)(t[3]), t[3], rtol=10 * ε, atol=10 * ε)


def test_a_ratio_that_the_path_does_not_reach_is_at_its_end():
    # This path keeps a trace of the data at time 0, and a floor of noise at time 1.
    path = ff.VariancePreservingPath()
    assert path.time_at_noise_ratio(jnp.asarray(1e-9, jnp.float32)) == 1
    assert path.time_at_noise_ratio(1e9) < 1e-6
