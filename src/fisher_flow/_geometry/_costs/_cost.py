import abc
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax.numpy as jnp
import lineax as lx
from jaxtyping import Array, Float, PRNGKeyArray, Scalar

from ..._custom_types import Action, Observation


class AbstractMetric(eqx.Module):
    r"""Abstract base class for metrics on the actions of a policy: what a displacement costs.

    A metric $G(a)$ prices a small displacement $\delta$ at $\tfrac12 \delta^\top G \delta$, in nats
    where it stands for a KL. It is written for one action, and acts on flattened displacements.
    """

    @abc.abstractmethod
    def operator(
        self, policy: Any, observation: Observation, action: Action, *, key: PRNGKeyArray
    ) -> lx.AbstractLinearOperator:
        """The metric at an action.

        **Arguments:**

        - `policy`: the flow policy whose geometry is meant.
        - `observation`: one observation, any PyTree of arrays.
        - `action`: where to evaluate the metric.
        - `key`: a `jax.random.key`, for metrics that draw samples.

        **Returns:**

        A symmetric positive semi-definite Lineax operator on vectors of the size of the action,
        which is the metric for displacements that are the same at every action.
        """

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

        - `policy`, `observation`, `action`, `key`: as for `operator`.
        - `displacement`: the field $\delta$, a function from an action to its displacement.

        **Returns:**

        A scalar: its mean over the actions of the policy is the predicted KL, for the metrics
        that predict one.
        """


def quadratic_form(operator: lx.AbstractLinearOperator, displacement: Array) -> Scalar:
    δ: Float[Array, " size"] = displacement.reshape(-1)
    return 0.5 * jnp.dot(δ, operator.mv(δ))
