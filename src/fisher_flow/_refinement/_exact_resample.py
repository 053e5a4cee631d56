import math
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, Float, PRNGKeyArray, Scalar, ScalarLike

from .._checks import check_at_least, check_instance, check_positive_integer
from .._custom_types import Action, Critic, Observation
from .._flows import AbstractPolicy, TanhBounds
from ._executed_critic import check_critic, critic_value
from ._steering import SteeredPolicy


class ExactResample(AbstractPolicy):
    r"""Draws `n` actions of a steered policy and keeps one of them with probability

    $$p_i \propto \exp\bigl(k\, Q(a_i) - r_i\bigr), \qquad r_i = \log \frac{q}{p}(a_i),$$

    the weight that turns actions of the steered policy $q$ into actions of the best policy
    $\pi^* \propto p \exp(k Q)$ at the inverse temperature $k$. A choice by the critic alone prefers
    actions that the steering has moved too far; this weight takes that back. As `n` grows the
    result becomes $\pi^*$ itself, whatever the steering.

    The KL from the policy underneath is at most

    $$\mathbb E\Bigl[\sum_i p_i \bigl(\log(n\, p_i) + r_i\bigr)\Bigr],$$

    since the choice is a function of the $n$ actions and an index. The difference between them and
    $n$ actions of $q$ with a uniform index is $\log(n p_i)$ nats.
    """

    policy: SteeredPolicy
    critic: Critic
    n: int = eqx.field(static=True)
    inverse_temperature: ScalarLike | None

    def __init__(
        self,
        policy: SteeredPolicy,
        critic: Critic,
        n: int = 4,
        inverse_temperature: ScalarLike | None = None,
    ):
        """**Arguments:**

        - `policy`: the steered policy.
        - `critic`: called as `critic(observation, action)`; returns a scalar. An action at which
            it is not finite is never preferred.
        - `n`: the number of actions to choose from.
        - `inverse_temperature`: the factor $k$. By default it is the strength of the steering. It
            must be given for a guidance without a critic.

        **Raises:**

        - `ValueError` if an argument is not of its kind.
        """
        check_instance("policy", policy, SteeredPolicy, "refine(policy, critic, Steering())")
        check_critic(critic)
        check_positive_integer("n", n, 4)
        if inverse_temperature is None and policy.critic is None:
            raise ValueError(
                "`inverse_temperature` must be given for a policy that is not steered by a critic. "
                "Write `inverse_temperature=1.0`."
            )
        if inverse_temperature is not None:
            check_at_least("inverse_temperature", inverse_temperature, 0, 1.0)
        self.policy = policy
        self.critic = critic
        self.n = n
        self.inverse_temperature = inverse_temperature

    @property
    def action_shape(self) -> tuple[int, ...]:
        return self.policy.action_shape

    @property
    def bounds(self) -> tuple[Any, Any] | TanhBounds | None:
        return self.policy.bounds

    def log_weights(
        self,
        observation: Observation,
        values: Float[Array, " n"],
        log_ratios: Float[Array, " n"],
    ) -> Float[Array, " n"]:
        """The logarithms of the weights, up to a constant.

        **Arguments:**

        - `observation`: one observation, any PyTree of arrays.
        - `values`: the values of the critic.
        - `log_ratios`: the log-ratios of the actions.

        **Returns:**

        One number for each action. It is minus infinity where the value or the log-ratio is not
        finite. If that is so everywhere, all of them are zero.
        """
        k = self.inverse_temperature
        k = self.policy.velocity_field.strength_at(observation) if k is None else k
        log_w = jnp.asarray(k, values.dtype) * values - log_ratios
        usable = jnp.isfinite(log_w)
        return jnp.where(usable, log_w, jnp.where(jnp.any(usable), -jnp.inf, 0))

    def draw_and_kl(self, observation: Observation, *, key: PRNGKeyArray) -> tuple[Action, Scalar]:
        """Draws an action before its bounds, and tells what this choice adds to the bound on the
        KL.

        **Arguments:**

        - `observation`: one observation, any PyTree of arrays.
        - `key`: a `jax.random.key`.

        **Returns:**

        - The action.
        - A number of nats, whose mean is a bound on the KL from the policy underneath.
        """

        choice_key, key = jr.split(key)
        actions, values, r = self._candidates(observation, jr.split(key, self.n))
        log_p = jax.nn.log_softmax(self.log_weights(observation, values, r))
        p = jnp.exp(log_p)
        spent = jnp.where(p > 0, p * (math.log(self.n) + log_p + r), 0)
        return actions[jr.categorical(choice_key, log_p)], jnp.sum(spent)

    def draw(self, observation: Observation, *, key: PRNGKeyArray) -> Action:
        return self.draw_and_kl(observation, key=key)[0]

    @eqx.filter_jit
    def effective_share(
        self, observation: Observation, *, num_actions: int = 256, key: PRNGKeyArray
    ) -> Scalar:
        r"""How near the steered policy is to the best policy at this temperature: the effective
        share of a sample of actions, $(\sum_i w_i)^2 / (m \sum_i w_i^2)$.

        It is 1 if the steering is the best one, and $1 / (1 + \chi^2(\pi^* \,\|\, q))$ in the limit
        of many actions. It is a certificate of optimality: it does not refer to another method.

        **Arguments:**

        - `observation`: one observation, any PyTree of arrays.
        - `num_actions`: the number $m$ of actions to draw.
        - `key`: a `jax.random.key`.

        **Returns:**

        A number from $1 / m$ to 1.
        """
        _, values, r = self._candidates(observation, jr.split(key, num_actions))
        log_w = self.log_weights(observation, values, r)
        logsumexp = jax.scipy.special.logsumexp
        return jnp.exp(2 * logsumexp(log_w) - logsumexp(2 * log_w)) / num_actions

    def _candidates(self, observation, keys):
        def one(key):
            action, r = self.policy.draw_and_log_ratio(observation, key=key)
            value = critic_value(self.policy, self.critic, observation, action)
            return action, value.astype(r.dtype), r

        return jax.vmap(one)(keys)
