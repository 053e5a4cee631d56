from collections.abc import Callable, Sequence
from typing import Any

import equinox as eqx
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import PRNGKeyArray

from .._checks import checked_shape
from .._custom_types import Action, Observation
from ._bounds import checked_bounds, TanhBounds
from ._foreign import check_inference
from ._policy import AbstractPolicy, sample_dtype


class OneStepPolicy(AbstractPolicy):
    r"""A policy that maps noise to an action in one evaluation of a network,
    $a = \mu(o, z)$ with $z \sim \mathcal N(0, I)$.

    It is the fastest policy to act with. It has samples and no density, so refine first and distill
    last: [`fisher_flow.distill`][] makes a one-step policy from any flow policy.
    [`fisher_flow.FlowQLearning`][] trains one.
    """

    network: Callable[[Any, Any], Any]
    action_shape: tuple[int, ...] = eqx.field(static=True)
    bounds: tuple[Any, Any] | TanhBounds | None = eqx.field(static=True)
    dtype: Any = eqx.field(static=True)

    def __init__(
        self,
        network: Callable[[Any, Any], Any],
        action_shape: Sequence[int],
        *,
        bounds: Any = None,
        dtype: Any = None,
    ):
        """**Arguments:**

        - `network`: called as `network(observation, noise)` for one sample; returns an action. Any
            callable.
        - `action_shape`: the shape of one action, and of the noise.

        **Other arguments:**

        - `bounds`: as for [`fisher_flow.FlowPolicy`][].
        - `dtype`: the dtype of the noise. By default the dtype of the arrays in `network`, else of
            the observation, else the default of JAX.

        **Raises:**

        - `ValueError` if an argument is not of its kind.
        """
        if not callable(network) or isinstance(network, type):
            raise ValueError(
                "`network` must be a function `network(observation, noise)`, but got "
                f"`{network!r}`. Write `OneStepPolicy(lambda observation, noise: ..., "
                "action_shape)`."
            )
        check_inference("network", network)
        self.network = network
        self.action_shape = checked_shape(action_shape)
        self.bounds = checked_bounds(bounds, self.action_shape)
        self.dtype = None if dtype is None else jnp.dtype(dtype)

    def __call__(self, observation: Observation, noise: Action) -> Action:
        r"""The action $\mu(o, z)$, not yet held to the bounds.

        **Arguments:**

        - `observation`: one observation, any PyTree of arrays.
        - `noise`: $z$, of the shape of an action.

        **Raises:**

        - `ValueError` if the network returns anything but an array of the shape of an action.
        """
        action = self.network(observation, noise)
        if jnp.shape(action) != self.action_shape:
            raise ValueError(
                "`network(observation, noise)` must return an action of shape "
                f"{self.action_shape}, but returned shape {jnp.shape(action)}. Both are for one "
                f"sample. Write `OneStepPolicy(network, action_shape={jnp.shape(action)})` if that "
                "is the shape of an action."
            )
        return jnp.asarray(action, noise.dtype)

    def draw(self, observation: Observation, *, key: PRNGKeyArray) -> Action:
        dtype = sample_dtype(self.dtype, self.network, observation)
        return self(observation, jr.normal(key, self.action_shape, dtype))
