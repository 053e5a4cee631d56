import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import optax
from jax import lax
from jaxtyping import Float, PRNGKeyArray, PyTree

from .._checks import check_equal_lengths, check_instance, check_positive_integer
from .._custom_types import Data
from .._fit import apply_gradient, fit
from ._q_ensemble import QEnsemble


def fit_critic(
    critic: QEnsemble,
    observations: PyTree[Float[Data, "batch ..."]],
    actions: Float[Data, "batch ..."],
    rewards: Float[Data, " batch"],
    next_observations: PyTree[Float[Data, "batch ..."]],
    next_actions: Float[Data, "batch ..."],
    masks: Float[Data, " batch"],
    *,
    discount: float = 0.99,
    target_rate: float = 0.005,
    num_updates: int = 20_000,
    batch_size: int = 256,
    learning_rate: float = 3e-4,
    progress: bool = True,
    key: PRNGKeyArray,
) -> QEnsemble:
    r"""Fits a critic of the behaviour policy to logged transitions, by temporal differences,

    $$Q(o, a) \to r + \gamma\, m\, \bar Q(o', a'),$$

    where $a'$ is the action that the data took next, so no action is ever evaluated that is not in
    the data, and no policy is sampled.

    **Arguments:**

    - `critic`: the critic to start from. It is not modified.
    - `observations`, `actions`, `rewards`: the transitions, each with a leading axis.
    - `next_observations`, `next_actions`: what came next in the same episode.
    - `masks`: 0 where the episode terminated after the transition, else 1. An episode that was cut
        off by a time limit has not terminated.

    **Other arguments:**

    - `discount`: the discount $\gamma$.
    - `target_rate`: the share of the critic that enters the target $\bar Q$ at each update.
    - `num_updates`: the number of gradient steps.
    - `batch_size`: the number of transitions in each, drawn with replacement.
    - `learning_rate`: the rate of Adam.
    - `progress`: whether to show a progress bar with the loss and the mean value.
    - `key`: a `jax.random.key`; the same key gives the same critic.

    **Returns:**

    The trained critic.

    **Raises:**

    - `ValueError` if the lengths do not match.
    """
    check_instance("critic", critic, QEnsemble, "fisher_flow.QEnsemble(3, 1, key=key)")
    data = dict(
        observations=observations,
        actions=actions,
        rewards=rewards,
        next_observations=next_observations,
        next_actions=next_actions,
        masks=masks,
    )
    check_equal_lengths(**data)
    check_positive_integer("num_updates", num_updates, 20_000)
    check_positive_integer("batch_size", batch_size, 256)
    for name, column in (("rewards", rewards), ("masks", masks)):
        if jnp.ndim(column) != 1:
            raise ValueError(
                f"`{name}` must have one entry a transition, but got shape {jnp.shape(column)}. "
                f"Write `{name}={name}.reshape(-1)`."
            )
    data = jax.tree.map(jnp.asarray, data)
    optimiser_state = optax.adam(learning_rate).init(eqx.filter(critic, eqx.is_inexact_array))
    args = (data, discount, target_rate, batch_size, learning_rate)
    critic, _, _ = fit(
        _update,
        args,
        (critic, critic, optimiser_state),
        num_updates,
        key=key,
        progress=progress,
        description="critic",
    )
    return critic


def _update(args, state, key, step):
    del step
    data, discount, target_rate, batch_size, learning_rate = args
    critic, target_critic, optimiser_state = state
    rows = jr.randint(key, (batch_size,), 0, data["rewards"].shape[0])
    batch = jax.tree.map(lambda leaf: leaf[rows], data)
    next_value = jax.vmap(target_critic)(batch["next_observations"], batch["next_actions"])
    target = lax.stop_gradient(batch["rewards"] + discount * batch["masks"] * next_value)

    @eqx.filter_value_and_grad(has_aux=True)
    def loss_and_gradient(critic):
        values = jax.vmap(critic.values)(batch["observations"], batch["actions"])
        return jnp.mean((values - target[:, None]) ** 2), jnp.mean(values)

    (loss, value), gradient = loss_and_gradient(critic)
    optimiser = optax.adam(learning_rate)
    critic, optimiser_state = apply_gradient(optimiser, gradient, optimiser_state, critic)
    arrays, static = eqx.partition(target_critic, eqx.is_inexact_array)
    arrays = optax.incremental_update(eqx.filter(critic, eqx.is_inexact_array), arrays, target_rate)
    target_critic = eqx.combine(arrays, static)
    return (critic, target_critic, optimiser_state), {"loss": loss, "value": value}
