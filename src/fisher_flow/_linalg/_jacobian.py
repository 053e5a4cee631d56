"""The divergence of a vector field on arrays of any shape, exact or estimated."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, Float, PRNGKeyArray


def value_and_jacobian(
    field: Callable[[Array], Any], x: Float[Array, "..."], *, has_aux: bool = False
) -> Any:
    """Returns `field(x)`, and its Jacobian with both arguments flattened.

    One evaluation and as many forward-mode products as `x` has entries. With `has_aux`, `field`
    returns a pair, whose second entry is returned last and not differentiated.
    """
    basis = jnp.eye(x.size, dtype=x.dtype).reshape(x.size, *x.shape)
    value, push, *aux = jax.linearize(field, x, has_aux=has_aux)
    columns = jax.vmap(push)(basis).reshape(x.size, x.size)
    return value, columns.T, *aux


def value_and_divergence(
    field: Callable[[Array], Array],
    x: Float[Array, "..."],
    probes: Float[Array, "probes ..."] | None = None,
) -> tuple[Float[Array, "..."], Float[Array, ""]]:
    """Returns `field(x)` and its divergence, exact if `probes` is `None`.

    With probes the divergence is Hutchinson's estimate `mean(zᵀ J z)`.
    """
    if probes is None:
        value, jacobian = value_and_jacobian(field, x)
        return value, jnp.trace(jacobian)
    value, push = jax.linearize(field, x)
    return value, jnp.mean(jax.vmap(lambda z: jnp.vdot(z, push(z)))(probes))


def rademacher_probes(num_probes: int, like: Array, key: PRNGKeyArray) -> Float[Array, "..."]:
    """Random signs, the probes of least variance for Hutchinson's estimate."""
    return jr.rademacher(key, (num_probes, *like.shape), dtype=like.dtype)
