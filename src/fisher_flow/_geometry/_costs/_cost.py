import abc
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax.numpy as jnp
import lineax as lx
from equinox import AbstractVar
from jaxtyping import Array, Float, PRNGKeyArray, Scalar

from ..._custom_types import Action, Observation
from ..._linalg import mean_eigenvalue
from .._score import AbstractScore


class AbstractCost(eqx.Module):
    r"""Abstract base class for what a field of displacements costs.

    A cost is written for one action. It is in nats where it predicts a KL.
    """

    score: AbstractVar[AbstractScore | None]

    @abc.abstractmethod
    def cost(
        self,
        policy: Any,
        observation: Observation,
        action: Action,
        displacement: Callable[[Action], Action],
        *,
        key: PRNGKeyArray,
    ) -> Scalar:
        r"""The cost of a field of displacements, at an action.

        **Arguments:**

        - `policy`: the flow policy whose geometry is meant.
        - `observation`: one observation, any PyTree of arrays.
        - `action`: where to evaluate the cost.
        - `displacement`: the field $\delta$, a function from an action to its displacement.
        - `key`: a `jax.random.key`, for costs that draw samples.

        **Returns:**

        A scalar. Its mean over the actions of the policy is the predicted KL, for the costs that
        predict one.
        """

    @abc.abstractmethod
    def mean_eigenvalue(
        self, policy: Any, observation: Observation, action: Action, *, key: PRNGKeyArray
    ) -> Scalar:
        """Twice the cost of a displacement whose `squared_length` is one and which is the same at
        every action, averaged over its direction. A damping is measured in this unit.

        **Arguments:**

        - `policy`, `observation`, `action`, `key`: as for `cost`.
        """

    def squared_length(self, displacement: Action) -> Scalar:
        """The squared length of a displacement, in the coordinates of the score. In the coordinates
        of a [`fisher_flow.CalibratedScore`][] the actions have covariance one.

        **Arguments:**

        - `displacement`: the displacement of one action.
        """
        δ = displacement.reshape(-1)
        if self.score is not None and self.score.whitening is not None:
            δ = self.score.whitening.whiten(δ)
        return jnp.sum(δ**2)


class AbstractMetric(AbstractCost):
    r"""Abstract base class for metrics on the actions of a policy.

    A metric is a cost that depends on the displacement of the action alone, not on the field around
    it: a metric $G(a)$ prices a small displacement $\delta$ at $\tfrac12 \delta^\top G \delta$. It
    acts on flattened displacements.
    """

    @abc.abstractmethod
    def operator(
        self, policy: Any, observation: Observation, action: Action, *, key: PRNGKeyArray
    ) -> lx.AbstractLinearOperator:
        """The metric at an action.

        **Arguments:**

        - `policy`, `observation`, `action`, `key`: as for `cost`.

        **Returns:**

        A symmetric positive semi-definite Lineax operator on vectors of the size of the action.
        """

    def mean_eigenvalue(
        self, policy: Any, observation: Observation, action: Action, *, key: PRNGKeyArray
    ) -> Scalar:
        return mean_eigenvalue(self.operator(policy, observation, action, key=key), action)

    def cost(
        self,
        policy: Any,
        observation: Observation,
        action: Action,
        displacement: Callable[[Action], Action],
        *,
        key: PRNGKeyArray,
    ) -> Scalar:
        δ: Float[Array, " size"] = displacement(action).reshape(-1)
        operator = self.operator(policy, observation, action, key=key)
        return 0.5 * jnp.dot(δ, operator.mv(δ))
