import math
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.core
import jax.numpy as jnp
from jaxtyping import PRNGKeyArray

from .._custom_types import Action, Observation
from .._trees import ravel_inputs
from ._encoder import AbstractEncoder, encode, make_encoder


class ActionMLP(eqx.Module):
    """A multilayer perceptron that maps an observation and noise, or an action, to an action."""

    mlp: eqx.nn.MLP
    encoder: Callable[[Any], Any] | None

    def __init__(
        self,
        observation: Observation,
        action: Action | jax.ShapeDtypeStruct,
        width_size: int,
        depth: int,
        *,
        encoder: Callable[[Any], Any] | None = None,
        key: PRNGKeyArray,
    ):
        features = eqx.filter_eval_shape(encode, encoder, observation)
        inputs = eqx.filter_eval_shape(ravel_inputs, features, action).size
        size = math.prod(action.shape)
        self.mlp = eqx.nn.MLP(
            inputs, size, width_size, depth, jax.nn.gelu, dtype=action.dtype, key=key
        )
        self.encoder = encoder

    def __call__(self, observation: Observation, x: Action) -> Action:
        return self.mlp(ravel_inputs(encode(self.encoder, observation), x)).reshape(x.shape)


def zero_network(
    observation: Observation,
    action: Action | jax.ShapeDtypeStruct,
    width_size: int,
    depth: int,
    *,
    encoder: AbstractEncoder | None = None,
    example: str,
    key: PRNGKeyArray,
) -> ActionMLP:
    """A network for displacements, which are zero at the start."""
    encode, _, key = make_encoder(encoder, observation, action.dtype, key, example)
    network = ActionMLP(observation, action, width_size, depth, encoder=encode, key=key)
    last = lambda network: (network.mlp.layers[-1].weight, network.mlp.layers[-1].bias)
    return eqx.tree_at(last, network, jax.tree.map(jnp.zeros_like, last(network)))
