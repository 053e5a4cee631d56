import csv
import dataclasses
import signal
from collections.abc import Callable

import equinox as eqx
import gymnasium
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from gymnasium.vector import SyncVectorEnv
from helpers import run_script

import fisher_flow as ff
from fisher_flow._training._sampling import BalancedSampling, ReplayBuffer


pytestmark = pytest.mark.usefixtures("standard_promotion")
sizes: dict = dict(width_size=8, depth=1)
flow, critic = ff.BehaviourFlow(**sizes), ff.TemporalDifference(**sizes)
# Where it does not matter: it is compiled fastest.
cloning = ff.BehaviourCloning(flow=flow)
# Learns from every column.
one_step = ff.OneStep(flow=flow, critic=critic, refinement=None, num_candidates=1)


class Walk(gymnasium.Env):
    """Walks on from a random place, into the abyss or for a random number of steps."""

    observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (2,), np.float32)
    action_space = gymnasium.spaces.Box(-1.0, 1.0, (1,), np.float32)

    def __init__(self):
        self.metadata = {}

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.place = self.np_random.normal(size=2).astype(np.float32)
        self.remaining = int(self.np_random.integers(2, 9))
        return self.place, {}

    def step(self, action):
        self.place = self.place + self.np_random.normal(size=2).astype(np.float32) + action
        self.remaining -= 1
        return self.place, float(self.place[0]), self.place[1] > 2, self.remaining == 0, {}


def make(num=3, env: Callable = Walk):
    return SyncVectorEnv([env] * num)


def logged(num=60, scale=1.0):
    rng = np.random.default_rng(0)
    o = scale * rng.normal(size=(num, 2)).astype(np.float32)
    a = rng.uniform(-1, 1, (num, 1)).astype(np.float32)
    r = scale * rng.normal(size=num).astype(np.float32)
    return ff.Transitions(o, a, r, np.ones(num, np.float32), o[::-1].copy(), a[::-1].copy())


def train(agent: ff.AbstractAgent = cloning, transitions=None, num_updates=3, **options):
    transitions = logged() if transitions is None else transitions
    return ff.train(agent, transitions, num_updates, batch_size=8, progress=False, **options)


def fine_tune(trained, envs, num_steps, **options):
    defaults: dict = dict(batch_size=8, progress=False, normaliser=None)
    return ff.fine_tune(trained, envs, num_steps, **(defaults | options))


def leaves(state):
    return [np.asarray(x) for x in jax.tree.leaves(eqx.filter(state, eqx.is_array))]


def same(x, y):
    return all(np.array_equal(a, b) for a, b in zip(leaves(x), leaves(y), strict=True))


def rows_of(path):
    with open(path, newline="") as stream:
        return list(csv.DictReader(stream))


def test_it_is_the_loop_that_anyone_would_write(tmp_path):
    trained, envs = train(one_step, seeds=[4]), make()
    options = dict(updates_per_step=0.5, online_share=0.25)
    tuned = fine_tune(trained, envs, 40, folder=tmp_path, **options)

    state, updates = trained.states[0], 3
    offline = trained.transitions
    played = []
    update = eqx.filter_jit(one_step.update)
    table = rows_of(tmp_path / "online.csv")
    assert len(table) > 2
    for row in table:
        policy = one_step.policy(state, None, key=jr.key(4))
        played.append(ff.collect(policy, envs, seed=int(row["episode_seed"])))
        assert np.isclose(float(row["return"]), played[-1].rewards.sum() / 3, rtol=1e-5)
        buffer = played[0].concatenate(*played[1:])
        assert int(row["steps"]) == len(buffer)
        shift = len(buffer) % 40 if len(buffer) > 40 else 0  # a ring, with room for all steps
        buffer = jax.tree.map(lambda x, n=shift: np.roll(x[-40:], n, axis=0), buffer)
        assert int(row["buffer_size"]) == len(buffer)
        stop = 3 + round(0.5 * min(int(row["steps"]), 40))
        for step in range(updates, stop):
            row_key, update_key = jr.split(jr.fold_in(jr.fold_in(jr.key(1), step), 4))
            offline_key, online_key = jr.split(row_key)
            old = np.asarray(jr.randint(offline_key, (6,), 0, 60))
            new = np.asarray(jr.randint(online_key, (2,), 0, len(buffer)))
            batch = jax.tree.map(
                lambda x, y, old=old, new=new: jnp.asarray(np.append(x[old], y[new], axis=0)),
                offline,
                buffer,
            )
            state, _ = update(state, batch, key=update_key)
        updates = stop
        assert int(row["updates"]) == updates
    assert updates == tuned.num_updates == 23
    for x, y in zip(leaves(tuned.states[0]), leaves(state), strict=True):
        assert np.allclose(x, y, rtol=1e-4, atol=1e-5)


def numbered(start, stop):
    rows = np.arange(start, stop, dtype=np.float32)
    return ff.Transitions({"o": rows}, rows, rows, np.ones_like(rows), {"o": rows}, rows)


@pytest.mark.parametrize("capacity", [1, 7, 1500])
def test_a_buffer_holds_the_last_rows(capacity):
    buffer = ReplayBuffer.empty(jax.tree.map(jnp.asarray, numbered(0, 1)), capacity)
    written = 0
    for length in (1, 2, 0, 5, 13, 1, 2400, 3):
        buffer = buffer.write(jax.tree.map(lambda x, n=length: x[:n], numbered(written, 10**4)))
        written += length
        held = np.sort(np.asarray(buffer.rows.rewards)[: int(buffer.size)])
        assert np.array_equal(held, np.arange(max(0, written - capacity), written))
        for column in jax.tree.leaves((buffer.rows.observations, buffer.rows.next_actions)):
            assert np.array_equal(column, buffer.rows.rewards)


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0, None])
def test_shares_of_a_batch(share):
    offline = jax.tree.map(jnp.asarray, numbered(1, 31))
    buffer = ReplayBuffer.empty(offline, 1000).write(numbered(100, 110))
    sampling = BalancedSampling(offline, buffer, share)
    keys = jr.split(jr.key(0), 300)
    drawn = np.asarray(jax.vmap(lambda key: sampling.draw(10, 0, 0, key=key).rewards)(keys))
    online = np.isin(drawn, np.arange(100, 110))
    assert np.all(online | np.isin(drawn, np.arange(1, 31)))  # no row that was never written
    if share is None:
        assert abs(online.mean() - 10 / 40) < 4 * np.sqrt(0.25 * 0.75 / 3000)
    else:
        assert np.all(online.sum(1) == round(share * 10))
    expected = 40 if share is None else 30 * (share < 1) + 10 * (share > 0)
    assert len(np.unique(drawn)) == expected


def test_a_seed_does_not_depend_on_those_beside_it():
    envs = make()
    together = fine_tune(train(seeds=[0, 1]), envs, 30)
    alone = fine_tune(train(seeds=[1]), envs, 30)
    assert same(together.states[1], alone.states[0])
    assert not same(together.states[0], together.states[1])
    assert together.num_updates == alone.num_updates == 33


def test_normaliser_and_preparation_do_what_wrappers_would():
    # Powers of two, so that nothing is rounded.
    normaliser = ff.Normaliser(jnp.zeros(2, jnp.float32), jnp.full(2, 4.0, jnp.float32))
    data = logged(scale=4.0)
    data = dataclasses.replace(normaliser.transitions(data), rewards=data.rewards / 4)
    trained = train(one_step, data)
    seen = []

    def evaluate(policy, seed):
        seen.append(type(policy))
        return {}

    raw = fine_tune(
        trained,
        make(),
        30,
        normaliser=normaliser,
        prepare=lambda t: dataclasses.replace(t, rewards=t.rewards / 4),
        evaluate=evaluate,
    )

    def wrapped():
        env = gymnasium.wrappers.TransformObservation(Walk(), lambda o: o / 4, None)
        return gymnasium.wrappers.TransformReward(env, lambda r: float(r) / 4)

    assert same(raw.states, fine_tune(trained, make(env=wrapped), 30).states)
    assert not same(raw.states, fine_tune(trained, make(), 30).states)
    assert seen == [ff.FlowPolicy]  # as in `train`, for observations as it was trained on them


def test_everything_is_compiled_once():
    class Counting(ff.AbstractAgent):
        inner: ff.AbstractAgent

        def init(self, example, *, key):
            return self.inner.init(example, key=key)

        def update(self, state, batch, *, key):
            traces.append(None)
            return self.inner.update(state, batch, key=key)

        def policy(self, state, observations, *, key):
            return self.inner.policy(state, observations, key=key)

    traces = []
    trained = train(Counting(cloning), seeds=[0, 1])
    traces.clear()
    fine_tune(trained, make(1), 20)
    assert len(traces) == 2  # its shapes and its program


def test_agents_are_settled_as_in_training():
    class Settling(ff.AbstractAgent):
        inner: ff.AbstractAgent

        def init(self, example, *, key):
            return jnp.zeros((), jnp.int32), self.inner.init(example, key=key)

        def update(self, state, batch, *, key):
            return (state[0] + 1, state[1]), {"loss": jnp.zeros(())}

        def settle(self, state, observations, *, key):
            settled.append(int(state[0]))
            return state

        def policy(self, state, observations, *, key):
            return self.inner.policy(state[1], observations, key=key)

    settled = []
    trained = train(Settling(cloning), num_updates=150)
    tuned = fine_tune(trained, make(), 30, updates_per_step=100)
    assert settled == [0, 100, 200, 400, 800, 1000, 2000, 3000]
    assert int(tuned.states[0][0]) == 3150


def test_data_without_next_actions_need_none():
    inner = ff.ImplicitQLearning(flow=flow, critic=critic)
    data = dataclasses.replace(logged(), next_actions=None)
    tuned = fine_tune(train(inner, data), make(), 20)
    assert tuned.num_updates == 23


def test_evaluations_of_all_seeds_are_after_the_same_updates(tmp_path):
    rounds = []
    fine_tune(
        train(seeds=[0, 4]),
        make(),
        50,
        folder=tmp_path,
        evaluate=lambda policy, seed: {"score": float(seed)},
        evaluate_every=20,
        loggers=[lambda seed, updates, values: rounds.append((seed, updates, sorted(values)))],
    )
    table = rows_of(tmp_path / "evaluations.csv")
    for seed in ("0", "4"):
        mine = [row["updates"] for row in table if row["seed"] == seed]
        assert mine == ["23", "43", "53"]
    results = ff.Results.read(tmp_path / "evaluations.csv", task="none", method="online")
    assert np.array_equal(results.scores("online"), [[0.0, 4.0]])
    assert (4, 53, ["score"]) in rounds
    (names,) = {tuple(names) for _, _, names in rounds if names != ["score"]}
    assert {"return", "steps", "buffer_size", "episode_seed", "flow_loss"} <= set(names)


def test_goes_on_to_the_same_numbers_with_more_steps(tmp_path):
    trained, envs, options = train(seeds=[0, 1]), make(), dict(capacity=25, updates_per_step=0.5)
    once = fine_tune(trained, envs, 60, folder=tmp_path / "once", **options)
    fine_tune(trained, envs, 30, folder=tmp_path / "twice", **options)
    twice = fine_tune(trained, envs, 60, folder=tmp_path / "twice", **options)
    assert same(once.states, twice.states)
    again = fine_tune(trained, envs, 60, folder=tmp_path / "twice", **options)
    assert same(again.states, twice.states)
    with pytest.raises(ValueError, match="(?s)`num_steps` must .*Write `num_steps=60`"):
        fine_tune(trained, envs, 30, folder=tmp_path / "twice", **options)


script = """
import os, signal, sys
sys.path.insert(0, {tests!r})
import fisher_flow as ff, jax.random as jr, numpy as np
from test_fine_tune import leaves, make, train

def kill(seed, updates, values):
    if updates >= {kill_at} and "score" in values and seed == 1:
        os.kill(os.getpid(), signal.SIGKILL)

tuned = ff.fine_tune(
    train(seeds=[0, 1]), make(), 120, normaliser=None, batch_size=8, capacity=50,
    folder={folder!r}, checkpoint_every=20, evaluate_every=10,
    evaluate=lambda policy, seed: dict(
        score=float(policy.sample(np.zeros(2, "f"), key=jr.key(0))[0])
    ),
    loggers=[kill], progress=False,
)
np.savez({folder!r} + "/final.npz", *leaves(tuned.states))
"""


def run(folder, kill_at):
    return run_script(script, folder=str(folder), kill_at=kill_at)


@pytest.mark.slow
def test_killed_it_resumes_to_the_same_bits(tmp_path):
    code, printed = run(tmp_path / "whole", kill_at=1000)
    assert code == 0, printed
    code, printed = run(tmp_path / "killed", kill_at=80)  # in midst of a round of the second seed
    assert code == -signal.SIGKILL, printed
    assert not (tmp_path / "killed" / "final.npz").exists()
    assert len(list((tmp_path / "killed" / "checkpoints").iterdir())) == 2
    with open(tmp_path / "killed" / "online.csv", "a") as stream:
        stream.write("0,8")  # as if it had been killed in the midst of writing, too
    code, printed = run(tmp_path / "killed", kill_at=1000)
    assert code == 0, printed
    for file in ("online.csv", "evaluations.csv"):
        whole, killed = (tmp_path / name / file for name in ("whole", "killed"))
        assert whole.read_text() == killed.read_text()
    whole, killed = (np.load(tmp_path / name / "final.npz") for name in ("whole", "killed"))
    assert len(whole.files) > 20
    assert all(np.array_equal(whole[name], killed[name]) for name in whole.files)


def test_another_run_in_the_folder_is_refused(tmp_path):
    trained, envs = train(), make()
    fine_tune(trained, envs, 20, folder=tmp_path)
    for other, options, name in (
        (train(num_updates=4), {}, "trained"),
        (trained, {"online_share": None}, "online_share"),
        (trained, {"updates_per_step": 2}, "updates_per_step"),
        (trained, {"capacity": 10}, "capacity"),
        (trained, {"normaliser": ff.Normaliser.of(logged())}, "normaliser"),
    ):
        with pytest.raises(ValueError, match=f"(?s)other `{name}`.*_2'`"):
            fine_tune(other, envs, 20, folder=tmp_path, **options)
    with pytest.raises(ValueError, match="(?s)a run of `fine_tune`.*_2'`"):
        train(num_updates=30, folder=tmp_path)
    train(num_updates=3, folder=tmp_path / "offline")
    with pytest.raises(ValueError, match="(?s)a run of `train`.*_2'`"):
        fine_tune(trained, envs, 20, folder=tmp_path / "offline")


def test_the_room_of_a_buffer_is_kept(tmp_path):
    trained, envs = train(), make()
    fine_tune(trained, envs, 20, folder=tmp_path)
    assert fine_tune(trained, envs, 40, folder=tmp_path).num_updates == 43
    assert max(float(row["buffer_size"]) for row in rows_of(tmp_path / "online.csv")) == 20


def test_divergence_is_reported_and_the_checkpoint_before_it_is_kept(tmp_path):
    class Diverging(ff.AbstractAgent):
        inner: ff.AbstractAgent

        def init(self, example, *, key):
            return jnp.zeros((), jnp.int32), self.inner.init(example, key=key)

        def update(self, state, batch, *, key):
            return (state[0] + 1, state[1]), {"loss": jnp.where(state[0] < 25, 1.0, jnp.nan)}

        def policy(self, state, observations, *, key):
            return self.inner.policy(state[1], observations, key=key)

    with pytest.raises(FloatingPointError, match=r"(?s)seed 0 has diverged: loss"):
        fine_tune(train(Diverging(cloning)), make(), 100, folder=tmp_path, checkpoint_every=1)
    assert rows_of(tmp_path / "online.csv")[-1]["updates"] < "25"
    assert len(list((tmp_path / "checkpoints").iterdir())) > 0


class Bandit(gymnasium.Env):
    """Pays the action, once."""

    observation_space = gymnasium.spaces.Box(-1.0, 1.0, (1,), np.float32)
    action_space = gymnasium.spaces.Box(-1.0, 1.0, (1,), np.float32)

    def __init__(self):
        self.metadata = {}

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return np.zeros(1, np.float32), {}

    def step(self, action):
        return np.zeros(1, np.float32), float(action[0]), True, False, {}


def test_online_it_learns_what_the_data_do_not_show():
    rng = np.random.default_rng(0)
    a = rng.uniform(-1, -0.5, (200, 1)).astype(np.float32)
    zeros = np.zeros((200, 1), np.float32)
    data = ff.Transitions(zeros, a, a[:, 0], np.zeros(200, np.float32), zeros, a)
    sizes: dict = dict(width_size=16, depth=1)
    learner = ff.FisherDecorator.deflow(
        1,
        0.1,
        flow=ff.BehaviourFlow(**sizes, learning_rate=1e-2),
        critic=ff.TemporalDifference(**sizes),
        learning_rate=1e-2,
    )
    trained = ff.train(learner, data, 500, batch_size=64, progress=False)
    envs = make(20, Bandit)
    before = ff.evaluate(trained.policy(), envs).mean()
    tuned = fine_tune(trained, envs, 600, batch_size=64)
    after = ff.evaluate(tuned.policy(), envs).mean()
    assert after > before + 0.3
    assert after > a.max() + 0.2  # than anything it was shown


class Short(Walk):
    """Most of whose episodes are too short for a chunk and the one after it."""

    def reset(self, *, seed=None, options=None):
        observation, info = super().reset(seed=seed, options=options)
        self.remaining = int(self.np_random.choice([1, 2, 8], p=[0.4, 0.4, 0.2]))
        return observation, info

    def step(self, action):
        observation, reward, _, truncated, info = super().step(action)
        return observation, reward, False, truncated, info


def test_a_round_without_a_whole_chunk_is_played_all_the_same(tmp_path):
    data = ff.Transitions.from_episodes(
        [np.zeros((41, 2), np.float32)],
        [np.zeros((40, 1), np.float32)],
        [np.zeros(40, np.float32)],
        [False],
    )
    chunked = lambda t: t.chunks(3, 0.9)
    trained = train(transitions=chunked(data))
    tuned = fine_tune(trained, make(1, Short), 60, prepare=chunked, folder=tmp_path)
    assert tuned.num_updates == 3 + 60
    rows = rows_of(tmp_path / "online.csv")
    assert 0 < float(rows[-1]["buffer_size"]) < float(rows[-1]["steps"])
    # Where there never is one, it says so.
    with pytest.raises(ValueError, match="`horizon` must leave at least one chunk"):
        fine_tune(trained, make(1, Short), 1, prepare=chunked)


def test_data_on_disk_are_as_good(tmp_path):
    ff.save_transitions(tmp_path / "data", logged())
    stored = ff.open_transitions(tmp_path / "data")
    tuned = [fine_tune(train(one_step, t), make(), 20) for t in (logged(), stored)]
    assert same(tuned[0].states[0], tuned[1].states[0])


def test_batches_are_augmented_as_before():
    def shifted(batch, *, key):
        noise = jr.normal(key, batch.observations.shape, batch.observations.dtype)
        return eqx.tree_at(lambda t: t.observations, batch, batch.observations + noise)

    plain = train(one_step)
    augmented = dataclasses.replace(plain, augment=shifted)
    tuned = [fine_tune(x, make(), 20) for x in (plain, augmented)]
    assert tuned[1].augment is shifted
    assert not same(tuned[0].states[0], tuned[1].states[0])


def unlike():
    return gymnasium.wrappers.TransformObservation(
        Walk(), lambda o: o[:1], gymnasium.spaces.Box(-np.inf, np.inf, (1,), np.float32)
    )


def logged_in_three():
    t = logged()
    o = np.concatenate([t.observations, t.observations[:, :1]], axis=1)
    return dataclasses.replace(t, observations=o, next_observations=o)


def rescaled(t):
    return dataclasses.replace(t, actions=3 + t.actions)


class Endless(Walk):
    def step(self, action):
        return self.place, 0.0, False, False, {}


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda x: fine_tune(x, Walk(), 1), r"vector environment.*SyncVectorEnv\(\[make_env\]"),
        (lambda x: fine_tune(x, make(), 0), "`num_steps=100000`"),
        (lambda x: fine_tune(x, make(), 9, updates_per_step=0.01), "`updates_per_step=1.0`"),
        (lambda x: fine_tune(x, make(), 9, updates_per_step=-1), "`updates_per_step=1.0`"),
        (lambda x: fine_tune(x, make(), 9, online_share=1.5), "`1.5`.*`online_share=0.5`"),
        (lambda x: fine_tune(x, make(), 9, online_share=True), "`True`.*`online_share=0.5`"),
        (
            lambda x: fine_tune(x, make(), 9, normaliser=ff.Normaliser.of(logged_in_three())),
            r"`normaliser` must .*f32\[3\].*`normaliser=Normaliser.of\(transitions\)`",
        ),
        (lambda x: fine_tune(x, make(), 9, prepare=rescaled), "`transitions.actions` .*bounds"),
        (lambda x: fine_tune(x, make(), 9, prepare=lambda t: None), "`prepare` must .*`None`"),
        (lambda x: fine_tune(x, make(env=unlike), 9), r"f32\[3,1\].* for f32\[60,2\].*`envs=gym"),
        (
            lambda x: fine_tune(x, make(), 9, prepare=lambda t: t.chunks(2, 0.9)),
            r"`envs` must .*actions=f32\[\d+,2,1\].*`prepare=lambda t: t.chunks\(5, 0.99\)`",
        ),
    ],
)
def test_messages(call, message):
    with pytest.raises(ValueError, match=f"(?s){message}"):
        call(train())


def test_episodes_that_do_not_end():
    with pytest.raises(RuntimeError, match="did not end within `max_steps=9`"):
        fine_tune(train(), make(env=Endless), 20, max_steps=9)
