from typing import Any, NamedTuple

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jax import lax
from jaxtyping import Array, Float, PRNGKeyArray, PyTree, Scalar

from .._checks import batch_length
from .._custom_types import Critic
from .._flows import AbstractFlowPolicy, AbstractPolicy, OneStepPolicy
from .._linalg import dense_limit, value_and_jacobian
from .._trees import as_entries
from ._executed_critic import check_critic, critic_value
from ._selections import flow_underneath


class Fidelity(eqx.Module):
    """What a policy lost when another was fitted to its actions; made by [`fisher_flow.absorb`][]
    and [`fisher_flow.distill`][].

    Standard errors are over observations. Prints as a table.
    """

    kl: Scalar
    r"""$\operatorname{KL}(\text{original} \,\|\, \text{fitted})$ in nats, averaged over
    observations. NaN where one of the two has no density: a choice among several actions, or a
    one-step policy. It does not hold where a map of the original folds."""

    kl_stderr: Scalar
    """Its standard error."""

    distance: Scalar
    """The root mean square distance between the actions that the two make of the same noise, before
    the bounds, over the distance of two actions of the original. Zero is perfect. NaN unless the
    fitted policy follows the noise, as a one-step policy does."""

    energy: Scalar
    r"""The energy coefficient of the two distributions, from 0 (the same) to 1:
    $(2\,\mathbb E\|X - Y\| - \mathbb E\|X - X'\| - \mathbb E\|Y - Y'\|) /
    2\,\mathbb E\|X - Y\|$ for actions $X$ of the original and $Y$ of the fitted policy, before the
    bounds."""

    improvement: Scalar
    """The mean gain in the critic's value of the original policy, within the bounds, over the flow
    underneath; NaN for a policy without a flow."""

    improvement_stderr: Scalar
    """Its standard error."""

    lost: Scalar
    """How much lower the critic's value is for the fitted policy than for the original, within the
    bounds."""

    lost_stderr: Scalar
    """Its standard error."""

    num_actions: int = eqx.field(static=True)
    """The number of actions that were drawn from each policy."""

    num_observations: int = eqx.field(static=True)
    """The number of observations they were drawn at, some of them repeatedly if they were few."""

    def __str__(self) -> str:
        gain = f"{self.improvement:.4g} ± {self.improvement_stderr:.2g}"
        # A dash where there is nothing to measure.
        kl = "-" if jnp.isnan(self.kl) else f"{self.kl:.4g} ± {self.kl_stderr:.2g}"
        distance = "-" if jnp.isnan(self.distance) else f"{self.distance:.3g}"
        rows = [
            ("KL from the original (nats)", kl),
            ("distance at the same noise", distance),
            ("energy coefficient", f"{self.energy:.3g}"),
            ("gain in Q of the original", gain),
            ("  lost", f"{self.lost:.4g} ± {self.lost_stderr:.2g}"),
            ("actions, observations", f"{self.num_actions}, {self.num_observations}"),
        ]
        width = max(len(name) for name, _ in rows)
        return "\n".join(f"{name:<{width}}  {value}" for name, value in rows)


class Refit(NamedTuple):
    """A policy that was fitted to the actions of another, and how well."""

    policy: Any
    """The fitted policy."""

    fidelity: Fidelity
    """What was lost."""


def critic_of(policy: AbstractPolicy, critic: Critic | None, observations: PyTree[Any]) -> Critic:
    """The critic to judge by: the one that is given, or the one that the policy was made with."""
    batch_length("observations", observations)
    chosen: Any = getattr(policy, "critic", None) if critic is None else critic
    if chosen is None:
        raise ValueError(
            "`critic`, the function `critic(observation, action)` to judge by, must be given for a "
            f"`{type(policy).__name__}`, which was not made by one. Write `critic=critic`."
        )
    check_critic(chosen)
    # Once before all the training, so that a critic of another shape is refused at once.
    observation = jax.tree.map(lambda leaf: jnp.asarray(leaf)[0], observations)
    draw = lambda o, key: critic_value(policy, chosen, o, policy.draw(o, key=key))
    eqx.filter_eval_shape(draw, observation, jr.key(0))
    return chosen


def checked_held_out(held_out: PyTree[Any] | None, observations: PyTree[Any]) -> PyTree[Any]:
    """The observations to measure at: the given ones, or otherwise the ones to learn at."""
    if held_out is None:
        return observations
    batch_length("held_out", held_out)
    shapes = lambda tree: jax.tree.map(lambda leaf: jnp.shape(leaf)[1:], tree)
    if shapes(held_out) != shapes(observations):
        raise ValueError(
            f"`held_out` must be a batch of observations like `observations`, whose rows have the "
            f"shapes {shapes(observations)}, but got {shapes(held_out)}. Write "
            "`held_out=jax.tree.map(lambda leaf: leaf[n:], observations)`."
        )
    return held_out


def measure_fidelity(
    original: AbstractPolicy,
    fitted: AbstractPolicy,
    critic: Critic,
    observations: PyTree[Any],
    *,
    num_observations: int = 512,
    num_actions: int = 8,
    key: PRNGKeyArray,
) -> Fidelity:
    """Compares a policy with one that was fitted to it.

    **Arguments:**

    - `original`, `fitted`: the two policies.
    - `critic`: called as `critic(observation, action)`; the judge of the gain.
    - `observations`: a batch of observations.
    - `num_observations`: how many of them are used, chosen at random. If there are fewer, all of
        them are used, each about as often.
    - `num_actions`: the number of actions drawn from each policy at each of them; at least two.
    - `key`: a `jax.random.key`.
    """
    row_key, key = jr.split(key)
    length = batch_length("observations", observations)
    rows = jnp.concatenate([jr.permutation(row_key, length)] * -(-num_observations // length))
    rows = rows[:num_observations]
    observations = jax.tree.map(lambda leaf: jnp.asarray(leaf)[rows], observations)
    has_densities = all(isinstance(x, AbstractFlowPolicy) for x in (original, fitted))
    coupled = isinstance(original, AbstractFlowPolicy) and isinstance(fitted, OneStepPolicy)
    arguments = (original, fitted, critic, observations, num_actions, has_densities, coupled, key)
    measured = _measure(*arguments)
    # Only now: NaN inside the program would be taken for a fault by `jax_debug_nans`.
    absent = {
        "kl": not has_densities,
        "distance": not coupled,
        "improvement": flow_underneath(original) is None,
    }
    for name in [name for name, is_absent in absent.items() if is_absent]:
        for entry in {name, f"{name}_stderr"} & set(measured):
            measured[entry] = as_entries(np.nan, measured[entry].dtype)
    return Fidelity(
        **measured, num_actions=num_observations * num_actions, num_observations=num_observations
    )


@eqx.filter_jit
def _measure(
    original, fitted, critic, observations, num_actions, has_densities, coupled, key
) -> dict[str, Array]:
    """The numbers of a `Fidelity`; zero for what there is not."""
    num_observations = batch_length("observations", observations)
    flow = flow_underneath(original)
    absent = jnp.zeros(())

    def of_action(o, key):
        # The same noise for both, so that what they have in common cancels in the difference.
        x, y = original.draw(o, key=key), fitted.draw(o, key=key)
        value = critic_value(original, critic, o, x)
        before = value if flow is None else critic_value(flow, critic, o, flow.draw(o, key=key))
        return dict(
            x=x,
            y=y,
            gain=value - before,
            lost=value - critic_value(fitted, critic, o, y),
            kl=_log_ratio(original, fitted, o, key) if has_densities else absent,
            squared=jnp.sum((x - y) ** 2) if coupled else absent,
        )

    def of_observation(row):
        o, key = row
        results = jax.vmap(lambda key: of_action(o, key))(jr.split(key, num_actions))
        x: Array = results.pop("x").reshape(num_actions, -1)
        y: Array = results.pop("y").reshape(num_actions, -1)
        results = jax.tree.map(lambda leaf: jnp.mean(leaf).astype(x.dtype), results)
        return results | dict(
            between=_mean_of_pairs(x, y),
            within=_mean_of_pairs(x, x) + _mean_of_pairs(y, y),
            spread=_mean_of_pairs(x, x, squared=True),
        )

    keys = jr.split(key, num_observations)
    results = lax.map(of_observation, (observations, keys), batch_size=max(1, 256 // num_actions))
    mean: dict[str, Array] = jax.tree.map(jnp.mean, results)
    stderr = lambda name: jnp.std(results[name], ddof=1) / jnp.sqrt(num_observations)
    twice_between = jnp.where(mean["between"] > 0, 2 * mean["between"], 1)
    spread = jnp.where(mean["spread"] > 0, mean["spread"], 1)
    return dict(
        kl=mean["kl"],
        kl_stderr=stderr("kl"),
        distance=jnp.sqrt(mean["squared"] / spread),
        # An estimate of zero is negative half the time.
        energy=jnp.maximum(2 * mean["between"] - mean["within"], 0) / twice_between,
        improvement=mean["gain"],
        improvement_stderr=stderr("gain"),
        lost=mean["lost"],
        lost_stderr=stderr("lost"),
    )


def _log_ratio(original, fitted, o, key) -> Scalar:
    """log(original / fitted) at an action of the original.

    The density of the original is the density of its sampler with its steps, from the Jacobian of
    the map that takes noise to the action. With the density in continuous time, the errors of the
    steps would count as errors of the fitted policy.
    """
    flow = original.flow_policy
    flow = eqx.tree_at(lambda flow: flow.adjoint, flow, diffrax.ForwardMode())
    z = flow.noise(o, key=key)
    a, jacobian = value_and_jacobian(lambda z: original.from_flow(o, flow.flow(o, z)), z)
    log_noise = jnp.sum(jax.scipy.stats.norm.logpdf(z))
    options = {} if a.size <= dense_limit else dict(num_probes=4, key=jr.fold_in(key, 1))
    log_fitted: Array = fitted.log_prob(o, a, **options)
    return log_noise - jnp.linalg.slogdet(jacobian)[1] - log_fitted


def _mean_of_pairs(
    x: Float[Array, "n size"], y: Float[Array, "n size"], *, squared: bool = False
) -> Scalar:
    """The mean distance of a row of one from another row of the other: of independent actions."""
    n = x.shape[0]
    squares = jnp.sum((x[:, None] - y[None]) ** 2, axis=-1)
    squares = jnp.where(jnp.eye(n, dtype=bool), 0, squares)
    return jnp.sum(squares if squared else jnp.sqrt(squares)) / (n * (n - 1))
