from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import optimistix as optx
from jaxtyping import Array, PRNGKeyArray, Scalar

from .._custom_types import Action, Critic, Observation
from .._flows import AbstractFlowPolicy, FlowPolicy, TanhBounds
from .._linalg import value_and_jacobian
from .._trees import as_inexact, finite_or_zero
from ._executed_critic import check_critic, critic_gradient
from ._method import AbstractDisplacement, AbstractTransport, Reached


class RefinedPolicy(AbstractFlowPolicy):
    r"""A flow policy followed by a local transport map, $T(a) = a + \delta(o, a)$.

    Made by [`fisher_flow.refine`][]. It is a flow policy itself: it has samples, a density

    $$\log \pi'(T(a)) = \log \pi(a) - \log |\det(I + \nabla\delta(a))|$$

    and a score

    $$s'(T(a)) = (I + \nabla\delta)^{-\top}
        \bigl(s(a) - \nabla \log |\det(I + \nabla\delta)|\bigr),$$

    so it can be refined again.
    """

    policy: AbstractFlowPolicy
    critic: Critic
    displacement_field: AbstractDisplacement
    method: AbstractTransport
    reached: Reached | None

    def __init__(
        self,
        policy: AbstractFlowPolicy,
        critic: Critic,
        displacement_field: AbstractDisplacement,
        method: AbstractTransport,
        reached: Reached | None = None,
    ):
        """**Arguments:**

        - `policy`: the policy to refine.
        - `critic`: the critic to refine it by.
        - `displacement_field`: the displacement of its actions.
        - `method`: how the displacement was found.
        - `reached`: what the calibration of the displacement reached.

        **Raises:**

        - `ValueError` if `critic` is not a function.
        """
        check_critic(critic)
        self.policy = policy
        self.critic = critic
        self.displacement_field = displacement_field
        self.method = method
        self.reached = reached

    @property
    def action_shape(self) -> tuple[int, ...]:
        return self.policy.action_shape

    @property
    def bounds(self) -> tuple[Any, Any] | TanhBounds | None:
        return self.policy.bounds

    @property
    def flow_policy(self) -> FlowPolicy:
        return self.policy.flow_policy

    def from_flow(self, observation: Observation, action: Action) -> Action:
        action = self.policy.from_flow(observation, action)
        return action + self.displacement(observation, action)

    def to_flow(self, observation: Observation, action: Action) -> Action:
        return self.policy.to_flow(observation, self.inverse(observation, action))

    def draw(self, observation: Observation, *, key: PRNGKeyArray) -> Action:
        return self.from_flow(observation, self.flow_policy.draw(observation, key=key))

    @eqx.filter_jit
    def displacement(self, observation: Observation, action: Action) -> Action:
        r"""The displacement $\delta(o, a)$ of one action.

        It is zero where the gradient of the critic, or the displacement itself, is not finite.

        **Arguments:**

        - `observation`: one observation, any PyTree of arrays.
        - `action`: an action of the unrefined policy.

        **Returns:**

        The displacement, with the shape and dtype of `action`.
        """
        displacement, _ = self.checked_displacement(observation, as_inexact(action))
        return displacement

    def checked_displacement(
        self, observation: Observation, action: Action
    ) -> tuple[Action, Scalar]:
        """The displacement, and whether it and the gradient of the critic are finite."""
        g = critic_gradient(self.policy, self.critic, observation, action)
        δ = self.displacement_field(self.policy, self.critic, observation, action)
        δ, finite = finite_or_zero(jnp.asarray(δ, action.dtype))
        finite = finite & jnp.all(jnp.isfinite(g))
        return jnp.where(finite, δ, jnp.zeros_like(δ)), finite

    @eqx.filter_jit
    def transport(self, observation: Observation, action: Action) -> Action:
        r"""The transport map $T(a) = a + \delta(o, a)$, held to the bounds.

        Differentiable in the action.

        **Arguments:**

        - `observation`: one observation, any PyTree of arrays.
        - `action`: an action of the unrefined policy.

        **Returns:**

        The action to take instead, with the shape and dtype of `action`.
        """
        action = as_inexact(action)
        return self.project(action + self.displacement(observation, action))

    @eqx.filter_jit
    def inverse(self, observation: Observation, action: Action, *, throw: bool = False) -> Action:
        r"""The action $a$ with $a + \delta(o, a)$ equal to `action`, found by Newton's method.

        **Arguments:**

        - `observation`: one observation, any PyTree of arrays.
        - `action`: an action of the refined policy, before its bounds.

        **Other arguments:**

        - `throw`: whether to raise an error at run time where there is no inverse.

        **Returns:**

        The action of the unrefined policy; NaN where Newton's method does not find one, or finds
        one at which the map is folded, $\det(I + \nabla\delta) \le 0$.

        **Raises:**

        - With `throw=True`, an error at run time where the result would be NaN.
        """
        a = _inverse((self, observation), as_inexact(action))
        if throw:
            a = eqx.error_if(
                a,
                jnp.any(jnp.isnan(a)),
                "No inverse was found: the map folds near `action`, or never reaches it. `certify` "
                "shows how often it folds; refine with a lower `radius` or a higher `damping`, or "
                "write `inverse(observation, action, throw=False)` for NaN there.",
            )
        return a

    @eqx.filter_jit
    def log_prob(self, observation: Observation, action: Action, **options: Any) -> Scalar:
        """The log-density at an action of the refined policy, before its bounds.

        **Arguments:**

        - `observation`: one observation, any PyTree of arrays.
        - `action`: where to evaluate the density.
        - `**options`: passed on to the `log_prob` of the flow.

        **Returns:**

        The log-density in nats, a scalar; NaN where `inverse` is.
        """
        action = as_inexact(action)
        a = self.inverse(observation, action)
        found = jnp.all(jnp.isfinite(a))
        a = jnp.where(found, a, action)  # solvers raise at what is not finite
        log_p: Array = self.policy.log_prob(observation, a, **options) - self._log_det(observation)(
            a
        )
        return jnp.where(found, log_p, jnp.nan)

    def score(
        self, estimator: Callable[..., Action], observation: Observation, action: Action
    ) -> Action:
        a = self.inverse(observation, action)
        found = jnp.all(jnp.isfinite(a))
        a = jnp.where(found, a, action)  # derivatives of what is not finite may raise
        _, J = value_and_jacobian(lambda a: self.displacement(observation, a), a)
        s: Array = self.policy.score(estimator, observation, a)
        s = s - jax.grad(self._log_det(observation))(a)
        identity = jnp.eye(a.size, dtype=a.dtype)
        s = jnp.linalg.solve((identity + J).T, s.reshape(-1)).reshape(a.shape)
        return jnp.where(found, s, jnp.nan)

    def _log_det(self, observation):
        def log_det(a):
            _, J = value_and_jacobian(lambda a: self.displacement(observation, a), a)
            return jnp.linalg.slogdet(jnp.eye(a.size, dtype=a.dtype) + J)[1]

        return log_det


@eqx.filter_custom_jvp
def _inverse(map_and_observation: tuple[RefinedPolicy, Observation], action: Action) -> Action:
    tol = 1e-9 if action.dtype == jnp.float64 else 1e-5
    solution = optx.root_find(
        lambda a, target: _moved(map_and_observation, a) - target,
        optx.Newton(rtol=tol, atol=tol),
        action,
        args=action,
        max_steps=32,
        throw=False,
    )
    # Judged by the residual: rounding may keep the last steps above the tolerance.
    moved, J = value_and_jacobian(lambda a: _moved(map_and_observation, a), solution.value)
    found = jnp.max(jnp.abs(moved - action)) <= 100 * tol * (1 + jnp.max(jnp.abs(action)))
    return jnp.where(found & (jnp.linalg.slogdet(J)[0] > 0), solution.value, jnp.nan)


@_inverse.def_jvp
def _inverse_jvp(primals, tangents):
    # T(a) = y, so DT ȧ = ẏ - Ṫ(a).
    map_and_observation, y = primals
    map_dot, y_dot = tangents
    a = _inverse(map_and_observation, y)
    _, J = value_and_jacobian(lambda a: _moved(map_and_observation, a), a)
    _, T_dot = eqx.filter_jvp(lambda m: _moved(m, a), (map_and_observation,), (map_dot,))
    rhs = (0 if y_dot is None else y_dot) - (0 if T_dot is None else T_dot)
    return a, jnp.linalg.solve(J, jnp.reshape(rhs, -1)).reshape(a.shape)


def _moved(map_and_observation, action):
    refined, observation = map_and_observation
    return action + refined.displacement(observation, action)
