import abc
from collections.abc import Callable
from typing import Any, TYPE_CHECKING

import equinox as eqx
import jax.numpy as jnp
import jax.random as jr
from equinox import AbstractVar
from jaxtyping import Array, PRNGKeyArray, Scalar

from .._custom_types import Action, Observation
from .._divergence import value_and_jacobian
from ._bounds import clip, TanhBounds


if TYPE_CHECKING:
    from ._flow_policy import FlowPolicy


class AbstractPolicy(eqx.Module):
    """Abstract base class for everything that draws actions.

    Policies are written for one observation; use `jax.vmap` to act on a batch.
    """

    action_shape: AbstractVar[tuple[int, ...]]
    bounds: AbstractVar[tuple[Any, Any] | TanhBounds | None]

    @abc.abstractmethod
    def draw(self, observation: Observation, *, key: PRNGKeyArray) -> Action:
        """Draws an action *before* it is held to the bounds.

        This is the variable whose density the geometry speaks of: a density cannot describe the
        atoms that clipping leaves at the bounds. Clipping two policies alike never increases
        their KL, so what is bounded here is bounded for the actions that are executed too.

        **Arguments:**

        - `observation`: one observation, any PyTree of arrays.
        - `key`: a `jax.random.key`.

        **Returns:**

        An action of shape `action_shape`.
        """

    @eqx.filter_jit
    def sample(self, observation: Observation, *, key: PRNGKeyArray) -> Action:
        """Samples an action inside the bounds.

        **Arguments:**

        - `observation`: one observation, any PyTree of arrays.
        - `key`: a `jax.random.key`.

        **Returns:**

        An action of shape `action_shape`.
        """
        return self.project(self.draw(observation, key=key))

    def project(self, action: Action) -> Action:
        """Holds `action` to the bounds: clips it, or squashes it by [`fisher_flow.TanhBounds`][].
        Without bounds it is returned untouched."""
        if self.bounds is None:
            return action
        if isinstance(self.bounds, TanhBounds):
            return self.bounds.project(action)
        return clip(self.bounds, action)


class AbstractFlowPolicy(AbstractPolicy):
    """Abstract base class for policies with a density, and so with a score.

    Either a flow itself, or a flow followed by transport maps.
    """

    @property
    @abc.abstractmethod
    def flow_policy(self) -> "FlowPolicy":
        """The flow underneath all transport maps."""

    @abc.abstractmethod
    def from_flow(self, observation: Observation, action: Action) -> Action:
        """Carries an action of `flow_policy` through all transport maps.

        **Arguments:**

        - `observation`: one observation, any PyTree of arrays.
        - `action`: an action of the flow, before its bounds.

        **Returns:**

        The action of this policy, before its bounds.
        """

    @abc.abstractmethod
    def to_flow(self, observation: Observation, action: Action) -> Action:
        """Finds the action of `flow_policy` that `from_flow` carries to `action`.

        **Arguments:**

        - `observation`: one observation, any PyTree of arrays.
        - `action`: an action of this policy, before its bounds.

        **Returns:**

        The action of the flow, before its bounds; NaN where none is found.
        """

    @abc.abstractmethod
    def log_prob(self, observation: Observation, action: Action) -> Scalar:
        """The log-density at an action, in nats, of the policy before its bounds."""

    @eqx.filter_jit
    def draw_and_log_prob(
        self, observation: Observation, *, key: PRNGKeyArray, **options: Any
    ) -> tuple[Action, Scalar]:
        r"""Draws an action before its bounds, together with its log-density.

        The density needs no inverse: the action is known to come from one of the flow, and
        $\log \pi(T(b)) = \log \pi_0(b) - \log |\det \nabla T(b)|$ through all transport maps.

        **Arguments:**

        - `observation`: one observation, any PyTree of arrays.
        - `key`: a `jax.random.key`; the same gives the same action as in `draw`.
        - `**options`: passed on to the `log_prob` of the flow, for example `num_probes=4`.

        **Returns:**

        The action, and its log-density in nats; NaN where a map folds. For the action of
        [`fisher_flow.TanhBounds`][], subtract `bounds.log_det(action)`.

        **Raises:**

        - As `log_prob`.
        """
        flow = self.flow_policy
        b = flow.draw(observation, key=key)
        # A key of its own: the probes must not depend on the noise that made the action.
        log_p: Array = flow.log_prob(observation, b, key=jr.fold_in(key, 1), **options)
        if flow is self:
            return b, log_p
        action, jacobian = value_and_jacobian(lambda b: self.from_flow(observation, b), b)
        sign, log_det = jnp.linalg.slogdet(jacobian)
        return action, log_p - log_det + jnp.where(sign > 0, 0, jnp.nan)

    @abc.abstractmethod
    def score(
        self, estimator: Callable[..., Action], observation: Observation, action: Action
    ) -> Action:
        """The gradient of the log-density in the action. Called by `AbstractScore`.

        **Arguments:**

        - `estimator`: called as `estimator(path, velocity, action)` with the path of the flow and
            its velocity, a function of a time and a point.
        - `observation`: one observation, any PyTree of arrays.
        - `action`: where to evaluate the score.

        **Returns:**

        The score, with the shape and dtype of `action`.
        """
