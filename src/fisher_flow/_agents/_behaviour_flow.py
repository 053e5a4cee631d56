import dataclasses
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import PRNGKeyArray, Scalar, ScalarLike

from .._checks import check_at_least, check_instance, check_positive_integer
from .._data import Transitions
from .._flows import flow_matching_loss, FlowPolicy
from .._networks import AbstractEncoder, make_encoder, VelocityMLP
from ._learner import adam, first, Learner


class BehaviourFlow(eqx.Module):
    r"""How the behaviour policy of an agent is made and learned: a velocity field, trained by flow
    matching on the logged actions ([`fisher_flow.flow_matching_loss`][]).
    """

    _: dataclasses.KW_ONLY
    width_size: int = eqx.field(default=512, static=True)
    depth: int = eqx.field(default=4, static=True)
    num_steps: int = eqx.field(default=10, static=True)
    bounds: tuple[float, float] = eqx.field(default=(-1.0, 1.0), static=True)
    encoder: AbstractEncoder | None = None
    learning_rate: ScalarLike = 3e-4

    def __check_init__(self):
        check_positive_integer("width_size", self.width_size, 512)
        check_positive_integer("depth", self.depth, 4)
        check_positive_integer("num_steps", self.num_steps, 10)
        check_at_least("learning_rate", self.learning_rate, 0, 3e-4)

    def init(self, example: Transitions, *, key: PRNGKeyArray) -> Learner:
        """A flow with fresh parameters, and its optimiser."""
        observation, action = first(example)
        line = "BehaviourFlow(encoder=fisher_flow.ImpalaEncoder())"
        network, size, key = make_encoder(self.encoder, observation, action.dtype, key, line)
        field = VelocityMLP(
            size,
            action.shape,
            width_size=self.width_size,
            depth=self.depth,
            encoder=network,
            dtype=action.dtype,
            key=key,
        )
        return Learner.init(field, adam(self.learning_rate))

    def policy(self, flow: Learner) -> FlowPolicy:
        """The flow policy of a learner."""
        field = flow.model
        return FlowPolicy(field, field.action_shape, num_steps=self.num_steps, bounds=self.bounds)

    def update(
        self, flow: Learner, batch: Transitions, *, key: PRNGKeyArray
    ) -> tuple[Learner, Scalar]:
        """One step of flow matching; the learner and the loss."""
        keys = jax.random.split(key, len(batch))

        @eqx.filter_value_and_grad
        def loss_and_gradient(field):
            policy = self.policy(Learner(field, None))
            losses = jax.vmap(lambda o, a, m, key: flow_matching_loss(policy, o, a, m, key=key))(
                batch.observations, batch.actions, batch.action_masks, keys
            )
            return jnp.mean(losses)

        loss, gradient = loss_and_gradient(flow.model)
        return flow.step(gradient, adam(self.learning_rate)), loss


BehaviourFlow.__init__.__doc__ = """**Arguments:**

- `width_size`, `depth`: the hidden layers of the velocity field.
- `num_steps`: the number of Euler steps of a sample.
- `bounds`: the bounds of the actions. Rescale an environment whose bounds differ from
    entry to entry, with `gymnasium.wrappers.RescaleAction`.
- `encoder`: what turns images into features for the velocity field, such as
    [`fisher_flow.ImpalaEncoder`][].
- `learning_rate`: the rate of Adam.
"""


def check_flow(flow: Any) -> None:
    check_instance("flow", flow, BehaviourFlow, "fisher_flow.BehaviourFlow()")
