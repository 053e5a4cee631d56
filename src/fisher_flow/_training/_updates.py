"""The loop over the updates of an agent, in programs that run wholly on the device."""

from collections.abc import Callable, Iterable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from .._checks import short
from .._data import Transitions
from .._fit import add_chunk, no_logs
from ._feed import Piece
from ._sampling import key_of_updates, keys_of_update


def make_updates(
    update: Callable[..., Any],
    settings: tuple[Any, Any, int],
    states: list[Any],
    seeds: list[Any],
    pieces: Iterable[Piece],
    start: int,
    stop: int,
) -> tuple[list[Any], list[dict[str, np.ndarray]]]:
    """Updates number `start` to `stop - 1`; the new states, and the means of the logs of each.

    **Arguments:**

    - `update`: `update_one`, with a state for each seed, or `update_all`, with one state that
        `stack` has made and one array of seeds.
    - `settings`: the agent, what augments its batches, and the number of rows in a batch.
    - `pieces`: where the rows come from.
    """
    agent, augment, batch_size = settings
    key, count = key_of_updates(), jnp.asarray(stop - start)
    states, running = list(states), None
    totals: list[Any] = [None for _ in states]
    for last, sampling in pieces:
        for i, (state, seed) in enumerate(zip(states, seeds, strict=True)):
            args = (agent, sampling, augment, batch_size, seed)
            if totals[i] is None:
                totals[i] = no_logs(update, args, state, key)
            span = (jnp.asarray(start), jnp.asarray(last), key)
            states[i], totals[i] = add_chunk(update, args, state, totals[i], *span)
        start = last
        # One piece is learned from while the next is fetched; more of them would fill the memory.
        jax.block_until_ready(running)
        running = list(totals)
    means = [{name: np.asarray(total / count) for name, total in logs.items()} for logs in totals]
    return states, means


def update_one(args, state, key, step):
    agent, sampling, augment, batch_size, seed = args
    row_key, update_key, augment_key = keys_of_update(key, seed)
    batch = sampling.draw(batch_size, seed, step, key=row_key)
    if augment is not None:
        batch = augment(batch, key=augment_key)
        if not isinstance(batch, Transitions):
            raise ValueError(
                f"`augment` must return `Transitions`, but returned `{short(batch)}`. Write "
                "`augment=fisher_flow.RandomCrop()`."
            )
    return agent.update(state, batch, key=update_key)


def update_all(args, states, key, step):
    """As `update_one`, for all seeds at once."""
    *settings, seeds = args
    one = lambda state, seed: update_one((*settings, seed), state, key, step)
    return eqx.filter_vmap(one)(states, seeds)


def stack(states: list[Any]) -> Any:
    """One state out of several: every array gets a leading axis."""
    return jax.tree.map(
        lambda *leaves: jnp.stack(leaves) if eqx.is_array(leaves[0]) else leaves[0], *states
    )


def unstack(stacked: Any, num: int) -> list[Any]:
    """The states, or the means of their logs, that were stacked."""
    arrays = (jax.Array, np.ndarray)

    def entry(i):
        return jax.tree.map(lambda leaf: leaf[i] if isinstance(leaf, arrays) else leaf, stacked)

    return [entry(i) for i in range(num)]
