from collections.abc import Callable
from typing import Any

import equinox as eqx

from .._custom_types import Observation


def given(network: Any, observation: Observation) -> Callable[[Any, Any], Any]:
    """`network(t, x, observation)` as a function of `t` and `x`: what its method `given` returns,
    if it has one."""
    if callable(getattr(network, "given", None)):
        return network.given(observation)
    return lambda t, x: network(t, x, observation)


def given_within(wrapper: Any, observation: Observation) -> Callable[[Any, Any], Any]:
    """The same for a module around a `network`."""
    inner = given(wrapper.network, observation)
    once = eqx.tree_at(lambda w: w.network, wrapper, lambda t, x, observation: inner(t, x))
    return lambda t, x: once(t, x, observation)
