"""Refines a flow policy that was written in Flax and trained with Optax.

Nothing is rewritten: a linen module joins its parameters in a `jax.tree_util.Partial`, which is a
PyTree, so the parameters can be trained further; an NNX module is a PyTree by itself.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import jax.random as jr
import optax
from jax.tree_util import Partial

import fisher_flow


class Velocity(nn.Module):
    """Noise at time 0, batches first, as one would write it for training."""

    @nn.compact
    def __call__(self, t, x, observation):
        h = jnp.concatenate([t[:, None], x, observation], axis=-1)
        for _ in range(3):
            h = nn.gelu(nn.Dense(128)(h))
        return nn.Dense(x.shape[-1])(h)


def make_data(key, num):
    """Two ways to act in every state, of which the critic below likes one better."""
    state_key, mode_key, noise_key = jr.split(key, 3)
    observations = jr.normal(state_key, (num, 2))
    sign = jr.rademacher(mode_key, (num, 1), jnp.float32)
    noise = jr.normal(noise_key, (num, 2)) * jnp.array([0.3, 0.1])
    return observations, jnp.tanh(observations) + sign * jnp.array([[1.0, 0.5]]) + noise


def train(model, parameters, observations, actions, key, num_updates, batch_size=256):
    optimiser = optax.adam(1e-3)

    def loss(parameters, key):
        row_key, time_key, noise_key = jr.split(key, 3)
        rows = jr.randint(row_key, (batch_size,), 0, len(actions))
        x1, t = actions[rows], jr.uniform(time_key, (batch_size,))
        x0 = jr.normal(noise_key, x1.shape)
        xt = t[:, None] * x1 + (1 - t[:, None]) * x0
        velocity = model.apply(parameters, t, xt, observations[rows])
        return jnp.mean((velocity - (x1 - x0)) ** 2)

    def update(state, key):
        parameters, optimiser_state = state
        gradient = jax.grad(loss)(parameters, key)
        updates, optimiser_state = optimiser.update(gradient, optimiser_state)
        return (optax.apply_updates(parameters, updates), optimiser_state), None

    state = parameters, optimiser.init(parameters)
    (parameters, _), _ = jax.jit(lambda s, k: jax.lax.scan(update, s, k))(
        state, jr.split(key, num_updates)
    )
    return parameters


def main(num_updates=3000):
    data_key, init_key, train_key = jr.split(jr.key(0), 3)
    observations, actions = make_data(data_key, 20_000)
    model = Velocity()
    parameters = model.init(init_key, jnp.zeros(1), actions[:1], observations[:1])
    parameters = train(model, parameters, observations, actions, train_key, num_updates)

    network = fisher_flow.BatchedVelocity(Partial(model.apply, parameters))
    policy = fisher_flow.FlowPolicy(network, action_shape=(2,))
    fisher_flow.check_convention(policy, observations[:1000], actions[:1000], key=jr.key(1))

    critic = lambda observation, action: -jnp.sum((action - observation) ** 2)
    method = fisher_flow.NaturalStep(radius=0.3)
    refined = fisher_flow.refine(policy, critic, method, observations=observations[:4096])
    print(fisher_flow.certify(refined, critic, observations[4096:8192], key=jr.key(2)))


if __name__ == "__main__":
    main()
