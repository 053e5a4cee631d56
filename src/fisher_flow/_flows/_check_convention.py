import itertools
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, Float, PRNGKeyArray, PyTree

from .._checks import check_equal_lengths, check_instance
from ._path import AbstractAffineGaussianPath, CosinePath, LinearPath, VariancePreservingPath
from ._policy import FlowPolicy
from ._prediction import (
    DataPrediction,
    NoisePrediction,
    ReversedTime,
    ReversedVelocity,
    ScorePrediction,
    VPrediction,
)


_kinds = NoisePrediction, DataPrediction, VPrediction, ScorePrediction


def check_convention(
    policy: FlowPolicy,
    observations: PyTree[Any],
    actions: Float[Array, "batch ..."],
    *,
    key: PRNGKeyArray,
) -> dict[str, float]:
    r"""Checks on logged actions that a policy declares its network as it was trained.

    A velocity in reversed time, or along another path, gives no error: it gives a wrong score. But
    every declaration says how to take noise off an action, and the right one does so best. So
    noise of four sizes is put on the actions, and the declared time direction, path and prediction
    type are held against all others that the library knows.

    **Arguments:**

    - `policy`: the policy, as declared.
    - `observations`: observations of the data, any PyTree of arrays with a leading batch axis.
    - `actions`: the actions taken there; a few hundred are enough. For a policy with
        [`fisher_flow.TanhBounds`][] pass `bounds.unproject(actions)`.

    **Other arguments:**

    - `key`: a `jax.random.key`, for the noise.

    **Returns:**

    The mean squared error of each declaration, relative to the variance of the actions, from the
    best on.

    **Raises:**

    - `ValueError` if another declaration is better by more than 3%, and by more than chance;
        the message ends with it.
    """
    check_instance("policy", policy, FlowPolicy, "fisher_flow.FlowPolicy(velocity, action_shape)")
    check_equal_lengths(observations=observations, actions=actions)
    declared, network, own_path = _declared(policy)
    losses = _losses(network, own_path, observations, actions, key)
    errors = {name: float(jnp.mean(loss)) for name, loss in losses.items()}
    errors = {name: error for name, error in errors.items() if error == error}  # not NaN
    errors = dict(sorted(errors.items(), key=lambda item: item[1]))
    best = next(iter(errors), declared)
    excess = losses[declared] - losses[best]
    stderr = jnp.std(excess) / len(excess) ** 0.5
    known = declared in errors
    if best != declared and (
        not known or (errors[declared] > 1.03 * errors[best] and jnp.mean(excess) > 5 * stderr)
    ):
        shown = f"{errors[declared]:.3g}" if known else "NaN"
        raise ValueError(
            f"`policy` declares `{declared}`, whose error at taking noise off these actions is "
            f"{shown} of their variance, but `{best}` has {errors[best]:.3g}. Write "
            f"`FlowPolicy({best}, ...)` with the same network."
        )
    return errors


def _declared(policy) -> tuple[str, Any, AbstractAffineGaussianPath]:
    field = policy.velocity_field
    if isinstance(field, ReversedVelocity):
        return _name("velocity", True, policy.path), field.network, policy.path
    if type(field) in _kinds:  # of a user's own prediction only path and time are in question
        reverse = isinstance(field.network, ReversedTime)
        network = field.network.network if reverse else field.network
        return _name(type(field).__name__, reverse, policy.path), network, policy.path
    return _name("velocity", False, policy.path), field, policy.path


def _name(kind: str, reverse: bool, path: AbstractAffineGaussianPath) -> str:
    """The declaration as it is written."""
    path_name = f"{type(path).__name__}()"
    if kind == "velocity":
        field = "ReversedVelocity(network)" if reverse else "network"
    else:
        field = f"{kind}({'ReversedTime(network)' if reverse else 'network'}, {path_name})"
    return f"{field}, path={path_name}"


@eqx.filter_jit
def _losses(network, own_path, observations, actions, key) -> dict[str, Float[Array, " batch"]]:
    """The squared error of every declaration at each action, over four sizes of noise and relative
    to the variance."""
    others = [LinearPath(), CosinePath(), VariancePreservingPath()]
    paths = [own_path, *(path for path in others if type(path) is not type(own_path))]
    deviation = jnp.sqrt(jnp.mean(jnp.var(actions, axis=0)))
    ratios = deviation * jnp.asarray([0.25, 0.5, 1.0, 2.0], actions.dtype)

    def errors(path, reverse, ratio, o, a, z):
        t = path.time_at_noise_ratio(ratio)
        α, σ, α_dot, σ_dot = path.schedule(t)
        x = α * a + σ * z
        # The network is evaluated once for all kinds of output.
        output = network(1 - t if reverse else t, x, o)
        velocities = {"velocity": -output if reverse else output}
        for kind in _kinds:
            velocities[kind.__name__] = kind(lambda t, x, o: output, path)(t, x, o)
        # v = α̇ x₁ + σ̇ x₀ and x = α x₁ + σ x₀, solved for x₁
        denoised = {
            kind: (σ * v - σ_dot * x) / (σ * α_dot - α * σ_dot) for kind, v in velocities.items()
        }
        return {
            _name(kind, reverse, path): jnp.sum((x1 - a) ** 2) / a.size / deviation**2
            for kind, x1 in denoised.items()
        }

    def losses(o, a, z):
        found = {}
        for path, reverse in itertools.product(paths, (False, True)):
            at = lambda ratio, path=path, reverse=reverse: errors(path, reverse, ratio, o, a, z)
            found |= jax.tree.map(jnp.mean, jax.vmap(at)(ratios))
        return found

    return jax.vmap(losses)(observations, actions, jr.normal(key, actions.shape, actions.dtype))
