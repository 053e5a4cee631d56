import abc
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax.random as jr
from jaxtyping import Array, Float, PRNGKeyArray, Scalar

from .._custom_types import Action, Observation
from .._networks import EncoderNetwork, QNetwork


class AbstractNetworkEnsemble(eqx.Module):
    """Abstract base class for critics of several networks that are alike but for their parameters.

    The members are one network, in which every array has a leading axis with an entry for each
    member. They share one encoder.
    """

    members: eqx.AbstractVar[QNetwork]
    encoder: eqx.AbstractVar[EncoderNetwork | None]
    aggregate: eqx.AbstractVar[Callable[[Array], Array]]

    @abc.abstractmethod
    def values(self, observation: Observation, action: Action) -> Float[Array, " members"]:
        """The value of an action by each member."""

    def __call__(self, observation: Observation, action: Action) -> Scalar:
        """The value of an action, a scalar in the units of the rewards."""
        return self.aggregate(self.values(observation, action))


def make_members(
    num_members: int,
    input_size: int,
    width_size: int,
    depth: int,
    dtype: Any,
    key: PRNGKeyArray,
    output_size: int | None = None,
) -> QNetwork:
    """The members of an ensemble, from different initial parameters."""
    make = lambda key: QNetwork(input_size, width_size, depth, dtype, key, output_size)
    return eqx.filter_vmap(make)(jr.split(key, num_members))
