from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import lineax as lx
from jaxtyping import PRNGKeyArray, ScalarLike

from ..._checks import check_at_least, check_instance, check_positive_integer
from ..._custom_types import Action, Observation
from .._score import AbstractScore, PerturbedScore
from ._cost import AbstractMetric


class AveragedFisher(AbstractMetric):
    r"""The Fisher information of a state, averaged over samples of the policy there,

    $$G = \frac{F}{\operatorname{tr} F}, \qquad
        F = \frac 1 K \sum_{k=1}^K s(a_k) s(a_k)^\top + \lambda I, \qquad a_k \sim \pi(\cdot \mid o).$$

    It is the same at every action of a state, and costs $K$ samples of the flow. The released code
    of the Fisher Decorator paper regularises in this way (with another estimate of the score).
    """  # noqa: E501

    score: AbstractScore = PerturbedScore()
    num_samples: int = eqx.field(static=True, default=8)
    damping: ScalarLike = 1e-3
    normalise: bool = eqx.field(static=True, default=True)

    def __check_init__(self):
        check_instance("score", self.score, AbstractScore, "fisher_flow.PerturbedScore()")
        check_positive_integer("num_samples", self.num_samples, 8)
        check_at_least("damping", self.damping, 0, 1e-3)

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


AveragedFisher.__init__.__doc__ = r"""**Arguments:**

- `score`: the estimate of the score.
- `num_samples`: the number $K$ of actions drawn at a state.
- `damping`: the multiple $\lambda$ of the identity that is added.
- `normalise`: whether to divide by the trace. The cost is in nats only without.
"""
