from typing import Any

import equinox as eqx
import jax.random as jr
import optax
from jaxtyping import Array, Float, PRNGKeyArray, Scalar

from .._custom_types import Data
from .._fit import apply_gradient
from ._critic_learning import AbstractCriticLearning


class CriticLearner(eqx.Module):
    """A critic, the state of the optimiser that trains it, and the target that follows it.

    A batch is anything that has the columns of [`fisher_flow.Transitions`][].
    """

    model: Any
    optimiser_state: Any
    target: Any

    @staticmethod
    def init(critic: Any, optimiser: optax.GradientTransformation) -> "CriticLearner":
        return CriticLearner(
            critic, optimiser.init(eqx.filter(critic, eqx.is_inexact_array)), critic
        )

    def update(
        self,
        learning: AbstractCriticLearning,
        optimiser: optax.GradientTransformation,
        batch: Any,
        next_actions: Float[Data, "batch ..."],
        *,
        key: PRNGKeyArray,
    ) -> tuple["CriticLearner", dict[str, Scalar]]:
        """One step towards the reward and the value of the next action by the target. The key may
        be the one of the whole update of an agent."""
        # Folded in beyond any row, so that no other key is this one or depends on the critic.
        sample_key, loss_key = jr.split(jr.fold_in(key, 2**31))
        next_values = learning.next_values(
            self.target, batch.next_observations, next_actions, key=sample_key
        )
        return self._step(learning, optimiser, batch, next_values, loss_key)

    def update_towards(
        self,
        learning: AbstractCriticLearning,
        optimiser: optax.GradientTransformation,
        batch: Any,
        next_values: Float[Array, " batch"],
        *,
        key: PRNGKeyArray,
    ) -> tuple["CriticLearner", dict[str, Scalar]]:
        """One step towards the reward and these values of the next observations."""
        return self._step(learning, optimiser, batch, next_values, jr.fold_in(key, 2**31))

    def _step(self, learning, optimiser, batch, next_values, key):
        y = learning.target(batch.rewards, batch.masks, next_values)

        @eqx.filter_grad(has_aux=True)
        def gradient_and_logs(critic):
            return learning.loss(critic, batch.observations, batch.actions, y, key=key)

        gradient, logs = gradient_and_logs(self.model)
        model, state = apply_gradient(optimiser, gradient, self.optimiser_state, self.model)
        return CriticLearner(model, state, learning.follow(self.target, model)), logs
