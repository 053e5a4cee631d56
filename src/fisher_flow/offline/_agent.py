import abc
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, PRNGKeyArray, PyTree, Scalar, ScalarLike

from .._misc import check_at_least, check_instance, check_positive_integer
from .._training import apply_gradient
from ..data import Transitions
from ..encoders import AbstractEncoder, make_encoder
from ..flows import AbstractPolicy, flow_matching_loss, FlowPolicy, VelocityMLP
from ..values import AbstractCriticLearning


class AbstractAgent(eqx.Module):
    """Abstract base class for agents: what is learned from a batch of transitions, and how.

    An agent holds settings only. What it learns is a state, which `init` makes, `update` improves
    by one batch and `policy` turns into something that acts. [`fisher_flow.train`][] loops over
    them; so can your own code.
    """

    @abc.abstractmethod
    def init(self, example: Transitions, *, key: PRNGKeyArray) -> PyTree[Any]:
        """The state to start from.

        **Arguments:**

        - `example`: transitions of the shapes and dtypes of the data; only these are used.
        - `key`: a `jax.random.key` for the initial parameters.
        """

    @abc.abstractmethod
    def update(
        self, state: Any, batch: Transitions, *, key: PRNGKeyArray
    ) -> tuple[Any, dict[str, Scalar]]:
        """One gradient step on each network.

        **Arguments:**

        - `state`: what `init` or the last `update` returned.
        - `batch`: some rows of the data.
        - `key`: a `jax.random.key`.

        **Returns:**

        The new state, and the statistics named in the docstring of the agent.
        """

    def settle(self, state: Any, observations: PyTree[Array], *, key: PRNGKeyArray) -> PyTree[Any]:
        """Settles anew what needs more actions than a batch has, such as the time of a score.

        [`fisher_flow.train`][] calls it before the first update, after 100, 200, 400 and 800 of
        them, and then after every 1000. By default nothing is to be settled.

        **Arguments:**

        - `state`: what `update` returned.
        - `observations`: a batch of observations of the data.
        - `key`: a `jax.random.key`.

        **Returns:**

        The new state.
        """
        del observations, key
        return state

    @abc.abstractmethod
    def policy(
        self, state: Any, observations: PyTree[Array], *, key: PRNGKeyArray
    ) -> AbstractPolicy:
        """The policy that has been learned.

        **Arguments:**

        - `state`: what `update` returned.
        - `observations`: a batch of observations of the data, for agents that settle something
            (such as the length of a step) once for all of them.
        - `key`: a `jax.random.key` for the same.
        """


class Learner(eqx.Module):
    """A network and the state of the optimiser that trains it."""

    model: Any
    optimiser_state: Any

    @staticmethod
    def init(model: Any, optimiser: optax.GradientTransformation) -> "Learner":
        return Learner(model, optimiser.init(eqx.filter(model, eqx.is_inexact_array)))

    def step(self, gradient: Any, optimiser: optax.GradientTransformation) -> "Learner":
        return Learner(*apply_gradient(optimiser, gradient, self.optimiser_state, self.model))


def check_flow(flow: Any) -> None:
    check_instance("flow", flow, BehaviourFlow, "fisher_flow.BehaviourFlow()")


def check_parts(flow: Any, critic: Any, learning_rate: Any) -> None:
    """Refuses what is no flow, no critic or no rate of an agent."""
    check_flow(flow)
    example = "fisher_flow.TemporalDifference()"
    check_instance("critic", critic, AbstractCriticLearning, example)
    check_at_least("learning_rate", learning_rate, 0, 3e-4)


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
            losses = jax.vmap(lambda o, a, key: flow_matching_loss(policy, o, a, key=key))(
                batch.observations, batch.actions, keys
            )
            return jnp.mean(losses)

        loss, gradient = loss_and_gradient(flow.model)
        return flow.step(gradient, adam(self.learning_rate)), loss


def adam(learning_rate: Any) -> optax.GradientTransformation:
    return optax.adam(learning_rate)


def first(example: Transitions) -> tuple[PyTree[Array], Float[Array, "..."]]:
    """One observation and one action."""
    return jax.tree.map(lambda leaf: jnp.asarray(leaf[0]), (example.observations, example.actions))


def require_next_actions(batch: Transitions, agent: str, example: str) -> Array:
    if batch.next_actions is None:
        raise ValueError(
            f"`transitions` must have `next_actions` for {agent}, but got `None`. Write "
            f"`Transitions.from_episodes(...)`, which knows what was done next, or {example}."
        )
    return jnp.asarray(batch.next_actions)
