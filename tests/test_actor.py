import types

import gymnasium
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from helpers import gaussian

import fisher_flow as ff


class Chunks:
    """Draws chunks that count: the first entry is the step in the chunk, the second is random."""

    def __init__(self, horizon, shape):
        self.action_shape = (horizon, *shape)

    def sample(self, observation, *, key):
        steps = jnp.arange(self.action_shape[0]) / 10
        return jnp.stack([steps, jnp.full_like(steps, jr.uniform(key))], axis=1)


class Box(gymnasium.Env):
    observation_space = gymnasium.spaces.Box(-1.0, 1.0, (3,), np.float32)
    action_space = gymnasium.spaces.Box(-1.0, 1.0, (2,), np.float32)


def vector(num):
    return gymnasium.vector.SyncVectorEnv([Box] * num)


def policy():
    return gaussian([0.0, 0.0], [[1.0, 0.3], [0.3, 2.0]]).policy()


def test_actions_fit_the_space():
    actor = ff.Actor(policy(), Box(), seed=0)
    actions = np.stack([actor(np.zeros(3, np.float32)) for _ in range(50)])
    assert actions.dtype == np.float32 and actions.shape == (50, 2)
    assert np.all(np.abs(actions) <= 1) and np.any(np.abs(actions) == 1)
    assert len(np.unique(actions[:, 0])) > 20


def test_seeds_repeat():
    one, same, other = (ff.Actor(policy(), Box(), seed=seed) for seed in (3, 3, 4))
    o = np.zeros(3)
    first = np.stack([one(o) for _ in range(5)])
    assert np.array_equal(first, np.stack([same(o) for _ in range(5)]))
    assert not np.array_equal(first, np.stack([other(o) for _ in range(5)]))


def test_deterministic_actions_depend_on_the_observation_alone():
    def velocity(t, x, observation):
        return observation[:2] - 0.1 * x

    actor = ff.Actor(ff.FlowPolicy(velocity, (2,)), Box(), deterministic=True)
    a, b = np.full(3, 0.1), np.full(3, -0.2)
    first = actor(a)
    second = actor(b)
    assert np.array_equal(actor(a), first) and not np.array_equal(first, second)


def test_a_vector_of_environments_acts_as_one_batch():
    actor = ff.Actor(policy(), vector(4))
    actions = actor(np.zeros((4, 3), np.float32))
    assert actions.shape == (4, 2)
    assert len(np.unique(actions[:, 0])) == 4


@pytest.mark.parametrize("num_executed", [None, 2])
def test_chunks_are_executed_in_order(num_executed):
    actor = ff.Actor(Chunks(3, (2,)), Box(), num_executed=num_executed)
    actions = np.stack([actor(np.zeros(3)) for _ in range(6)])
    length = 3 if num_executed is None else 2
    assert np.allclose(actions[:, 0], [0.1 * (i % length) for i in range(6)])
    # a new draw whenever a chunk is used up
    assert np.allclose(actions[:, 1].reshape(-1, length), actions[::length, 1][:, None])
    assert len(np.unique(actions[:, 1])) == 6 // length


@pytest.mark.parametrize("mode", list(gymnasium.vector.AutoresetMode))
def test_an_episode_that_ends_forgets_its_chunk(mode):
    envs = gymnasium.vector.SyncVectorEnv([Box] * 2, autoreset_mode=mode)
    actor = ff.Actor(Chunks(4, (2,)), envs)
    o = np.zeros((2, 3))
    before = actor(o)
    actor.reset(np.array([False, True]))
    if mode is gymnasium.vector.AutoresetMode.NEXT_STEP:
        # The environment ignores this action: the next one is the first of the new episode.
        actor(o)
        after = actor(o)
        assert np.allclose(after[:, 0], [0.2, 0.0])
        assert after[0, 1] == before[0, 1] and after[1, 1] != before[1, 1]
        return
    after = actor(o)
    assert np.allclose(after[:, 0], [0.1, 0.0])
    assert after[0, 1] == before[0, 1] and after[1, 1] != before[1, 1]


@pytest.mark.parametrize("horizon", [1, 4])
def test_a_reset_of_everything_draws_at_once(horizon):
    actor = ff.Actor(Chunks(horizon, (2,)), vector(2))
    o = np.zeros((2, 3))
    actor.reset()
    first = actor(o)
    actor.reset()
    second = actor(o)
    assert np.allclose(first[:, 0], 0) and np.allclose(second[:, 0], 0)
    assert not np.any(first[:, 1] == second[:, 1])


def test_evaluate_plays_chunks():
    class Pays(Box):
        def reset(self, *, seed=None, options=None):
            super().reset(seed=seed)
            self.steps = 0
            return np.zeros(3, np.float32), {}

        def step(self, action):
            self.steps += 1
            return np.zeros(3, np.float32), float(action[0]), self.steps == 4, False, {}

    envs = gymnasium.vector.SyncVectorEnv([Pays] * 2)
    # 0, 0.1, 0.2 and then the start of the next chunk
    assert np.allclose(ff.evaluate(Chunks(3, (2,)), envs), 0.3, atol=1e-6)


def test_acts_inside_a_real_environment():
    env = gymnasium.make("Pendulum-v1", max_episode_steps=20)
    base = gaussian([0.0], [[1.0]], jnp.float32).policy(bounds=env.action_space)
    refined = ff.refine(base, lambda o, a: a[0] * o[1], ff.NaturalStep(num_auxiliary=4))
    actor, total = ff.Actor(refined, env), 0.0
    observation, _ = env.reset(seed=0)
    for _ in range(20):
        observation, reward, _, truncated, _ = env.step(actor(observation))
        total += float(reward)
    assert truncated and np.isfinite(total)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: ff.Actor(lambda o: o, Box()), r"`policy` must have `sample\(.*Actor\(FlowPolicy"),  # pyright: ignore
        (
            lambda: ff.Actor(types.SimpleNamespace(policy=lambda seed: None), Box()),  # pyright: ignore
            r"`trained.policy\(\)`",
        ),
        (
            lambda: ff.Actor(gaussian([0.0], [[1.0]]).policy(), Box()),
            r"shape \(1,\), but the actions of `env` have shape \(2,\).*`action_shape=\(2,\)`",
        ),
        (
            lambda: ff.Actor(policy(), gymnasium.make("CartPole-v1")),
            r"`env` must have continuous actions.*`Box`",
        ),
        (
            lambda: ff.Actor(Chunks(3, (2,)), Box(), num_executed=4),
            r"at most the 3 actions of a chunk.*`num_executed=3`",
        ),
    ],
)
def test_errors(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_observations_may_be_dictionaries():
    def velocity(t, x, observation):
        return observation["speed"] + jnp.mean(observation["image"].astype(x.dtype)) - x

    class Pictures(Box):
        observation_space = gymnasium.spaces.Dict(
            image=gymnasium.spaces.Box(0, 255, (4, 4), np.uint8),
            speed=gymnasium.spaces.Box(-1.0, 1.0, (2,), np.float32),
        )

    actor = ff.Actor(ff.FlowPolicy(velocity, (2,)), Pictures())
    observation = Pictures.observation_space.sample()
    assert actor(observation).shape == (2,)
    assert jax.tree.leaves(observation)[0].dtype == np.uint8
