from collections.abc import Mapping
from typing import Any

import equinox as eqx
import jax
import jax.core
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray, PyTree


def random_rows(tree: PyTree[Any], num: int, *, key: PRNGKeyArray) -> PyTree[Any]:
    """Rows of a batch, drawn at random with replacement."""
    length = jnp.shape(jax.tree.leaves(tree)[0])[0]
    rows = jax.random.randint(key, (num,), 0, length)
    return jax.tree.map(lambda leaf: jnp.asarray(leaf)[rows], tree)


def plain(tree: PyTree[Any]) -> PyTree[Any]:
    """The PyTree with a dictionary for every mapping in it.

    JAX sorts the keys of a dictionary, keeps the order of an `OrderedDict` and takes other mappings
    for leaves: the same observation would be laid out in several ways.
    """

    def convert(node: Any) -> Any:
        if not isinstance(node, Mapping):
            return node
        return {key: plain(value) for key, value in node.items()}

    return jax.tree.map(convert, tree, is_leaf=lambda node: isinstance(node, Mapping))


def ravel_inputs(*trees: PyTree[Any]) -> Float[Array, " size"]:
    """Joins the arrays of PyTrees in one vector, for the input of a network."""
    return jax.flatten_util.ravel_pytree(plain(trees))[0]


def fold_in_values(key: PRNGKeyArray, tree: PyTree[Any]) -> PRNGKeyArray:
    """A key that depends on every value of a PyTree of arrays."""
    values = jax.lax.stop_gradient(ravel_inputs(tree)).astype(jnp.float32)
    bits = jax.lax.bitcast_convert_type(values, jnp.uint32)
    weights = 2 * jnp.arange(bits.size, dtype=jnp.uint32) + 1  # else permutations would agree
    return jax.random.fold_in(key, jnp.sum(bits * weights, dtype=jnp.uint32))


def as_inexact(x: Any) -> Array:
    """An array of floating point numbers."""
    x = jnp.asarray(x)
    return x if jnp.issubdtype(x.dtype, jnp.inexact) else x.astype(jnp.result_type(float))


def as_entries(numbers: Any, dtype: Any) -> Array:
    """An array of numbers that may be NaN, outside `jax.jit`. It is made without an operation:
    `jax_debug_nans` looks at the results of those."""
    return jax.device_put(np.asarray(numbers, dtype))


def is_half(dtype: Any) -> bool:
    """Whether it is a floating point dtype of less than 32 bits."""
    return jnp.issubdtype(dtype, jnp.inexact) and jnp.finfo(dtype).bits < 32


def in_full_precision(tree: PyTree[Any]) -> PyTree[Any]:
    """The PyTree with arrays of half precision, bfloat16 among them, in float32.

    They hold two or three digits: enough to act, but not for a density, nor for the small steps of
    an optimiser.
    """
    is_array = lambda x: isinstance(x, jax.Array | np.ndarray)
    return jax.tree.map(
        lambda leaf: leaf.astype(jnp.float32) if is_array(leaf) and is_half(leaf.dtype) else leaf,
        tree,
    )


def with_dtypes_of(original: PyTree[Any], tree: PyTree[Any]) -> PyTree[Any]:
    """The PyTree with every array in the dtype that it has in `original`, a PyTree alike."""
    return jax.tree.map(
        lambda leaf, other: leaf.astype(other.dtype) if eqx.is_inexact_array(leaf) else leaf,
        tree,
        original,
    )


def constant(tree: PyTree[Any]) -> PyTree[Any]:
    """Lets no gradient through the arrays of a PyTree."""
    return jax.tree.map(
        lambda leaf: jax.lax.stop_gradient(leaf) if eqx.is_inexact_array(leaf) else leaf, tree
    )


def finite_or_zero(x: Array) -> tuple[Array, Array]:
    """`x` where all of it is finite, zero otherwise; and whether it was.

    One bad entry discards the whole of `x`: without some of its entries, a displacement points in
    another direction.
    """
    finite = jnp.all(jnp.isfinite(x))
    return jnp.where(finite, x, jnp.zeros_like(x)), finite
