"""Refines inside somebody else's training step: RLax losses, Optax updates, one `scan`.

The critic learns by temporal differences towards the values of the *refined* policy, which changes
with the critic at every step. No data are needed to refine, so it works on traced parameters.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import jax.random as jr
import optax
import rlax

import fisher_flow


class Critic(nn.Module):
    @nn.compact
    def __call__(self, observation, action):
        h = jnp.concatenate([observation, action], axis=-1)
        for _ in range(2):
            h = nn.tanh(nn.Dense(64)(h))
        return nn.Dense(1)(h)[..., 0]


def behaviour(t, x, observation):
    """The velocity of a policy that draws from N(observation, I / 4)."""
    variance = t**2 / 4 + (1 - t) ** 2
    return observation + (t / 4 - (1 - t)) / variance * (x - t * observation)


def main(num_updates=200, batch_size=64):
    policy = fisher_flow.FlowPolicy(behaviour, action_shape=(2,))
    method = fisher_flow.NaturalStep(radius=0.2, num_auxiliary=8)
    model, optimiser = Critic(), optax.adam(3e-3)
    parameters = model.init(jr.key(0), jnp.zeros(2), jnp.zeros(2))

    def reward(observation, action):  # one step, then a new state
        return -jnp.sum((action - 0.5) ** 2, axis=-1)

    def update(state, key):
        parameters, optimiser_state = state
        keys = jr.split(key, 4)
        observations, following = jr.normal(keys[0], (2, batch_size, 2))
        actions = jax.vmap(lambda o, k: policy.sample(o, key=k))(
            observations, jr.split(keys[1], batch_size)
        )
        refined = fisher_flow.refine(policy, lambda o, a: model.apply(parameters, o, a), method)
        next_actions = jax.vmap(lambda o, k: refined.sample(o, key=k))(
            following, jr.split(keys[2], batch_size)
        )

        def loss(parameters):
            q: Any = model.apply(parameters, observations, actions)
            next_q: Any = model.apply(parameters, following, next_actions)
            discounts = jnp.full(batch_size, 0.5)
            errors: Any = jax.vmap(rlax.td_learning)(
                q, reward(observations, actions), discounts, next_q
            )
            return jnp.mean(rlax.l2_loss(errors))

        gradient = jax.grad(loss)(parameters)
        updates, optimiser_state = optimiser.update(gradient, optimiser_state)
        gain = jnp.mean(reward(following, next_actions)) + jnp.mean(
            jnp.sum((following - 0.5) ** 2, axis=-1) + 0.5
        )
        return (optax.apply_updates(parameters, updates), optimiser_state), gain

    scan = jax.jit(lambda state, keys: jax.lax.scan(update, state, keys))
    _, gains = scan((parameters, optimiser.init(parameters)), jr.split(jr.key(1), num_updates))
    print(f"gain in reward, first 20 updates: {gains[:20].mean():.3f}")
    print(f"gain in reward, last 20 updates:  {gains[-20:].mean():.3f}")


if __name__ == "__main__":
    main()
