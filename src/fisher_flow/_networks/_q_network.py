from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.random as jr
from jaxtyping import Array, Float, PRNGKeyArray, Scalar

from .._custom_types import Observation
from .._trees import ravel_inputs
from ._encoder import encode


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
