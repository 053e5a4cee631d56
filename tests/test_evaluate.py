import copy
import functools
import sys
import weakref

import gymnasium
import jax
import numpy as np
import pytest
from gymnasium.vector import AsyncVectorEnv, AutoresetMode, SyncVectorEnv
from helpers import gaussian
from PIL import Image

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


class Walk(gymnasium.Env):
    """Walks on from a random place for a random number of steps, and succeeds if it ends above."""

    observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (2,), np.float32)
    action_space = gymnasium.spaces.Box(-1.0, 1.0, (1,), np.float32)
    reports: str | None = "success"

    def __init__(self, render_mode=None):
        # Vector environments write to the metadata of the first, which must not be that of all.
        self.render_mode, self.metadata = render_mode, {"render_fps": 20}

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.place = self.np_random.normal(size=2).astype(np.float32)
        self.remaining = int(self.np_random.integers(2, 9))
        return self.place, self._info()

    def step(self, action):
        self.place = self.place + self.np_random.normal(size=2).astype(np.float32) + action
        self.remaining -= 1
        truncated = self.remaining == 0
        return self.place, float(self.place[0]), False, truncated, self._info()

    def _info(self):
        return {} if self.reports is None else {self.reports: bool(self.place[0] > 0)}

    def render(self):
        return np.full((8, 8, 3), 25 * self.remaining, np.uint8)


class Noisy:
    """Draws its actions, and so must be replayed with the same noise."""

    def sample(self, observation, *, key):
        return 0.1 * observation[:1] + jax.random.normal(key, (1,), observation.dtype)


class Chunked:
    action_shape = (3, 1)

    def sample(self, observation, *, key):
        return jax.random.normal(key, (3, 1), observation.dtype)


@functools.cache
def by_hand(policy, seed):
    """Plays one episode without a vector environment, or an actor."""
    env, steps, total, chunk = Walk(), 0, 0.0, []
    observation, info = env.reset(seed=seed)
    truncated = False
    while not truncated:
        if len(chunk) == 0:
            key = jax.random.fold_in(jax.random.key(seed), steps)
            chunk = np.asarray(policy.sample(observation, key=key)).reshape(-1, 1)
        action, chunk = np.clip(chunk[0], -1, 1), chunk[1:]
        observation, reward, _, truncated, info = env.step(action)
        total, steps = total + reward, steps + 1
    return total, steps, info["success"]


# Every mode with every number of environments, and both kinds of policies in turn.
kinds = [Noisy(), Chunked()]
every_kind_of_play = pytest.mark.parametrize(
    "policy, mode, num_envs",
    [
        pytest.param(kinds[(i + j) % 2], mode, num, id=f"{mode.name}-{num}")
        for i, mode in enumerate(AutoresetMode)
        for j, num in enumerate((1, 3, 8))
    ],
)


@every_kind_of_play
def test_an_episode_depends_on_its_seed_alone(policy, mode, num_envs):
    envs = SyncVectorEnv([Walk] * num_envs, autoreset_mode=mode)
    episodes = ff.rollout(policy, envs, num_episodes=7, seed=5)
    assert np.array_equal(episodes.seeds, np.arange(5, 12))
    returns, lengths, successes = np.transpose([by_hand(policy, seed) for seed in range(5, 12)])
    assert np.array_equal(episodes.lengths, lengths)
    assert np.array_equal(episodes.successes, successes)
    assert 0 < np.mean(successes) < 1 and len(set(lengths)) > 3  # so that these say something
    assert np.allclose(episodes.returns, returns, atol=1e-4)  # sums in float32


def test_evaluate_returns_the_returns_of_one_episode_in_each_environment():
    envs = SyncVectorEnv([Walk] * 4)
    episodes = ff.rollout(Noisy(), envs, seed=3)
    assert np.array_equal(ff.evaluate(Noisy(), envs, seed=3), episodes.returns)
    assert np.array_equal(episodes.seeds, [3, 4, 5, 6])


@pytest.mark.parametrize("reports", ["is_success", None])
@pytest.mark.parametrize("mode", [AutoresetMode.NEXT_STEP, AutoresetMode.SAME_STEP])
def test_the_other_name_of_success_and_none(reports, mode):
    make = type("Other", (Walk,), {"reports": reports})
    episodes = ff.rollout(Noisy(), SyncVectorEnv([make] * 2, autoreset_mode=mode), num_episodes=5)
    expected = [np.nan if reports is None else by_hand(kinds[0], seed)[2] for seed in range(5)]
    assert np.array_equal(episodes.successes, expected, equal_nan=True)


class Boasting(Walk):
    """Speaks of success only when there is one."""

    def _info(self):
        return {"success": True} if self.place[0] > 0 else {}


def test_success_that_some_environments_report_is_not_that_of_others():
    expected = [by_hand(kinds[0], seed)[2] or np.nan for seed in range(6)]
    for num_envs in (1, 6):
        episodes = ff.rollout(Noisy(), SyncVectorEnv([Boasting] * num_envs), num_episodes=6)
        assert np.array_equal(episodes.successes, expected, equal_nan=True)


@pytest.mark.slow
def test_environments_in_processes_of_their_own():
    make = functools.partial(gymnasium.make, "Pendulum-v1", max_episode_steps=20)
    policy = gaussian([0.0], [[1.0]]).policy(bounds=(-2.0, 2.0))
    expected = ff.rollout(policy, SyncVectorEnv([make] * 2), num_episodes=3)
    envs = AsyncVectorEnv([make] * 2, context="spawn")  # a fork of a process that runs JAX may hang
    try:
        episodes = ff.rollout(policy, envs, num_episodes=3)
    finally:
        envs.close()
    assert np.allclose(episodes.returns, expected.returns)
    assert np.array_equal(episodes.lengths, [20, 20, 20])


def test_episodes_that_cannot_be_played():
    with pytest.raises(ValueError, match=r"`envs` must be a vector .*`envs=gymnasium.vector"):
        ff.evaluate(Noisy(), Walk())  # pyright: ignore
    with pytest.raises(ValueError, match=r"`num_episodes` must .* `0`. Write `num_episodes=10`"):
        ff.rollout(Noisy(), SyncVectorEnv([Walk]), num_episodes=0)


@pytest.mark.parametrize("suffix", [".gif", ".webp", ".png"])
def test_a_video_shows_the_episode_of_its_seed(tmp_path, suffix):
    path = tmp_path / f"episode{suffix}"
    episodes = ff.rollout(Noisy(), SyncVectorEnv([Walk] * 2), num_episodes=4)
    longest = np.argmax(episodes.lengths)
    env = Walk(render_mode="rgb_array")
    again = ff.record_video(Noisy(), env, path, seed=episodes.seeds[longest])
    for name in ("returns", "lengths", "successes", "seeds"):
        assert np.allclose(getattr(again, name), getattr(episodes, name)[longest], atol=1e-4)
    with Image.open(path) as image:
        assert getattr(image, "n_frames", 1) == 1 + episodes.lengths[longest]
        assert image.size == (8, 8)


def test_a_video_with_fewer_frames(tmp_path):
    env = Walk(render_mode="rgb_array")
    seed = next(seed for seed in range(10) if by_hand(kinds[0], seed)[1] > 4)
    episode = ff.record_video(Noisy(), env, tmp_path / "a.gif", seed=seed, every=3, max_steps=4)
    assert episode.lengths[0] == 4
    with Image.open(tmp_path / "a.gif") as image:
        assert getattr(image, "n_frames", 1) == 2  # at the start and after 3 steps
        assert image.info["duration"] == 150  # at 20 frames a second


def test_a_video_of_what_renders_no_frames(tmp_path):
    with pytest.raises(ValueError, match=r"`env` must .* `render_mode=None`.*\"rgb_array\"\)`"):
        ff.record_video(Noisy(), Walk(), tmp_path / "episode.gif")
    with pytest.raises(ValueError, match=r"`path` must .*episode.avi`.*episode.gif\"`"):
        ff.record_video(Noisy(), Walk("rgb_array"), tmp_path / "episode.avi")


class Coloured(Walk):
    """Of an odd size, and of a shade that tells the step."""

    def render(self):
        self.drawn = getattr(self, "drawn", -1) + 1
        return np.full((33, 47, 3), 20 * self.drawn, np.uint8)


@pytest.mark.parametrize("every", [1, 2])
def test_an_mp4_has_the_frames_the_rate_and_the_size_of_the_episode(tmp_path, every):
    av = pytest.importorskip("av")
    seed = next(seed for seed in range(10) if by_hand(kinds[0], seed)[1] > 4)
    path = tmp_path / "episode.mp4"
    episode = ff.record_video(
        Noisy(), Coloured("rgb_array"), path, seed=seed, every=every, max_steps=4
    )
    same = ff.record_video(Noisy(), Walk("rgb_array"), tmp_path / "a.gif", seed=seed, max_steps=4)
    assert np.array_equal(episode.returns, same.returns)
    with av.open(str(path)) as file:
        (stream,) = file.streams
        assert stream.average_rate == 20 / every  # the environment has 20 frames a second
        frames = [frame.to_ndarray(format="rgb24") for frame in file.decode(stream)]
    assert len(frames) == 1 + 4 // every
    for i, frame in enumerate(frames):
        assert frame.shape == (34, 48, 3)  # even
        assert abs(frame.mean() - 20 * i) < 5


def test_the_frames_of_an_mp4_are_written_as_they_come(tmp_path):
    pytest.importorskip("av")

    class Endless(Coloured):
        alive = []

        def render(self):
            frame = np.zeros((33, 47, 3), np.uint8)
            self.alive.append(weakref.ref(frame))
            return frame

    ff.record_video(Noisy(), Endless("rgb_array"), tmp_path / "a.mp4", max_steps=20)
    assert sum(frame() is not None for frame in Endless.alive) <= 1


@pytest.mark.parametrize("library, suffix", [("av", ".mp4"), ("PIL", ".gif")])
def test_a_video_without_what_writes_it(tmp_path, monkeypatch, library, suffix):
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(ImportError, match=r'`pip install "fisher_flow\[video\]"`'):
        ff.record_video(Noisy(), Walk("rgb_array"), tmp_path / f"episode{suffix}")


class Ending(gymnasium.Env):
    """Walks on in double precision, into the abyss or until time is up, and sees what is left."""

    observation_space = gymnasium.spaces.Dict(
        place=gymnasium.spaces.Box(-np.inf, np.inf, (2,), np.float64),
        left=gymnasium.spaces.Box(0, 9, (), np.int64),
    )
    action_space = gymnasium.spaces.Box(-1.0, 1.0, (1,), np.float32)

    def __init__(self):
        self.metadata = {}

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.place = self.np_random.normal(size=2)
        self.left = int(self.np_random.integers(1, 9))
        return self._seen(), {}

    def step(self, action):
        self.place += self.np_random.normal(size=2) + action  # in place: who keeps it sees it move
        self.left -= 1
        return self._seen(), float(self.place[1]), self.place[0] > 2, self.left == 0, {}

    def _seen(self):
        return {"place": self.place, "left": np.array(self.left)}


class OfDicts:
    """Acts by the place, singly or in chunks."""

    def __init__(self, policy):
        self.policy = policy
        if hasattr(policy, "action_shape"):
            self.action_shape = policy.action_shape

    def sample(self, observation, *, key):
        return self.policy.sample(observation["place"], key=key)


def played_by_hand(policy, seed):
    """The transitions of one episode, without a vector environment, or an actor."""
    env, rows, chunk = Ending(), [], []
    seen = copy.deepcopy(env.reset(seed=seed)[0])

    def act(step):
        nonlocal chunk
        if len(chunk) == 0:
            key = jax.random.fold_in(jax.random.key(seed), step)
            chunk = np.asarray(policy.sample(seen, key=key)).reshape(-1, 1)
        action, chunk = np.clip(chunk[0], -1, 1), chunk[1:]
        return action

    action, done = act(0), False
    while not done:
        led_to, reward, terminated, truncated, _ = env.step(action)
        before, done = (seen, action), terminated or truncated
        seen = copy.deepcopy(led_to)
        action = act(len(rows) + 1)
        rows.append((*before, reward, 1 - terminated, seen, action, done))
    return rows


@every_kind_of_play
def test_collected_are_the_transitions_of_the_episodes(policy, mode, num_envs):
    policy = OfDicts(policy)
    envs = SyncVectorEnv([Ending] * num_envs, autoreset_mode=mode, copy=num_envs != 3)
    t = ff.collect(policy, envs, num_episodes=7, seed=5)
    expected = [row for seed in range(5, 12) for row in played_by_hand(policy, seed)]
    o, a, r, masks, next_o, next_a, ends = (
        jax.tree.map(lambda *leaves: np.stack(leaves), *column)
        for column in zip(*expected, strict=True)
    )
    assert 0 < np.sum(masks == 0) < np.sum(ends) == 7  # so that these say something
    assert t.observations["place"].dtype == t.rewards.dtype == t.masks.dtype == np.float32
    assert np.array_equal(t.masks, masks) and np.array_equal(t.ends, ends)
    for mine, theirs in ((t.observations, o), (t.next_observations, next_o)):
        assert np.array_equal(mine["left"], theirs["left"])
        assert np.allclose(mine["place"], theirs["place"], atol=1e-4)
    for mine, theirs in ((t.actions, a), (t.rewards, r), (t.next_actions, next_a)):
        assert np.allclose(mine, theirs, atol=1e-4)
    episodes = ff.rollout(policy, envs, num_episodes=7, seed=5)
    assert np.array_equal(episodes.lengths, np.diff(np.flatnonzero(t.ends), prepend=-1))
    starts = np.append(0, np.flatnonzero(t.ends)[:-1] + 1)
    assert np.allclose(episodes.returns, np.add.reduceat(t.rewards, starts), atol=1e-4)


def test_environments_that_do_not_say_how_it_ended():
    class Silent(gymnasium.vector.VectorWrapper):
        def step(self, actions):
            *stepped, infos = self.env.step(actions)
            return (*stepped, {k: x for k, x in infos.items() if "final_obs" not in k})

    envs = Silent(SyncVectorEnv([Walk] * 2, autoreset_mode=AutoresetMode.SAME_STEP))
    with pytest.raises(ValueError, match=r"`envs` must say in `final_obs`.*`envs=gymnasium"):
        ff.collect(Noisy(), envs)
    ff.rollout(Noisy(), envs)  # needs to know only that it ended
