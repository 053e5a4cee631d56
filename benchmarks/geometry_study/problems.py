"""Problems in which everything is known: Gaussian mixtures, critics that are formulas, and π*."""

import math
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import scipy.optimize
import scipy.stats
from jaxtyping import Array, Float, PRNGKeyArray, Scalar

import fisher_flow as ff


class Mixture(eqx.Module):
    """Three Gaussians, each rotated and stretched at random; equally likely.

    `distance` is the root mean square distance between two of their means; their deviations along
    their axes lie between `narrowest` and 1.
    """

    means: Float[Array, "3 d"]
    deviations: Float[Array, "3 d"]
    rotations: Float[Array, "3 d d"]

    def __init__(
        self,
        dimension: int,
        distance: float = 3.0,
        narrowest: float = 0.15,
        *,
        key: PRNGKeyArray,
    ):
        mean_key, deviation_key, rotation_key = jr.split(key, 3)
        self.means = distance / math.sqrt(2 * dimension) * jr.normal(mean_key, (3, dimension))
        low, high = math.log(narrowest), 0.0
        self.deviations = jnp.exp(jr.uniform(deviation_key, (3, dimension), None, low, high))
        self.rotations = jr.orthogonal(rotation_key, dimension, (3,))

    def velocity(self) -> ff.GaussianMixtureVelocity:
        factors = self.rotations * self.deviations[:, None]
        return ff.GaussianMixtureVelocity(self.means, factors @ factors.mT)

    def policy(self, **options: Any) -> ff.FlowPolicy:
        return ff.FlowPolicy(self.velocity(), self.means.shape[1:], **options)

    def sample(self, num: int, *, key: PRNGKeyArray) -> Float[Array, "num d"]:
        component_key, noise_key = jr.split(key)
        k = jr.randint(component_key, (num,), 0, 3)
        noise = self.deviations[k] * jr.normal(noise_key, (num, self.means.shape[1]))
        return self.means[k] + jnp.einsum("nij,nj->ni", self.rotations[k], noise)

    def log_prob(self, a: Float[Array, " d"]) -> Scalar:
        z = jnp.einsum("kji,kj->ki", self.rotations, a - self.means) / self.deviations
        exponents = -0.5 * jnp.sum(z**2, axis=1) - jnp.sum(jnp.log(self.deviations), axis=1)
        log_normaliser = 0.5 * a.size * math.log(2 * math.pi) + math.log(3)
        return jax.scipy.special.logsumexp(exponents) - log_normaliser


class Critic(eqx.Module):
    """A linear slope under waves in random directions: smooth, with many local maxima."""

    slope: Float[Array, " d"]
    frequencies: Float[Array, "waves d"]
    phases: Float[Array, " waves"]

    def __init__(self, dimension: int, frequency: float = 0.45, *, key: PRNGKeyArray):
        slope_key, frequency_key, phase_key = jr.split(key, 3)
        self.slope = jr.normal(slope_key, (dimension,)) / math.sqrt(dimension)
        self.frequencies = frequency * jr.normal(frequency_key, (8, dimension))
        self.phases = jr.uniform(phase_key, (8,), maxval=2 * math.pi)

    def __call__(self, observation: Any, action: Float[Array, " d"]) -> Scalar:
        waves = jnp.sin(self.frequencies @ action + self.phases)
        return self.slope @ action + jnp.sum(waves) / math.sqrt(waves.size)


@eqx.filter_jit
def true_terms(
    refined: ff.RefinedPolicy, mixture: Mixture, critic: Critic, actions: Float[Array, "num d"]
):
    """Of all the transport maps together, at every exact sample: log π'/p where it arrives, the
    Stein residual, the critic's value after and before, and whether the maps fold.

    KL(T#p || p) = E[log p(a) - log|det DT(a)| - log p(T(a))], with the density of the mixture. The
    mean of the Stein residual is zero: added to the first, it takes away most of the noise.
    """
    o = jnp.zeros(1)

    def terms(a):
        moved, push = jax.linearize(lambda a: refined.from_flow(o, a), a)
        J = jax.vmap(push, out_axes=1)(jnp.eye(a.size))
        sign, log_det = jnp.linalg.slogdet(J)
        log_p, s = jax.value_and_grad(mixture.log_prob)(a)
        log_ratio = log_p - log_det - mixture.log_prob(moved)
        stein = jnp.dot(s, moved - a) + jnp.trace(J) - a.size
        return log_ratio, stein, critic(o, moved), critic(o, a), sign <= 0

    return jax.lax.map(terms, actions, batch_size=256)


def tilted(q: Float[np.ndarray, " num"], log_inverse_beta: float) -> tuple[float, float]:
    """The KL and the gain in E[Q] of p exp(Q / β), from the values of Q at samples of p.

    By self-normalised importance weights.
    """
    tilt = math.exp(log_inverse_beta) * (q - q.max())
    weights = np.exp(tilt)
    log_mean = math.log(weights.mean())
    weights /= weights.sum()
    return float(weights @ tilt) - log_mean, float(weights @ q - q.mean())


def best_gain(q: Float[np.ndarray, " num"], kl: float) -> float:
    """The gain in E[Q] of π* = p exp(Q / β), the best of all policies at this KL from p."""
    if kl <= 0:
        return math.nan
    root: Any = scipy.optimize.bisect(lambda x: tilted(q, x)[0] - kl, -14.0, 6.0, xtol=1e-6)
    return tilted(q, root)[1]


def mean_and_interval(values: Any) -> tuple[float, float]:
    """The mean, and the half-width of its 95% t-interval."""
    n = len(values)
    width = scipy.stats.t.ppf(0.975, n - 1) * scipy.stats.sem(values) if n > 1 else math.nan
    return float(np.mean(values)), float(width)


def claim(text: str, value: Any, holds: Any) -> dict[str, Any]:
    return dict(claim=text, value=float(value), holds=bool(holds))
