"""Coordinates in which all the entries of an action are alike, whatever their units."""

import equinox as eqx
import jax
import jax.numpy as jnp
import lineax as lx
from jaxtyping import Array, Bool, Float, Scalar, ScalarLike

from ._krylov import dense_limit
from ._registered import register_positive_semidefinite


class Whitening(eqx.Module):
    r"""A linear change of coordinates $a = L z$, in which actions have covariance one.

    Everything that compares one entry of an action with another is done in these coordinates, so
    that it is the same whether a length is written in metres or in millimetres. A direction in
    which the actions do not vary is left out: its column of $L$ is zero, and so is its row of the
    inverse.
    """

    factor: Float[Array, "size size"] | Float[Array, " size"]  # L; a vector if it is diagonal
    inverse: Float[Array, "size size"] | Float[Array, " size"]
    deviations: Float[Array, " size"]
    """The standard deviation of the actions in each direction."""

    @staticmethod
    def identity(action: Array) -> "Whitening":
        """The coordinates of the action itself."""
        one = jnp.ones(action.size, action.dtype)
        return Whitening(one, one, one)

    @property
    def varies(self) -> Bool[Array, " size"]:
        """Whether the actions vary in each direction."""
        return self.deviations > 0

    @property
    def rank(self) -> Scalar:
        """The number of directions in which they vary, at least one."""
        return jnp.maximum(jnp.sum(self.varies, dtype=self.deviations.dtype), 1)

    def whiten(self, vector: Float[Array, " size"]) -> Float[Array, " size"]:
        """A displacement of an action in these coordinates, $L^{-1} v$."""
        return _product(self.inverse, vector)

    def colour(self, vector: Float[Array, " size"]) -> Float[Array, " size"]:
        """A displacement of these coordinates as one of the action, $L z$."""
        return _product(self.factor, vector)

    def whiten_gradient(self, gradient: Float[Array, " size"]) -> Float[Array, " size"]:
        r"""A gradient in the action as one in these coordinates, $L^\top g$."""
        return _product(self.factor.T, gradient)

    def colour_gradient(self, gradient: Float[Array, " size"]) -> Float[Array, " size"]:
        r"""A gradient in these coordinates as one in the action, $L^{-\top} g$."""
        return _product(self.inverse.T, gradient)

    def whiten_jacobian(self, jacobian: Float[Array, "size size"]) -> Float[Array, "size size"]:
        r"""The derivative of a gradient in these coordinates, $L^\top J L$."""
        if self.factor.ndim == 1:
            return self.factor[:, None] * jacobian * self.factor[None]
        return self.factor.T @ jacobian @ self.factor


def whiten_samples(
    samples: Float[Array, "n size"], magnitude: Float[Array, " size"], smallest: ScalarLike
) -> Whitening:
    """The whitening of actions of mean zero.

    **Arguments:**

    - `samples`: differences of two actions of one observation, divided by the root of two.
    - `magnitude`: the size of the entries themselves, by which rounding is judged: an entry that
        varies by no more than rounding is constant.
    - `smallest`: an entry of a smaller standard deviation is constant too.
    """
    n, size = samples.shape
    ε = jnp.asarray(8 * jnp.finfo(samples.dtype).eps, samples.dtype)
    scale = jnp.sqrt(jnp.mean(samples**2, axis=0))
    # Solvers, too, err by a share of what they solve for.
    rounding = jnp.asarray(smallest, samples.dtype) * (1 + 3 * magnitude)
    varies = scale > jnp.maximum(ε * (1 + magnitude), rounding)
    scale = jnp.where(varies, scale, 0)
    safe = jnp.where(varies, scale, 1)
    diagonal = jnp.where(varies, 1 / safe, 0)
    if size > dense_limit or size == 1 or n < size:
        return Whitening(scale, diagonal, scale)
    # From the entry that varies most to the one that varies least, so that a narrow direction is
    # told apart from a wide one, and does not pass its rounding on to it. The entries are scaled
    # first: a factorisation keeps digits relative to the largest of them.
    order = jnp.argsort(-scale)
    Z = jnp.where(varies[None], samples / safe[None], 0)[:, order] / n**0.5
    R: Array = jnp.linalg.qr(Z, mode="r")  # pyright: ignore
    signs: Array = jnp.where(jnp.diagonal(R) < 0, -1, 1)
    R = signs.astype(R.dtype)[:, None] * R
    used = jnp.diagonal(R) > ε
    # Directions in which the others already tell all stay out of both factors.
    R = jnp.where(used[:, None], R, 0)
    identity = jnp.eye(size, dtype=R.dtype)
    rest = jnp.where(used, 0, 1)
    inverse = jax.scipy.linalg.solve_triangular(R + jnp.diag(rest.astype(R.dtype)), identity).T
    inverse = jnp.where(used[:, None], inverse * diagonal[order][None], 0)
    back = jnp.argsort(order)
    factor = (scale[order][:, None] * R.T)[back]
    inverse = inverse[:, back]
    norms = jnp.sqrt(jnp.sum(inverse**2, axis=1))
    deviations = jnp.where(norms > 0, 1 / jnp.where(norms > 0, norms, 1), 0)
    return Whitening(factor, inverse, deviations)


class WhitenedOperator(lx.AbstractLinearOperator):
    r"""The operator $L^{-\top} G L^{-1}$, for a $G$ that acts in the coordinates of a whitening."""

    operator: lx.AbstractLinearOperator
    whitening: Whitening

    def mv(self, vector: Float[Array, " size"]) -> Float[Array, " size"]:
        return self.whitening.colour_gradient(self.operator.mv(self.whitening.whiten(vector)))

    def as_matrix(self) -> Float[Array, "size size"]:
        L, G = self.whitening.inverse, self.operator.as_matrix()
        return L[:, None] * G * L[None] if L.ndim == 1 else L.T @ G @ L

    def transpose(self) -> "WhitenedOperator":
        return self

    def in_structure(self):
        return self.operator.in_structure()

    def out_structure(self):
        return self.operator.out_structure()


def _product(matrix, vector):
    return matrix * vector if matrix.ndim == 1 else matrix @ vector


register_positive_semidefinite(WhitenedOperator)
