import abc
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Scalar, ScalarLike

from .._checks import check_at_least, check_instance, check_positive_integer
from .._custom_types import Action
from .._flows import AbstractAffineGaussianPath


# `velocity(t, x)` and `critic(action)`, which returns the value and its gradient.
Velocity = Callable[[Scalar, Action], Action]
CriticAt = Callable[[Action], tuple[Scalar, Action]]


class AbstractPotential(eqx.Module):
    r"""Abstract base class for the approximations of the best steering of a flow by a critic.

    The best steering is $\Delta = b\, \nabla h^*$ with
    $h^*(t, x) = \log \mathbb E[\exp(k\, Q(x_1)) \mid x_t = x]$: its end is
    $\pi^* \propto p \exp(k Q)$ exactly. Here $v = a x + b\, \nabla \log p_t$ along the path, and
    $k$ is the strength, the inverse of a temperature.
    """

    @abc.abstractmethod
    def __call__(
        self,
        path: AbstractAffineGaussianPath,
        velocity: Velocity,
        critic: CriticAt,
        t: Scalar,
        x: Action,
        strength: Scalar,
    ) -> tuple[Action, Action]:
        r"""What is added to a velocity.

        **Arguments:**

        - `path`: the path along which the velocity was trained.
        - `velocity`: called as `velocity(t, x)`.
        - `critic`: called as `critic(action)`; returns a value and its gradient, both at the action
            that would be executed.
        - `t`: the time, in (0, 1).
        - `x`: the point.
        - `strength`: the strength $k$, positive.

        **Returns:**

        The velocity $v(t, x)$, and $\Delta(t, x)$.
        """


class TiltedAction(AbstractPotential):
    r"""Moves the projected action to the one that the best policy would have there.

    The flow heads for the posterior mean $\hat x_1(t, x) = \mathbb E[x_1 \mid x_t = x]$. The best
    steered flow heads for the mean of the same posterior tilted by $\exp(k Q(x_1))$. For a critic
    of slope $g$, the tilted posterior is

    $$p(x_1) \exp\Bigl(-\frac{\|x - \alpha x_1\|^2}{2 \sigma^2} + k\, g \cdot x_1\Bigr) \propto
        p\bigl(x_1 \bigm| x_t = x'\bigr), \qquad x' = x + \frac{\sigma^2}{\alpha}\, k\, g,$$

    that is the posterior of the *same* flow at another point. So the best steering for a linear
    critic is, exactly and for any density, however many modes it has,

    $$\Delta = \Bigl(\dot\alpha - \frac{\alpha \dot\sigma}{\sigma}\Bigr)
        \bigl(\hat x_1(t, x') - \hat x_1(t, x)\bigr)
        = v(t, x') - v(t, x) - \frac{\dot\sigma}{\sigma} (x' - x).$$

    Nothing is linearised in $x$: $\hat x_1(t, x')$ stays among the actions, where a step along the
    Jacobian overshoots between modes. If the critic is not linear, its slope is taken over the
    width of the posterior. The posterior has the covariance
    $C = (\sigma^2 / \alpha) \nabla \hat x_1$, and along $g$ its deviation is
    $u = C g / \sqrt{g^\top C g}$. The slope is the gradient at $\hat x_1$, corrected along $u$ such
    that it gives the difference of the values at $\hat x_1 \pm u$. If there are two modes of equal
    weight, these two points are the modes.

    It costs two velocities and a product with the Jacobian of one of them, and a gradient and two
    values of the critic.
    """

    sigma_points: bool = eqx.field(static=True)
    averaged: bool = eqx.field(static=True)
    reach: ScalarLike

    def __init__(self, sigma_points: bool = True, averaged: bool = False, reach: ScalarLike = 2.0):
        r"""**Arguments:**

        - `sigma_points`: whether the slope of the critic is taken over the width of the posterior.
            Otherwise it is the gradient at $\hat x_1$; that is cheaper, exact for linear critics
            too, and blind to what lies between far modes.
        - `averaged`: whether the mean of the gradients at $\hat x_1 \pm u$ takes the place of the
            gradient at $\hat x_1$. It costs two gradients more, and is better for critics that are
            rough.
        - `reach`: the farthest that $x'$ may lie from $x$, in root mean square over the entries
            and in units of $\sigma$. A learned velocity knows nothing beyond; from there on the
            difference is continued linearly.
        """
        check_at_least("reach", reach, 0, 2.0)
        self.sigma_points = bool(sigma_points)
        self.averaged = bool(averaged)
        self.reach = reach

    def __call__(
        self,
        path: AbstractAffineGaussianPath,
        velocity: Velocity,
        critic: CriticAt,
        t: Scalar,
        x: Action,
        strength: Scalar,
    ) -> tuple[Action, Action]:
        α, σ, α_dot, σ_dot = path.schedule(t)

        projected = _projection(path, velocity, t)
        if self.sigma_points:
            y, push, v = jax.linearize(projected, x, has_aux=True)
            _, g = critic(y)
            g = _sigma_slope(critic, y, g, σ**2 / α * push(g), self.averaged)
        else:
            y, v = projected(x)
            _, g = critic(y)
        shift = strength * (σ**2 / α) * g
        size = jnp.sqrt(jnp.mean(shift**2))
        reach = jnp.asarray(self.reach, x.dtype) * σ
        near = jnp.where(size > reach, reach / jnp.where(size > 0, size, 1), 1)
        there = x + near * shift
        difference = velocity(t, there) - v - σ_dot / σ * (near * shift)
        return v, difference / near


class ProjectedAction(AbstractPotential):
    r"""The critic at the projected action, $h = k\, Q(\hat x_1(t, x))$, so that

    $$\Delta = k\, b\, (\nabla \hat x_1)^\top \nabla Q(\hat x_1) .$$

    It costs a velocity, one product with the transpose of its Jacobian, and one gradient of the
    critic. Between far modes the Jacobian is large and the steering overshoots:
    [`fisher_flow.TiltedAction`][] does not, at about the same cost.

    ??? cite "Reference"

        As diffusion posterior sampling, due to

        ```bibtex
        @inproceedings{chung2023diffusion,
            title={Diffusion posterior sampling for general noisy inverse problems},
            author={Chung, Hyungjin and Kim, Jeongsol and Mccann, Michael T. and Klasky, Marc L.
                    and Ye, Jong Chul},
            booktitle={International Conference on Learning Representations},
            year={2023},
        }
        ```
    """

    jacobian: bool = eqx.field(static=True)

    def __init__(self, jacobian: bool = True):
        r"""**Arguments:**

        - `jacobian`: whether the Jacobian of $\hat x_1$ is computed from the flow. Otherwise it is
            taken to be $\alpha$, which needs no derivative of the velocity.
        """
        self.jacobian = bool(jacobian)

    def __call__(
        self,
        path: AbstractAffineGaussianPath,
        velocity: Velocity,
        critic: CriticAt,
        t: Scalar,
        x: Action,
        strength: Scalar,
    ) -> tuple[Action, Action]:
        projected = _projection(path, velocity, t)
        if self.jacobian:
            y, pull, v = jax.vjp(projected, x, has_aux=True)
            (slope,) = pull(critic(y)[1])
        else:
            y, v = projected(x)
            slope = path.alpha(t) * critic(y)[1]
        return v, strength * _diffusivity(path, t) * slope


class PosteriorMean(AbstractPotential):
    r"""The mean of $\exp(k Q)$ over a few Gaussian samples about the projected action,

    $$h = \log \frac1n \sum_i \exp\bigl(k\, Q(\hat x_1 + \rho z_i)\bigr), \qquad
        \rho = \frac{\sigma}{\sqrt{\alpha^2 + \sigma^2}},$$

    with the Jacobian of $\hat x_1$. The samples are the same everywhere, in pairs $\pm z_i$.

    ??? cite "Reference"

        In the manner of loss-guided diffusion,

        ```bibtex
        @inproceedings{song2023loss,
            title={Loss-guided diffusion models for plug-and-play controllable generation},
            author={Song, Jiaming and Zhang, Qinsheng and Yin, Hongxu and Mardani, Morteza
                    and Liu, Ming-Yu and Kautz, Jan and Chen, Yongxin and Vahdat, Arash},
            booktitle={International Conference on Machine Learning},
            year={2023},
        }
        ```
    """

    num_samples: int = eqx.field(static=True)

    def __init__(self, num_samples: int = 8):
        """**Arguments:**

        - `num_samples`: the number of samples, rounded up to an even one; each costs a gradient of
            the critic.
        """
        check_positive_integer("num_samples", num_samples, 8)
        self.num_samples = 2 * -(-num_samples // 2)

    def __call__(
        self,
        path: AbstractAffineGaussianPath,
        velocity: Velocity,
        critic: CriticAt,
        t: Scalar,
        x: Action,
        strength: Scalar,
    ) -> tuple[Action, Action]:
        projected = _projection(path, velocity, t)
        y, pull, v = jax.vjp(projected, x, has_aux=True)
        α, σ = path.alpha(t), path.sigma(t)
        z = jr.normal(jr.key(0), (self.num_samples // 2, *x.shape), x.dtype)
        z = jnp.concatenate([z, -z])
        values, gradients = jax.vmap(lambda z: critic(y + σ / jnp.sqrt(α**2 + σ**2) * z))(z)
        weights = jax.nn.softmax(strength * values)
        (slope,) = pull(jnp.tensordot(weights, gradients, axes=1))
        return v, strength * _diffusivity(path, t) * slope


class TimeWeighted(AbstractPotential):
    """Another potential with a strength that depends on time."""

    potential: AbstractPotential
    weight: Callable[[Scalar], Any]

    def __check_init__(self):
        example = "fisher_flow.TiltedAction()"
        check_instance("potential", self.potential, AbstractPotential, example)
        if not callable(self.weight):
            raise ValueError(
                f"`weight` must be a function of time, but got `{self.weight!r}`. Write "
                "`weight=lambda t: t`."
            )

    def __call__(
        self,
        path: AbstractAffineGaussianPath,
        velocity: Velocity,
        critic: CriticAt,
        t: Scalar,
        x: Action,
        strength: Scalar,
    ) -> tuple[Action, Action]:
        weight = jnp.asarray(self.weight(t), x.dtype)
        return self.potential(path, velocity, critic, t, x, weight * strength)


TimeWeighted.__init__.__doc__ = """**Arguments:**

- `potential`: the potential.
- `weight`: a function of time to a positive number, by which the strength is multiplied;
    for example `lambda t: t`.
"""


def _projection(path, velocity, t) -> Callable[[Action], tuple[Action, Action]]:
    """The posterior mean of the action as a function of the point, beside the velocity there."""
    α, σ, α_dot, σ_dot = path.schedule(t)

    def projected(x):
        v = velocity(t, x)
        return (σ * v - σ_dot * x) / (σ * α_dot - α * σ_dot), v

    return projected


def _diffusivity(path, t) -> Scalar:
    """The factor b of the score in the velocity."""
    α, σ, α_dot, σ_dot = path.schedule(t)
    return σ * (α_dot * σ - α * σ_dot) / α


def _sigma_slope(critic, y, g, spread, averaged) -> Action:
    """The slope of the critic over one deviation of the posterior to either side."""
    variance = jnp.vdot(g, spread)
    # The Jacobian of a learned velocity need not be positive: then the width is taken as zero.
    wide = variance > 0
    u: Any = jnp.where(wide, spread / jnp.sqrt(jnp.where(wide, variance, 1)), 0)
    (up, g_up), (down, g_down) = critic(y + u), critic(y - u)
    mean = 0.5 * (g_up + g_down) if averaged else g
    squared = jnp.sum(u**2)
    # Where the points are close, the difference of their values is rounding.
    ε = jnp.sqrt(jnp.finfo(y.dtype).eps)
    apart = squared > ε * (1 + jnp.sum(y**2))
    excess = (0.5 * (up - down) - jnp.vdot(mean, u)) / jnp.where(apart, squared, 1)
    return mean + jnp.where(apart, excess, 0) * u
