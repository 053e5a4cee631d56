from typing import Any

import equinox as eqx
import jax
import jax.core
import jax.numpy as jnp
from jaxtyping import PRNGKeyArray, PyTree

from ._method import Reached
from ._refined_policy import RefinedPolicy
from ._witness import beyond_chance, is_normalised, is_vague, witnesses


# A sampler whose KL is larger than the KL of its flow by more than this factor is not the flow.
MOST_APART = 1.3


def correct_length(
    refined: RefinedPolicy, observations: PyTree[Any], num_witnesses: int, *, key: PRNGKeyArray
) -> RefinedPolicy:
    """Makes the displacement of a refined policy shorter or longer until the KL by densities meets
    the radius.

    The length was settled by scores. A score that is read off a learned velocity is not quite the
    score of its flow; the densities are exact. They are known at few actions, so what they tell is
    the difference from the KL by scores at the same actions. There are two KLs by densities: the KL
    of the flow, and the KL of the steps of its sampler. The larger one meets the radius, unless the
    steps differ so much from the flow that they are another policy. Nothing is done inside
    `jax.jit`, after other maps, where the densities are not known well, and where the difference
    may be chance.
    """
    method: Any = refined.method
    reached = refined.reached
    leaves = jax.tree.leaves(eqx.filter((refined, observations), eqx.is_array))
    traced = any(isinstance(leaf, jax.core.Tracer) for leaf in leaves)
    if traced or reached is None or refined.policy is not refined.flow_policy:
        return refined
    radius, by_scores = float(method.radius), float(reached.kl)
    for _ in range(2):
        if not 0 < by_scores:
            return refined
        by_density, by_steps = witnesses(refined, observations, num_witnesses, key=key)
        follows = bool(by_steps.kl < MOST_APART * by_density.kl)
        larger = bool(by_steps.difference > by_density.difference)
        witness = by_steps if follows and larger else by_density
        unknown = jnp.isnan(witness.kl) or float(witness.unknown) > 0.02
        if unknown or is_vague(witness) or not is_normalised(witness):
            return refined
        kl = by_scores + beyond_chance(witness)
        if kl == by_scores or not kl > 0:
            return refined
        # Folds may forbid a longer map, and a map that folds little may fold much when longer.
        longest = 1.0 if bool(reached.limited) else 1.1
        factor = min((radius / kl) ** 0.5, longest)
        if abs(factor - 1) < 0.01:
            return refined
        by_scores *= factor**2
        reached = Reached(jnp.asarray(kl * factor**2, reached.kl.dtype), reached.limited)
        scale, _ = _scale_and_reached(refined)
        refined = eqx.tree_at(_scale_and_reached, refined, (factor * scale, reached))
    return refined


def _scale_and_reached(refined: RefinedPolicy) -> tuple[Any, Any]:
    displacement: Any = refined.displacement_field
    return displacement.scale, refined.reached
