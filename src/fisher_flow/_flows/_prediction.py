"""Velocities from networks that were trained to predict something else, or in reversed time."""

import abc
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax.numpy as jnp
from equinox import AbstractVar
from jaxtyping import Scalar

from .._checks import check_instance
from .._custom_types import Action, Observation
from ._given import given_within
from ._path import AbstractAffineGaussianPath


Network = Callable[[Scalar, Any, Any], Any]


class ReversedVelocity(eqx.Module):
    r"""The velocity of a flow with noise at time 1 and actions at time 0, in this library's time.

    With $v'(t, x)$ the velocity that was trained, it is $v(t, x) = -v'(1 - t, x)$. Most robot
    policies are written in that direction.

    !!! example

        ```python
        import fisher_flow
        import jax.numpy as jnp
        def velocity(t, x, observation):  # trained on x = t noise + (1 - t) action
            return jnp.zeros_like(x)

        policy = fisher_flow.FlowPolicy(fisher_flow.ReversedVelocity(velocity), action_shape=(7,))
        ```
    """

    network: Network

    def __call__(self, t: Scalar, x: Action, observation: Observation) -> Action:
        """The velocity with noise at time 0, like `x`."""
        return -self.network(1 - t, x, observation)

    def given(self, observation: Observation) -> Callable[[Scalar, Action], Action]:
        """The same function at one observation. A network with a method `given` encodes it once."""
        return given_within(self, observation)


ReversedVelocity.__init__.__doc__ = """**Arguments:**

- `network`: called as `network(t, x, observation)` with noise at time 1.
"""


class ReversedTime(eqx.Module):
    """A network that was trained with noise at time 1, as a network with noise at time 0.

    It is the argument of [`fisher_flow.NoisePrediction`][] and of the other predictions.
    """

    network: Network

    def __call__(self, t: Scalar, x: Action, observation: Observation) -> Action:
        """The output of the network at time `1 - t`."""
        return self.network(1 - t, x, observation)

    def given(self, observation: Observation) -> Callable[[Scalar, Action], Action]:
        """The same function at one observation. A network with a method `given` encodes it once."""
        return given_within(self, observation)


ReversedTime.__init__.__doc__ = """**Arguments:**

- `network`: called as `network(t, x, observation)` with noise at time 1.
"""


class AbstractPrediction(eqx.Module):
    r"""Abstract base class for velocities of networks that predict the data or the noise in
    $x_t = \alpha x_1 + \sigma x_0$.

    With the means of both at a point, the velocity is $\dot\alpha x_1 + \dot\sigma x_0$. Wrap a
    network with noise at time 1 in [`fisher_flow.ReversedTime`][].
    """

    network: AbstractVar[Network]
    path: AbstractVar[AbstractAffineGaussianPath]

    def __check_init__(self):
        if not callable(self.network) or isinstance(self.network, type):
            raise ValueError(
                "`network` must be a function `network(t, x, observation)`, but got "
                f"`{self.network!r}`. Write `network=lambda t, x, observation: ...`."
            )
        check_instance("path", self.path, AbstractAffineGaussianPath, "fisher_flow.LinearPath()")

    @abc.abstractmethod
    def data_and_noise(
        self, t: Scalar, x: Action, observation: Observation
    ) -> tuple[Action, Action]:
        """The means of the data $x_1$ and of the noise $x_0$, given the point $x_t$."""

    def __call__(self, t: Scalar, x: Action, observation: Observation) -> Action:
        """The velocity at time `t` and point `x`, like `x`."""
        # At the ends one of the two is not in the point: 0 / 0.
        t = jnp.clip(t, 1e-3, 1 - 1e-3)
        data, noise = self.data_and_noise(t, x, observation)
        _, _, α_dot, σ_dot = self.path.schedule(t)
        return α_dot * data + σ_dot * noise

    def given(self, observation: Observation) -> Callable[[Scalar, Action], Action]:
        """The same function at one observation. A network with a method `given` encodes it once."""
        return given_within(self, observation)


class NoisePrediction(AbstractPrediction):
    r"""The velocity of a network that predicts the noise $x_0$, as most diffusion models do."""

    network: Network
    path: AbstractAffineGaussianPath

    def data_and_noise(
        self, t: Scalar, x: Action, observation: Observation
    ) -> tuple[Action, Action]:
        noise = self.network(t, x, observation)
        return (x - self.path.sigma(t) * noise) / self.path.alpha(t), noise


NoisePrediction.__init__.__doc__ = """**Arguments:**

- `network`: called as `network(t, x, observation)` with noise at time 0.
- `path`: the path along which the network was trained. Give the policy the same one.

**Raises:**

- `ValueError` if an argument is not of its kind.
"""


class ScorePrediction(AbstractPrediction):
    r"""The velocity of a network that predicts the score $\nabla \log p_t(x) = -x_0 / \sigma$."""

    network: Network
    path: AbstractAffineGaussianPath

    def data_and_noise(
        self, t: Scalar, x: Action, observation: Observation
    ) -> tuple[Action, Action]:
        noise = -self.path.sigma(t) * self.network(t, x, observation)
        return (x - self.path.sigma(t) * noise) / self.path.alpha(t), noise


ScorePrediction.__init__.__doc__ = """**Arguments:**

- `network`: called as `network(t, x, observation)` with noise at time 0.
- `path`: the path along which the network was trained. Give the policy the same one.

**Raises:**

- `ValueError` if an argument is not of its kind.
"""


class DataPrediction(AbstractPrediction):
    r"""The velocity of a network that predicts the data $x_1$, a denoiser."""

    network: Network
    path: AbstractAffineGaussianPath

    def data_and_noise(
        self, t: Scalar, x: Action, observation: Observation
    ) -> tuple[Action, Action]:
        data = self.network(t, x, observation)
        return data, (x - self.path.alpha(t) * data) / self.path.sigma(t)


DataPrediction.__init__.__doc__ = """**Arguments:**

- `network`: called as `network(t, x, observation)` with noise at time 0.
- `path`: the path along which the network was trained. Give the policy the same one.

**Raises:**

- `ValueError` if an argument is not of its kind.
"""


class VPrediction(AbstractPrediction):
    r"""The velocity of a network that predicts $\alpha x_0 - \sigma x_1$.

    ??? cite "Reference"

        ```bibtex
        @inproceedings{salimans2022progressive,
            title={Progressive distillation for fast sampling of diffusion models},
            author={Salimans, Tim and Ho, Jonathan},
            booktitle={International Conference on Learning Representations},
            year={2022},
        }
        ```
    """

    network: Network
    path: AbstractAffineGaussianPath

    def data_and_noise(
        self, t: Scalar, x: Action, observation: Observation
    ) -> tuple[Action, Action]:
        α, σ = self.path.alpha(t), self.path.sigma(t)
        v = self.network(t, x, observation)
        norm = α**2 + σ**2
        return (α * x - σ * v) / norm, (σ * x + α * v) / norm


VPrediction.__init__.__doc__ = """**Arguments:**

- `network`: called as `network(t, x, observation)` with noise at time 0.
- `path`: the path along which the network was trained. Give the policy the same one.

**Raises:**

- `ValueError` if an argument is not of its kind.
"""
