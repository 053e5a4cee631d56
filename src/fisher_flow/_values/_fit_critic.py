from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Float, PRNGKeyArray, PyTree, ScalarLike

from .._checks import (
    check_at_least,
    check_equal_lengths,
    check_instance,
    check_positive_integer,
)
from .._custom_types import Data
from .._fit import fit
from .._trees import in_full_precision, random_rows, with_dtypes_of
from ._critic_learner import CriticLearner
from ._q_ensemble import QEnsemble
from ._temporal_difference import TemporalDifference


class _Columns(NamedTuple):
    observations: Any
    actions: Any
    rewards: Any
    next_observations: Any
    next_actions: Any
    masks: Any


def fit_critic(
    critic: QEnsemble,
    observations: PyTree[Float[Data, "batch ..."]],
    actions: Float[Data, "batch ..."],
    rewards: Float[Data, " batch"],
    next_observations: PyTree[Float[Data, "batch ..."]],
    next_actions: Float[Data, "batch ..."],
    masks: Float[Data, " batch"],
    *,
    discount: ScalarLike = 0.99,
    target_rate: ScalarLike = 0.005,
    num_updates: int = 20_000,
    batch_size: int = 256,
    learning_rate: ScalarLike = 3e-4,
    progress: bool = True,
    key: PRNGKeyArray,
) -> QEnsemble:
    r"""Fits a critic of the behaviour policy to logged transitions, by temporal differences,

    $$Q(o, a) \to r + \gamma\, m\, \bar Q(o', a'),$$

    with the loss of [`fisher_flow.TemporalDifference`][]. The action $a'$ is the one that the data
    took next, so no action is ever evaluated that is not in the data, and no policy is sampled.

    **Arguments:**

    - `critic`: the critic to start from. Parameters of half precision are trained in float32, and
        returned in the dtypes that they have. It is not modified.
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
    - `progress`: whether to show a progress bar with the loss, and the mean and the largest value.
    - `key`: a `jax.random.key`; the same key gives the same critic.

    **Returns:**

    The trained critic.

    **Raises:**

    - `ValueError` if the lengths do not match, or an argument is not of its kind.
    - `FloatingPointError` if the training ends in NaN.
    """
    check_instance("critic", critic, QEnsemble, "fisher_flow.QEnsemble(3, 1, key=key)")
    data = _Columns(observations, actions, rewards, next_observations, next_actions, masks)
    check_equal_lengths(**data._asdict())
    check_positive_integer("num_updates", num_updates, 20_000)
    check_positive_integer("batch_size", batch_size, 256)
    check_at_least("learning_rate", learning_rate, 0, 3e-4)
    for name, column in (("rewards", rewards), ("masks", masks)):
        if jnp.ndim(column) != 1:
            raise ValueError(
                f"`{name}` must have one entry a transition, but got shape {jnp.shape(column)}. "
                f"Write `{name}={name}.reshape(-1)`."
            )
    learning = TemporalDifference(discount=discount, target_rate=target_rate)
    data = jax.tree.map(jnp.asarray, data)
    # Arrays, so that other numbers are no reason to compile again.
    learning, rate = jax.tree.map(jnp.asarray, learning), jnp.asarray(learning_rate)
    learner = fit(
        _update,
        (data, learning, batch_size, rate),
        CriticLearner.init(in_full_precision(critic), optax.adam(rate)),
        num_updates,
        key=key,
        progress=progress,
        description="critic",
    )
    return with_dtypes_of(critic, learner.model)


def _update(args, learner, key, step):
    del step
    data, learning, batch_size, learning_rate = args
    batch = in_full_precision(random_rows(data, batch_size, key=key))
    return learner.update(learning, optax.adam(learning_rate), batch, batch.next_actions, key=key)
