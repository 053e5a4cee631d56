from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import lineax as lx
from jaxtyping import PRNGKeyArray, Scalar, ScalarLike

from ..._checks import check_at_least, check_instance, check_positive_integer
from ..._custom_types import Action, Observation
from .._score import AbstractScore, PerturbedScore
from ._cost import AbstractMetric, quadratic_form


class AveragedFisher(AbstractMetric):
    r"""The Fisher information of a state, averaged over samples of the policy there,

    $$G = \frac{F}{\operatorname{tr} F}, \qquad
        F = \frac 1 K \sum_{k=1}^K s(a_k) s(a_k)^\top + \lambda I, \qquad a_k \sim \pi(\cdot \mid o).$$

    It is the same at every action of a state, and costs $K$ samples of the flow. The released code
    of the Fisher Decorator paper regularises in this way (with another estimate of the score).
    """  # noqa: E501

    score: AbstractScore
    num_samples: int = eqx.field(static=True)
    damping: ScalarLike
    normalise: bool = eqx.field(static=True)

    def __init__(
        self,
        score: AbstractScore = PerturbedScore(),
        num_samples: int = 8,
        damping: ScalarLike = 1e-3,
        normalise: bool = True,
    ):
        r"""**Arguments:**

        - `score`: the estimate of the score.
        - `num_samples`: the number $K$ of actions drawn at a state.
        - `damping`: the multiple $\lambda$ of the identity that is added.
        - `normalise`: whether to divide by the trace. The cost is in nats only without.
        """
        check_instance("score", score, AbstractScore, "fisher_flow.PerturbedScore()")
        check_positive_integer("num_samples", num_samples, 8)
        check_at_least("damping", damping, 0, 1e-3)
        self.score = score
        self.num_samples = num_samples
        self.damping = damping
        self.normalise = normalise

    def operator(
        self, policy: Any, observation: Observation, action: Action, *, key: PRNGKeyArray
    ) -> lx.AbstractLinearOperator:
        def score_of_sample(key):
            sample = policy.draw(observation, key=key)
            return self.score(policy, observation, sample).reshape(-1)

        s = jax.vmap(score_of_sample)(jr.split(key, self.num_samples))
        F = s.T @ s / self.num_samples
        F = F + jnp.asarray(self.damping, F.dtype) * jnp.eye(action.size, dtype=F.dtype)
        if self.normalise:
            F = F / jnp.trace(F)
        return lx.MatrixLinearOperator(F.astype(action.dtype), lx.positive_semidefinite_tag)

    def cost(
        self,
        policy: Any,
        observation: Observation,
        action: Action,
        displacement: Callable[[Action], Action],
        *,
        key: PRNGKeyArray,
    ) -> Scalar:
        operator = self.operator(policy, observation, action, key=key)
        return quadratic_form(operator, displacement(action))
