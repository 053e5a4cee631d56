"""Large matrices that are known by their products only, seen from small spaces.

Arnoldi's method spans a space by a vector and its images, and projects the matrix onto it. A few
products give what a function of the matrix does to that vector, without ever forming the matrix.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import jax.random as jr
import lineax as lx
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Scalar

from .._trees import fold_in_values
from ._jacobian import rademacher_probes
from ._positive_part import smooth_positive_part
from ._registered import register_positive_semidefinite


# Up to this many entries an action has dense Jacobians: they are exact, and not slower.
dense_limit = 32


_projection_rank = 8


def arnoldi(
    product: Callable[[Array], Array], start: Float[Array, " size"], rank: int
) -> tuple[Float[Array, "rank size"], Float[Array, "rank rank"]]:
    """Spans the space of `start` and its images under a matrix, and projects the matrix onto it.

    **Arguments:**

    - `product`: the product of the matrix with a vector.
    - `start`: the vector to start from.
    - `rank`: the dimension of the space.

    **Returns:**

    - An orthonormal basis `V` as rows. If the space has fewer dimensions than `rank`, the last rows
        shrink to zero smoothly, so that everything can be differentiated.
    - The projection `V A Vᵀ`.
    """
    ε = jnp.asarray(jnp.finfo(start.dtype).eps, start.dtype)

    def unit(vector: Array, squared_scale: Array) -> Array:
        # Below the root of the rounding error, a direction is noise.
        squared = jnp.sum(vector**2) + ε * squared_scale
        return jnp.where(squared > 0, vector / jnp.sqrt(jnp.where(squared > 0, squared, 1)), 0)

    def extend(j, state):
        V, images = state
        w = product(V[j])
        rest = w - V.T @ (V @ w)
        rest = rest - V.T @ (V @ rest)  # once more, for the sake of rounding
        V = V.at[j + 1].set(unit(rest, jnp.sum(w**2)), mode="drop")
        return V, images.at[j].set(w)

    zeros = jnp.zeros((rank, start.size), start.dtype)
    V, images = lax.fori_loop(
        0,
        rank,
        extend,
        (zeros.at[0].set(unit(start, jnp.zeros((), start.dtype))), zeros),
        unroll=True,
    )
    return V, V @ images.T


class KrylovPositivePart(lx.AbstractLinearOperator):
    """The smooth positive part of a symmetric matrix, of which only products are known.

    A product, or a damped solution, is computed in the space that a vector and its images span. It
    is exact up to the error of that projection, which falls as fast as the error of conjugate
    gradients.
    """

    product: Callable[[Array], Array]
    squared_width: Callable[[Array], Scalar]
    rank: int
    structure: jax.ShapeDtypeStruct

    def mv(self, vector: Float[Array, " size"]) -> Float[Array, " size"]:
        V, P = self._projected(vector)
        return V.T @ (P @ (V @ vector))

    def damped_solve(self, vector: Float[Array, " size"], damping: Scalar) -> Float[Array, " size"]:
        """Solves `(G + damping I) x = vector`."""
        V, P = self._projected(vector)
        identity = jnp.eye(self.rank, dtype=vector.dtype)
        return V.T @ jnp.linalg.solve(P + damping * identity, V @ vector)

    def _projected(self, vector):
        # A learned velocity is not exactly a gradient field, and its score is not either.
        V, H = arnoldi(self.product, vector, self.rank)
        H = 0.5 * (H + H.T)
        return V, smooth_positive_part(H, self.squared_width(jnp.sum(H**2) / self.rank))

    def as_matrix(self) -> Float[Array, "size size"]:
        identity = jnp.eye(self.structure.shape[0], dtype=self.structure.dtype)
        return jax.vmap(self.mv, out_axes=1)(identity)

    def transpose(self) -> "KrylovPositivePart":
        return self

    def in_structure(self) -> jax.ShapeDtypeStruct:
        return self.structure

    def out_structure(self) -> jax.ShapeDtypeStruct:
        return self.structure


register_positive_semidefinite(KrylovPositivePart)


def masked_trace(
    operator: lx.AbstractLinearOperator, action: Array, mask: Float[Array, " size"]
) -> Scalar:
    """The sum of the diagonal where `mask` is 1: exact, or an estimate from one random probe that
    is a function of the action."""
    if not isinstance(operator, KrylovPositivePart):
        return jnp.sum(mask * lx.diagonal(operator))
    z = mask * _probes(1, action)[0]
    return jnp.dot(z, operator.mv(z))


def _probes(num_probes: int, action: Array) -> Float[Array, "probes size"]:
    """Random probes that depend on the action only."""
    return rademacher_probes(num_probes, action.reshape(-1), fold_in_values(jr.key(0), action))


def value_and_projections(
    field: Callable[[Array], Any],
    x: Float[Array, "..."],
    num_probes: int,
    *,
    has_aux: bool = False,
) -> Any:
    """Returns `field(x)` and projections of its Jacobian, one for each of a few random probes.

    The probes are a function of `x`. With `has_aux`, `field` returns a pair, whose second entry is
    returned last and not differentiated.
    """
    value, push, *aux = jax.linearize(field, x, has_aux=has_aux)
    product = lambda z: push(z.reshape(x.shape)).reshape(-1)
    _, projections = jax.vmap(lambda z: arnoldi(product, z, min(_projection_rank, x.size)))(
        _probes(num_probes, x)
    )
    return value, projections, *aux


def trace_and_log_det(
    jacobian: Float[Array, "size size"] | Float[Array, "probes rank rank"], size: int
) -> tuple[Scalar, Scalar, Scalar]:
    r"""The trace of a Jacobian $J$, and $\log |\det(I + J)|$ with its sign.

    From projections, the trace and the logarithm are unbiased up to the error of the rank. If
    $I + \tau J$ is singular in a projection for some $\tau$ up to 1, the logarithm is NaN and the
    sign negative. A projection may miss a slight reversal, so a positive sign is not a proof.
    """
    identity = jnp.eye(jacobian.shape[-1], dtype=jacobian.dtype)
    if jacobian.ndim == 2:
        sign, log_det = jnp.linalg.slogdet(identity + jacobian)
        return jnp.trace(jacobian), log_det, sign
    # H - log(I + H) = ∫₀¹ τ H² (I + τ H)⁻¹ dτ, of which the first entry belongs to the probe
    nodes, weights = np.polynomial.legendre.leggauss(12)
    τ = jnp.asarray(0.5 * (nodes + 1), jacobian.dtype)
    weights = jnp.asarray(0.5 * weights, jacobian.dtype)

    def excess_and_sign(H):
        inverses = jax.vmap(lambda τ: jnp.linalg.solve(identity + τ * H, H[:, 0]))(τ)
        # The integrand has a pole wherever the determinant passes through zero.
        on_the_way = jnp.append(τ, jnp.ones((), τ.dtype))
        signs, _ = jax.vmap(lambda τ: jnp.linalg.slogdet(identity + τ * H))(on_the_way)
        return size * jnp.sum(weights * τ * (inverses @ H[0])), jnp.min(signs)

    trace = size * jnp.mean(jacobian[:, 0, 0])
    excesses, signs = jax.vmap(excess_and_sign)(jacobian)
    sign = jnp.min(signs)
    return trace, jnp.where(sign > 0, trace - jnp.mean(excesses), jnp.nan), sign
