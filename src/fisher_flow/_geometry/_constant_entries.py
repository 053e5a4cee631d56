from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, Bool, Scalar

from .._custom_types import Action, Observation
from .._flows import changed, FlowPolicy, given
from .._linalg import Whitening


class FreedVelocity(eqx.Module):
    """A velocity whose constant entries keep the noise that they start from.

    The other entries see them as they are along the path, from this noise to their constant. So the
    other entries of an action are as the flow makes them, and all entries together have a density.
    """

    flow: FlowPolicy
    is_constant: Bool[Array, "..."]

    def __call__(self, t: Scalar, x: Action, observation: Observation) -> Action:
        return self.given(observation)(t, x)

    def given(self, observation: Observation) -> Callable[[Any, Any], Any]:
        velocity = given(self.flow.velocity_field, observation)
        constants = constants_at(self.flow, observation)  # once, not at every step

        def freed(t, x):
            α, σ = self.flow.path.alpha(t), self.flow.path.sigma(t)
            v = velocity(t, jnp.where(self.is_constant, α * constants + σ * x, x))
            return jnp.where(self.is_constant, jnp.zeros_like(v), v)

        return freed


def constant_entries(whitening: Whitening | None, action_shape: tuple[int, ...]) -> Any:
    """Which entries of the actions never vary; `None` if all of them do."""
    if whitening is None:
        return None
    L = whitening.factor
    constant = L == 0 if L.ndim == 1 else ~jnp.any(L != 0, axis=1)
    return constant.reshape(action_shape) if bool(jnp.any(constant)) else None


def constants_at(flow: FlowPolicy, observation: Observation) -> Action:
    """One action of the flow. Its constant entries are the same in all actions at this
    observation."""
    noise = eqx.filter_eval_shape(flow.noise, observation, key=jr.key(0))
    return flow.flow(observation, jnp.zeros(noise.shape, noise.dtype))


def free_constant_entries(flow: FlowPolicy, is_constant: Bool[Array, "..."]) -> FlowPolicy:
    """The flow with noise in place of its constant entries, so that its actions have a density."""
    return changed(flow, velocity=FreedVelocity(flow, is_constant))
