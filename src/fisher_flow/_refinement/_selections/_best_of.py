import math

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Scalar

from ..._checks import check_instance, check_positive_integer
from ..._custom_types import Critic
from ..._flows import AbstractPolicy
from .._executed_critic import check_critic
from ._selection import AbstractSelection


class BestOf(AbstractSelection):
    r"""Draws `n` actions of a policy and keeps the best by the critic.

    It spends a KL of at most $\log n - (n - 1) / n$ nats, whatever the critic.

    ??? cite "Reference"

        The bound is proved in

        ```bibtex
        @article{beirami2024theoretical,
            title={Theoretical guarantees on the best-of-n alignment policy},
            author={Beirami, Ahmad and Agarwal, Alekh and Berant, Jonathan and D'Amour, Alexander
                    and Eisenstein, Jacob and Nagpal, Chirag and Suresh, Ananda Theertha},
            journal={arXiv:2401.01879},
            year={2024},
        }
        ```
    """

    policy: AbstractPolicy
    critic: Critic
    n: int = eqx.field(static=True)

    def __init__(self, policy: AbstractPolicy, critic: Critic, n: int = 8):
        """**Arguments:**

        - `policy`: any policy.
        - `critic`: called as `critic(observation, action)`; returns a scalar. An action at which
            it is not finite is never preferred.
        - `n`: the number of actions to choose from.

        **Raises:**

        - `ValueError` if `policy` is not a policy or `n` is not a positive integer.
        """
        check_instance("policy", policy, AbstractPolicy, "fisher_flow.refine(policy, critic)")
        check_critic(critic)
        check_positive_integer("n", n, 8)
        self.policy = policy
        self.critic = critic
        self.n = n

    def probabilities(self, values: Float[Array, " n"]) -> Float[Array, " n"]:
        best = jnp.argmax(jnp.where(jnp.isfinite(values), values, -jnp.inf))
        return jax.nn.one_hot(best, self.n, dtype=values.dtype)

    def kl(self, probabilities: Float[Array, " n"]) -> Scalar:
        return jnp.asarray(self.kl_bound, probabilities.dtype)

    @property
    def kl_bound(self) -> float:
        r"""The bound $\log n - (n - 1) / n$ on the KL from `policy`, in nats."""
        return math.log(self.n) - (self.n - 1) / self.n
