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

    width_size: int = eqx.field(static=True)
    depth: int = eqx.field(static=True)
    num_steps: int = eqx.field(static=True)
    bounds: tuple[float, float] = eqx.field(static=True)
    encoder: AbstractEncoder | None
    learning_rate: ScalarLike

    def __init__(
        self,
        *,
        width_size: int = 512,
        depth: int = 4,
        num_steps: int = 10,
        bounds: tuple[float, float] = (-1.0, 1.0),
        encoder: AbstractEncoder | None = None,
        learning_rate: ScalarLike = 3e-4,
    ):
        """**Arguments:**

        - `width_size`, `depth`: the hidden layers of the velocity field.
        - `num_steps`: the number of Euler steps of a sample.
        - `bounds`: the bounds of the actions. Rescale an environment whose bounds differ from
            entry to entry, with `gymnasium.wrappers.RescaleAction`.
        - `encoder`: what the velocity field sees images through, such as
            [`fisher_flow.ImpalaEncoder`][].
        - `learning_rate`: the rate of Adam.
        """
        check_positive_integer("width_size", width_size, 512)
        check_positive_integer("depth", depth, 4)
        check_positive_integer("num_steps", num_steps, 10)
        check_at_least("learning_rate", learning_rate, 0, 3e-4)
        self.width_size = width_size
        self.depth = depth
        self.num_steps = num_steps
        self.bounds = bounds
        self.encoder = encoder
        self.learning_rate = learning_rate

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


def check_flow(flow: Any) -> None:
    check_instance("flow", flow, BehaviourFlow, "fisher_flow.BehaviourFlow()")
