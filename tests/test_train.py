import contextlib
import csv
import importlib
import os
import signal
import sys
import time
import types
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from helpers import run_script

import fisher_flow as ff
from fisher_flow._training._log import Log
from fisher_flow._training._run import described


pytestmark = pytest.mark.usefixtures("standard_promotion")
agent = ff.OneStep(
    flow=ff.BehaviourFlow(width_size=8, depth=1),
    critic=ff.TemporalDifference(width_size=8, depth=1),
)


def transitions(num=60, seed=0):
    rng = np.random.default_rng(seed)
    o = rng.normal(size=(num, 2)).astype(np.float32)
    a = rng.uniform(-1, 1, (num, 1)).astype(np.float32)
    r = rng.normal(size=num).astype(np.float32)
    return ff.Transitions(o, a, r, np.ones(num, np.float32), o[::-1].copy(), a[::-1].copy())


class Averaging(ff.AbstractAgent):
    """Compiles in no time, and remembers every row, in their order, and every key."""

    def init(self, example, *, key):
        return jr.normal(key, example.observations.shape[1:], jnp.float32)

    def update(self, state, batch, *, key):
        weights = jnp.arange(1.0, 1 + len(batch), dtype=jnp.float32)
        seen = weights @ (batch.observations + batch.actions + batch.next_observations)
        state = jnp.sin(3 * state + seen) + jr.uniform(key, (), jnp.float32)
        return state, {"loss": jnp.mean(state) + jnp.mean(batch.rewards)}

    def policy(self, state, observations, *, key):
        return ff.FlowPolicy(lambda t, x, observation: state[:1] * x, action_shape=(1,))


averaging: Any = Averaging()


def train(*args, **options):
    options = dict(batch_size=8, log_every=10, progress=False) | options
    return ff.train(*args, **options)


def leaves(state):
    return [np.asarray(x) for x in jax.tree.leaves(eqx.filter(state, eqx.is_array))]


def same(x, y):
    return all(np.array_equal(a, b) for a, b in zip(leaves(x), leaves(y), strict=True))


def rows_of(path):
    with open(path, newline="") as stream:
        return list(csv.DictReader(stream))


def test_it_is_the_loop_over_update_that_anyone_would_write():
    data = transitions()
    trained = train(agent, data, 7, seeds=[3])
    device = jax.tree.map(jnp.asarray, data)
    state = agent.init(device, key=jr.fold_in(jr.key(0), 3))
    update = eqx.filter_jit(agent.update)
    for step in range(7):
        key = jr.fold_in(jr.fold_in(jr.key(1), step), 3)
        row_key, update_key = jr.split(key)
        rows = jr.randint(row_key, (8,), 0, len(data))
        batch = jax.tree.map(lambda column, rows=rows: column[rows], device)
        state, _ = update(state, batch, key=update_key)
    for x, y in zip(leaves(trained.states[0]), leaves(state), strict=True):
        assert np.allclose(x, y, rtol=1e-5, atol=1e-6)


def test_a_seed_does_not_depend_on_those_beside_it():
    together = train(agent, transitions(), 25, seeds=[0, 1])
    alone = train(agent, transitions(), 25, seeds=[1])
    assert same(together.states[1], alone.states[0])
    assert not same(together.states[0], together.states[1])
    at_once = train(agent, transitions(), 25, seeds=[0, 1], vectorise=True)
    for i in range(2):
        for x, y in zip(leaves(at_once.states[i]), leaves(together.states[i]), strict=True):
            assert np.allclose(x, y, rtol=1e-4, atol=1e-5)


def test_settings_that_are_numbers_share_one_compilation():
    @eqx.filter_jit
    @eqx.debug.assert_max_traces(max_traces=1)
    def never_twice(agent):
        return agent.critic.discount

    class Counting(ff.AbstractAgent):
        inner: ff.OneStep

        def init(self, example, *, key):
            return self.inner.init(example, key=key)

        def update(self, state, batch, *, key):
            never_twice(self.inner)
            return self.inner.update(state, batch, key=key)

        def policy(self, state, observations, *, key):
            return self.inner.policy(state, observations, key=key)

    for discount in (0.9, 0.99):
        critic = ff.TemporalDifference(width_size=8, depth=1, discount=discount)
        train(Counting(ff.OneStep(flow=agent.flow, critic=critic)), transitions(), 3)


def test_logs_and_evaluations(tmp_path):
    seen = []

    def evaluate(policy, seed):
        assert isinstance(policy, ff.BestOf)
        return {"score": float(seed)}

    train(
        agent,
        transitions(),
        25,
        seeds=[0, 4],
        folder=tmp_path,
        evaluate=evaluate,
        evaluate_every=20,
        loggers=[lambda seed, updates, values: seen.append((seed, updates, sorted(values)))],
    )
    names = ["critic_loss", "flow_loss", "q_max", "q_mean"]
    table = rows_of(tmp_path / "train.csv")
    assert [(row["seed"], row["updates"]) for row in table] == [
        (seed, updates) for updates in "2 4 6 8 10 12 14 16 18 20 22 24 25".split() for seed in "04"
    ]
    assert all(np.isfinite(float(row[name])) for row in table for name in names)
    assert [row["score"] for row in rows_of(tmp_path / "evaluations.csv")] == ["0.0", "4.0"] * 2
    assert (4, 20, ["score"]) in seen and (0, 25, names) in seen
    # What the results of a study are read from.
    results = ff.Results.read(tmp_path / "evaluations.csv", task="none", method="one step")
    assert np.array_equal(results.scores("one step"), [[0.0, 4.0]])


def test_goes_on_to_the_same_numbers_after_more_updates(tmp_path):
    once = train(agent, transitions(), 40, folder=tmp_path / "once", checkpoint_every=10)
    train(agent, transitions(), 20, folder=tmp_path / "twice", checkpoint_every=10)
    twice = train(agent, transitions(), 40, folder=tmp_path / "twice", checkpoint_every=10)
    assert same(once.states, twice.states)
    for file in ("train.csv", "run.json"):
        first, second = (tmp_path / name / file for name in ("once", "twice"))
        assert first.read_text() == second.read_text()


script = """
import os, signal, sys
sys.path.insert(0, {tests!r})
import fisher_flow as ff, numpy as np
from test_train import agent, leaves, transitions

def kill(seed, updates, values):
    if updates == {kill_at} and "score" in values or updates == -{kill_at}:
        os.kill(os.getpid(), signal.SIGKILL)

trained = ff.train(
    ff.FisherDecorator.deflow(1, 0.1, flow=agent.flow, critic=agent.critic), transitions(), 300,
    seeds=[0, 1],
    batch_size=8, folder={folder!r}, log_every=50, checkpoint_every=100, evaluate_every=50,
    evaluate=lambda policy, seed: dict(score=float(policy.displacement(np.zeros(2, "f"),
                                                                      np.zeros(1, "f"))[0])),
    loggers=[kill], progress=False,
)
np.savez({folder!r} + "/final.npz", *leaves(trained.states))
"""


def run(folder, kill_at):
    return run_script(script, folder=str(folder), kill_at=kill_at)


@pytest.mark.slow
def test_killed_it_resumes_to_the_same_bits(tmp_path):
    code, printed = run(tmp_path / "whole", kill_at=-1)
    assert code == 0, printed
    code, printed = run(tmp_path / "killed", kill_at=250)
    assert code == -signal.SIGKILL, printed
    assert len(rows_of(tmp_path / "killed" / "train.csv")) > 0
    assert not (tmp_path / "killed" / "final.npz").exists()
    # As if it had been killed in the midst of writing, too.
    (tmp_path / "killed" / "checkpoints" / "300.orbax-checkpoint-tmp").mkdir()
    with open(tmp_path / "killed" / "train.csv", "a") as stream:
        stream.write("0,3")
    code, printed = run(tmp_path / "killed", kill_at=-1)
    assert code == 0, printed
    for file in ("train.csv", "evaluations.csv"):
        whole, killed = (tmp_path / name / file for name in ("whole", "killed"))
        assert whole.read_text() == killed.read_text()
    whole, killed = (np.load(tmp_path / name / "final.npz") for name in ("whole", "killed"))
    assert len(whole.files) > 50
    assert all(np.array_equal(whole[name], killed[name]) for name in whole.files)


def test_another_run_in_the_folder_is_refused(tmp_path):
    train(agent, transitions(), 10, folder=tmp_path)
    for other, options, name in (
        (ff.OneStep(flow=agent.flow, critic=agent.critic, num_candidates=5), {}, "agent"),
        (agent, {"seeds": [1]}, "seeds"),
        (agent, {"batch_size": 4}, "batch_size"),
    ):
        with pytest.raises(ValueError, match=f"(?s)other `{name}`.*_2'`"):
            train(other, transitions(), 10, folder=tmp_path, **options)
    with pytest.raises(ValueError, match="(?s)other `transitions`.*checksum"):
        train(agent, transitions(seed=1), 10, folder=tmp_path)
    with pytest.raises(ValueError, match="`num_updates` must be at least the 10"):
        train(agent, transitions(), 5, folder=tmp_path)


def test_divergence_is_reported_and_the_checkpoint_before_it_is_kept(tmp_path):
    class Diverging(ff.AbstractAgent):
        def init(self, example, *, key):
            return jnp.zeros((), jnp.int32)

        def update(self, state, batch, *, key):
            return state + 1, {"loss": jnp.where(state < 15, 1.0, jnp.nan)}

        def policy(self, state, observations, *, key):
            raise NotImplementedError

    with pytest.raises(FloatingPointError, match=r"(?s)seed 0 has diverged: loss .*by update 20"):
        train(Diverging(), transitions(), 40, folder=tmp_path, checkpoint_every=10)
    assert os.listdir(tmp_path / "checkpoints") == ["10"]


def outside():
    data = transitions()
    return eqx.tree_at(lambda t: t.actions, data, 3 * data.actions)


def unknown_successors():
    return eqx.tree_at(lambda t: t.next_actions, transitions(), None)


def too_many():
    grow = lambda leaf: np.broadcast_to(leaf[:1], (2**31, *leaf.shape[1:]))
    return jax.tree.map(grow, transitions())


@contextlib.contextmanager
def single_precision():
    """`jax.enable_x64(False)`, which came with JAX 0.8."""
    jax.config.update("jax_enable_x64", False)
    try:
        yield
    finally:
        jax.config.update("jax_enable_x64", True)


def train_with_short_integers(*args):
    with single_precision():
        train(*args)


@pytest.mark.parametrize(
    "call, message",
    [
        (
            lambda: train_with_short_integers(agent, too_many(), 1),
            r"`transitions` must have at most 2147483647 rows.*got 2147483648.*_enable_x64",
        ),
        (lambda: train(agent, transitions(), 0), "`num_updates=100000`"),
        (lambda: train(agent, transitions(), 1, seeds=[]), r"`seeds=range\(5\)`"),
        (lambda: train(agent, transitions(), 1, seeds=[1, 1]), "all different"),
        (lambda: train(agent, transitions(), 1, seeds=[-1]), r"from 0 to 2\*\*31 - 1"),
        (
            lambda: train(agent, transitions(), 1, evaluate=lambda *_: 3.0),
            r"`evaluate` must return a dictionary of numbers, .* but returned `3.0`",
        ),
        (
            lambda: train(agent, transitions(), 1, evaluate=lambda *_: {"score": np.ones(2)}),
            r"returned `\{'score': array.*float\(returns.mean\(\)\)",
        ),
        (
            lambda: train(agent, transitions(), 1, evaluate=lambda *_: {"updates": 1}),
            "none of them `seed` or `updates`",
        ),
        (lambda: train(agent, transitions()[:0], 1), "`transitions` must have at least one row"),
        (lambda: train(agent, outside(), 1), r"range from .*`flow=BehaviourFlow\(bounds="),
        (lambda: train(agent, unknown_successors(), 1), "`next_actions` for `OneStep`"),
        (lambda: train(agent, transitions(), 1).policy(7), r"`trained.policy\(0\)`"),
    ],
)
def test_messages(call, message):
    with pytest.raises(ValueError, match=f"(?s){message}"):
        call()


def test_evaluations_that_are_owed_are_made_up_for(tmp_path):
    def broken(policy, seed):
        if seed == 4:
            raise KeyError("a bug of the user's")
        return {"score": 1.0}

    options: Any = dict(seeds=[0, 4], folder=tmp_path, evaluate_every=10)
    with pytest.raises(KeyError):
        train(averaging, transitions(), 20, evaluate=broken, checkpoint_every=10, **options)
    # No update is lost, and none is evaluated twice.
    train(averaging, transitions(), 20, evaluate=lambda *_: {"score": 2.0}, **options)
    rows = [tuple(row.values()) for row in rows_of(tmp_path / "evaluations.csv")]
    assert rows == [("0", "10", "1.0"), ("4", "10", "2.0"), ("0", "20", "2.0"), ("4", "20", "2.0")]
    (tmp_path / "evaluations.csv").unlink()
    train(averaging, transitions(), 20, evaluate=lambda *_: {"score": 3.0}, **options)
    assert [row["score"] for row in rows_of(tmp_path / "evaluations.csv")] == ["3.0", "3.0"]


def test_half_of_a_number_is_no_evaluation(tmp_path):
    """As a run leaves it that is killed while it writes."""
    options: Any = dict(seeds=[0, 4], folder=tmp_path, evaluate=lambda *_: {"score": -150.25})
    train(averaging, transitions(), 20, **options)
    path = tmp_path / "evaluations.csv"
    whole = path.read_bytes()
    for cut in range(1, 10):
        path.write_bytes(whole[:-cut])
        train(averaging, transitions(), 20, **options)
        assert path.read_bytes() == whole


def test_evaluations_have_the_same_names(tmp_path):
    names = lambda policy, seed: {"score" if seed == 0 else "return": 1.0}
    with pytest.raises(ValueError, match=r"(?s)columns \['score'\], but one of seed 1 .*'return'"):
        train(averaging, transitions(), 2, seeds=[0, 1], folder=tmp_path, evaluate=names)


def test_double_precision_is_cut_without_a_warning():
    data = transitions()
    data = eqx.tree_at(lambda t: t.actions, data, data.actions.astype(np.float64))
    with single_precision():
        train(averaging, data, 1)


class Doubling:
    def __call__(self, batch, *, key):
        return eqx.tree_at(lambda t: t.rewards, batch, 2 * batch.rewards)


def test_augmentations_are_known_by_name(tmp_path):
    """Not by an address in memory, which is another in every process."""
    train(averaging, transitions(), 2, folder=tmp_path, augment=Doubling())
    train(averaging, transitions(), 4, folder=tmp_path, augment=Doubling())
    with pytest.raises(ValueError, match="holds a run with other `augment`"):
        train(averaging, transitions(), 6, folder=tmp_path, augment=lambda batch, *, key: batch)


def test_a_default_that_is_written_out_is_the_same_setting():
    plain, written = ff.FlowQLearning(), ff.FlowQLearning(coefficient=float("1.0"))
    assert described(plain) == described(written) and "learning_rate=0.0003" in described(plain)
    own = ff.TemporalDifference(aggregate=jax.custom_jvp(lambda values: values[0]))
    assert " at 0x" not in described(own), "an address in memory"


def test_an_augmentation_has_to_return_transitions():
    with pytest.raises(ValueError, match=r"`augment` must .*`None`.*fisher_flow.RandomCrop\(\)"):
        train(averaging, transitions(), 1, augment=lambda batch, *, key: None)


def test_tensorboard(tmp_path):
    logger = ff.TensorBoard(tmp_path)
    train(agent, transitions(), 20, loggers=[logger])
    (file,) = (tmp_path / "seed_0").iterdir()
    assert b"critic_loss" in file.read_bytes()


def test_tensorboard_hides_what_is_made_again(tmp_path):
    Event: Any = importlib.import_module("tensorboardX.proto.event_pb2").Event
    logger = ff.TensorBoard(tmp_path)
    logger(0, 20, {"q": 1.0})
    logger.close()
    (file,) = (tmp_path / "seed_0").iterdir()
    data, steps = file.read_bytes(), []
    while data:  # the length and a checksum, the event, and a checksum of it
        length = int.from_bytes(data[:8], "little")
        event = Event.FromString(data[12 : 12 + length])
        if event.WhichOneof("what") == "session_log":
            steps.append(event.step)
        data = data[16 + length :]
    assert steps == [21]


def test_tensorboard_is_missed_before_the_training(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    with pytest.raises(ImportError, match=r'tensorboardX.*`pip install "fisher_flow\[offline\]"`'):
        ff.TensorBoard(tmp_path)


def test_loggers_are_closed_however_the_training_ends():
    class Logger:
        def __init__(self, fails):
            self.fails, self.seen = fails, []

        def __call__(self, seed, updates, values):
            self.seen.append(updates)
            if self.fails:
                raise KeyboardInterrupt

        def close(self):
            self.seen.append("closed")

    kept, failing = Logger(False), Logger(True)
    train(averaging, transitions(), 2, checkpoint_every=2, loggers=[kept, lambda *row: None])
    assert kept.seen == [2, "closed"]
    with pytest.raises(KeyboardInterrupt):
        train(averaging, transitions(), 2, checkpoint_every=2, loggers=[kept, failing])
    assert kept.seen == [2, "closed", 2, "closed"] and failing.seen == [2, "closed"]


def test_loggers_are_closed_though_one_of_them_fails():
    closed = []

    def logger(fails):
        def close():
            closed.append(fails)
            if fails:
                raise OSError("no space left")

        row: Any = lambda seed, updates, values: None
        row.close = close
        return row

    with pytest.raises(OSError, match="no space left"):
        train(averaging, transitions(), 1, loggers=[logger(x) for x in (False, True, False)])
    assert closed == [False, True, False]


@pytest.mark.parametrize("left", ["", "seed,upd", "seed,updates,loss\r\n0,"])
def test_a_file_that_was_left_without_rows_is_begun_again(left, tmp_path):
    once, twice = tmp_path / "once", tmp_path / "twice"
    train(averaging, transitions(), 10, folder=once)
    twice.mkdir()
    (twice / "train.csv").write_text(left)
    train(averaging, transitions(), 10, folder=twice)
    assert (twice / "train.csv").read_text() == (once / "train.csv").read_text()


def test_a_row_is_below_its_header(tmp_path):
    (tmp_path / "online.csv").touch()
    Log(tmp_path, []).write("online", 0, 3, {"loss": 1.0})
    assert rows_of(tmp_path / "online.csv") == [{"seed": "0", "updates": "3", "loss": "1.0"}]


@pytest.fixture
def wandb(monkeypatch):
    """A stand-in for the package, as far as it is documented: the runs by their ids, on a server
    that takes no row for a step before the last."""
    runs = {}

    class Run:
        def __init__(self, **options):
            self.options, self.rows, self.step, self.open = options, {}, 0, True

        def log(self, values, step):
            assert self.open and step >= self.step
            self.step = step
            self.rows.setdefault(step, {}).update(values)

        def finish(self):
            self.open = False

    def init(*, id, resume, reinit, **options):
        assert resume == "allow" and reinit == "create_new"
        run = runs.setdefault(id, Run(**options))
        run.open, run.step = True, max(run.rows, default=-1) + 1
        return run

    module: Any = types.ModuleType("wandb")
    module.init, module.runs = init, runs
    monkeypatch.setitem(sys.modules, "wandb", module)
    return module


def test_weights_and_biases(wandb, tmp_path):
    def logger():
        return ff.WeightsAndBiases("first", project="tests", config={"radius": 1}, tags=["a"])

    options: Any = dict(seeds=[0, 4], folder=tmp_path, evaluate=lambda *_: {"score": 1.0})
    options |= dict(checkpoint_every=10, log_every=5, evaluate_every=10)

    def stop(seed, updates, values):
        if updates == 15:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(averaging, transitions(), 20, loggers=[logger(), stop], **options)
    assert not any(run.open for run in wandb.runs.values())
    train(averaging, transitions(), 30, loggers=[logger()], **options)
    assert sorted(wandb.runs) == ["first-0", "first-4"]  # which went on
    for seed in (0, 4):
        run = wandb.runs[f"first-{seed}"]
        assert not run.open
        assert run.options["config"] == {"radius": 1, "seed": seed}
        assert run.options["group"] == "first" and run.options["project"] == "tests"
        assert run.options["name"] == f"first-{seed}" and run.options["tags"] == ["a"]
        assert run.options["mode"] is None
        written = {updates: row for updates, row in run.rows.items() if "loss" in row}
        expected = [row for row in rows_of(tmp_path / "train.csv") if row["seed"] == str(seed)]
        assert [int(row["updates"]) for row in expected] == list(written)
        for row in expected:
            assert np.isclose(written[int(row["updates"])]["loss"], float(row["loss"]))
        assert [updates for updates, row in run.rows.items() if "score" in row] == [10, 20, 30]


def test_messages_of_weights_and_biases(wandb, monkeypatch):
    with pytest.raises(ValueError, match="`name` must have .*`name='a-b'`"):
        ff.WeightsAndBiases("a/b", project="tests")
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ImportError, match=r'`pip install "fisher_flow\[wandb\]"`'):
        ff.WeightsAndBiases("a", project="tests")


def test_weights_and_biases_itself(tmp_path, monkeypatch):
    """With no network. It is not among what the tests need, being large."""
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_SILENT", "true")
    logger = ff.WeightsAndBiases("real", project="tests", mode="offline", dir=str(tmp_path))
    train(averaging, transitions(), 20, seeds=[0, 4], loggers=[logger])
    files = sorted(path.name for path in tmp_path.glob("wandb/offline-run-*/*.wandb"))
    assert files == ["run-real-0.wandb", "run-real-4.wandb"]
    for path in tmp_path.glob("wandb/offline-run-*/*.wandb"):
        for _ in range(100):  # a process of its own writes it
            if b"loss" in path.read_bytes():
                break
            time.sleep(0.05)
        assert b"loss" in path.read_bytes()


def test_normalised_policy(getkey):
    data = transitions()
    data = eqx.tree_at(lambda t: t.observations, data, 5 + 3 * data.observations)
    normaliser = ff.Normaliser.of(data)
    policy = train(agent, normaliser.transitions(data), 5).policy()
    key = getkey()
    outer = ff.NormalisedPolicy(policy, normaliser).sample(data.observations[0], key=key)
    inner = policy.sample(normaliser.transitions(data).observations[0], key=key)
    assert np.allclose(outer, inner, atol=1e-5)
