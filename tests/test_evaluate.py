import functools

import gymnasium
import numpy as np
import pytest
from helpers import gaussian

import fisher_flow as ff


class Counter(gymnasium.Env):
    """Pays the action, and ends after as many steps as the seed says."""

    observation_space = gymnasium.spaces.Box(-1.0, 1.0, (2,), np.float32)
    action_space = gymnasium.spaces.Box(-1.0, 1.0, (1,), np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        # Reset again by the vector environment, an episode is short, and must not be counted.
        self.remaining = 1 if seed is None else seed
        return np.zeros(2, np.float32), {}

    def step(self, action):
        self.remaining -= 1
        return np.zeros(2, np.float32), float(action[0]), self.remaining == 0, False, {}


class Always:
    """A policy from elsewhere: all that is asked of it is to sample."""

    def sample(self, observation, *, key):
        return observation[:1] + 0.25


def make(env, num):
    return gymnasium.vector.SyncVectorEnv([env] * num)


def test_plays_one_episode_in_each_environment():
    # Environment i starts from the seed 2 + i, and so ends after 2 + i steps.
    assert np.allclose(ff.evaluate(Always(), make(Counter, 3), seed=2), [0.5, 0.75, 1.0])


def test_episodes_that_do_not_end():
    with pytest.raises(RuntimeError, match=r"2 of 3 .* `max_steps=2`.*`gymnasium.make\("):
        ff.evaluate(Always(), make(Counter, 3), seed=2, max_steps=2)


def test_the_same_seed_gives_the_same_returns():
    policy = gaussian([0.0], [[1.0]]).policy(bounds=(-2.0, 2.0))
    envs = make(functools.partial(gymnasium.make, "Pendulum-v1", max_episode_steps=30), 2)
    first = ff.evaluate(policy, envs, seed=0)
    assert np.array_equal(ff.evaluate(policy, envs, seed=0), first)
    assert not np.any(ff.evaluate(policy, envs, seed=1) == first)
