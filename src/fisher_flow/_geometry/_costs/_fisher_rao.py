from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import PRNGKeyArray, Scalar

from ..._checks import check_instance, check_positive_integer
from ..._custom_types import Action, Observation
from ..._linalg import dense_limit, rademacher_probes, value_and_jacobian
from .._score import AbstractScore, PerturbedScore
from ._cost import AbstractCost


class FisherRao(AbstractCost):
    r"""The Fisher-Rao length of the change of density that a field of displacements makes,

    $$\tfrac12 \bigl(s \cdot \delta + \nabla \cdot \delta\bigr)^2, \qquad
        s = \nabla_a \log \pi(a \mid o).$$

    Its mean over the actions is the KL of the transport map $a \mapsto a + \delta(a)$ to second
    order, exactly: moving the actions by $\delta$ changes the log-density by
    $-(s \cdot \delta + \nabla \cdot \delta)$, and the KL is half the variance of that. Without the
    divergence, as in [`fisher_flow.ScoreOuterProduct`][], this holds only for displacements that
    are the same at every action.

    To third order, with $u = s \cdot \delta + \nabla \cdot \delta$, it is the mean of

    $$e^{v} - 1 - v, \qquad v = u + \tfrac12 \delta^\top (\nabla s)\, \delta
        - \tfrac12 \operatorname{tr}\bigl((\nabla \delta)^2\bigr),$$

    continued by a parabola from $v = 3$ on, where no expansion holds.

    It is a cost of fields, not of single steps: the metric for a trained residual.
    """

    score: AbstractScore = PerturbedScore()
    num_probes: int | None = eqx.field(static=True, default=None)
    order: int = eqx.field(static=True, default=2)

    def __check_init__(self):
        check_instance("score", self.score, AbstractScore, "fisher_flow.PerturbedScore()")
        if self.num_probes is not None:
            check_positive_integer("num_probes", self.num_probes, 1)
        if self.order not in (2, 3):
            raise ValueError(f"`order` must be 2 or 3, but got `{self.order!r}`. Write `order=2`.")

    def mean_eigenvalue(
        self, policy: Any, observation: Observation, action: Action, *, key: PRNGKeyArray
    ) -> Scalar:
        del key  # a displacement that is the same at every action has no divergence
        s = self.score(policy, observation, action).reshape(-1)
        whitening = self.score.whitening
        if whitening is None:
            return jnp.mean(s**2)
        return jnp.sum(whitening.whiten_gradient(s) ** 2) / whitening.rank

    def cost(
        self,
        policy: Any,
        observation: Observation,
        action: Action,
        displacement: Callable[[Action], Action],
        *,
        key: PRNGKeyArray,
    ) -> Scalar:
        score = lambda a: self.score(policy, observation, a)
        if self.num_probes is None and action.size <= dense_limit:
            δ, J = value_and_jacobian(displacement, action)
            if self.order == 2:
                return 0.5 * (jnp.sum(score(action) * δ) + jnp.trace(J)) ** 2
            s, along = jax.jvp(score, (action,), (δ,))
            u = jnp.sum(s * δ) + jnp.trace(J)
            return _exponential_remainder(u + 0.5 * (jnp.sum(δ * along) - jnp.sum(J * J.T)))
        num_probes = 1 if self.num_probes is None else self.num_probes
        probes = rademacher_probes(self.order * num_probes, action, key)
        δ, push = jax.linearize(displacement, action)
        pushed = jax.vmap(push)(probes)

        def estimates(terms):
            return jax.vmap(jnp.vdot)(probes, terms).reshape(self.order, num_probes).mean(axis=1)

        if self.order == 2:
            u1, u2 = jnp.sum(score(action) * δ) + estimates(pushed)
            return 0.5 * u1 * u2
        s, along = jax.jvp(score, (action,), (δ,))
        u1, u2, u3 = jnp.sum(s * δ) + estimates(pushed)
        w = 0.5 * (jnp.sum(δ * along) - estimates(jax.vmap(push)(pushed)))
        # The same to third order: a power of an estimate would not be unbiased.
        return 0.5 * u1 * u2 + u1 * w[1] + u1 * u2 * u3 / 6


FisherRao.__init__.__doc__ = r"""**Arguments:**

- `score`: the estimate of the score.
- `num_probes`: the number of Hutchinson probes in each of several independent estimates of
    the divergence (as many as the order), whose product is an unbiased estimate of its
    power. By default the divergence is exact for actions of up to 32 entries, with as many
    forward-mode products of the displacement, and larger ones have one probe in each.
- `order`: 2, or 3 to predict larger KLs, at the price of a derivative of the score. From
    probes that is a polynomial, the terms up to the third order alone, which has no lower
    bound: a prediction of small KLs, not a loss to train on.

**Raises:**

- `ValueError` if an argument is not of its kind.
"""


def _exponential_remainder(v: Scalar) -> Scalar:
    """exp(v) - 1 - v, without the cancellation near zero; and from 3 on the parabola that touches
    it there, as v is an expansion that means nothing where it is large."""
    series = 0.5 * v**2 * (1 + v / 3 * (1 + v / 4 * (1 + v / 5)))
    below, beyond = jnp.minimum(v, 3), jnp.maximum(v - 3, 0)
    e = jnp.exp(below)
    closed = jnp.expm1(below) - below + (e - 1) * beyond + 0.5 * e * beyond**2
    return jnp.where(jnp.abs(v) < 0.05, series, closed)
