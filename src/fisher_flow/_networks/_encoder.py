import abc
from collections.abc import Callable
from typing import Any, TypeAlias

import equinox as eqx
import jax.random as jr
from jaxtyping import Array, Float, PRNGKeyArray, PyTree

from .._checks import check_instance
from .._custom_types import Observation
from .._images import refuse_images
from .._trees import plain, ravel_inputs


# `network(observation) -> vector`
EncoderNetwork: TypeAlias = Callable[[Any], Float[Array, " features"]]


class AbstractEncoder(eqx.Module):
    """Abstract base class for how observations become the vectors that networks take.

    It holds settings only. It makes a network, which becomes a part of another network and is
    trained by the loss of that. A flow, a critic, a value, a residual and a one-step policy each
    make one of their own.
    """

    @abc.abstractmethod
    def init(self, observation: Observation, *, dtype: Any = None, key: PRNGKeyArray) -> Any:
        """A network for observations like this one, called as `network(observation)` for one
        sample; it returns a vector.

        **Arguments:**

        - `observation`: one observation, for its shapes and dtypes.
        - `dtype`: the dtype of the parameters.
        - `key`: a `jax.random.key` for the initial parameters.
        """


def make_encoder(
    encoder: AbstractEncoder | None,
    observation: Observation,
    dtype: Any,
    key: PRNGKeyArray,
    example: str,
) -> tuple[EncoderNetwork | None, int, PRNGKeyArray]:
    """The network of an encoder, the number of its features, and a key for the network on top.
    Without an encoder: `None`, the number of entries of the observation, and `key` itself."""
    if encoder is None:
        refuse_images(observation, example)
        return None, ravel_inputs(observation).size, key
    check_instance("encoder", encoder, AbstractEncoder, "fisher_flow.ImpalaEncoder()")
    encoder_key, key = jr.split(key)
    network = encoder.init(plain(observation), dtype=dtype, key=encoder_key)
    return network, eqx.filter_eval_shape(network, plain(observation)).size, key


def encode(encoder: Any, observation: PyTree[Any]) -> PyTree[Any]:
    """What a network sees of an observation: all of it, unless it has an encoder."""
    return observation if encoder is None else encoder(plain(observation))
