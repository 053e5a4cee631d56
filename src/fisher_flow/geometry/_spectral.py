"""The positive part of a symmetric matrix, smooth and differentiable to every order.

Differentiating an eigendecomposition divides by differences of eigenvalues, and fails where two
of them agree, as they do for every isotropic Gaussian. The functions here use eigenvectors for
their values only; their derivatives solve a Sylvester equation, which never degenerates.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, ScalarLike


def _solve_sylvester(X: Float[Array, "n n"], C: Float[Array, "n n"]) -> Float[Array, "n n"]:
    """Solves `X Y + Y X = C` for a symmetric positive definite `X`."""

    def solve(_, C):
        w, V = jnp.linalg.eigh(X)
        return V @ ((V.T @ C @ V) / (w[:, None] + w[None, :])) @ V.T

    # Differentiated as a linear equation, not through its solution.
    return lax.custom_linear_solve(lambda Y: X @ Y + Y @ X, C, solve, symmetric=True)


@jax.custom_jvp
def _square_root(B: Float[Array, "n n"]) -> Float[Array, "n n"]:
    """The square root of a symmetric positive definite matrix."""
    w, V = jnp.linalg.eigh(B)
    return (V * jnp.sqrt(jnp.maximum(w, 0))[None]) @ V.T


@_square_root.defjvp
def _square_root_jvp(primals, tangents):
    (B,), (B_dot,) = primals, tangents
    X = _square_root(B)
    return X, _solve_sylvester(X, B_dot)


def smooth_positive_part(A: Float[Array, "n n"], smoothing: ScalarLike) -> Float[Array, "n n"]:
    r"""Maps each eigenvalue of a symmetric matrix by $\tfrac12 (\lambda + \sqrt{\lambda^2 + ε^2})$.

    The width `ε` of the corner is `smoothing` times the root mean square of the eigenvalues.
    """
    n = A.shape[0]
    mean_square = jnp.sum(A**2) / n
    # A zero matrix has no scale of its own; the floor keeps its square root differentiable.
    ε2 = jnp.asarray(smoothing, A.dtype) ** 2 * mean_square + jnp.finfo(A.dtype).tiny ** 0.5
    return 0.5 * (A + _square_root(A @ A + ε2 * jnp.eye(n, dtype=A.dtype)))
