import abc
from typing import Any

import equinox as eqx
from equinox import AbstractVar
from jaxtyping import PRNGKeyArray, PyTree, ScalarLike

from .._checks import check_at_least, check_instance
from .._custom_types import Action, Critic, Observation
from .._flows import AbstractFlowPolicy
from .._geometry import AbstractMetric, TransportKL


class AbstractDisplacement(eqx.Module):
    """Abstract base class for displacements of actions: what a refinement finds."""

    @abc.abstractmethod
    def __call__(
        self, policy: AbstractFlowPolicy, critic: Critic, observation: Observation, action: Action
    ) -> Action:
        """The displacement of one action.

        **Arguments:**

        - `policy`: the policy that is refined.
        - `critic`: the critic that it is refined by.
        - `observation`: one observation, any PyTree of arrays.
        - `action`: the action to displace, before its bounds.

        **Returns:**

        The displacement, with the shape and dtype of `action`.
        """


class AbstractRefinement(eqx.Module):
    """Abstract base class for the ways to find a displacement: the `method` of `refine`."""

    metric: AbstractVar[AbstractMetric]
    radius: AbstractVar[ScalarLike]
    measure: AbstractVar[TransportKL]

    @abc.abstractmethod
    def fit(
        self,
        policy: AbstractFlowPolicy,
        critic: Critic,
        observations: PyTree[Any] | None,
        *,
        key: PRNGKeyArray,
    ) -> AbstractDisplacement:
        """Finds the displacement that improves `policy` by `critic`.

        **Arguments:**

        - `policy`: the policy to improve.
        - `critic`: a function of one observation and one action to a scalar.
        - `observations`: a batch of observations, or `None`.
        - `key`: a `jax.random.key`.

        **Returns:**

        The displacement.
        """


def check_method(metric: Any, radius: Any, measure: Any, example: str) -> TransportKL:
    """Checks what all methods have in common, and settles how the KL is measured."""
    check_instance("metric", metric, AbstractMetric, example)
    check_at_least("radius", radius, 0, 0.5)
    if measure is None:
        # Hold the measured KL to the same estimate of the score as the metric, if it has one.
        return TransportKL(metric.score) if hasattr(metric, "score") else TransportKL()
    check_instance("measure", measure, TransportKL, "fisher_flow.TransportKL()")
    return measure


def method_example(method: Any) -> str:
    """What to write instead of a method that is none."""
    metric = f"{type(method).__name__}()" if isinstance(method, AbstractMetric) else ""
    return f"fisher_flow.NaturalStep({metric})"


def draw_from_flow(
    policy: AbstractFlowPolicy, observation: Observation, key: PRNGKeyArray
) -> tuple[Action, Action]:
    """An action before its bounds, and the action of the flow from which it comes."""
    b = policy.flow_policy.draw(observation, key=key)
    return policy.from_flow(observation, b), b
