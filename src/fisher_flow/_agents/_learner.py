from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, PyTree

from .._data import Transitions
from .._fit import apply_gradient


class Learner(eqx.Module):
    """A network and the state of the optimiser that trains it."""

    model: Any
    optimiser_state: Any

    @staticmethod
    def init(model: Any, optimiser: optax.GradientTransformation) -> "Learner":
        return Learner(model, optimiser.init(eqx.filter(model, eqx.is_inexact_array)))

    def step(self, gradient: Any, optimiser: optax.GradientTransformation) -> "Learner":
        return Learner(*apply_gradient(optimiser, gradient, self.optimiser_state, self.model))


def adam(learning_rate: Any) -> optax.GradientTransformation:
    return optax.adam(learning_rate)


def first(example: Transitions) -> tuple[PyTree[Array], Float[Array, "..."]]:
    """One observation and one action."""
    return jax.tree.map(lambda leaf: jnp.asarray(leaf[0]), (example.observations, example.actions))
