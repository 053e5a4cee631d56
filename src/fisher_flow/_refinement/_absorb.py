from typing import Any

import equinox as eqx
import jax
import jax.random as jr
from jax import lax
from jaxtyping import PRNGKeyArray, PyTree, ScalarLike

from .._checks import check_instance, check_positive_integer
from .._custom_types import Critic
from .._flows import AbstractFlowPolicy, AbstractPolicy, as_flow_policy, fit_flow, FlowPolicy
from .._trees import random_rows
from ._fidelity import checked_held_out, critic_of, measure_fidelity, Refit
from ._selections import flow_underneath


def absorb(
    policy: Any,
    observations: PyTree[Any],
    *,
    critic: Critic | None = None,
    flow: FlowPolicy | None = None,
    held_out: PyTree[Any] | None = None,
    num_samples: int = 65_536,
    num_updates: int = 20_000,
    batch_size: int = 256,
    learning_rate: ScalarLike = 1e-3,
    progress: bool = True,
    key: PRNGKeyArray,
) -> Refit:
    """Fits a flow to the actions of a refined policy, which it replaces.

    A chain of refinements costs more at every step, and a choice among several actions has no
    density. What comes out here is a plain [`fisher_flow.FlowPolicy`][] again: sampled at the cost
    of the flow, with a score of its own, ready for the next refinement, by the same critic or by a
    better one.

    !!! example

        ```python
        import fisher_flow
        import jax
        import jax.numpy as jnp

        velocity = fisher_flow.VelocityMLP(2, (2,), width_size=32, key=jax.random.key(0))
        policy = fisher_flow.FlowPolicy(velocity, action_shape=(2,))
        critic = lambda observation, action: -jnp.sum((action - observation) ** 2)
        observations = jax.random.normal(jax.random.key(1), (256, 2))

        best = fisher_flow.BestOf(policy, critic, 8)
        absorbed, fidelity = fisher_flow.absorb(
            best, observations, num_samples=1024, num_updates=100, progress=False,
            key=jax.random.key(2),
        )
        print(fidelity)
        ```

    **Arguments:**

    - `policy`: the policy to absorb: a refined one, a [`fisher_flow.BestOf`][] or
        [`fisher_flow.Resample`][] of it, or any other that draws actions.
    - `observations`: the observations to learn at, any PyTree of arrays with a leading axis.

    **Other arguments:**

    - `critic`: by which the loss is judged; by default the critic of the policy.
    - `flow`: the flow policy to start from, whose velocity field is trained, of the same bounds. By
        default the flow underneath `policy`.
    - `held_out`: the observations to measure the loss at; by default `observations`.
    - `num_samples`: the number of actions that are drawn to learn from.
    - `num_updates`, `batch_size`, `learning_rate`, `progress`: as for [`fisher_flow.fit_flow`][].
    - `key`: a `jax.random.key`; the same key gives the same policy.

    **Returns:**

    A named tuple of the `policy`, a [`fisher_flow.FlowPolicy`][], and its `fidelity`, a
    [`fisher_flow.Fidelity`][].

    **Raises:**

    - `ValueError` if an argument is not of its kind, the velocity holds no arrays to train, or
        the policy draws an action that is not finite.
    - `FloatingPointError` if the training ends in NaN.
    """
    if isinstance(policy, AbstractFlowPolicy) or not isinstance(policy, AbstractPolicy):
        policy = as_flow_policy(policy)
    critic = critic_of(policy, critic, observations)
    held_out = checked_held_out(held_out, observations)
    check_positive_integer("num_samples", num_samples, 65_536)
    start: Any = flow_underneath(policy) if flow is None else flow
    shape, bounds = policy.action_shape, policy.bounds
    options = "" if bounds is None else f", bounds={bounds}"
    example = f"FlowPolicy(VelocityMLP(observation_size, {shape}, key=key), {shape}{options})"
    check_instance("flow", start, FlowPolicy, example)
    if not any(map(eqx.is_inexact_array, jax.tree.leaves(start.velocity_field))):
        raise ValueError(
            "`flow` must have a velocity field with arrays to train, but its field "
            f"`{start.velocity_field!r}` has none. Write `flow={example}`."
        )
    if (start.action_shape, start.bounds) != (shape, bounds):
        raise ValueError(
            f"`flow` must have the action shape and the bounds of the policy, {shape} and "
            f"{bounds}, but got {start.action_shape} and {start.bounds}. Write `flow={example}`."
        )
    draw_key, fit_key, measure_key = jr.split(key, 3)
    row_key, action_key = jr.split(draw_key)
    o = random_rows(observations, num_samples, key=row_key)
    a = _draw(policy, o, jr.split(action_key, num_samples))
    # With new noise for every action: the score is read off a path whose noise is Gaussian and
    # independent of its end. The noise that made the action is not independent of it.
    fitted = fit_flow(
        start,
        o,
        a,
        num_updates=num_updates,
        batch_size=batch_size,
        learning_rate=learning_rate,
        progress=progress,
        key=fit_key,
    )
    return Refit(fitted, measure_fidelity(policy, fitted, critic, held_out, key=measure_key))


@eqx.filter_jit
def _draw(policy, observations, keys):
    draw = lambda row: policy.draw(row[0], key=row[1])
    return lax.map(draw, (observations, keys), batch_size=256)
