from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from .._checks import check_positive_integer
from .._custom_types import Action, Observation
from .._networks import encode, EncoderNetwork, QNetwork
from .._trees import ravel_inputs
from ._network_ensemble import AbstractNetworkEnsemble, make_members


class QEnsemble(AbstractNetworkEnsemble):
    """A critic: the mean of several Q networks, which differ in their initial parameters.

    Keep observations and rewards of order one: nothing here rescales them.
    """

    members: QNetwork
    encoder: EncoderNetwork | None
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
            With an `encoder`, the number of its features.
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
        size = observation_size + action_size
        self.members = make_members(num_members, size, width_size, depth, dtype, key)
        self.encoder = encoder
        self.num_members = num_members
        self.aggregate = aggregate

    def values(self, observation: Observation, action: Action) -> Float[Array, " members"]:
        """The value of an action by each member."""
        inputs = ravel_inputs(encode(self.encoder, observation), action)
        return eqx.filter_vmap(lambda member: member(inputs))(self.members)
