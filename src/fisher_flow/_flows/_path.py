import abc

import equinox as eqx
import jax
import jax.numpy as jnp
import optimistix as optx
from jax import lax
from jaxtyping import Array, Float, Scalar, ScalarLike

from .._checks import check_at_least


class AbstractAffineGaussianPath(eqx.Module):
    r"""Abstract base class for the paths from noise to data that flow matching can follow,

    $$x_t = \alpha(t)\, x_1 + \sigma(t)\, x_0, \qquad x_0 \sim \mathcal N(0, I).$$

    Time 0 is noise and time 1 is an action: $\alpha$ rises from 0 to 1 while $\sigma$ falls from
    1 to 0. A subclass writes `alpha` and `sigma`; their derivatives come from JAX.

    ??? example "Writing a path"

        ```python
        import fisher_flow
        import jax.numpy as jnp

        class CosinePath(fisher_flow.AbstractAffineGaussianPath):
            def alpha(self, t):
                return jnp.sin(jnp.pi / 2 * t)

            def sigma(self, t):
                return jnp.cos(jnp.pi / 2 * t)
        ```

    ??? cite "Reference"

        Affine Gaussian paths, and the relation of their score to their velocity, are described in

        ```bibtex
        @article{lipman2024flow,
            title={Flow matching guide and code},
            author={Lipman, Yaron and Havasi, Marton and Holderrieth, Peter and Shaul, Neta
                    and Le, Matt and Karrer, Brian and Chen, Ricky T. Q. and Lopez-Paz, David
                    and Ben-Hamu, Heli and Gat, Itai},
            journal={arXiv:2412.06264},
            year={2024},
        }
        ```
    """

    @abc.abstractmethod
    def alpha(self, t: Scalar) -> Scalar:
        r"""The scale $\alpha(t)$ of the data, with $\alpha(0) = 0$ and $\alpha(1) = 1$."""

    @abc.abstractmethod
    def sigma(self, t: Scalar) -> Scalar:
        r"""The scale $\sigma(t)$ of the noise, with $\sigma(0) = 1$ and $\sigma(1) = 0$."""

    def schedule(self, t: Scalar) -> tuple[Scalar, Scalar, Scalar, Scalar]:
        r"""Returns $\alpha$, $\sigma$ and their derivatives $\dot\alpha$, $\dot\sigma$ at `t`."""
        one = jnp.ones_like(t)
        α, α_dot = jax.jvp(self.alpha, (t,), (one,))
        σ, σ_dot = jax.jvp(self.sigma, (t,), (one,))
        return α, σ, α_dot, σ_dot

    def interpolate(
        self, t: ScalarLike, x0: Float[Array, "*action"], x1: Float[Array, "*action"]
    ) -> tuple[Float[Array, "*action"], Float[Array, "*action"]]:
        r"""The point $x_t$ between noise `x0` and data `x1`, and its velocity.

        **Arguments:**

        - `t`: the time, in [0, 1].
        - `x0`: a sample of the noise.
        - `x1`: a sample of the data.

        **Returns:**

        - The point $x_t = \alpha x_1 + \sigma x_0$.
        - The velocity $\dot x_t = \dot\alpha x_1 + \dot\sigma x_0$ of this one pair, which is the
            target of flow matching.
        """
        α, σ, α_dot, σ_dot = self.schedule(jnp.asarray(t, x1.dtype))
        return α * x1 + σ * x0, α_dot * x1 + σ_dot * x0

    def score(
        self, t: ScalarLike, x: Float[Array, "*action"], velocity: Float[Array, "*action"]
    ) -> Float[Array, "*action"]:
        r"""The score of the marginal density $p_t$, from its velocity,

        $$\nabla \log p_t(x)
            = \frac{\alpha\, v_t(x) - \dot\alpha\, x}{\sigma (\dot\alpha \sigma - \alpha \dot\sigma)}.$$

        **Arguments:**

        - `t`: the time, in (0, 1).
        - `x`: the point at which the velocity was evaluated.
        - `velocity`: the marginal velocity $v_t(x)$.

        **Returns:**

        The score, with the shape and dtype of `x`.
        """  # noqa: E501
        α, σ, α_dot, σ_dot = self.schedule(jnp.asarray(t, x.dtype))
        return (α * velocity - α_dot * x) / (σ * (α_dot * σ - α * σ_dot))

    def noise_ratio(self, t: ScalarLike) -> Scalar:
        r"""The standard deviation $r = \sigma / \alpha$ of the noise left in $x_t / \alpha$."""
        t = jnp.asarray(t)
        return self.sigma(t) / self.alpha(t)

    def time_at_noise_ratio(self, ratio: ScalarLike) -> Scalar:
        r"""The time at which $\sigma / \alpha$ equals `ratio`; inverse of `noise_ratio`.

        It is found by bisection. Override the method if there is a closed form. Where the path has
        no such ratio, as one that ends before its noise does, it is the time at the nearer end.
        """
        ratio = lax.stop_gradient(jnp.asarray(ratio))
        ε = float(jnp.finfo(ratio.dtype).eps)

        def excess(t, _):
            inside = self.sigma(t) - ratio * self.alpha(t)
            return jnp.where(t <= 0, 1, jnp.where(t >= 1, -1, inside))

        solution = optx.root_find(
            excess,
            optx.Bisection(rtol=2 * ε, atol=ε),
            jnp.full_like(ratio, 0.5),
            options=dict(lower=jnp.zeros_like(ratio), upper=jnp.ones_like(ratio)),
            max_steps=64,
            throw=False,
        )
        return solution.value


class LinearPath(AbstractAffineGaussianPath):
    r"""The straight path $x_t = t\, x_1 + (1 - t)\, x_0$ of rectified flows.

    Its score is $\nabla \log p_t(x) = (t\, v_t(x) - x) / (1 - t)$.

    ??? cite "Reference"

        ```bibtex
        @inproceedings{lipman2023flow,
            title={Flow matching for generative modeling},
            author={Lipman, Yaron and Chen, Ricky T. Q. and Ben-Hamu, Heli and Nickel, Maximilian
                    and Le, Matthew},
            booktitle={International Conference on Learning Representations},
            year={2023},
        }
        ```
    """

    def alpha(self, t: Scalar) -> Scalar:
        return t

    def sigma(self, t: Scalar) -> Scalar:
        return 1 - t

    def time_at_noise_ratio(self, ratio: ScalarLike) -> Scalar:
        return 1 / (1 + jnp.asarray(ratio))


LinearPath.__init__.__doc__ = """Takes no arguments."""


class CosinePath(AbstractAffineGaussianPath):
    r"""The circular path $x_t = \sin(\tfrac\pi2 t)\, x_1 + \cos(\tfrac\pi2 t)\, x_0$.

    ??? cite "Reference"

        ```bibtex
        @inproceedings{albergo2023building,
            title={Building normalizing flows with stochastic interpolants},
            author={Albergo, Michael S. and Vanden-Eijnden, Eric},
            booktitle={International Conference on Learning Representations},
            year={2023},
        }
        ```
    """

    def alpha(self, t: Scalar) -> Scalar:
        return jnp.sin(0.5 * jnp.pi * t)

    def sigma(self, t: Scalar) -> Scalar:
        # Not the cosine of t: near time 1 that would lose its digits.
        return jnp.sin(0.5 * jnp.pi * (1 - t))

    def time_at_noise_ratio(self, ratio: ScalarLike) -> Scalar:
        return 1 - 2 / jnp.pi * jnp.arctan(jnp.asarray(ratio))


CosinePath.__init__.__doc__ = """Takes no arguments."""


class VariancePreservingPath(AbstractAffineGaussianPath):
    r"""The path of variance-preserving diffusion models, $\alpha^2 + \sigma^2 = 1$ with

    $$\log \alpha(t) = -\tfrac14 s^2 (\beta_1 - \beta_0) - \tfrac12 s \beta_0, \qquad s = 1 - t.$$

    Time runs as everywhere in this library, with noise at 0; the diffusion time is $s$. At time 0 a
    trace of the data is left, $\alpha = 0.007$ by default. At time 1 the velocity is infinite, and
    its integral is finite: use a solver with steps of a fixed size that does not evaluate it there,
    such as Euler's. `log_prob` is slow.

    ??? cite "Reference"

        ```bibtex
        @inproceedings{song2021scorebased,
            title={Score-based generative modeling through stochastic differential equations},
            author={Song, Yang and Sohl-Dickstein, Jascha and Kingma, Diederik P.
                    and Kumar, Abhishek and Ermon, Stefano and Poole, Ben},
            booktitle={International Conference on Learning Representations},
            year={2021},
        }
        ```
    """

    beta_min: ScalarLike = 0.1
    beta_max: ScalarLike = 20.0

    def __check_init__(self):
        check_at_least("beta_min", self.beta_min, 0, 0.1)
        check_at_least("beta_max", self.beta_max, 0, 20.0)

    def _log_alpha(self, t: Scalar) -> Scalar:
        s = 1 - t
        low, high = (jnp.asarray(beta, t.dtype) for beta in (self.beta_min, self.beta_max))
        return -0.25 * s**2 * (high - low) - 0.5 * s * low

    def alpha(self, t: Scalar) -> Scalar:
        return jnp.exp(self._log_alpha(t))

    def sigma(self, t: Scalar) -> Scalar:
        # The floor keeps the derivative finite at time 1.
        return jnp.sqrt(jnp.maximum(-jnp.expm1(2 * self._log_alpha(t)), 1e-12))


VariancePreservingPath.__init__.__doc__ = r"""**Arguments:**

- `beta_min`, `beta_max`: the rates $\beta_0$ and $\beta_1$ at which noise is added.
"""
