from collections.abc import Callable, Sequence
from typing import Any

import equinox as eqx
import jax
import numpy as np
from jaxtyping import Array, PRNGKeyArray, Scalar

from .._checks import check_positive_integer, checked_shape
from .._custom_types import Action, Observation
from .._trees import ravel_inputs
from ._encoder import encode


class VelocityMLP(eqx.Module):
    """A velocity field given by a multilayer perceptron of the time, the point and the observation.

    Keep observations of order one: nothing here rescales them.
    """

    network: eqx.nn.MLP
    encoder: Callable[[Any], Any] | None
    action_shape: tuple[int, ...] = eqx.field(static=True)

    def __init__(
        self,
        observation_size: int,
        action_shape: Sequence[int],
        *,
        width_size: int = 256,
        depth: int = 3,
        activation: Callable[[Array], Array] = jax.nn.gelu,
        encoder: Callable[[Any], Any] | None = None,
        dtype: Any = None,
        key: PRNGKeyArray,
    ):
        """**Arguments:**

        - `observation_size`: the number of entries of one observation, all its leaves together; 0
            for none. With an `encoder`, the number of its features.
        - `action_shape`: the shape of one action.
        - `width_size`, `depth`, `activation`: the hidden layers.
        - `encoder`: called as `encoder(observation)`; returns a vector. It is trained with the
            rest, and may come from the `init` of [`fisher_flow.ImpalaEncoder`][].
        - `dtype`: the dtype of the parameters.
        - `key`: a `jax.random.key` for the initial parameters.
        """
        check_positive_integer("width_size", width_size, 256)
        check_positive_integer("depth", depth, 3)
        self.action_shape = checked_shape(action_shape)
        self.encoder = encoder
        size = int(np.prod(self.action_shape))
        self.network = eqx.nn.MLP(
            observation_size + size + 1, size, width_size, depth, activation, dtype=dtype, key=key
        )

    def __call__(self, t: Scalar, x: Action, observation: Observation) -> Action:
        """The velocity at time `t` and point `x`, with the shape of `x`."""
        return self.given(observation)(t, x)

    def given(self, observation: Observation) -> Callable[[Scalar, Action], Action]:
        """The velocity at one observation, a function of the time and the point. The observation
        is encoded once, however often it is called."""
        features = encode(self.encoder, observation)
        return lambda t, x: self.network(ravel_inputs(features, x, t)).reshape(self.action_shape)
