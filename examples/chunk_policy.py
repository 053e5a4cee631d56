"""Refines a policy of action chunks with noise at time 1, as most robot policies are written.

A chunk of 16 actions of 7 joints is one action of the policy. Observations are a dictionary with an
image, and the network takes batches only.
"""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import optax

import fisher_flow


HORIZON, JOINTS = 16, 7


class Velocity(eqx.Module):
    """Noise at time 1: trained on `x = t noise + (1 - t) chunk`."""

    convolution: eqx.nn.Conv2d
    layers: list[eqx.nn.Linear]

    def __init__(self, key):
        keys = jr.split(key, 4)
        self.convolution = eqx.nn.Conv2d(1, 4, kernel_size=4, stride=4, key=keys[0])
        sizes = [1 + HORIZON * JOINTS + 16 + JOINTS, 256, 256, HORIZON * JOINTS]
        self.layers = [
            eqx.nn.Linear(n, m, key=key)
            for n, m, key in zip(sizes[:-1], sizes[1:], keys[1:], strict=True)
        ]

    def __call__(self, t, x, observation):  # batches
        def one(t, x, observation):
            image = observation["image"].astype(x.dtype) / 255
            features = self.convolution(image[None]).reshape(-1)
            h = jnp.concatenate([t[None], x.reshape(-1), features, observation["joints"]])
            for layer in self.layers[:-1]:
                h = jax.nn.gelu(layer(h))
            return self.layers[-1](h).reshape(x.shape)

        return jax.vmap(one)(t, x, observation)


def make_data(key, num):
    """Smooth reaches from the joints towards where the image is bright."""
    keys = jr.split(key, 4)
    joints = 0.5 * jr.normal(keys[0], (num, JOINTS))
    images = jr.randint(keys[1], (num, 8, 8), 0, 256).astype(jnp.uint8)
    target = jnp.mean(images / 255 - 0.5, axis=(1, 2))[:, None] + jr.normal(keys[2], (num, JOINTS))
    ramp = jnp.linspace(0, 1, HORIZON)[None, :, None]
    chunks = joints[:, None] + ramp * (target - joints)[:, None]
    chunks = chunks + 0.2 * jr.normal(keys[3], chunks.shape)
    return {"image": images, "joints": joints}, chunks


@eqx.filter_jit
def train(velocity, observations, chunks, key, num_updates, batch_size=128) -> Any:
    optimiser = optax.adam(1e-3)
    arrays, static = eqx.partition(velocity, eqx.is_inexact_array)

    def loss(arrays, key):
        row_key, time_key, noise_key = jr.split(key, 3)
        rows = jr.randint(row_key, (batch_size,), 0, len(chunks))
        a, t = chunks[rows], jr.uniform(time_key, (batch_size,))
        noise = jr.normal(noise_key, a.shape)
        x = t[:, None, None] * noise + (1 - t[:, None, None]) * a
        observation = jax.tree.map(lambda leaf: leaf[rows], observations)
        v = eqx.combine(arrays, static)(t, x, observation)
        return jnp.mean((v - (noise - a)) ** 2)

    def update(state, key):
        arrays, optimiser_state = state
        updates, optimiser_state = optimiser.update(jax.grad(loss)(arrays, key), optimiser_state)
        return (optax.apply_updates(arrays, updates), optimiser_state), None

    state = arrays, optimiser.init(arrays)
    (arrays, _), _ = jax.lax.scan(update, state, jr.split(key, num_updates))
    return eqx.combine(arrays, static)


def main(num_updates=1000):
    data_key, init_key, train_key = jr.split(jr.key(0), 3)
    observations, chunks = make_data(data_key, 20_000)
    velocity = train(Velocity(init_key), observations, chunks, train_key, num_updates)

    network = fisher_flow.ReversedVelocity(fisher_flow.BatchedVelocity(velocity))
    policy = fisher_flow.FlowPolicy(network, action_shape=(HORIZON, JOINTS))
    some = jax.tree.map(lambda leaf: leaf[:500], observations)
    fisher_flow.check_convention(policy, some, chunks[:500], key=jr.key(1))

    def critic(observation, chunk):  # reach up, and do not jerk
        return jnp.mean(chunk[-1]) - 10 * jnp.mean(jnp.diff(chunk, axis=0) ** 2)

    method = fisher_flow.NaturalStep(radius=0.3, num_calibration=512)
    refined = fisher_flow.refine(policy, critic, method, observations=some)
    held_out = jax.tree.map(lambda leaf: leaf[500:1000], observations)
    print(fisher_flow.certify(refined, critic, held_out, num_actions=500, key=jr.key(2)))


if __name__ == "__main__":
    main()
