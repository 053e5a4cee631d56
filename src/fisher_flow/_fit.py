"""The loop under everything that is trained."""

import math
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.core
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
from jax import lax
from jaxtyping import Array, PRNGKeyArray, PyTree, ScalarLike


# update(args, state, key, step) -> state, logs
Update = Callable[[Any, Any, PRNGKeyArray, Array], tuple[Any, dict[str, Array]]]


def fit(
    update: Update,
    args: PyTree[Any],
    state: PyTree[Any],
    num_updates: int,
    *,
    key: PRNGKeyArray,
    progress: bool,
    description: str,
    num_chunks: int = 50,
) -> PyTree[Any]:
    """Applies `update` `num_updates` times, in chunks that run wholly on the device.

    The chunk is compiled once for all of them and for later calls of the same shapes, provided
    that `update` is a function of a module: a closure would be new, and compiled, at every call.

    The first entry of `state`, or all of it, is what is trained. If that ends in NaN, an error is
    raised.
    """
    from tqdm.auto import tqdm  # only here: it is slow to import

    chunk = max(1, math.ceil(num_updates / num_chunks))
    with tqdm(total=num_updates, desc=description, disable=not progress) as bar:
        for start in range(0, num_updates, chunk):
            stop = min(start + chunk, num_updates)
            state, logs = run_chunk(update, args, state, jnp.asarray(start), jnp.asarray(stop), key)
            if progress and not any(isinstance(x, jax.core.Tracer) for x in logs.values()):
                bar.set_postfix({name: f"{float(value):.3g}" for name, value in logs.items()})
            model = state[0] if isinstance(state, tuple) else state
            _check_finite(model, description, num_updates=stop)
            bar.update(stop - start)
    return state


def _check_finite(model: PyTree[Any], description: str, num_updates: int) -> None:
    """Raises an error if a parameter is NaN, unless the fit is being traced."""
    leaves = [x for x in jax.tree.leaves(model) if isinstance(x, jax.Array | np.ndarray)]
    leaves = [x for x in leaves if jnp.issubdtype(x.dtype, jnp.inexact)]
    if any(isinstance(x, jax.core.Tracer) for x in leaves) or not _any_nan(leaves):
        return
    raise FloatingPointError(
        f"The fit of the {description} ended in NaN before update {num_updates}. Likely causes: "
        "(a) the learning rate is too high, (b) the data or the values of the critic are not "
        "finite, or far from order one, (c) the velocity is not finite at times 0 or 1. Write a "
        "lower `learning_rate=1e-4`, or scale the data by `Normaliser.fit(transitions)`."
    )


@jax.jit
def _any_nan(leaves: list[Array]) -> Array:
    return jnp.any(jnp.asarray([jnp.any(jnp.isnan(x)) for x in leaves], bool))


@eqx.filter_jit
def run_chunk(update: Update, args: Any, state: Any, start: Array, stop: Array, key: PRNGKeyArray):
    """Updates number `start` to `stop - 1`, in one program; the state, and the mean of the logs."""
    totals = no_logs(update, args, state, key)
    state, totals = add_chunk(update, args, state, totals, start, stop, key)
    count = stop - start
    return state, jax.tree.map(lambda total: total / count, totals)


@eqx.filter_jit
def add_chunk(
    update: Update,
    args: Any,
    state: Any,
    totals: dict[str, Array],
    start: Array,
    stop: Array,
    key: PRNGKeyArray,
):
    """As `run_chunk`, but adds the logs to `totals`: the data of a chunk may come in pieces."""
    arrays, static = eqx.partition(state, eqx.is_array)

    def step(i, carry):
        arrays, totals = carry
        state, logs = update(args, eqx.combine(arrays, static), jr.fold_in(key, i), i)
        return eqx.filter(state, eqx.is_array), jax.tree.map(jnp.add, totals, logs)

    arrays, totals = lax.fori_loop(start, stop, step, (arrays, totals))
    return eqx.combine(arrays, static), totals


@eqx.filter_jit  # so as to trace the update once
def no_logs(update: Update, args: Any, state: Any, key: PRNGKeyArray) -> dict[str, Array]:
    """The zeros that logs are added to."""
    _, logs = eqx.filter_eval_shape(update, args, state, key, jnp.asarray(0))
    return jax.tree.map(lambda log: jnp.zeros(log.shape, log.dtype), logs)


def decaying_adam(learning_rate: ScalarLike, num_updates: int) -> optax.GradientTransformation:
    """Adam with a rate that falls to zero along a cosine."""
    return optax.adam(optax.cosine_decay_schedule(learning_rate, num_updates))


def apply_gradient(
    optimiser: optax.GradientTransformation,
    gradient: PyTree[Any],
    optimiser_state: PyTree[Any],
    model: PyTree[Any],
) -> tuple[PyTree[Any], PyTree[Any]]:
    """One step of an Optax optimiser on the inexact arrays of `model`."""
    updates, optimiser_state = optimiser.update(
        gradient, optimiser_state, eqx.filter(model, eqx.is_inexact_array)
    )
    return eqx.apply_updates(model, updates), optimiser_state
