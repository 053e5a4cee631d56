import abc
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jax import lax
from jaxtyping import Array, Float, PRNGKeyArray, PyTree, Scalar, ScalarLike

from .._checks import check_at_least, check_discount, check_positive_integer
from .._custom_types import Action, Data, Observation
from .._networks import AbstractEncoder


class AbstractCriticLearning(eqx.Module):
    """Abstract base class for how the critic of an agent is made and learned.

    It holds settings only. It makes a critic `critic(observation, action) -> scalar`.
    """

    width_size: eqx.AbstractVar[int]
    depth: eqx.AbstractVar[int]
    encoder: eqx.AbstractVar[AbstractEncoder | None]
    discount: eqx.AbstractVar[ScalarLike]
    target_rate: eqx.AbstractVar[ScalarLike]

    @abc.abstractmethod
    def init(self, observation: Observation, action: Action, *, key: PRNGKeyArray) -> Any:
        """A critic for observations and actions like these."""

    def next_values(
        self,
        target_critic: Any,
        next_observations: PyTree[Any],
        next_actions: Float[Data, "batch ..."],
        *,
        key: PRNGKeyArray,
    ) -> Float[Array, " batch"]:
        """The return that is left after the step, by the target critic: its value for each row. A
        critic that learns a distribution gives a sample of the return for each row instead."""
        del key
        return jax.vmap(target_critic)(next_observations, next_actions)

    def target(
        self,
        rewards: Float[Data, " batch"],
        masks: Float[Data, " batch"],
        next_values: Float[Array, " batch"],
    ) -> Float[Array, " batch"]:
        r"""What the critic should say, $r + \gamma m V(o')$. No gradient passes through it."""
        return lax.stop_gradient(jnp.asarray(rewards) + self.discount * masks * next_values)

    @abc.abstractmethod
    def loss(
        self,
        critic: Any,
        observations: PyTree[Any],
        actions: Float[Data, "batch ..."],
        targets: Float[Array, " batch"],
        *,
        key: PRNGKeyArray,
    ) -> tuple[Scalar, dict[str, Scalar]]:
        """The loss, summed over the members and averaged over the batch; and logs."""

    def follow(self, target: Any, model: Any) -> Any:
        r"""Moves a target network towards `model` by the share `target_rate`."""
        new, static = eqx.partition(model, eqx.is_inexact_array)
        old = eqx.filter(target, eqx.is_inexact_array)
        return eqx.combine(optax.incremental_update(new, old, self.target_rate), static)


def check_members(learning: Any) -> None:
    """Checks the settings that are common to the critics of several members."""
    check_positive_integer("num_members", learning.num_members, 2)
    check_positive_integer("width_size", learning.width_size, 512)
    check_positive_integer("depth", learning.depth, 4)
    check_discount(learning.discount)
    check_at_least("target_rate", learning.target_rate, 0, 0.005, maximum=1)
    if not callable(learning.aggregate):
        raise ValueError(
            "`aggregate` must be a function from the values of the members to one, but got "
            f"`{learning.aggregate!r}`. Write `aggregate=jax.numpy.min`."
        )
