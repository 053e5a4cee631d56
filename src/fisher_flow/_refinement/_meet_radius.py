from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, PyTree, Scalar

from .._flows import AbstractFlowPolicy
from .._trees import finite_or_zero
from ._method import AbstractTransport, Reached
from ._radius import scale_to_radius


# Maps a function of one observation, and of one entry of each column, over all of them.
OverRows = Callable[[Callable[..., Any]], Callable[..., Any]]


def over_batch(observations: PyTree[Any]) -> OverRows:
    """Maps over the rows of a batch of observations, a few hundred at a time to bound the
    memory."""

    def over_rows(function):
        def mapped(*columns):
            return lax.map(lambda row: function(*row), (observations, *columns), batch_size=256)

        return mapped

    return over_rows


def linearised_fields(
    method: AbstractTransport,
    policy: AbstractFlowPolicy,
    displacement: Callable[[Any, Any], Any],
    actions: Array,
    over_rows: OverRows,
) -> tuple[Array, Array]:
    """The displacement `displacement(observation, action)` at every action, and its Jacobian. Both
    are zero where the displacement is not finite."""

    def field(o, a):
        δ, J = method.measure.linearise(policy, lambda a: displacement(o, a), a)
        δ, finite = finite_or_zero(δ)
        return δ, jnp.where(finite, J, 0)

    return over_rows(field)(actions)


def meet_radius(
    method: AbstractTransport,
    policy: AbstractFlowPolicy,
    fields: Callable[[Scalar], tuple[Array, Array]],
    initial: Scalar,
    draws: tuple[Array, Array],
    over_rows: OverRows,
) -> tuple[Scalar, Reached]:
    """The scale of a displacement at which the measured KL meets the radius of a method.

    **Arguments:**

    - `fields`: maps a scale to the displacements and their Jacobians.
    - `initial`: the first scale to try.
    - `draws`: a batch of what `draw_from_flow` returns.
    """
    actions, flow_actions = draws

    def terms(o, a, b, δ, J):
        result = method.measure.terms(policy, o, a, δ, J, b)
        return result.kl, result.folded

    def measure(scale):
        kl, folded = over_rows(terms)(actions, flow_actions, *fields(scale))
        return jnp.mean(kl), jnp.mean(folded)

    radius = jnp.asarray(method.radius, initial.dtype)
    scale, kl = scale_to_radius(
        measure,
        radius,
        initial,
        max_folded=method.max_folded,
        after_others=policy.flow_policy is not policy,
    )
    return scale, Reached(kl, kl < 0.95 * radius)
