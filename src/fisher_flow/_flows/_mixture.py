import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Scalar

from .._custom_types import Observation
from ._path import AbstractAffineGaussianPath, LinearPath


class GaussianMixtureVelocity(eqx.Module):
    r"""The exact velocity whose flow carries noise to a mixture of Gaussians,

    $$p_1 = \sum_k w_k\, \mathcal N(\mu_k, \Sigma_k).$$

    It needs no training and ignores the observation. The density, the score and the Fisher matrix
    of its policy are known, so everything else can be checked against them.

    Along a path, component $k$ has mean $\alpha \mu_k$ and covariance
    $C_k = \alpha^2 \Sigma_k + \sigma^2 I$ at time $t$, and moves with velocity
    $\dot\alpha \mu_k + \tfrac12 \dot C_k C_k^{-1} (x - \alpha \mu_k)$; the marginal velocity is the
    mean over the components, weighted by their probabilities at $x$.
    """

    log_weights: Float[Array, " components"]
    means: Float[Array, "components action"]
    variances: Float[Array, "components action"]
    directions: Float[Array, "components action action"]
    path: AbstractAffineGaussianPath

    def __init__(
        self,
        means: Float[Array, "components action"],
        covariances: Float[Array, "components action action"],
        weights: Float[Array, " components"] | None = None,
        *,
        path: AbstractAffineGaussianPath = LinearPath(),
    ):
        """**Arguments:**

        - `means`: one row for each component.
        - `covariances`: one symmetric positive definite matrix for each component.
        - `weights`: positive numbers, rescaled to sum to one. Equal by default.
        - `path`: the path from noise. Give the policy the same one.

        **Raises:**

        - `ValueError` if the shapes do not match.
        """
        dtype = jnp.result_type(means, covariances, 1.0)
        means, covariances = jnp.asarray(means, dtype), jnp.asarray(covariances, dtype)
        if means.ndim != 2 or covariances.shape != (*means.shape, means.shape[-1]):
            raise ValueError(
                "`means` must have shape (components, action) and `covariances` shape "
                f"(components, action, action), but got {means.shape} and {covariances.shape}. "
                "For a single Gaussian write "
                "`GaussianMixtureVelocity(mean[None], covariance[None])`."
            )
        if weights is None:
            weights = jnp.ones(means.shape[0], dtype)
        weights = jnp.asarray(weights, dtype)
        if weights.shape != means.shape[:1]:
            raise ValueError(
                f"`weights` must have shape {means.shape[:1]}, one entry a component, but got "
                f"{weights.shape}. Write `weights=jnp.ones({means.shape[0]})`."
            )
        self.log_weights = jax.nn.log_softmax(jnp.log(weights))
        self.means = means
        # In the eigenbasis of Σ_k every C_k is diagonal, so a velocity costs no factorisation.
        self.variances, self.directions = jnp.linalg.eigh(covariances)
        self.path = path

    def __call__(
        self, t: Scalar, x: Float[Array, " action"], observation: Observation
    ) -> Float[Array, " action"]:
        """The velocity at time `t` and point `x`, with the shape of `x`."""
        del observation
        α, σ, α_dot, σ_dot = self.path.schedule(t)
        C = α**2 * self.variances + σ**2
        half_C_dot = α * α_dot * self.variances + σ * σ_dot
        residual = jnp.einsum("kji,kj->ki", self.directions, x[None] - α * self.means)
        log_p = self.log_weights - 0.5 * jnp.sum(residual**2 / C + jnp.log(C), axis=-1)
        drift = jnp.einsum("kij,kj->ki", self.directions, half_C_dot / C * residual)
        return jax.nn.softmax(log_p) @ (α_dot * self.means + drift)
