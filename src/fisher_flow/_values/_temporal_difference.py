import dataclasses
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray, PyTree, Scalar, ScalarLike

from .._custom_types import Action, Data, Observation
from .._networks import AbstractEncoder, make_encoder
from ._critic_learning import AbstractCriticLearning, check_members
from ._q_ensemble import QEnsemble


class TemporalDifference(AbstractCriticLearning):
    r"""How the critic of an agent is made and learned: by squared temporal differences,

    $$\sum_i \bigl(Q_i(o, a) - y\bigr)^2, \qquad
        y = r + \gamma\, m\, \operatorname{agg}_j \bar Q_j(o', a'),$$

    towards targets $\bar Q_j$ that follow the members $Q_j$ slowly. The agent chooses $a'$.
    """

    _: dataclasses.KW_ONLY
    num_members: int = eqx.field(default=2, static=True)
    width_size: int = eqx.field(default=512, static=True)
    depth: int = eqx.field(default=4, static=True)
    aggregate: Callable[[Array], Array] = eqx.field(default=jnp.mean, static=True)
    encoder: AbstractEncoder | None = None
    discount: ScalarLike = 0.99
    target_rate: ScalarLike = 0.005

    def __check_init__(self):
        check_members(self)

    def init(self, observation: Observation, action: Action, *, key: PRNGKeyArray) -> QEnsemble:
        """A critic for observations and actions like these."""
        example = "TemporalDifference(encoder=fisher_flow.ImpalaEncoder())"
        network, size, key = make_encoder(self.encoder, observation, action.dtype, key, example)
        return QEnsemble(
            size,
            action.size,
            num_members=self.num_members,
            width_size=self.width_size,
            depth=self.depth,
            aggregate=self.aggregate,
            encoder=network,
            dtype=action.dtype,
            key=key,
        )

    def loss(
        self,
        critic: QEnsemble,
        observations: PyTree[Any],
        actions: Float[Data, "batch ..."],
        targets: Float[Array, " batch"],
        *,
        key: PRNGKeyArray,
    ) -> tuple[Scalar, dict[str, Scalar]]:
        """The squared error, summed over the members and averaged over the batch; and logs."""
        del key
        values = jax.vmap(critic.values)(observations, jnp.asarray(actions))
        loss = jnp.mean(jnp.sum((values - targets[:, None]) ** 2, axis=1))
        return loss, {"critic_loss": loss, "q_mean": jnp.mean(values), "q_max": jnp.max(values)}


TemporalDifference.__init__.__doc__ = r"""**Arguments:**

- `num_members`: the number of networks, each with layer norm.
- `width_size`, `depth`: the hidden layers of each.
- `aggregate`: how the values of the members become one: `jax.numpy.mean`, or
    `jax.numpy.min` for a pessimist.
- `encoder`: what turns images into features for the networks, such as
    [`fisher_flow.ImpalaEncoder`][]. All of them share one.
- `discount`: the discount $\gamma$ of one step.
- `target_rate`: the share of the critic that enters its target at each update.
"""
