from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import optax
from jax import lax
from jaxtyping import Array, Float, PRNGKeyArray, PyTree, Scalar

from .._custom_types import Action, Data, Observation
from .._misc import (
    check_equal_lengths,
    check_instance,
    check_positive_integer,
    encode,
    ravel_inputs,
)
from .._training import apply_gradient, train


class QNetwork(eqx.Module):
    """A multilayer perceptron of an observation and an action, with layer norm before each
    activation."""

    layers: list[eqx.nn.Linear]
    norms: list[eqx.nn.LayerNorm]
    output_size: int | None = eqx.field(static=True)  # `None` for a scalar

    def __init__(
        self,
        input_size: int,
        width_size: int,
        depth: int,
        dtype: Any,
        key: PRNGKeyArray,
        output_size: int | None = None,
    ):
        self.output_size = output_size
        sizes = [input_size, *[width_size] * depth, output_size or 1]
        keys = jr.split(key, len(sizes) - 1)
        self.layers = [
            eqx.nn.Linear(fan_in, fan_out, dtype=dtype, key=key)
            for fan_in, fan_out, key in zip(sizes[:-1], sizes[1:], keys, strict=True)
        ]
        self.norms = [eqx.nn.LayerNorm(size, dtype=dtype) for size in sizes[1:-1]]

    def __call__(self, inputs: Float[Array, " inputs"]) -> Float[Array, "..."]:
        *hidden, last = self.layers
        for layer, norm in zip(hidden, self.norms, strict=True):
            inputs = jax.nn.gelu(norm(layer(inputs)))
        outputs = last(inputs)
        return outputs[0] if self.output_size is None else outputs


class ValueNetwork(eqx.Module):
    """The value of an observation."""

    network: QNetwork
    encoder: Callable[[Any], Any] | None

    def __call__(self, observation: Observation) -> Scalar:
        return self.network(ravel_inputs(encode(self.encoder, observation)))


class QEnsemble(eqx.Module):
    """A critic: the mean of several Q networks, alike but for their initial parameters.

    Keep observations and rewards of order one: nothing here rescales them.
    """

    members: QNetwork  # every array in it has a leading axis, one entry a member
    encoder: Callable[[Any], Any] | None  # one for all members
    num_members: int = eqx.field(static=True)
    aggregate: Callable[[Array], Array] = eqx.field(static=True)

    def __init__(
        self,
        observation_size: int,
        action_size: int,
        *,
        num_members: int = 2,
        width_size: int = 256,
        depth: int = 3,
        aggregate: Callable[[Array], Array] = jnp.mean,
        encoder: Callable[[Any], Any] | None = None,
        dtype: Any = None,
        key: PRNGKeyArray,
    ):
        """**Arguments:**

        - `observation_size`: the number of entries of one observation, all its leaves together.
            With an `encoder`, that of its features.
        - `action_size`: the number of entries of one action.
        - `num_members`: the number of networks.
        - `width_size`, `depth`: the hidden layers of each.
        - `aggregate`: how their values become one: `jax.numpy.mean`, or `jax.numpy.min` for a
            pessimist.
        - `encoder`: called as `encoder(observation)`; returns a vector, which all networks see. It
            is trained with them, and may come from the `init` of [`fisher_flow.ImpalaEncoder`][].
        - `dtype`: the dtype of the parameters.
        - `key`: a `jax.random.key` for the initial parameters.
        """
        check_positive_integer("num_members", num_members, 2)
        check_positive_integer("width_size", width_size, 256)
        check_positive_integer("depth", depth, 3)
        self.members = eqx.filter_vmap(
            lambda key: QNetwork(observation_size + action_size, width_size, depth, dtype, key)
        )(jr.split(key, num_members))
        self.encoder = encoder
        self.num_members = num_members
        self.aggregate = aggregate

    def __call__(self, observation: Observation, action: Action) -> Scalar:
        """The value of an action, a scalar in the units of the rewards."""
        return self.aggregate(self.values(observation, action))

    def values(self, observation: Observation, action: Action) -> Float[Array, " members"]:
        """The value of an action by each member."""
        inputs = ravel_inputs(encode(self.encoder, observation), action)
        return eqx.filter_vmap(lambda member: member(inputs))(self.members)


def fit_critic(
    critic: QEnsemble,
    observations: PyTree[Float[Data, "batch ..."]],
    actions: Float[Data, "batch ..."],
    rewards: Float[Data, " batch"],
    next_observations: PyTree[Float[Data, "batch ..."]],
    next_actions: Float[Data, "batch ..."],
    masks: Float[Data, " batch"],
    *,
    discount: float = 0.99,
    target_rate: float = 0.005,
    num_updates: int = 20_000,
    batch_size: int = 256,
    learning_rate: float = 3e-4,
    progress: bool = True,
    key: PRNGKeyArray,
) -> QEnsemble:
    r"""Fits a critic of the behaviour policy to logged transitions, by temporal differences,

    $$Q(o, a) \to r + \gamma\, m\, \bar Q(o', a'),$$

    where $a'$ is the action that the data took next, so no action is ever evaluated that is not in
    the data, and no policy is sampled.

    **Arguments:**

    - `critic`: the critic to start from. It is not modified.
    - `observations`, `actions`, `rewards`: the transitions, each with a leading axis.
    - `next_observations`, `next_actions`: what came next in the same episode.
    - `masks`: 0 where the episode terminated after the transition, else 1. An episode that was cut
        off by a time limit has not terminated.

    **Other arguments:**

    - `discount`: the discount $\gamma$.
    - `target_rate`: the share of the critic that enters the target $\bar Q$ at each update.
    - `num_updates`: the number of gradient steps.
    - `batch_size`: the number of transitions in each, drawn with replacement.
    - `learning_rate`: the rate of Adam.
    - `progress`: whether to show a progress bar with the loss and the mean value.
    - `key`: a `jax.random.key`; the same key gives the same critic.

    **Returns:**

    The trained critic.

    **Raises:**

    - `ValueError` if the lengths do not match.
    """
    check_instance("critic", critic, QEnsemble, "fisher_flow.QEnsemble(3, 1, key=key)")
    data = dict(
        observations=observations,
        actions=actions,
        rewards=rewards,
        next_observations=next_observations,
        next_actions=next_actions,
        masks=masks,
    )
    check_equal_lengths(**data)
    check_positive_integer("num_updates", num_updates, 20_000)
    check_positive_integer("batch_size", batch_size, 256)
    for name, column in (("rewards", rewards), ("masks", masks)):
        if jnp.ndim(column) != 1:
            raise ValueError(
                f"`{name}` must have one entry a transition, but got shape {jnp.shape(column)}. "
                f"Write `{name}={name}.reshape(-1)`."
            )
    data = jax.tree.map(jnp.asarray, data)
    optimiser_state = optax.adam(learning_rate).init(eqx.filter(critic, eqx.is_inexact_array))
    args = (data, discount, target_rate, batch_size, learning_rate)
    critic, _, _ = train(
        _update,
        args,
        (critic, critic, optimiser_state),
        num_updates,
        key=key,
        progress=progress,
        description="critic",
    )
    return critic


def _update(args, state, key, step):
    del step
    data, discount, target_rate, batch_size, learning_rate = args
    critic, target_critic, optimiser_state = state
    rows = jr.randint(key, (batch_size,), 0, data["rewards"].shape[0])
    batch = jax.tree.map(lambda leaf: leaf[rows], data)
    next_value = jax.vmap(target_critic)(batch["next_observations"], batch["next_actions"])
    target = lax.stop_gradient(batch["rewards"] + discount * batch["masks"] * next_value)

    @eqx.filter_value_and_grad(has_aux=True)
    def loss_and_gradient(critic):
        values = jax.vmap(critic.values)(batch["observations"], batch["actions"])
        return jnp.mean((values - target[:, None]) ** 2), jnp.mean(values)

    (loss, value), gradient = loss_and_gradient(critic)
    optimiser = optax.adam(learning_rate)
    critic, optimiser_state = apply_gradient(optimiser, gradient, optimiser_state, critic)
    arrays, static = eqx.partition(target_critic, eqx.is_inexact_array)
    arrays = optax.incremental_update(eqx.filter(critic, eqx.is_inexact_array), arrays, target_rate)
    target_critic = eqx.combine(arrays, static)
    return (critic, target_critic, optimiser_state), {"loss": loss, "value": value}
