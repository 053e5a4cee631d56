"""Where the rows of a batch come from."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jaxtyping import Array, Int, PRNGKeyArray

from .._data import Transitions


def key_of_updates() -> PRNGKeyArray:
    """What the key of every update is folded from, by the number of the update."""
    return jr.key(1)


def keys_of_update(key: PRNGKeyArray, seed: Any) -> tuple[PRNGKeyArray, PRNGKeyArray, PRNGKeyArray]:
    """Three keys of an update, for the training with one seed: for the rows of its batch, for the
    update itself, and for what augments the batch."""
    row_key, update_key, augment_key = jr.split(jr.fold_in(key, seed), 3)
    return row_key, update_key, augment_key


def uniform_rows(key: PRNGKeyArray, num: int, length: int) -> Int[Array, " num"]:
    """Rows, drawn with replacement. They are the same wherever the data lie."""
    return jr.randint(key, (num,), 0, length)


class UniformSampling(eqx.Module):
    """Rows of transitions, drawn with replacement."""

    transitions: Transitions

    def draw(self, num: int, seed: Any, step: Any, *, key: PRNGKeyArray) -> Transitions:
        del seed, step
        return _take(self.transitions, uniform_rows(key, num, len(self.transitions)))


class BlockSampling(eqx.Module):
    """Batches that have been drawn already, for several updates and several seeds, one after
    another. The batch of a seed for update `step` has the number `origin + step`."""

    batches: Transitions
    seeds: Int[Array, " seeds"]
    origins: Int[Array, " seeds"]

    def draw(self, num: int, seed: Any, step: Any, *, key: PRNGKeyArray) -> Transitions:
        del key
        number = self.origins[jnp.argmax(self.seeds == seed)] + step
        return _take(self.batches, number * num + jnp.arange(num))


class ReplayBuffer(eqx.Module):
    """The last rows that were written, as many as there is room for, on the device."""

    rows: Transitions
    num_written: Int[Array, ""]

    @staticmethod
    def empty(like: Transitions, capacity: int) -> "ReplayBuffer":
        """Room for rows of the shapes and dtypes of some transitions."""
        rows = jax.tree.map(
            lambda column: jnp.zeros((capacity, *column.shape[1:]), column.dtype), like
        )
        return ReplayBuffer(rows, jnp.asarray(0))

    @property
    def capacity(self) -> int:
        return len(self.rows)

    @property
    def size(self) -> Int[Array, ""]:
        return jnp.minimum(self.num_written, self.capacity)

    def write(self, transitions: Transitions) -> "ReplayBuffer":
        """The buffer with these rows too. The buffer before must not be used again: the new one
        takes its memory."""
        buffer = self
        # Blocks of one length, so that episodes of any length share one compilation.
        block = min(1024, self.capacity)
        for start in range(0, len(transitions), block):
            count = min(block, len(transitions) - start)

            def padded(column, start=start, count=count):
                room = np.zeros((block, *column.shape[1:]), column.dtype)
                room[:count] = column[start : start + count]
                return room

            buffer = _write((jax.tree.map(padded, transitions), jnp.asarray(count)), buffer)
        return buffer


@eqx.filter_jit(donate="all-except-first")
def _write(block, buffer: ReplayBuffer) -> ReplayBuffer:
    rows, count = block
    i = jnp.arange(len(rows))
    # New rows replace the oldest. Padding goes beyond the end, where nothing is written.
    place = jnp.where(i < count, (buffer.num_written + i) % buffer.capacity, buffer.capacity)
    rows = jax.tree.map(
        lambda column, new: column.at[place].set(new.astype(column.dtype), mode="drop"),
        buffer.rows,
        rows,
    )
    return ReplayBuffer(rows, buffer.num_written + count)


class BalancedSampling(eqx.Module):
    """Rows of logged transitions and of a buffer. The buffer has a fixed share of every batch; with
    a share of `None`, rows are drawn from the union of both."""

    transitions: Transitions
    buffer: ReplayBuffer
    online_share: float | None = eqx.field(static=True)

    def draw(self, num: int, seed: Any, step: Any, *, key: PRNGKeyArray) -> Transitions:
        del seed, step
        num_offline = len(self.transitions)
        if self.online_share is None:
            rows = jr.randint(key, (num,), 0, num_offline + self.buffer.size)
            offline = _take(self.transitions, jnp.minimum(rows, num_offline - 1))
            online = _take(self.buffer.rows, jnp.maximum(rows - num_offline, 0))

            def choose(x, y):
                is_offline = (rows < num_offline).reshape(-1, *[1] * (x.ndim - 1))
                return jnp.where(is_offline, x, y)

            return jax.tree.map(choose, offline, online)
        num_online = round(self.online_share * num)
        offline_key, online_key = jr.split(key)
        offline_rows = jr.randint(offline_key, (num - num_online,), 0, num_offline)
        online_rows = jr.randint(online_key, (num_online,), 0, self.buffer.size)
        return jax.tree.map(
            lambda *parts: jnp.concatenate(parts),
            _take(self.transitions, offline_rows),
            _take(self.buffer.rows, online_rows),
        )


def _take(transitions: Transitions, rows: Int[Array, " batch"]) -> Transitions:
    return jax.tree.map(lambda column: column[rows], transitions)
