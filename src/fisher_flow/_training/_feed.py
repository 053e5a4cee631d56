"""What updates learn from: all the rows, on the device, or blocks of batches read ahead of them."""

import functools
import math
import mmap
import weakref
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jax import lax
from jaxtyping import PRNGKeyArray

from .._data import is_mapped, Transitions
from ._sampling import (
    BalancedSampling,
    BlockSampling,
    keys_of_update,
    uniform_rows,
    UniformSampling,
)


# The number of updates by which a piece is used up, and where their batches come from.
Piece = tuple[int, UniformSampling | BlockSampling | BalancedSampling]


_BLOCK_SIZE = 2**23  # bytes: small beside any memory, large beside what starting a program costs


_BLOCK_LENGTH = 100  # updates


# A read from disk takes long and does little, so many blocks at once are read as fast as a few.
# But with large images or many seeds, the batch of one update may be larger than a block should be.
_MOST_BLOCKS = 16


_MOST_BYTES = 2**28  # of all blocks that are read at once; two blocks may take more


def check_num_rows(transitions: Transitions) -> None:
    """Refuses transitions without a row, or with more rows than JAX's integers can count."""
    if len(transitions) == 0:
        raise ValueError(
            "`transitions` must have at least one row, but has 0 rows. Write "
            "`transitions=Transitions.from_episodes(...)`, with episodes that have ended or that "
            "have two steps or more."
        )
    most = int(jnp.iinfo(jnp.result_type(int)).max)
    if len(transitions) > most:
        raise ValueError(
            f"`transitions` must have at most {most} rows while integers have 32 bits, but got "
            f"{len(transitions)}. Write `transitions[:{most}]`, or "
            '`jax.config.update("jax_enable_x64", True)` before.'
        )


class Resident:
    """All the rows, on the device."""

    def __init__(self, transitions: Transitions):
        self._sampling = UniformSampling(jax.tree.map(jnp.asarray, transitions))

    def pieces(self, start: int, stop: int) -> Iterator[Piece]:
        del start
        yield stop, self._sampling

    def close(self) -> None:
        pass


class Streamed:
    """Blocks with the batches of several updates each. Grain reads them while the agent learns from
    the blocks before.

    Block `b` depends on `b` alone, so that a run may start with any block.
    """

    def __init__(
        self,
        transitions: Transitions,
        key: PRNGKeyArray,
        seeds: tuple[int, ...],
        batch_size: int,
        num_updates: int,
    ):
        try:
            import grain
        except ImportError as error:
            raise ImportError(
                "Transitions are streamed by Grain, which is not installed. Write "
                '`pip install "fisher_flow[offline]"`, or train with `stream=False` if they fit '
                "on the device."
            ) from error
        maps = [leaf for leaf in jax.tree.leaves(transitions) if is_mapped(leaf)]
        # Otherwise the system reads some 128 KB around every row.
        _advise(maps, "MADV_RANDOM")
        # The maps belong to the user, who may read them in order: undone however training ends.
        self._read_in_order = weakref.finalize(self, _advise, maps, "MADV_NORMAL")
        columns = jax.tree.map(np.asarray, transitions)
        row = sum(leaf[:1].nbytes for leaf in jax.tree.leaves(columns))
        batches = len(seeds) * batch_size * row  # bytes of an update
        self._length = max(1, min(_BLOCK_SIZE // batches, _BLOCK_LENGTH, num_updates))
        count = math.ceil(num_updates / self._length)
        self._seeds = jnp.asarray(seeds)
        blocks = _Blocks(columns, key, self._seeds, batch_size, self._length, count)
        self._dataset = grain.MapDataset.source(blocks)
        ahead = max(2, min(_MOST_BYTES // (self._length * batches), _MOST_BLOCKS))
        self._options = grain.ReadOptions(num_threads=ahead, prefetch_buffer_size=ahead)
        self._reader: Any = None
        self._number = -1
        self._sampling: Any = None

    def pieces(self, start: int, stop: int) -> Iterator[Piece]:
        while start < stop:
            number = start // self._length
            if self._reader is None:
                rest = self._dataset[number:]
                self._reader = iter(rest.to_iter_dataset(self._options))
            first = number * self._length
            if number != self._number:
                self._number = number
                batches = jax.tree.map(jnp.asarray, next(self._reader))
                origins = jnp.arange(len(self._seeds)) * self._length - first
                self._sampling = BlockSampling(batches, self._seeds, origins)
            start = min(stop, first + self._length)
            yield start, self._sampling

    def close(self) -> None:
        """Ends the threads that read."""
        if self._reader is not None:
            self._reader.close()
        self._read_in_order()


def _advise(maps: list[Any], name: str) -> None:
    """Tells the system how maps will be read, if the system can be told."""
    if hasattr(mmap, name):
        for leaf in maps:
            leaf._mmap.madvise(getattr(mmap, name))


class _Blocks:
    """What Grain reads: block after block, each with the batches of all seeds."""

    def __init__(self, columns, key, seeds, batch_size, length, count):
        self._columns, self._length, self._count = columns, length, count
        try:  # The accelerator has other things to do.
            device = jax.local_devices(backend="cpu")[0]
        except RuntimeError:  # JAX_PLATFORMS names accelerators alone
            device = None
        self._args = jax.device_put((key, seeds), device)
        # Not in the threads of Grain: the rows depend on the configuration of JAX, and a `with`
        # around the training configures this thread alone.
        lowered = _rows.lower(*self._args, batch_size, length, len(columns), np.int32(0))
        self._rows = lowered.compile()

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> Transitions:
        rows = np.asarray(self._rows(*self._args, np.int32(index * self._length)))
        return jax.tree.map(lambda column: column[rows], self._columns)


@functools.partial(jax.jit, static_argnums=(2, 3, 4))
def _rows(key, seeds, batch_size, length, num_rows, first):
    """The rows of the batches of a block, one after another."""

    def one(seed, step):
        row_key, _, _ = keys_of_update(jr.fold_in(key, step), seed)
        return uniform_rows(row_key, batch_size, num_rows)

    # No `vmap`, under which some generators draw other numbers.
    steps = first + jnp.arange(length, dtype=first.dtype)
    return lax.map(lambda seed: lax.map(lambda step: one(seed, step), steps), seeds).reshape(-1)
