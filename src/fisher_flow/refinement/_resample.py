import math

import equinox as eqx
import jax
import jax.core
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Scalar, ScalarLike

from .._custom_types import Critic
from .._misc import check_at_least, check_instance, check_positive_integer
from ..flows import AbstractPolicy
from ._selection import AbstractSelection


class Resample(AbstractSelection):
    r"""Draws `n` actions of a policy and keeps one of them with probability
    $p_i \propto \exp(Q_i / \beta)$, with the temperature at which the radius is spent.

    As `n` grows this becomes the best of all policies at their KL, $\pi \exp(Q / \beta)$, which
    is why it is gentler than [`fisher_flow.BestOf`][] for the same gain. The temperature $\beta$ is
    set at every observation such that

    $$\sum_i p_i \log(n p_i) = \epsilon .$$

    The KL from `policy` is at most this radius $\epsilon$, for any `n` and any critic. For the
    choice is a function of `n` independent actions and an index, which would be uniform without the
    critic, and what a function of them loses cannot be more than what they have.

    Multiplying the critic by a positive constant, or adding one, changes nothing.
    """

    policy: AbstractPolicy
    critic: Critic
    radius: ScalarLike
    n: int = eqx.field(static=True)

    def __init__(
        self, policy: AbstractPolicy, critic: Critic, radius: ScalarLike = 0.5, n: int = 32
    ):
        """**Arguments:**

        - `policy`: any policy.
        - `critic`: called as `critic(observation, action)`; returns a scalar. An action at which
            it is not finite is never preferred.
        - `radius`: the KL to spend at every observation, in nats; less than `log(n)`.
        - `n`: the number of actions to choose from. The fewer, the more of the radius is wasted.

        **Raises:**

        - `ValueError` if an argument is not of its kind, or `n` is too small for the radius.
        """
        check_instance("policy", policy, AbstractPolicy, "fisher_flow.refine(policy, critic)")
        check_positive_integer("n", n, 32)
        check_at_least("radius", radius, 0, 0.5)
        known = not isinstance(radius, jax.core.Tracer)
        if known and (needed := math.exp(float(np.asarray(radius)))) >= n:
            raise ValueError(
                "`n` must be above exp(radius), since a choice among n actions spends less than "
                f"log(n) nats, but got n={n} with radius={radius}. Write "
                f"`n={2 * math.ceil(needed)}`."
            )
        self.policy = policy
        self.critic = critic
        self.radius = radius
        self.n = n

    def probabilities(self, values: Float[Array, " n"]) -> Float[Array, " n"]:
        finite = jnp.isfinite(values)
        count = jnp.maximum(jnp.sum(finite, dtype=values.dtype), 1)
        mean = jnp.sum(jnp.where(finite, values, 0)) / count
        centred = jnp.where(finite, values - mean, 0)
        deviation = jnp.sqrt(jnp.sum(centred**2) / count)
        # With no critic to go by, every action is as good as another.
        usable = finite | ~jnp.any(finite)
        scaled = lax.stop_gradient(centred / jnp.where(deviation > 0, deviation, 1))

        def tilted(log_inverse_temperature):
            logits = jnp.where(usable, jnp.exp(log_inverse_temperature) * scaled, -jnp.inf)
            return jax.nn.softmax(logits)

        def halve(_, ends):
            low, high = ends
            middle = 0.5 * (low + high)
            spent = self.kl(tilted(middle))
            below = spent < jnp.asarray(self.radius, spent.dtype)
            return jnp.where(below, middle, low), jnp.where(below, high, middle)

        # The lower end stays within the radius, and starts from a choice that is all but uniform.
        ends = jnp.asarray(-12.0, values.dtype), jnp.asarray(8.0, values.dtype)
        low, _ = lax.fori_loop(0, 40, halve, ends)
        return tilted(low)

    def kl(self, probabilities: Float[Array, " n"]) -> Scalar:
        return math.log(self.n) - jnp.sum(jax.scipy.special.entr(probabilities))

    @property
    def kl_bound(self) -> ScalarLike:
        """The radius: a bound on the KL from `policy`, in nats."""
        return self.radius
