import math

import equinox as eqx
import jax
import jax.core
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Scalar, ScalarLike

from ..._checks import check_at_least, check_instance, check_positive_integer
from ..._custom_types import Critic
from ..._flows import AbstractPolicy
from .._executed_critic import check_critic
from ._selection import AbstractSelection


class Resample(AbstractSelection):
    r"""Draws `n` actions of a policy and keeps one of them with probability
    $p_i \propto \exp(Q_i / \beta)$, with the temperature at which the radius is spent.

    As `n` grows this becomes the best of all policies at their KL, $\pi \exp(Q / \beta)$, which
    is why it is gentler than [`fisher_flow.BestOf`][] for the same gain. The temperature $\beta$ is
    set at every observation such that

    $$\sum_i p_i \log(n p_i) = \epsilon .$$

    The KL from `policy` is at most this radius, for any `n` and any critic that is finite. The
    reason: the choice is a function of `n` independent actions and an index, which would be uniform
    without the critic. A function of them cannot differ by more nats than they do. Actions at which
    the critic is not finite are left out, which costs more; `certify` measures it.

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

        - `ValueError` if an argument is not of its kind, or the radius is too large for `n`.
        """
        check_instance("policy", policy, AbstractPolicy, "fisher_flow.refine(policy, critic)")
        check_critic(critic)
        check_positive_integer("n", n, 32)
        check_at_least("radius", radius, 0, 0.5)
        if not isinstance(radius, jax.core.Tracer) and not float(np.asarray(radius)) < math.log(n):
            raise ValueError(
                "`radius` must be below log(n), the most that a choice among n actions can spend, "
                f"but got {radius} with n={n}. Write `radius={0.5 * math.log(n):.2g}`, or a larger "
                "`n`."
            )
        self.policy = policy
        self.critic = critic
        self.radius = radius
        self.n = n

    def probabilities(self, values: Float[Array, " n"]) -> Float[Array, " n"]:
        finite = jnp.isfinite(values)
        # With no critic to go by, every action is as good as another.
        usable = finite | ~jnp.any(finite)
        # From the best down, so that no digits are lost to one that is very bad.
        below = jnp.where(finite, values - jnp.max(jnp.where(finite, values, -jnp.inf)), 0)
        count = jnp.maximum(jnp.sum(finite, dtype=values.dtype), 1)
        size = -jnp.sum(below) / count
        scaled = lax.stop_gradient(below / jnp.where(size > 0, size, 1))

        def tilted(log_inverse_temperature):
            logits = jnp.where(usable, jnp.exp(log_inverse_temperature) * scaled, -jnp.inf)
            return jax.nn.softmax(logits)

        def halve(_, ends):
            low, high = ends
            middle = 0.5 * (low + high)
            spent = self.kl(tilted(middle))
            within = spent < jnp.asarray(self.radius, spent.dtype)
            return jnp.where(within, middle, low), jnp.where(within, high, middle)

        # The lower end stays within the radius, and starts from a choice that is all but uniform.
        ends = jnp.asarray(-12.0, values.dtype), jnp.asarray(40.0, values.dtype)
        low, _ = lax.fori_loop(0, 50, halve, ends)
        return tilted(low)

    def kl(self, probabilities: Float[Array, " n"]) -> Scalar:
        return math.log(self.n) - jnp.sum(jax.scipy.special.entr(probabilities))

    @property
    def kl_bound(self) -> ScalarLike:
        """The radius: a bound on the KL from `policy`, in nats."""
        return self.radius
