"""Evaluates a refined policy on device, in an environment written in JAX.

Acting, the environment and the refinement are one compiled program: hundreds of episodes at once.
"""

import gymnax
import jax
import jax.numpy as jnp
import jax.random as jr

import fisher_flow


env, parameters = gymnax.make("Pendulum-v1")


def play_episodes(act, key, num_episodes):
    """Plays episodes at once, each by `act(observation, key=key)`; returns their transitions."""

    def step(carry, key):
        observation, state = carry
        act_key, step_key = jr.split(key)
        action = act(observation, key=act_key)
        following = env.step_env(step_key, state, action, parameters)
        next_observation, state, reward, *_ = following
        return (next_observation, state), (observation, action, reward, next_observation)

    def episode(key):
        reset_key, key = jr.split(key)
        start = env.reset_env(reset_key, parameters)
        return jax.lax.scan(step, start, jr.split(key, parameters.max_steps_in_episode))[1]

    return jax.vmap(episode)(jr.split(key, num_episodes))


def behaviour(observation, *, key):
    """Pumps energy and balances, with noise: sometimes a little, sometimes a lot."""
    cosine, sine, speed = observation
    pump = 2 * jnp.sign(speed + 1e-6)
    balance = -10 * jnp.arctan2(sine, cosine) - 2 * speed
    action = jax.lax.select(cosine > 0.9, balance, pump)
    noise_key, size_key = jr.split(key)
    size = jr.choice(size_key, jnp.array([0.3, 1.5]))
    return jnp.clip(action + size * jr.normal(noise_key), -2, 2)[None]


def main(num_updates=3000, num_episodes=256):
    keys = jr.split(jr.key(0), 6)
    data_key, velocity_key, flow_key, critic_key, train_key, play_key = keys
    data = jax.jit(lambda key: play_episodes(behaviour, key, num_episodes))(data_key)
    observations, actions, rewards, next_observations = data
    next_actions = jnp.roll(actions, -1, axis=1)
    # The last transition of an episode has no next action.
    observations, actions, rewards, next_observations, next_actions = (
        x[:, :-1].reshape(-1, *x.shape[2:])
        for x in (observations, actions, rewards / 5, next_observations, next_actions)
    )

    velocity = fisher_flow.VelocityMLP(3, (1,), width_size=64, key=velocity_key)
    policy = fisher_flow.FlowPolicy(velocity, (1,), bounds=(-2.0, 2.0))
    policy = fisher_flow.fit_flow(
        policy, observations, actions, num_updates=num_updates, key=flow_key, progress=False
    )
    critic = fisher_flow.QEnsemble(3, 1, width_size=64, key=critic_key)
    critic = fisher_flow.fit_critic(
        critic,
        observations,
        actions,
        rewards,
        next_observations,
        next_actions,
        masks=jnp.ones(len(actions)),  # no episode terminates
        num_updates=num_updates,
        key=train_key,
        progress=False,
    )
    method = fisher_flow.NaturalStep(radius=0.5, num_calibration=1024)
    refined = fisher_flow.refine(policy, critic, method, observations=observations)

    for name, played in (("behaviour", policy), ("refined", refined)):
        play = jax.jit(
            lambda key, act=played.sample: play_episodes(act, key, num_episodes)[2].sum(axis=1)
        )
        returns = play(play_key)
        error = returns.std() / len(returns) ** 0.5
        print(f"{name:10} return {returns.mean():8.1f} ± {error:.1f}")


if __name__ == "__main__":
    main()
