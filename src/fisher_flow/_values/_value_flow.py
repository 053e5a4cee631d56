import dataclasses
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray, PyTree, Scalar, ScalarLike

from .._checks import check_positive_integer
from .._custom_types import Action, Data, Observation
from .._networks import AbstractEncoder, encode, EncoderNetwork, make_encoder, QNetwork
from .._trees import ravel_inputs
from ._critic_learning import AbstractCriticLearning, check_members
from ._network_ensemble import AbstractNetworkEnsemble, make_members


class FlowEnsemble(AbstractNetworkEnsemble):
    """Several flows from noise to returns; the critic of [`fisher_flow.ValueFlow`][]."""

    members: QNetwork
    encoder: EncoderNetwork | None
    aggregate: Callable[[Array], Array] = eqx.field(static=True)
    num_steps: int = eqx.field(static=True)
    num_nodes: int = eqx.field(static=True)

    def values(self, observation: Observation, action: Action) -> Float[Array, " members"]:
        """The mean return of an action by each member."""
        # Fixed noise: the value is a function of the action, with a gradient.
        nodes, weights = np.polynomial.hermite_e.hermegauss(self.num_nodes)
        dtype = self.members.layers[0].weight.dtype
        weights = jnp.asarray(weights / weights.sum(), dtype)
        z = jnp.asarray(nodes, dtype)
        returns = jax.vmap(lambda z: self.returns(observation, action, z))(z)
        return weights @ returns

    def returns(
        self, observation: Observation, action: Action, noise: Scalar
    ) -> Float[Array, " members"]:
        """The point to which the flow of each member carries `noise`. If the noise is normal, it is
        a sample of the return."""
        x = jnp.full(self.members.layers[0].weight.shape[:1], noise)
        features = encode(self.encoder, observation)  # once for all steps

        def euler(x, t):
            return x + self._velocities(features, action, x, t) / self.num_steps, None

        times = jnp.arange(self.num_steps, dtype=x.dtype) / self.num_steps
        return jax.lax.scan(euler, x, times)[0]

    def velocities(
        self, observation: Observation, action: Action, x: Float[Array, " members"], t: Scalar
    ) -> Float[Array, " members"]:
        """The velocity of each member at its own point."""
        return self._velocities(encode(self.encoder, observation), action, x, t)

    def _velocities(self, features, action, x, t):
        return eqx.filter_vmap(lambda member, x: member(ravel_inputs(features, action, x, t)))(
            self.members, x
        )


class ValueFlow(AbstractCriticLearning):
    r"""A critic that learns the distribution of the return, by flow matching from normal noise,

    $$\sum_i \bigl(v_i(t, x_t, o, a) - (y - z)\bigr)^2, \quad x_t = (1 - t) z + t y, \qquad
        y = r + \gamma\, m\, \operatorname{agg}_j \bar Z_j(z' \mid o', a'),$$

    where $\bar Z_j(z')$ is the point to which the target flow carries the noise $z'$. The velocity
    that is learned is linear in the target given $x_t$, so samples of the target give the flow of
    the distributional Bellman operator, a contraction. (floq learns towards the mean of the target
    instead; its flow then keeps only the spread of one step.) The value is the mean return, by
    Gauss-Hermite quadrature over the noise. Keep returns of order one. An agent whose next value is
    a number, such as [`fisher_flow.ImplicitQLearning`][], makes a target with the spread of one
    step.

    ??? cite "Reference"

        ```bibtex
        @article{dong2025value,
            title={Value flows},
            author={Dong, Perry and Zheng, Chongyi and Finn, Chelsea and Sadigh, Dorsa and
                    Eysenbach, Benjamin},
            journal={arXiv:2510.07650},
            year={2025},
        }
        @article{agrawalla2025floq,
            title={floq: Training critics via flow-matching for scaling compute in value-based
                   {RL}},
            author={Agrawalla, Bhavya and Nauman, Michal and Agrawal, Khush and Kumar, Aviral},
            journal={arXiv:2509.06863},
            year={2025},
        }
        ```
    """

    _: dataclasses.KW_ONLY
    num_steps: int = eqx.field(default=8, static=True)
    num_nodes: int = eqx.field(default=4, static=True)
    num_members: int = eqx.field(default=2, static=True)
    width_size: int = eqx.field(default=512, static=True)
    depth: int = eqx.field(default=4, static=True)
    aggregate: Callable[[Array], Array] = eqx.field(default=jnp.mean, static=True)
    encoder: AbstractEncoder | None = None
    discount: ScalarLike = 0.99
    target_rate: ScalarLike = 0.005

    def __check_init__(self):
        check_positive_integer("num_steps", self.num_steps, 8)
        check_positive_integer("num_nodes", self.num_nodes, 4)
        check_members(self)

    def init(self, observation: Observation, action: Action, *, key: PRNGKeyArray) -> FlowEnsemble:
        example = "ValueFlow(encoder=fisher_flow.ImpalaEncoder())"
        network, size, key = make_encoder(self.encoder, observation, action.dtype, key, example)
        size += action.size + 2  # for the point and the time
        members = make_members(
            self.num_members, size, self.width_size, self.depth, action.dtype, key
        )
        return FlowEnsemble(members, network, self.aggregate, self.num_steps, self.num_nodes)

    def next_values(
        self,
        target_critic: FlowEnsemble,
        next_observations: PyTree[Any],
        next_actions: Float[Data, "batch ..."],
        *,
        key: PRNGKeyArray,
    ) -> Float[Array, " batch"]:
        next_a = jnp.asarray(next_actions)
        z = jr.normal(key, next_a.shape[:1], next_a.dtype)
        # The members share the noise, so that their mean, a mean of quantiles, loses no spread.
        sample = lambda o, a, z: target_critic.aggregate(target_critic.returns(o, a, z))
        return jax.vmap(sample)(next_observations, next_a, z)

    def loss(
        self,
        critic: FlowEnsemble,
        observations: PyTree[Any],
        actions: Float[Data, "batch ..."],
        targets: Float[Array, " batch"],
        *,
        key: PRNGKeyArray,
    ) -> tuple[Scalar, dict[str, Scalar]]:
        noise_key, time_key = jr.split(key)
        shape = (targets.shape[0], self.num_members)
        z = jr.normal(noise_key, shape, targets.dtype)
        t = jr.uniform(time_key, targets.shape, targets.dtype)
        y = targets[:, None]
        x = (1 - t[:, None]) * z + t[:, None] * y
        a = jnp.asarray(actions)
        v = jax.vmap(critic.velocities)(observations, a, x, t)
        loss = jnp.mean(jnp.sum((v - (y - z)) ** 2, axis=1))
        # At time 0 the point says nothing of the return, and the velocity leads to its mean.
        zero = jnp.zeros((), targets.dtype)
        means = jax.vmap(lambda o, a: critic.velocities(o, a, jnp.zeros_like(z[0]), zero))(
            observations, a
        )
        return loss, {"critic_loss": loss, "q_mean": jnp.mean(means), "q_max": jnp.max(means)}


ValueFlow.__init__.__doc__ = r"""**Arguments:**

- `num_steps`: the number of Euler steps from noise to a return.
- `num_nodes`: the number of nodes of the quadrature over the noise.
- the others: as in [`fisher_flow.TemporalDifference`][].
"""
