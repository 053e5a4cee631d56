"""Networks written in other styles and frameworks."""

import sys
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Scalar

from .._custom_types import Action, Observation


class BatchedVelocity(eqx.Module):
    """The velocity of a network that takes batches only, for one sample.

    The network sees a batch of one sample. Under `jax.vmap` these batches become one batch again,
    so it is as fast as before. Layers that mix the samples of a batch, such as batch normalisation,
    must be in inference mode.

    !!! example

        ```python
        import fisher_flow
        import jax.numpy as jnp

        def network(t, x, observation):  # of shapes (batch,), (batch, 7) and (batch, 3)
            return jnp.concatenate([x[:, :4] * t[:, None], observation], axis=-1)

        velocity = fisher_flow.BatchedVelocity(network)
        policy = fisher_flow.FlowPolicy(velocity, action_shape=(7,))
        ```
    """

    network: Callable[[Any, Any, Any], Any]

    def __call__(self, t: Scalar, x: Action, observation: Observation) -> Action:
        """The velocity of one sample, like `x`."""
        t, x, observation = jax.tree.map(lambda leaf: jnp.asarray(leaf)[None], (t, x, observation))
        v = self.network(t, x, observation)
        if jnp.shape(v) != x.shape:
            raise ValueError(
                f"`network(t, x, observation)` must return a batch like `x`, of shape {x.shape}, "
                f"but returned shape {jnp.shape(v)}. For a network of one sample write "
                "`FlowPolicy(network, action_shape)`, without `BatchedVelocity`."
            )
        return v[0]


BatchedVelocity.__init__.__doc__ = """**Arguments:**

- `network`: called as `network(t, x, observation)`, with a leading axis of length 1 on every array:
    `t` has shape `(1,)`.
"""


def check_inference(name: str, network: Any) -> None:
    """Refuses networks of Equinox and Flax NNX that would draw random masks or update statistics.

    Looks at a framework only if its user has imported it.
    """
    nnx = sys.modules.get("flax.nnx")
    layers = (eqx.nn.Dropout, eqx.nn.BatchNorm)
    kinds = layers if nnx is None else (*layers, nnx.Module)
    policy = "OneStepPolicy" if name == "network" else "FlowPolicy"
    hint = f"{policy}(eqx.nn.inference_mode({name}), action_shape)"
    training = []
    for x in jax.tree.leaves(network, is_leaf=lambda x: isinstance(x, kinds)):
        if isinstance(x, layers):
            # A dropout of rate zero, as in layers of attention, does nothing.
            if x.inference is False and not (isinstance(x, eqx.nn.Dropout) and x.p == 0):
                training.append(x)
        elif nnx is not None and isinstance(x, nnx.Module):
            for _, layer in nnx.iter_graph(x):  # Flax 0.12.0 has no `iter_modules`
                drops = isinstance(layer, nnx.Dropout) and layer.rate > 0
                if (drops and not layer.deterministic) or (
                    isinstance(layer, nnx.BatchNorm) and not layer.use_running_average
                ):
                    hint = f"model.eval()` first, then `{policy}(model, action_shape)"
                    training.append(layer)
    if len(training) > 0:
        raise ValueError(
            f"`{name}` has a `{type(training[0]).__name__}` layer in training mode. A flow is a "
            "function of its arguments alone, so its network must be in inference mode. Write "
            f"`{hint}`."
        )
