import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from helpers import dtypes

from fisher_flow._linalg._positive_part import smooth_positive_part


def symmetric(key, size, dtype=jnp.float64):
    A = jr.normal(key, (size, size), dtype)
    return A + A.T


@dtypes
@pytest.mark.parametrize("squared_width", [0.0, 0.01, 1.0])
@pytest.mark.parametrize("size", [1, 2, 5])
def test_maps_the_eigenvalues(size, squared_width, dtype, getkey):
    A = symmetric(getkey(), size, dtype)
    λ, V = np.linalg.eigh(np.asarray(A, float))
    expected = (V * (0.5 * (λ + np.sqrt(λ**2 + squared_width)))) @ V.T
    # The root of A² loses half the digits of eigenvalues near zero.
    atol = 1e-6 if dtype == jnp.float64 else 3e-3
    actual = smooth_positive_part(A, squared_width)
    assert actual.dtype == dtype
    assert np.allclose(actual, expected, rtol=0, atol=atol)


@pytest.mark.parametrize("order", [1, 2])
def test_derivatives_match_finite_differences(order, getkey):
    A, A_dot = symmetric(getkey(), 3), symmetric(getkey(), 3)
    curve = lambda t: smooth_positive_part(A + t * A_dot, 0.2)
    for _ in range(order - 1):
        curve = jax.jacfwd(curve)
    curve, derivative = jax.jit(curve), jax.jit(jax.jacfwd(curve))
    h = 1e-5
    difference = (curve(h) - curve(-h)) / (2 * h)
    assert np.allclose(derivative(0.0), difference, rtol=1e-5, atol=1e-5)


modes = pytest.mark.parametrize("mode", [jax.jacfwd, jax.jacrev], ids=["forward", "reverse"])


@modes
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64], ids=["float32", "float64"])
def test_degenerate_eigenvalues_have_a_derivative(mode, dtype):
    derivative = jax.jit(jax.vmap(mode(lambda A: smooth_positive_part(A, 0.1))))
    scales = jnp.asarray([0.0, -2.0, 3.0], dtype)[:, None, None]
    assert np.all(np.isfinite(derivative(scales * jnp.eye(3, dtype=dtype)[None])))


@modes
@pytest.mark.parametrize("outer", [jax.jacfwd, jax.jacrev], ids=["forward over", "reverse over"])
def test_degenerate_eigenvalues_have_a_second_derivative(outer, mode):
    derivative = jax.jit(jax.vmap(outer(mode(lambda A: smooth_positive_part(A, 0.1)))))
    scales = jnp.asarray([0.0, -2.0, 3.0])[:, None, None]
    assert np.all(np.isfinite(derivative(scales * jnp.eye(3)[None])))


def test_derivative_at_a_multiple_of_the_identity():
    # A function f(λ) of the eigenvalues: f(λ I + t B) = f(λ) I + t f'(λ) B, for traceless B.
    λ, squared_width = 1.5, 0.2
    B = jnp.asarray([[1.0, 2.0], [2.0, -1.0]])
    function = lambda t: smooth_positive_part(λ * jnp.eye(2) + t * B, squared_width)
    slope = 0.5 * (1 + λ / np.sqrt(λ**2 + squared_width))
    assert np.allclose(jax.jacfwd(function)(0.0), slope * B, rtol=1e-9)
