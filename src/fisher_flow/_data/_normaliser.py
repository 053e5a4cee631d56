from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PyTree

from .._checks import check_instance
from .._custom_types import Observation
from .._trees import plain
from ._transitions import Transitions


_PART_SIZE = 2**22  # numbers that are worked on at once, 32 MB of them in double precision


class Normaliser(eqx.Module):
    r"""Shifts and scales observations to mean 0 and standard deviation 1, $(o - \mu) / \sigma$.

    Only floating point leaves are normalised. Images and other leaves of integers or booleans are
    left alone, so that `{"image": ..., "state": ...}` needs nothing else.

    Nothing here rescales data by itself. A policy that was learned from normalised transitions and
    the normaliser make one policy of observations as they come,
    [`fisher_flow.NormalisedPolicy`][], and are saved as one:
    `fisher_flow.export_sampler(NormalisedPolicy(policy, normaliser), observation, "policy.jax")`.

    !!! example

        ```python
        import fisher_flow
        import numpy as np

        observations = np.random.default_rng(0).normal(5.0, 3.0, (101, 3))
        transitions = fisher_flow.Transitions.from_episodes(
            [observations], [np.zeros((100, 1))], [np.zeros(100)], [False]
        )
        normaliser = fisher_flow.Normaliser.of(transitions)
        normalised = normaliser.transitions(transitions)
        assert abs(normalised.observations.mean()) < 1e-6
        ```
    """

    mean: PyTree[Float[Array, "..."]]  # with `None` for each leaf that is left alone
    deviation: PyTree[Float[Array, "..."]]

    @staticmethod
    def of(transitions: Transitions) -> "Normaliser":
        """The normaliser of the observations of some transitions.

        An entry that never varies is shifted and not scaled. The columns are read once, in parts,
        so that those of [`fisher_flow.open_transitions`][] may be larger than memory.

        **Arguments:**

        - `transitions`: the transitions.

        **Raises:**

        - `ValueError` if no leaf of the observations is of a floating point dtype.
        """
        check_instance("transitions", transitions, Transitions, "Transitions.from_episodes(...)")
        leaves, structure = jax.tree.flatten(transitions.observations)
        if not any(map(_is_normalised, leaves)):
            dtypes = ", ".join(sorted({str(leaf.dtype) for leaf in leaves}))
            raise ValueError(
                "`transitions.observations` must have a leaf of a floating point dtype to be "
                f"normalised, but got {dtypes or 'no leaves'}. Do without a normaliser: networks "
                "scale images themselves. If the integers are measurements, write "
                "`observations=jax.tree.map(lambda leaf: leaf.astype(np.float32), observations)`."
            )
        moments = [_mean_and_deviation(x) if _is_normalised(x) else (None, None) for x in leaves]
        means, deviations = zip(*moments, strict=True)
        return Normaliser(
            jax.tree.unflatten(structure, means), jax.tree.unflatten(structure, deviations)
        )

    def __call__(self, observation: Observation) -> Observation:
        """One observation, or a batch of them, shifted and scaled, in the dtype of the mean."""

        def apply(leaf, μ, σ):
            if μ is None:
                return leaf
            leaf = jnp.asarray(leaf).astype(μ.dtype)  # many simulators count in double precision
            return (leaf - jnp.broadcast_to(μ, leaf.shape)) / jnp.broadcast_to(σ, leaf.shape)

        return self._map(apply, observation)

    def _map(self, apply: Callable[..., Any], observation: Observation) -> Observation:
        """Applies a function to each leaf with its mean and deviation, whichever mapping or named
        tuple holds it."""
        leaves, structure = jax.tree.flatten(plain(observation))
        bare = jax.tree.structure(_without_names(plain(observation)))
        try:
            moments = [bare.flatten_up_to(_without_names(x)) for x in (self.mean, self.deviation)]
        except ValueError as error:
            raise ValueError(
                "`observation` must have the structure of the observations that the normaliser was "
                f"made from, {jax.tree.structure(self.mean)}, but got {structure}. Write "
                "`Normaliser.of(transitions)` with transitions of such observations."
            ) from error
        return jax.tree.unflatten(structure, map(apply, leaves, *moments))

    def transitions(self, transitions: Transitions) -> Transitions:
        """The transitions, with their observations and next observations shifted and scaled.

        These are new columns, in memory. What does not fit is normalised part by part:
        `save_transitions(folder, (normaliser.transitions(part) for part in parts))`.
        """

        def apply(leaf, μ, σ):  # in NumPy if the column is
            if μ is None:
                return leaf
            μ, σ = (np.broadcast_to(np.asarray(x), leaf.shape) for x in (μ, σ))
            return (leaf - μ) / σ

        o, next_o = (
            self._map(apply, column)
            for column in (transitions.observations, transitions.next_observations)
        )
        return eqx.tree_at(
            lambda t: (t.observations, t.next_observations), transitions, (o, next_o)
        )


def _without_names(tree: PyTree[Any]) -> PyTree[Any]:
    """The PyTree with a tuple for every named tuple, as which those are stored."""

    def is_named(node: Any) -> bool:
        return isinstance(node, tuple) and hasattr(node, "_fields")

    return jax.tree.map(
        lambda node: tuple(map(_without_names, node)) if is_named(node) else node,
        tree,
        is_leaf=is_named,
    )


def _is_normalised(leaf: Any) -> bool:
    return jnp.issubdtype(leaf.dtype, np.floating)


def _mean_and_deviation(leaf: Any) -> tuple[Array, Array]:
    """Over the rows, in double precision and in parts, which are merged as they come."""
    column = np.asarray(leaf)
    rows = max(1, _PART_SIZE // max(1, column[:1].size))
    count, mean, square = 0, np.zeros(column.shape[1:]), np.zeros(column.shape[1:])
    for start in range(0, len(column), rows):
        part = column[start : start + rows].astype(np.float64)
        shift = part.mean(0) - mean
        total = count + len(part)
        square += part.var(0) * len(part) + shift**2 * count * len(part) / total
        mean += shift * len(part) / total
        count = total
    deviation = np.sqrt(square / count)
    # What varies by less than its own rounding does not vary. No size is small in itself: the unit
    # of an entry is the user's choice.
    limits = jnp.finfo(column.dtype)
    relative = max(float(limits.eps), 1e-12)  # the sums round in double precision
    rounding = np.maximum(relative * np.abs(mean), float(limits.tiny))
    deviation = np.where(deviation > rounding, deviation, 1)
    return jnp.asarray(mean.astype(column.dtype)), jnp.asarray(deviation.astype(column.dtype))
