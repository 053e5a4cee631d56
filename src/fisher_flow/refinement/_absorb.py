from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from jax import lax
from jaxtyping import PRNGKeyArray, PyTree

from .._custom_types import Critic
from .._misc import batch_length, check_instance, check_positive_integer
from ..flows import AbstractFlowPolicy, AbstractPolicy, fit_flow, FlowPolicy
from ._fidelity import critic_of, measure_fidelity, Refit
from ._selection import AbstractSelection


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
    learning_rate: float = 1e-3,
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

        refined = fisher_flow.refine(policy, critic, observations=observations)
        best = fisher_flow.BestOf(refined, critic, 8)
        absorbed, fidelity = fisher_flow.absorb(
            best, observations, num_samples=1024, num_updates=100, progress=False,
            key=jax.random.key(2),
        )
        print(fidelity)
        again = fisher_flow.refine(absorbed, critic, observations=observations)
        ```

    **Arguments:**

    - `policy`: the policy to absorb: a refined one, or a [`fisher_flow.BestOf`][] or
        [`fisher_flow.Resample`][] of it.
    - `observations`: the observations to learn at, any PyTree of arrays with a leading axis.

    **Other arguments:**

    - `critic`: by which the loss is judged; by default that of the policy.
    - `flow`: the flow policy to start from, whose velocity field is trained. By default the flow
        underneath `policy`, which is the nearest thing at hand.
    - `held_out`: the observations to measure the loss at; by default `observations`.
    - `num_samples`: the number of actions that are drawn to learn from.
    - `num_updates`, `batch_size`, `learning_rate`, `progress`: as of [`fisher_flow.fit_flow`][].
    - `key`: a `jax.random.key`; the same key gives the same policy.

    **Returns:**

    A named tuple of the `policy`, a [`fisher_flow.FlowPolicy`][], and its `fidelity`, a
    [`fisher_flow.Fidelity`][].

    **Raises:**

    - `ValueError` if an argument is not of its kind, or the velocity holds no arrays to train.
    """
    check_instance("policy", policy, AbstractPolicy, "fisher_flow.refine(policy, critic)")
    critic = critic_of(policy, critic)
    start: Any = _flow_underneath(policy) if flow is None else flow
    check_instance("flow", start, FlowPolicy, "fisher_flow.FlowPolicy(velocity, action_shape)")
    if not any(map(eqx.is_inexact_array, jax.tree.leaves(start.velocity_field))):
        raise ValueError(
            "`flow` must have a velocity field with arrays to train, but its field "
            f"`{start.velocity_field!r}` has none. Write `flow=FlowPolicy(VelocityMLP("
            f"observation_size, {start.action_shape}, key=key), {start.action_shape})`."
        )
    draw_key, fit_key, measure_key = jr.split(key, 3)
    o, a = _draw_samples(policy, observations, num_samples, key=draw_key)
    # With noise of its own for every action: the score is read off a path whose noise is Gaussian
    # and independent of its end, which the noise that made the action is not.
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
    held_out = observations if held_out is None else held_out
    return Refit(fitted, measure_fidelity(policy, fitted, critic, held_out, key=measure_key))


def _flow_underneath(policy: AbstractPolicy) -> FlowPolicy | None:
    chosen_from = policy.policy if isinstance(policy, AbstractSelection) else policy
    return chosen_from.flow_policy if isinstance(chosen_from, AbstractFlowPolicy) else None


def _draw_samples(
    policy: AbstractPolicy, observations: PyTree[Any], num_samples: int, *, key: PRNGKeyArray
) -> tuple[PyTree[Any], Any]:
    """Observations chosen at random, and an action of the policy, before its bounds, at each."""
    check_positive_integer("num_samples", num_samples, 65_536)
    row_key, key = jr.split(key)
    rows = jr.randint(row_key, (num_samples,), 0, batch_length("observations", observations))
    observations = jax.tree.map(lambda leaf: jnp.asarray(leaf)[rows], observations)
    return observations, _draw(policy, observations, jr.split(key, num_samples))


@eqx.filter_jit
def _draw(policy, observations, keys):
    draw = lambda row: policy.draw(row[0], key=row[1])
    return lax.map(draw, (observations, keys), batch_size=256)
