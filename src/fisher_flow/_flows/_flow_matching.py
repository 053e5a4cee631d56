from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Float, PRNGKeyArray, PyTree, Scalar, ScalarLike

from .._checks import (
    check_at_least,
    check_batch_of_actions,
    check_equal_lengths,
    check_instance,
    check_positive_integer,
)
from .._custom_types import Action, Data, Observation
from .._fit import apply_gradient, decaying_adam, fit
from .._trees import in_full_precision, with_dtypes_of
from ._policy import FlowPolicy


def flow_matching_loss(
    policy: FlowPolicy,
    observation: Observation,
    action: Action,
    mask: Any = None,
    *,
    key: PRNGKeyArray,
) -> Scalar:
    r"""The conditional flow-matching loss of one logged action,

    $$\operatorname{mean} \bigl(v(t, x_t, o) - \dot x_t\bigr)^2, \qquad
        t \sim U[0, 1], \quad x_0 \sim \mathcal N(0, I), \quad x_1 = a,$$

    where the mean is over the entries of the action. Average it over a batch with `jax.vmap`.

    **Arguments:**

    - `policy`: the policy whose velocity is trained.
    - `observation`: one observation, any PyTree of arrays.
    - `action`: the action that was taken there.
    - `mask`: for a chunk of actions, 1 for each that was taken and 0 for each that only fills the
        chunk up: an array of shape `(horizon,)`. The mean is over the entries of the former. `None`
        if all were taken.
    - `key`: a `jax.random.key`.

    **Returns:**

    The loss, a scalar. It does not go to zero: what is left is the variance of $\dot x_t$ given
    $x_t$.

    ??? cite "Reference"

        Equation 6 of

        ```bibtex
        @inproceedings{lipman2023flow,
            title={Flow matching for generative modeling},
            author={Lipman, Yaron and Chen, Ricky T. Q. and Ben-Hamu, Heli and Nickel, Maximilian
                    and Le, Matthew},
            booktitle={International Conference on Learning Representations},
            year={2023},
        }
        ```
    """
    noise_key, time_key = jr.split(key)
    x0 = jr.normal(noise_key, action.shape, action.dtype)
    t = jr.uniform(time_key, (), action.dtype)
    x_t, target = policy.path.interpolate(t, x0, action)
    square = (policy.velocity(t, x_t, observation) - target) ** 2
    if mask is None:
        return jnp.mean(square)
    weight = jnp.asarray(mask, square.dtype)
    weight = weight.reshape(weight.shape + (1,) * (square.ndim - weight.ndim))
    weight = jnp.broadcast_to(weight, square.shape)
    total = jnp.sum(weight)
    # Padding may be anything, so long as it is finite.
    return jnp.sum(weight * square) / jnp.where(total > 0, total, 1)


def fit_flow(
    policy: FlowPolicy,
    observations: PyTree[Float[Data, "batch ..."]],
    actions: Float[Data, "batch ..."],
    action_masks: Any = None,
    *,
    num_updates: int = 20_000,
    batch_size: int = 256,
    learning_rate: ScalarLike = 1e-3,
    progress: bool = True,
    key: PRNGKeyArray,
) -> FlowPolicy:
    """Fits a flow policy to logged observations and actions: behaviour cloning by flow matching.

    All data are kept on the device, and the updates run there, many in one program.

    **Arguments:**

    - `policy`: the policy to start from. Its arrays are trained, in float32 if they are of half
        precision, and returned in the dtypes that they have; it is not modified.
    - `observations`: the observations, any PyTree of arrays with a leading axis.
    - `actions`: the actions taken there, in the same order. For a policy with
        [`fisher_flow.TanhBounds`][] pass `bounds.unproject(actions)`.
    - `action_masks`: for chunks of actions, 1 for each action that was taken and 0 for each that
        only fills its chunk up, of shape `(batch, horizon)`, such as the `action_masks` of
        [`fisher_flow.Transitions.chunks`][]. `None` if all were taken.

    **Other arguments:**

    - `num_updates`: the number of gradient steps.
    - `batch_size`: the number of rows in each, drawn with replacement.
    - `learning_rate`: the initial rate of Adam. It falls to zero along a cosine.
    - `progress`: whether to show a progress bar with the loss.
    - `key`: a `jax.random.key`; the same key gives the same policy.

    **Returns:**

    The trained policy.

    **Raises:**

    - `ValueError` if lengths or shapes do not match.
    - `FloatingPointError` if the training ends in NaN.
    """
    check_instance("policy", policy, FlowPolicy, "fisher_flow.FlowPolicy(velocity, action_shape)")
    check_equal_lengths(observations=observations, actions=actions)
    check_positive_integer("num_updates", num_updates, 20_000)
    check_positive_integer("batch_size", batch_size, 256)
    check_at_least("learning_rate", learning_rate, 0, 1e-3)
    # An array, so that another rate does not compile again.
    learning_rate = jnp.asarray(learning_rate)
    observations, actions = jax.tree.map(jnp.asarray, (observations, actions))
    check_batch_of_actions(actions, policy.action_shape)
    if action_masks is not None:
        action_masks = jnp.asarray(action_masks)
        if actions.shape[: action_masks.ndim] != action_masks.shape or action_masks.ndim < 2:
            raise ValueError(
                "`action_masks` must have one entry for each action of a chunk, of shape (batch, "
                f"horizon), but got shape {action_masks.shape} for actions of shape "
                f"{actions.shape}. Write `action_masks=transitions.action_masks`."
            )
    finite = jnp.all(jnp.isfinite(actions))
    for leaf in jax.tree.leaves(observations):
        finite &= jnp.all(jnp.isfinite(leaf))
    if not finite:
        raise ValueError(
            "`observations` and `actions` must be finite, but some entries are not. Drop those "
            "rows: `keep = jnp.isfinite(actions).all(-1)`, then `actions=actions[keep]`."
        )
    original = policy.velocity_field
    policy = eqx.tree_at(lambda policy: policy.velocity_field, policy, in_full_precision(original))
    actions = in_full_precision(actions)
    parameters = eqx.filter(policy.velocity_field, eqx.is_inexact_array)
    if len(jax.tree.leaves(parameters)) == 0:
        raise ValueError(
            "`policy` must have a velocity field with arrays to train, but its field "
            f"`{policy.velocity_field!r}` has none. Make the field a module that holds its "
            "parameters: `FlowPolicy(VelocityMLP(observation_size, action_shape, key=key), "
            "action_shape)`."
        )
    optimiser_state = decaying_adam(learning_rate, num_updates).init(parameters)
    args = (observations, actions, action_masks, batch_size, learning_rate, num_updates)
    policy, _ = fit(
        _update,
        args,
        (policy, optimiser_state),
        num_updates,
        key=key,
        progress=progress,
        description="behaviour flow",
    )
    field = with_dtypes_of(original, policy.velocity_field)
    return eqx.tree_at(lambda policy: policy.velocity_field, policy, field)


def _update(args, state, key, step):
    del step
    observations, actions, action_masks, batch_size, learning_rate, num_updates = args
    policy, optimiser_state = state
    row_key, loss_key = jr.split(key)
    rows = jr.randint(row_key, (batch_size,), 0, actions.shape[0])
    batch = jax.tree.map(lambda leaf: leaf[rows], (observations, actions, action_masks))
    batch = in_full_precision(batch)

    @eqx.filter_value_and_grad
    def loss_and_gradient(policy):
        def loss(row, key):
            return flow_matching_loss(policy, *row, key=key)

        return jnp.mean(jax.vmap(loss)(batch, jr.split(loss_key, batch_size)))

    loss, gradient = loss_and_gradient(policy)
    optimiser = decaying_adam(learning_rate, num_updates)
    field, optimiser_state = apply_gradient(
        optimiser, gradient.velocity_field, optimiser_state, policy.velocity_field
    )
    policy = eqx.tree_at(lambda policy: policy.velocity_field, policy, field)
    return (policy, optimiser_state), {"loss": loss}
