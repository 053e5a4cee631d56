import math
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import PRNGKeyArray

from .._custom_types import Action, Critic, Observation
from .._misc import check_instance, check_positive_integer
from ..flows import AbstractPolicy
from ._method import critic_value


class BestOf(AbstractPolicy):
    r"""Draws `n` actions of a policy and keeps the best by the critic.

    A transport map moves actions locally and cannot carry them from one mode of the data to
    another; this can, and the two combine: `BestOf(refine(policy, critic), critic, 8)`.

    It spends a KL of at most $\log n - (n - 1) / n$ nats, whatever the critic: `kl_bound`.

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
        check_positive_integer("n", n, 8)
        self.policy = policy
        self.critic = critic
        self.n = n

    @property
    def action_shape(self) -> tuple[int, ...]:
        return self.policy.action_shape

    @property
    def bounds(self) -> tuple[Any, Any] | None:
        return self.policy.bounds

    @property
    def kl_bound(self) -> float:
        r"""The bound $\log n - (n - 1) / n$ on the KL from `policy`, in nats."""
        return math.log(self.n) - (self.n - 1) / self.n

    def draw(self, observation: Observation, *, key: PRNGKeyArray) -> Action:
        def draw_and_value(key):
            action = self.policy.draw(observation, key=key)
            return action, critic_value(self.policy, self.critic, observation, action)

        actions, values = jax.vmap(draw_and_value)(jr.split(key, self.n))
        best = jnp.argmax(jnp.where(jnp.isfinite(values), values, -jnp.inf))
        return actions[best]
