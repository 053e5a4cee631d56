from typing import Any

import equinox as eqx
import jax.numpy as jnp
import lineax as lx
from jaxtyping import PRNGKeyArray

from ..._checks import check_instance
from ..._custom_types import Action, Observation
from .._score import AbstractScore, PerturbedScore
from ._cost import AbstractMetric


class ScoreOuterProduct(AbstractMetric):
    r"""The Fisher Decorator paper's metric, the outer product of the score with itself,

    $$G(a) = \frac{s(a) s(a)^\top}{\|s(a)\|^2}, \qquad s(a) = \nabla_a \log \pi(a \mid o).$$

    Its mean over the actions is the Fisher information, but at each action it has rank one, and
    every direction orthogonal to the score is free. For the published method use it with
    `score=PaperScore(time=0.8)`.

    ??? cite "Reference"

        Section 4 of

        ```bibtex
        @article{cheng2026fisher,
            title={Fisher Decorator: Refining flow policy via a local transport map},
            author={Cheng and Wang and Yuan and Wang and Chen and Zeng and Sun},
            journal={arXiv:2604.17919},
            year={2026},
        }
        ```
    """

    score: AbstractScore = PerturbedScore()
    normalise: bool = eqx.field(static=True, default=True)

    def __check_init__(self):
        check_instance("score", self.score, AbstractScore, "fisher_flow.PerturbedScore()")

    def operator(
        self, policy: Any, observation: Observation, action: Action, *, key: PRNGKeyArray
    ) -> lx.AbstractLinearOperator:
        del key
        s = self._direction(policy, observation, action).reshape(-1)
        return lx.MatrixLinearOperator(jnp.outer(s, s), lx.positive_semidefinite_tag)

    def _direction(self, policy, observation, action):
        s = self.score(policy, observation, action)
        if self.normalise:
            norm2 = jnp.sum(s**2)
            # Where the score vanishes so does the metric; the inner `where` keeps its gradient.
            s = jnp.where(norm2 > 0, s / jnp.sqrt(jnp.where(norm2 > 0, norm2, 1)), 0)
        return s


ScoreOuterProduct.__init__.__doc__ = """**Arguments:**

- `score`: the estimate of the score.
- `normalise`: whether to divide by the trace, as the paper does for numerical stability.
    The cost is in nats only without.
"""
