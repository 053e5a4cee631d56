from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Scalar

from .._checks import check_instance, check_positive_integer
from .._custom_types import Action, Observation
from .._flows import AbstractFlowPolicy, as_flow_policy, FlowPolicy
from .._linalg import dense_limit, trace_and_log_det, value_and_jacobian, value_and_projections
from ._score import AbstractScore, PerturbedScore


class TransportTerms(NamedTuple):
    r"""What one action contributes to the KL of a transport map $T(a) = a + \delta(a)$."""

    kl: Scalar
    r"""Nats; the KL is its mean over the actions of the policy."""

    folded: Bool[Array, ""]
    r"""Whether $\det(I + \nabla\delta) \le 0$, so that $T$ is not one-to-one here. It is true, too,
    where the map or the score is not finite: nothing is known there, and the KL is given as zero.
    Probes may miss a fold whose determinant is only a little below zero."""

    stein: Scalar
    r"""The Stein residual $s \cdot \delta + \nabla \cdot \delta$, of mean zero if $s$ is right."""


class TransportKL(eqx.Module):
    r"""The KL between a policy before and after a transport map $T(a) = a + \delta(a)$, measured.

    $$\operatorname{KL}(T_\# \pi \,\|\, \pi)
        = \mathbb E\bigl[\nabla \cdot \delta - \log |\det(I + \nabla\delta)|\bigr]
        - \mathbb E\Bigl[\int_0^1 \bigl(s(a + \tau\delta) - s(a)\bigr) \cdot \delta
            \,\mathrm d\tau\Bigr], \qquad a \sim \pi .$$

    This is exact to all orders in $\delta$ while $T$ is one-to-one, and needs the score only, not
    the density. It follows from
    $\operatorname{KL} = \mathbb E[\log\pi(a) - \log|\det(I + \nabla\delta)| - \log\pi(a + \delta)]$
    by writing the difference of log-densities as an integral of the score, and then adding
    $\mathbb E[\nabla \cdot \delta + s \cdot \delta]$, which is zero by Stein's identity. What is
    left of each bracket is of second order at every single action, so few samples are enough.

    The estimate is of the policy before its bounds, and as good as its score. Two quantities come
    with it for a check: the share of actions at which the map folds (there the formula does not
    hold), and the Stein residual $\mathbb E[\nabla \cdot \delta + s \cdot \delta]$ (which is zero
    if the score is the score of the actions).
    """

    score: AbstractScore = PerturbedScore()
    num_nodes: int = eqx.field(static=True, default=3)
    num_probes: int | None = eqx.field(static=True, default=None)
    whole_chain: bool = eqx.field(static=True, default=False)

    def __check_init__(self):
        check_instance("score", self.score, AbstractScore, "fisher_flow.PerturbedScore()")
        check_positive_integer("num_nodes", self.num_nodes, 3)
        if self.num_probes is not None:
            check_positive_integer("num_probes", self.num_probes, 1)

    @eqx.filter_jit
    def __call__(
        self,
        policy: Any,
        observation: Observation,
        action: Action,
        displacement: Callable[[Action], Action],
    ) -> TransportTerms:
        r"""What one action contributes to the KL.

        **Arguments:**

        - `policy`: the flow policy before the map.
        - `observation`: one observation, any PyTree of arrays.
        - `action`: an action drawn from the policy (by `draw`: before its bounds).
        - `displacement`: the field $\delta$, a function from an action to its displacement.

        **Returns:**

        A named tuple of

        - `kl`: nats, whose mean over the actions of the policy is the KL.
        - `folded`: whether $\det(I + \nabla\delta) \le 0$ at this action, or something is not
            finite there.
        - `stein`: the Stein residual $s \cdot \delta + \nabla \cdot \delta$.
        """
        policy = as_flow_policy(policy)
        δ, J = self.linearise(policy, displacement, action)
        return self.terms(policy, observation, action, δ, J)

    def linearise(
        self,
        policy: AbstractFlowPolicy,
        displacement: Callable[[Action], Any],
        action: Action,
        *,
        has_aux: bool = False,
    ) -> Any:
        r"""The displacement at an action, and its Jacobian in the form that `terms` takes.

        **Arguments:**

        - `policy`: the flow policy before the map.
        - `displacement`: the field $\delta$, a function from an action to its displacement; with
            `has_aux`, to a pair of that and something else, which is returned last.
        - `action`: where to evaluate both.

        **Returns:**

        - The displacement $\delta(a)$.
        - $\nabla\delta(a)$, flattened to a matrix; with probes, one projection of it for each. Both
            are linear in $\delta$.
        """
        # A map of a refined policy is brought into the coordinates of the flow as a matrix.
        exact = self.num_probes is None and action.size <= dense_limit
        if exact or not isinstance(policy, FlowPolicy):
            return value_and_jacobian(displacement, action, has_aux=has_aux)
        num_probes = 1 if self.num_probes is None else self.num_probes
        return value_and_projections(displacement, action, num_probes, has_aux=has_aux)

    def terms(
        self,
        policy: AbstractFlowPolicy,
        observation: Observation,
        action: Action,
        displacement: Action,
        jacobian: Float[Array, "size size"] | Float[Array, "probes rank rank"],
        flow_action: Action | None = None,
    ) -> TransportTerms:
        r"""As `__call__`, for a displacement and a Jacobian that are already known.

        **Arguments:**

        - `policy`, `observation`, `action`: as for `__call__`.
        - `displacement`: $\delta(a)$.
        - `jacobian`: $\nabla\delta(a)$, as `linearise` returns it.
        - `flow_action`: for a refined policy, the action of its flow from which `action` comes. If
            it is not known, it is found by inverting.

        **Returns:**

        The same named tuple.
        """
        flow = policy.flow_policy
        # The KL is the same in all coordinates; in the coordinates of the flow the score is at
        # hand.
        a, δ, J = self.in_flow_coordinates(
            policy, observation, action, displacement, jacobian, flow_action
        )
        nodes, weights = np.polynomial.legendre.leggauss(self.num_nodes)
        # Node zero is the action itself; all the nodes are one batch for the network.
        τ = jnp.asarray(np.concatenate([[0.0], 0.5 * (nodes + 1)]), a.dtype)
        s = jax.vmap(lambda τ: self.score(flow, observation, a + τ * δ))(τ)
        change = jnp.tensordot(jnp.asarray(0.5 * weights, a.dtype), s[1:] - s[:1], axes=1)
        divergence, log_det, sign = trace_and_log_det(J, a.size)
        terms = TransportTerms(
            kl=divergence - log_det - jnp.sum(change * δ),
            folded=sign <= 0,
            stein=jnp.sum(s[0] * δ) + divergence,
        )
        known = jnp.isfinite(terms.kl) & jnp.isfinite(terms.stein)
        # An action that stays costs nothing, whether or not it has a score.
        map_and_jacobian = (δ, J) if self.whole_chain else (displacement, jacobian)
        moved = jnp.any(map_and_jacobian[0] != 0) | jnp.any(map_and_jacobian[1] != 0)
        zero = jnp.zeros_like(terms.kl)
        return TransportTerms(
            kl=jnp.where(known & moved, terms.kl, zero),
            folded=jnp.where(known, terms.folded, True) & moved,
            stein=jnp.where(known & moved, terms.stein, zero),
        )

    def in_flow_coordinates(
        self,
        policy: AbstractFlowPolicy,
        observation: Observation,
        action: Action,
        displacement: Action,
        jacobian: Float[Array, "..."],
        flow_action: Action | None = None,
    ) -> tuple[Action, Action, Float[Array, "..."]]:
        r"""Expresses a transport map of a policy as one of the flow underneath, at the same KL.

        Let the policy be the flow followed by a map $F$. A further map $S$ of the policy is the map
        $F^{-1} \circ S \circ F$ of the flow; measured from the flow it is $S \circ F$.

        **Arguments:**

        - `policy`, `observation`, `action`, `displacement`, `jacobian`, `flow_action`: as for
            `terms`.

        **Returns:**

        The action of the flow, its displacement, and the Jacobian of that.
        """
        if isinstance(policy, FlowPolicy):
            return action, displacement, jacobian

        def map_jacobian(b):
            return value_and_jacobian(lambda b: policy.from_flow(observation, b), b)[1]

        identity = jnp.eye(action.size, dtype=action.dtype)
        a = policy.to_flow(observation, action) if flow_action is None else flow_action
        J = (identity + jacobian) @ map_jacobian(a)
        if self.whole_chain:
            return a, action + displacement - a, J - identity
        b = policy.to_flow(observation, action + displacement)
        return a, b - a, jnp.linalg.solve(map_jacobian(b), J) - identity


TransportKL.__init__.__doc__ = r"""**Arguments:**

- `score`: the estimate of the score.
- `num_nodes`: the number of Gauss-Legendre nodes for the integral over $\tau$.
- `num_probes`: the number of random probes from which trace and determinant are
    estimated, each at eight products of $\nabla\delta$ with a vector. By default both
    are exact for actions of up to 32 entries, and larger ones have one probe: its error
    averages out over the actions.
- `whole_chain`: whether the KL of a map of a *refined* policy is measured from the flow
    underneath, through this map and all maps before it. Otherwise it is measured from the refined
    policy.
"""
