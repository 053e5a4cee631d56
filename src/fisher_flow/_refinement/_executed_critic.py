from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Scalar

from .._custom_types import Action, Critic, Observation
from .._flows import AbstractPolicy, TanhBounds
from .._trees import in_full_precision


def check_critic(critic: Any) -> None:
    if not callable(critic) or isinstance(critic, type):
        raise ValueError(
            "`critic` must be a function `critic(observation, action)` that returns a scalar, but "
            f"got `{critic!r}`. Write `critic=lambda observation, action: ...`."
        )


def critic_value(
    policy: AbstractPolicy, critic: Critic, observation: Observation, action: Action
) -> Scalar:
    """The critic at the action that would be executed."""
    return _scalar_value(critic, observation, policy.project(action))


def critic_gradient(
    policy: AbstractPolicy, critic: Critic, observation: Observation, action: Action
) -> Action:
    """The gradient of the critic in the action, at the action that would be executed.

    It is not multiplied by the derivative of the clipping. So actions beyond a bound are pushed
    back just as actions at the bound are, and the field of displacements stays continuous.
    Squashing is smooth and one-to-one, so the chain rule is applied to it.
    """
    if isinstance(policy.bounds, TanhBounds):
        return jax.grad(lambda a: critic_value(policy, critic, observation, a))(action)
    executed = policy.project(action)
    return jax.grad(lambda a: _scalar_value(critic, observation, a))(executed)


def _scalar_value(critic: Critic, observation: Observation, action: Action) -> Scalar:
    value = critic(observation, action)
    if jnp.shape(value) != ():
        example = (
            "lambda observation, action: critic(observation, action).mean()"
            if jnp.ndim(value) > 0 and jnp.size(value) > 1
            else "lambda observation, action: critic(observation, action).squeeze()"
        )
        raise ValueError(
            "`critic(observation, action)` must return a scalar for one observation and one "
            f"action, but it returned shape {jnp.shape(value)}. Write `critic={example}`."
        )
    return in_full_precision(jnp.asarray(value))
