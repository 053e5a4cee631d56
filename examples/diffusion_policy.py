"""Refines a diffusion policy: a network that predicts noise, in diffusion time.

The variance-preserving schedule and the network stay as they are. Two wrappers say what it predicts
and which way its time runs; `check_convention` holds that against data.
"""

import jax
import jax.numpy as jnp
import jax.random as jr
import optax
from flax import nnx

import fisher_flow


class Noise(nnx.Module):
    """Predicts the noise in `x = alpha a + sigma noise`, where time 1 is all noise."""

    def __init__(self, rngs):
        self.first = nnx.Linear(1 + 2 + 2, 128, rngs=rngs)
        self.second = nnx.Linear(128, 128, rngs=rngs)
        self.last = nnx.Linear(128, 2, rngs=rngs)

    def __call__(self, s, x, observation):
        h = jnp.concatenate([s[..., None], x, observation], axis=-1)
        return self.last(nnx.gelu(self.second(nnx.gelu(self.first(h)))))


def make_data(key, num):
    state_key, mode_key, noise_key = jr.split(key, 3)
    observations = jr.normal(state_key, (num, 2))
    sign = jr.rademacher(mode_key, (num, 1), jnp.float32)
    noise = jr.normal(noise_key, (num, 2)) * jnp.array([0.3, 0.15])
    return observations, 0.5 * observations + sign * jnp.array([[0.8, 0.4]]) + noise


def train(model, path, observations, actions, key, num_updates, batch_size=256):
    optimiser = nnx.Optimizer(model, optax.adam(1e-3), wrt=nnx.Param)

    @nnx.jit
    def update(model, optimiser, key):
        row_key, time_key, noise_key = jr.split(key, 3)
        rows = jr.randint(row_key, (batch_size,), 0, len(actions))
        s = jr.uniform(time_key, (batch_size,), minval=1e-3)
        noise = jr.normal(noise_key, (batch_size, 2))
        alpha, sigma = jax.vmap(path.alpha)(1 - s), jax.vmap(path.sigma)(1 - s)
        x = alpha[:, None] * actions[rows] + sigma[:, None] * noise

        def loss(model):
            return jnp.mean((model(s, x, observations[rows]) - noise) ** 2)

        optimiser.update(model, nnx.grad(loss)(model))

    for update_key in jr.split(key, num_updates):
        update(model, optimiser, update_key)
    return model


def main(num_updates=3000):
    data_key, train_key = jr.split(jr.key(0))
    observations, actions = make_data(data_key, 20_000)
    path = fisher_flow.VariancePreservingPath()
    model = train(Noise(nnx.Rngs(0)), path, observations, actions, train_key, num_updates)

    velocity = fisher_flow.NoisePrediction(fisher_flow.ReversedTime(model), path)
    policy = fisher_flow.FlowPolicy(velocity, action_shape=(2,), path=path, num_steps=50)
    fisher_flow.check_convention(policy, observations[:1000], actions[:1000], key=jr.key(1))

    critic = lambda observation, action: action[0] - jnp.sum((action - observation) ** 2)
    method = fisher_flow.NaturalStep(radius=0.3)
    refined = fisher_flow.refine(policy, critic, method, observations=observations[:4096])
    print(fisher_flow.certify(refined, critic, observations[4096:8192], key=jr.key(2)))


if __name__ == "__main__":
    main()
