from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PyTree

from .._checks import check_instance
from .._custom_types import Observation
from ._transitions import Transitions


_PART_SIZE = 2**22  # numbers that are worked on at once, 32 MB of them in double precision


class Normaliser(eqx.Module):
    r"""Shifts and scales observations to mean 0 and standard deviation 1, $(o - \mu) / \sigma$.

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

    mean: PyTree[Float[Array, "..."]]
    deviation: PyTree[Float[Array, "..."]]

    @staticmethod
    def of(transitions: Transitions) -> "Normaliser":
        """The normaliser of the observations of some transitions.

        An entry that never varies is shifted and not scaled. The columns are read once, in parts,
        so that those of [`fisher_flow.open_transitions`][] may be larger than memory.

        **Arguments:**

        - `transitions`: the transitions. Integer observations, such as images, are refused: scale
            them where they enter the network.
        """
        check_instance("transitions", transitions, Transitions, "Transitions.from_episodes(...)")
        for path, leaf in jax.tree.leaves_with_path(transitions.observations):
            if not np.issubdtype(leaf.dtype, np.inexact):
                raise ValueError(
                    f"`transitions.observations{jax.tree_util.keystr(path)}` must be of a floating "
                    f"point dtype to be normalised, but got {leaf.dtype}. Write "
                    "`observations=jax.tree.map(lambda leaf: leaf.astype(np.float32), ...)`, or do "
                    "without a normaliser."
                )

        leaves, structure = jax.tree.flatten(transitions.observations)
        means, deviations = zip(*map(_mean_and_deviation, leaves), strict=True)
        return Normaliser(
            jax.tree.unflatten(structure, means), jax.tree.unflatten(structure, deviations)
        )

    def __call__(self, observation: Observation) -> Observation:
        """One observation, or a batch of them, shifted and scaled, in the dtype of the mean."""

        def apply(leaf, μ, σ):
            leaf = jnp.asarray(leaf).astype(μ.dtype)  # many simulators count in double precision
            return (leaf - jnp.broadcast_to(μ, leaf.shape)) / jnp.broadcast_to(σ, leaf.shape)

        return jax.tree.map(apply, observation, self.mean, self.deviation)

    def transitions(self, transitions: Transitions) -> Transitions:
        """The transitions, with their observations and next observations shifted and scaled.

        These are new columns, in memory. What does not fit is normalised part by part:
        `save_transitions(folder, (normaliser.transitions(part) for part in parts))`.
        """

        def apply(leaf, μ, σ):  # in NumPy if the column is
            μ, σ = (np.broadcast_to(np.asarray(x), leaf.shape) for x in (μ, σ))
            return (leaf - μ) / σ

        o, next_o = (
            jax.tree.map(apply, column, self.mean, self.deviation)
            for column in (transitions.observations, transitions.next_observations)
        )
        return eqx.tree_at(
            lambda t: (t.observations, t.next_observations), transitions, (o, next_o)
        )


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
    deviation = np.where(deviation > 1e-6, deviation, 1)
    return jnp.asarray(mean.astype(column.dtype)), jnp.asarray(deviation.astype(column.dtype))
