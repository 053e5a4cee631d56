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
from jaxtyping import PyTree


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
    """The representation of a value, cut if it is too long for a message."""
    text = " ".join(repr(value).split())
    return text if len(text) <= 80 else f"{text[:77]}..."


def check_positive_integer(name: str, value: Any, example: int) -> None:
    if isinstance(value, bool) or not isinstance(value, numbers.Integral) or value < 1:
        raise ValueError(
            f"`{name}` must be an integer of at least 1, but got `{value!r}`. "
            f"Write `{name}={example}`."
        )


def check_count(name: str, value: Any, example: int) -> None:
    """Refuses anything but a positive integer or zero."""
    if isinstance(value, bool) or not isinstance(value, numbers.Integral) or value < 0:
        raise ValueError(
            f"`{name}` must be an integer of at least 0, but got `{value!r}`. "
            f"Write `{name}={example}`."
        )


def check_at_least(
    name: str, value: Any, minimum: float, example: float, maximum: float = math.inf
) -> None:
    """Refuses anything but a finite number from `minimum` to `maximum`. Lets traced values through,
    which are not known."""
    if isinstance(value, jax.core.Tracer):
        return
    try:
        # NumPy runs under `jit` too, but reads numbers from strings.
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


def is_ogbench(task: str) -> bool:
    """Whether the name of a task is one of OGBench, not of D4RL."""
    words = {"singletask", "oraclerep", "navigate", "stitch", "explore"}
    return not words.isdisjoint(task.split("-"))


def checked_shape(action_shape: Any) -> tuple[int, ...]:
    try:
        shape = tuple(int(size) for size in action_shape)
        valid = all(size > 0 for size in shape)
    except TypeError:
        valid = False
    if not valid:
        example = f"({action_shape},)" if isinstance(action_shape, int) else "(5,)"
        raise ValueError(
            "`action_shape` must be a tuple of positive integers, but got "
            f"`{action_shape!r}`. Write `action_shape={example}`."
        )
    return shape
