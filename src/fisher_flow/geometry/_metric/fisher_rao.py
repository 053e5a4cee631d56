from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import lineax as lx
from jaxtyping import PRNGKeyArray, Scalar

from ..._custom_types import Action, Observation
from ..._divergence import rademacher_probes, value_and_divergence
from ..._misc import check_instance, check_positive_integer
from .._krylov import dense_limit
from .._score import AbstractScore, PerturbedScore
from .base import AbstractMetric


class FisherRao(AbstractMetric):
    r"""The Fisher-Rao length of the change of density that a field of displacements makes,

    $$\tfrac12 \bigl(s \cdot \delta + \nabla \cdot \delta\bigr)^2, \qquad
        s = \nabla_a \log \pi(a \mid o).$$

    Its mean over the actions is the KL of the transport map $a \mapsto a + \delta(a)$ to second
    order, exactly: moving the actions by $\delta$ changes the log-density by
    $-(s \cdot \delta + \nabla \cdot \delta)$, and the KL is half the variance of that. Without the
    divergence, as in [`fisher_flow.ScoreOuterProduct`][], this holds only for displacements that
    are the same at every action.

    It is a cost of fields, not of single steps: the metric for a trained residual.
    """

    score: AbstractScore
    num_probes: int | None = eqx.field(static=True)

    def __init__(self, score: AbstractScore = PerturbedScore(), num_probes: int | None = None):
        r"""**Arguments:**

        - `score`: the estimate of the score.
        - `num_probes`: the number of Hutchinson probes in each of two independent estimates of
            the divergence, whose product is an unbiased estimate of the square. By default the
            divergence is exact for actions of up to 32 entries, with as many forward-mode products
            of the displacement, and larger ones have one probe in each.
        """
        check_instance("score", score, AbstractScore, "fisher_flow.PerturbedScore()")
        if num_probes is not None:
            check_positive_integer("num_probes", num_probes, 1)
        self.score = score
        self.num_probes = num_probes

    def operator(
        self, policy: Any, observation: Observation, action: Action, *, key: PRNGKeyArray
    ) -> lx.AbstractLinearOperator:
        del key  # a displacement that is the same at every action has no divergence
        s = self.score(policy, observation, action).reshape(-1)
        return lx.MatrixLinearOperator(jnp.outer(s, s), lx.positive_semidefinite_tag)

    def cost(
        self,
        policy: Any,
        observation: Observation,
        action: Action,
        displacement: Callable[[Action], Action],
        *,
        key: PRNGKeyArray,
    ) -> Scalar:
        s = self.score(policy, observation, action)
        if self.num_probes is None and action.size <= dense_limit:
            δ, divergence = value_and_divergence(displacement, action)
            return 0.5 * (jnp.sum(s * δ) + divergence) ** 2
        num_probes = 1 if self.num_probes is None else self.num_probes
        probes = rademacher_probes(2 * num_probes, action, key)
        δ, push = jax.linearize(displacement, action)
        estimates = jnp.sum(s * δ) + jax.vmap(lambda z: jnp.vdot(z, push(z)))(probes)
        first, second = estimates.reshape(2, num_probes).mean(axis=1)
        return 0.5 * first * second
