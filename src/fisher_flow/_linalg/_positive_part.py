"""The positive part of a symmetric matrix, smooth and differentiable to every order.

The derivative of an eigendecomposition divides by differences of eigenvalues. It fails where two
eigenvalues agree, as they do for every isotropic Gaussian. The functions here use eigenvectors for
their values only. Their derivatives solve a Sylvester equation, which is never singular.
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


def smooth_positive_part(A: Float[Array, "n n"], squared_width: ScalarLike) -> Float[Array, "n n"]:
    r"""Maps each eigenvalue of a symmetric matrix by $\tfrac12 (\lambda + \sqrt{\lambda^2 + ε^2})$,
    whose corner has the width `ε`.
    """
    # A floor, so that the square root can be differentiated at a zero matrix without a width.
    ε2 = jnp.asarray(squared_width, A.dtype) + jnp.finfo(A.dtype).tiny ** 0.5
    return 0.5 * (A + _square_root(A @ A + ε2 * jnp.eye(A.shape[0], dtype=A.dtype)))
