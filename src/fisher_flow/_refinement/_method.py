import abc
from typing import Any

import equinox as eqx
from equinox import AbstractVar
from jaxtyping import Array, Bool, PRNGKeyArray, PyTree, Scalar, ScalarLike

from .._checks import check_at_least, check_instance
from .._custom_types import Action, Critic, Observation
from .._flows import AbstractFlowPolicy
from .._geometry import AbstractCost, AbstractMetric, TransportKL


class Reached(eqx.Module):
    """The KL that a refinement met, on the actions that settled its length."""

    kl: Scalar
    """The KL in nats: the radius, within about one part in a hundred, unless something forbade
    it."""

    limited: Bool[Array, ""]
    """Whether the KL stays below the radius by more than one part in twenty. Then a longer
    displacement folds at too many actions, or its KL cannot be measured, or the critic has no
    gradient."""


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
    """Abstract base class for the ways to improve a policy: the `method` of `refine`.

    It has a `radius`: the KL to spend, in nats.
    """

    @abc.abstractmethod
    def fit(
        self,
        policy: AbstractFlowPolicy,
        critic: Critic,
        observations: PyTree[Any] | None,
        *,
        key: PRNGKeyArray,
    ) -> AbstractFlowPolicy:
        """Improves `policy` by `critic`.

        **Arguments:**

        - `policy`: the policy to improve.
        - `critic`: a function of one observation and one action to a scalar.
        - `observations`: a batch of observations, or `None`.
        - `key`: a `jax.random.key`.

        **Returns:**

        The better policy.
        """


class AbstractTransport(AbstractRefinement):
    """Abstract base class for the ways to find a displacement of actions."""

    metric: AbstractVar[AbstractCost]
    radius: AbstractVar[ScalarLike]
    measure: AbstractVar[TransportKL]
    max_folded: AbstractVar[ScalarLike]


def check_method(metric: Any, cls: type, radius: Any, measure: Any, example: str) -> None:
    """Checks the arguments that all methods have."""
    check_instance("metric", metric, cls, example)
    check_at_least("radius", radius, 0, 0.5)
    if measure is not None:
        check_instance("measure", measure, TransportKL, "fisher_flow.TransportKL()")


def measure_by(metric: AbstractCost) -> TransportKL:
    """The KL is measured by the score that the metric uses, if it uses one."""
    return TransportKL() if metric.score is None else TransportKL(metric.score)


def method_example(method: Any) -> str:
    """What to write instead of something that is not a method."""
    metric = f"{type(method).__name__}()" if isinstance(method, AbstractMetric) else ""
    return f"fisher_flow.NaturalStep({metric})"


def draw_from_flow(
    policy: AbstractFlowPolicy, observation: Observation, key: PRNGKeyArray
) -> tuple[Action, Action]:
    """An action before its bounds, and the action of the flow from which it comes."""
    b = policy.flow_policy.draw(observation, key=key)
    return policy.from_flow(observation, b), b
