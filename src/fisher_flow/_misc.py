"""Checks of arguments, and the few operations on PyTrees that several modules share."""

import inspect
import math
import numbers
from typing import Any

import equinox as eqx
import jax
import jax.core
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray, PyTree


def check_instance(name: str, value: Any, cls: type, example: str) -> None:
    """Refuses `value` unless it is an instance of `cls`, and says what to write instead."""
    if isinstance(value, cls):
        return
    if inspect.isclass(value):
        arrived = f"the class `{value.__name__}` itself, not an instance of it"
        required = [
            parameter
            for parameter in inspect.signature(value).parameters.values()
            if parameter.default is parameter.empty
            and parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
        ]
        if issubclass(value, cls) and len(required) == 0:
            example = f"{value.__name__}()"
    else:
        arrived = f"`{short(value)}` of type `{type(value).__name__}`"
        if isinstance(getattr(value, name, None), cls):  # such as the result of a function
            example = f"result.{name}"
    raise ValueError(
        f"`{name}` must be an instance of `{cls.__name__}`, but got {arrived}. "
        f"Write `{name}={example}`."
    )


def short(value: Any) -> str:
    """The representation of a value, cut where a message would drown in it."""
    text = " ".join(repr(value).split())
    return text if len(text) <= 80 else f"{text[:77]}..."


def check_positive_integer(name: str, value: Any, example: int) -> None:
    if isinstance(value, bool) or not isinstance(value, numbers.Integral) or value < 1:
        raise ValueError(
            f"`{name}` must be an integer of at least 1, but got `{value!r}`. "
            f"Write `{name}={example}`."
        )


def check_at_least(
    name: str, value: Any, minimum: float, example: float, maximum: float = math.inf
) -> None:
    """Refuses what is not one finite number from `minimum` up, or to `maximum`. Lets traced values
    through."""
    if isinstance(value, jax.core.Tracer):
        return
    try:
        # NumPy, so that it runs under `jit` too; it would read numbers from strings.
        number = np.nan if isinstance(value, str) else float(np.asarray(value))
    except (TypeError, ValueError):
        number = np.nan
    if not (minimum <= number <= maximum and number < np.inf):
        size = f"of at least {minimum}" if maximum == np.inf else f"from {minimum} to {maximum}"
        arrived = repr(value) if isinstance(value, str) else value
        raise ValueError(
            f"`{name}` must be a finite number {size}, but got {arrived}. Write `{name}={example}`."
        )


def check_discount(discount: Any) -> None:
    check_at_least("discount", discount, 0, 0.99, maximum=1)


def check_vector_environment(envs: Any) -> None:
    if getattr(envs, "num_envs", None) is None:
        raise ValueError(
            f"`envs` must be a vector environment, but got `{short(envs)}`. Write "
            "`envs=gymnasium.vector.SyncVectorEnv([make_env] * 10)`."
        )


def batch_length(name: str, tree: PyTree[Any]) -> int:
    """The length of the leading axis that all the leaves of `tree` share."""
    leaves = jax.tree.leaves_with_path(tree)
    if len(leaves) == 0 or any(jnp.ndim(leaf) == 0 for _, leaf in leaves):
        raise ValueError(
            f"`{name}` must be a batch: every array in it needs a leading batch axis, but got "
            f"{eqx.tree_pformat(tree)}. For a single observation write "
            f"`{name}=jax.tree.map(lambda leaf: leaf[None], {name})`."
        )
    lengths = {name + jax.tree_util.keystr(path): int(jnp.shape(leaf)[0]) for path, leaf in leaves}
    if len(set(lengths.values())) > 1:
        raise ValueError(
            f"All the arrays in `{name}` must have the same leading length, but got {lengths}. "
            f"Write `{name}=jax.tree.map(lambda leaf: leaf[:{min(lengths.values())}], {name})` "
            "if the surplus rows at the end can go."
        )
    (length,) = set(lengths.values())
    if length == 0:
        raise ValueError(f"`{name}` is empty. Pass at least one row: `{name}={name}_of_the_data`.")
    return length


def check_equal_lengths(**batches: PyTree[Any]) -> int:
    """The leading length that all the named batches share."""
    lengths = {name: batch_length(name, batch) for name, batch in batches.items()}
    if len(set(lengths.values())) > 1:
        names = ", ".join(f"`{name}`" for name in lengths)
        first, shortest = next(iter(lengths)), min(lengths.values())
        raise ValueError(
            f"{names} must have the same length, but got {lengths}. "
            f"Write `{first}={first}[:{shortest}]`, and likewise for the others, if the rows "
            "that match come first."
        )
    return next(iter(lengths.values()))


def check_batch_of_actions(actions: Any, action_shape: tuple[int, ...]) -> None:
    """Refuses a batch of actions that are not of the shape that the policy draws."""
    if actions.shape[1:] == action_shape:
        return
    if math.prod(actions.shape[1:]) == math.prod(action_shape):
        advice = f"`actions=actions.reshape(-1, *{action_shape})`"
    else:
        advice = f"`FlowPolicy(velocity, action_shape={actions.shape[1:]})` if that is an action"
    raise ValueError(
        f"`actions` must have shape (batch, *action_shape) with `action_shape={action_shape}`, but "
        f"got {actions.shape}. Write {advice}."
    )


def random_rows(tree: PyTree[Any], num: int, *, key: PRNGKeyArray) -> PyTree[Any]:
    """Rows of a batch, drawn at random with replacement."""
    length = jnp.shape(jax.tree.leaves(tree)[0])[0]
    rows = jax.random.randint(key, (num,), 0, length)
    return jax.tree.map(lambda leaf: jnp.asarray(leaf)[rows], tree)


def ravel_inputs(*trees: PyTree[Any]) -> Float[Array, " size"]:
    """Lays PyTrees of arrays side by side in one vector, for the input of a network."""
    return jax.flatten_util.ravel_pytree(trees)[0]


def encode(encoder: Any, observation: PyTree[Any]) -> PyTree[Any]:
    """What a network sees of an observation: all of it, unless it has an encoder."""
    return observation if encoder is None else encoder(observation)


_MOST_CHANNELS = 32  # of one frame: colours, or a few frames side by side


def is_image(leaf: Any, num_batch_axes: int = 0) -> bool:
    """Whether a leaf of an observation is an image, or a stack of frames: `uint8`, of shape
    `(height, width, channels)` or `(frames, height, width, channels)`. Refuses one whose last axis
    is too long to be the channels, or whose first is short enough to be them."""
    if jnp.ndim(leaf) - num_batch_axes not in (3, 4) or leaf.dtype != np.uint8:
        return False
    shape = jnp.shape(leaf)[num_batch_axes:]
    if shape[-1] > _MOST_CHANNELS or shape[-3] <= 4 < min(shape[-2:]):
        raise ValueError(
            "`observation` must have images of shape (height, width, channels) or (frames, height, "
            f"width, channels), the channels last and at most {_MOST_CHANNELS}, but got shape "
            f"{shape}. For channels that come first write `np.moveaxis(image, -3, -1)`; for "
            "greyscale images `image[..., None]`, and `GrayscaleObservation(env, keep_dim=True)` "
            "before `FrameStackObservation`."
        )
    return True


def refuse_images(observation: PyTree[Any], example: str) -> None:
    """Refuses to lay the pixels of an image side by side."""
    for path, leaf in jax.tree.leaves_with_path(observation):
        if leaf.dtype == np.uint8 and jnp.ndim(leaf) == 2 and min(jnp.shape(leaf)) > 4:
            raise ValueError(
                f"`observation{jax.tree_util.keystr(path)}` looks like a greyscale image, of shape "
                f"{jnp.shape(leaf)}. Write `image[..., None]`, or "
                "`GrayscaleObservation(env, keep_dim=True)`, and "
                f"`{example}`; if it is none, `observation.astype(np.float32)`."
            )
        if is_image(leaf):
            raise ValueError(
                f"`observation{jax.tree_util.keystr(path)}` is an image, of shape "
                f"{jnp.shape(leaf)}, and would be flattened to {jnp.size(leaf)} entries. Write "
                f"`{example}`."
            )


def fold_in_values(key: PRNGKeyArray, tree: PyTree[Any]) -> PRNGKeyArray:
    """A key of its own for every value of a PyTree of arrays."""
    values = jax.lax.stop_gradient(ravel_inputs(tree)).astype(jnp.float32)
    bits = jax.lax.bitcast_convert_type(values, jnp.uint32)
    weights = 2 * jnp.arange(bits.size, dtype=jnp.uint32) + 1  # else permutations would agree
    return jax.random.fold_in(key, jnp.sum(bits * weights, dtype=jnp.uint32))


def as_inexact(x: Any) -> Array:
    """An array of floating point numbers."""
    x = jnp.asarray(x)
    return x if jnp.issubdtype(x.dtype, jnp.inexact) else x.astype(jnp.result_type(float))


def constant(tree: PyTree[Any]) -> PyTree[Any]:
    """Lets no gradient through the arrays of a PyTree."""
    return jax.tree.map(
        lambda leaf: jax.lax.stop_gradient(leaf) if eqx.is_inexact_array(leaf) else leaf, tree
    )


def finite_or_zero(x: Array) -> tuple[Array, Array]:
    """`x` where all of it is finite, zero otherwise; and whether it was.

    One bad entry discards the whole of `x`, since a displacement with some of its entries
    removed points somewhere that nobody asked for.
    """
    finite = jnp.all(jnp.isfinite(x))
    return jnp.where(finite, x, jnp.zeros_like(x)), finite


def is_ogbench(task: str) -> bool:
    """Whether a task has a name of OGBench's that D4RL does not use."""
    return not {"singletask", "navigate", "stitch", "explore"}.isdisjoint(task.split("-"))
