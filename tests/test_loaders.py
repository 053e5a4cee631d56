"""Reads files in the formats of OGBench, D4RL and Minari, made here: nothing is downloaded."""

import dataclasses
import importlib
import importlib.util
import subprocess
import sys
import tracemalloc
import warnings
import zipfile
from pathlib import Path
from typing import Any

import gymnasium
import h5py
import jax
import minari
import numpy as np
import pytest
from minari.data_collector import EpisodeBuffer

import fisher_flow as ff
from fisher_flow._data import _columns


root = Path(__file__).parent.parent


def needs_ogbench(test):
    """On Python 3.13 it must be installed by hand; its environments warn while they are made."""
    missing = importlib.util.find_spec("ogbench") is None
    test = pytest.mark.skipif(missing, reason="On Python 3.13, OGBench is not installed")(test)
    return pytest.mark.filterwarnings("ignore:.*precision lowered by casting:UserWarning")(test)


@pytest.fixture(autouse=True)
def nothing_is_drawn(monkeypatch):
    monkeypatch.setenv("MUJOCO_GL", "disabled")


# --- OGBench ----------------------------------------------------------------------------------


NAME = "pointmaze-medium-navigate"


def play(lengths=(6, 4, 5)):
    """The columns of a file of trajectories of so many rows."""
    rng = np.random.default_rng(0)
    rows = sum(lengths)
    return {
        "observations": rng.normal(size=(rows, 2)).astype(np.float32),
        "actions": rng.uniform(-1, 1, (rows, 2)).astype(np.float32),
        "terminals": np.isin(np.arange(rows), np.cumsum(lengths) - 1),
    }


def write(folder, columns, name=f"{NAME}-v0"):
    np.savez(folder / f"{name}.npz", **columns)
    return folder


def agree(transitions, reference, rows=slice(None)):
    for name in ("observations", "actions", "next_observations", "rewards", "masks"):
        ours, theirs = getattr(transitions, name), reference[name][rows]
        assert np.array_equal(ours, theirs) and ours.dtype == theirs.dtype, name


def reference_datasets(name, folder):
    """The transitions for training and for validation, as OGBench reads them."""
    import ogbench

    read: Any = ogbench.make_env_and_datasets
    env, *datasets = read(name, dataset_dir=str(folder))
    env.close()
    return datasets


def make_data(task, folder, transitions):
    """Runs the example as its reader would."""
    script = ["examples/make_data.py", task, f"--out={folder}", f"--transitions={transitions}"]
    subprocess.run([sys.executable, *script], cwd=root, check=True, capture_output=True)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A file of 1000 transitions, and one for validation."""
    folder = tmp_path_factory.mktemp("ogbench")
    make_data("pointmaze", folder, 1000)
    return folder


@needs_ogbench
@pytest.mark.parametrize("task", ["singletask", "singletask-task3"])
def test_ogbench_reads_what_ogbench_reads(made, task):
    name = f"{NAME}-{task}-v0"
    references = reference_datasets(name, made)
    total_reward = 0.0
    for validation, reference in zip((False, True), references, strict=True):
        transitions = ff.load_ogbench(name, made, validation=validation)
        assert len(transitions) == 1000
        agree(transitions, reference)
        assert np.array_equal(transitions.ends, reference["terminals"])
        assert np.array_equal(transitions.masks, -transitions.rewards)
        total_reward += transitions.rewards.sum()
    assert -2000 < total_reward < 0, "the goal was reached, and not always"
    train, held_out = (ff.load_ogbench(name, made, validation=v) for v in (False, True))
    assert not np.array_equal(train.observations, held_out.observations)


def test_ogbench_keeps_the_last_action_of_a_trajectory(tmp_path):
    columns = play()
    t = ff.load_ogbench(f"{NAME}-v0", write(tmp_path, columns))
    a, o = columns["actions"], columns["observations"]
    kept = [0, 1, 2, 3, 4, 6, 7, 8, 10, 11, 12, 13]
    assert np.array_equal(t.observations, o[kept]) and np.array_equal(t.actions, a[kept])
    following = [1, 2, 3, 4, 5, 7, 8, 9, 11, 12, 13, 14]
    assert np.array_equal(t.next_observations, o[following])
    assert np.array_equal(t.next_actions, a[following])
    assert np.flatnonzero(t.ends).tolist() == [4, 7, 11]
    # Without a task, play has no goal.
    assert np.all(t.rewards == 0) and np.all(t.masks == 1) and t.rewards.dtype == np.float32


@needs_ogbench
def test_ogbench_relabels_manipulation(tmp_path):
    rng = np.random.default_rng(1)
    columns = play() | {
        "observations": rng.normal(size=(15, 55)).astype(np.float32),
        "actions": rng.uniform(-1, 1, (15, 5)).astype(np.float32),
        "qpos": np.zeros((15, 23), np.float32),
        "button_states": rng.integers(0, 2, (15, 9)),
    }
    for suffix in ("", "-val"):
        write(tmp_path, columns, f"puzzle-3x3-play-v0{suffix}")
    name = "puzzle-3x3-play-singletask-v0"
    reference, _ = reference_datasets(name, tmp_path)
    transitions = ff.load_ogbench(name, tmp_path)
    agree(transitions, reference)
    assert len(np.unique(transitions.rewards)) > 1 and transitions.rewards.min() >= -9


@needs_ogbench
@pytest.mark.parametrize("compact", [True, False])
def test_ogbench_reads_what_ogbench_returned(made, tmp_path, compact):
    import ogbench

    name = f"{NAME}-singletask-v0"
    columns = ogbench.load_dataset(
        str(made / f"{NAME}-v0.npz"), compact_dataset=compact, add_info=True
    )
    again = ff.load_ogbench(name, write(tmp_path, columns))
    # What was done after the last transition is not in a regular dataset.
    reference = ff.load_ogbench(name, made)[: 1000 if compact else 999]
    assert len(again) == len(reference)
    assert all(jax.tree.leaves(jax.tree.map(np.array_equal, again, reference)))


def test_ogbench_errors(tmp_path):
    def message(columns, error: type[Exception] = ValueError, name=f"{NAME}-v0"):
        write(tmp_path, columns)
        with pytest.raises(error) as raised:
            ff.load_ogbench(name, tmp_path)
        return str(raised.value)

    with pytest.raises(FileNotFoundError) as raised:
        ff.load_ogbench("cube-single-play-singletask-task3-v0", tmp_path, validation=True)
    path = tmp_path / "cube-single-play-v0-val.npz"
    assert f"the file `{path}`, which is missing" in str(raised.value)
    assert f"`python examples/make_data.py cube-single --out {tmp_path}`" in str(raised.value)
    assert "no .npz file" in str(raised.value)
    with pytest.raises(FileNotFoundError) as raised:
        ff.load_ogbench("pointmaze-large-navigate-v0", tmp_path)  # which the example does not make
    assert "make_data" not in str(raised.value)
    good = play()
    without = {k: v for k, v in good.items() if k != "terminals"}
    assert "terminals is missing: it has actions, observations" in message(without)
    assert f"{NAME}-v0.npz" in message({}, FileNotFoundError, "antmaze-large-navigate-v0")
    endless = good | {"terminals": np.zeros(15, bool)}
    assert "none of its 15 rows is marked" in message(endless)
    bad = good["observations"].copy()
    bad[[4, 7], 1] = np.nan
    assert "2 of 15 rows are not, the first of them row 4" in message(good | {"observations": bad})
    assert "from -2 to 2" in message(good | {"actions": np.linspace(-2, 2, 15)[:, None]})
    assert "continuous, but got int64" in message(good | {"actions": np.zeros((15, 1), int)})
    assert "'actions': 14" in message(good | {"actions": good["actions"][1:]})
    write(tmp_path, good, "scene-play-v0")
    whole = (tmp_path / "scene-play-v0.npz").read_bytes()
    (tmp_path / "scene-play-v0.npz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="must be an .npz file, but is not, or was copied in part"):
        ff.load_ogbench("scene-play-v0", tmp_path)


@needs_ogbench
def test_states_that_are_missing(tmp_path):
    write(tmp_path, play())
    with pytest.raises(ValueError, match="qpos is missing"):
        ff.load_ogbench(f"{NAME}-singletask-v0", tmp_path)
    write(tmp_path, play() | {"qpos": np.zeros((15, 21))}, "scene-play-v0")
    with pytest.raises(ValueError, match="button_states is missing"):
        ff.load_ogbench("scene-play-singletask-v0", tmp_path)


@needs_ogbench
def test_states_of_another_environment_are_refused(tmp_path):
    columns = {"observations": np.zeros((15, 55)), "actions": np.zeros((15, 5))}
    states = {"qpos": np.zeros((15, 21)), "button_states": np.zeros((15, 4, 2), int)}
    write(tmp_path, play() | columns | states, "puzzle-3x3-play-v0")
    with pytest.raises(ValueError, match=r"states of `puzzle-3x3-.*`button_states` \(.*no task"):
        ff.load_ogbench("puzzle-3x3-play-singletask-v0", tmp_path)


@needs_ogbench
def test_a_file_of_another_environment_is_refused(tmp_path):
    columns = play() | {"observations": np.zeros((15, 28)), "qpos": np.zeros((15, 21))}
    with pytest.raises(ValueError, match=r"observations of shape \(2,\).*but got \(28,\)"):
        ff.load_ogbench(f"{NAME}-singletask-v0", write(tmp_path, columns))


def split(folder, count=4, name="cube-triple-play-v0", suffix="", total=False, **changes):
    """Shards of a dataset of trajectories of three rows."""
    folder.mkdir(parents=True, exist_ok=True)
    parts = []
    for i in range(count):
        columns = play((3, 3)) | changes
        columns["observations"] = columns["observations"] + i
        end = f"-of-{count:03d}" if total else ""
        write(folder, columns, f"{name}-{i:03d}{end}{suffix}")
        parts.append(columns["observations"][[0, 1, 3, 4]])
    return np.concatenate(parts)


@pytest.mark.parametrize("total", [True, False])
@pytest.mark.parametrize("suffix", ["", "-val"])
def test_shards_become_one(tmp_path, total, suffix):
    large = tmp_path / "cube-triple-play-100m-v0"
    o = split(large, suffix=suffix, total=total)
    validation = suffix == "-val"
    for name, folder in (
        ("cube-triple-play-v0", large),
        ("cube-triple-play-oraclerep-v0", large),
        ("cube-triple-play-100m-v0", tmp_path),
        ("cube-triple-play-100m-v0", large),
    ):
        t = ff.load_ogbench(name, folder, validation=validation)
        assert np.array_equal(t.observations, o) and len(t) == 16
        assert np.flatnonzero(t.ends).tolist() == [1, 3, 5, 7, 9, 11, 13, 15]
        assert np.all(t.rewards == 0) and np.all(t.masks == 1)
        some: Any = ff.load_ogbench(name, folder, validation=validation, shards=[2, 0])
        assert np.array_equal(some.observations, np.concatenate([o[8:12], o[:4]]))
    parts = (ff.load_ogbench(name, large, validation=validation, shards=[i]) for i in range(4))
    ff.save_transitions(tmp_path / "stored", parts)
    opened = ff.open_transitions(tmp_path / "stored")
    assert all(jax.tree.leaves(jax.tree.map(np.array_equal, opened, t)))


def test_shards_are_read_one_by_one(tmp_path):
    split(tmp_path, 8, observations=np.zeros((6, 200_000), np.float32))
    t = ff.load_ogbench("cube-triple-play-v0", tmp_path, shards=[0])
    one = t.observations.nbytes + t.next_observations.nbytes
    del t
    tracemalloc.start()
    t = ff.load_ogbench("cube-triple-play-v0", tmp_path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert t.observations.nbytes + t.next_observations.nbytes == 8 * one
    # The room of the rows that lead nowhere is asked for, though it is not taken.
    assert peak < 1.5 * 8 * one + 4 * one


@needs_ogbench
def test_shards_have_the_rewards_of_a_task(made, tmp_path):
    """From one environment for all of them, as OGBench reads each."""
    large = tmp_path / f"{NAME}-100m-v0"
    large.mkdir()
    for i, source in enumerate(("", "-val")):
        whole = (made / f"{NAME}-v0{source}.npz").read_bytes()
        (large / f"{NAME}-v0-{i:03d}.npz").write_bytes(whole)
    apart = [ff.load_ogbench(f"{NAME}-singletask-v0", made, validation=v) for v in (False, True)]
    together = apart[0].concatenate(apart[1])
    for name, folder in ((NAME, large), (f"{NAME}-100m", tmp_path)):
        t = ff.load_ogbench(f"{name}-singletask-v0", folder)
        assert all(jax.tree.leaves(jax.tree.map(np.array_equal, t, together)))


def test_oraclerep_is_play_from_the_same_file(tmp_path):
    write(tmp_path, play())
    t = ff.load_ogbench(f"{NAME}-v0", tmp_path)
    oracle = ff.load_ogbench(f"{NAME}-oraclerep-v0", tmp_path)
    assert all(jax.tree.leaves(jax.tree.map(np.array_equal, t, oracle)))


def test_errors_of_shards(tmp_path):
    def message(name="cube-triple-play-v0", error: Any = ValueError, folder=tmp_path / "a", **kw):
        with pytest.raises(error) as raised:
            ff.load_ogbench(name, folder, **kw)
        return str(raised.value)

    split(tmp_path / "a", 6)
    for number in (1, 3):
        (tmp_path / "a" / f"cube-triple-play-v0-00{number}.npz").unlink()
    text = message(error=FileNotFoundError)
    assert "`cube-triple-play-v0-001.npz`, `cube-triple-play-v0-003.npz` are missing" in text
    assert "shards=[0, 2, 4, 5])`" in text
    assert "-007.npz` is missing" in message(error=FileNotFoundError, shards=[0, 7])
    assert len(ff.load_ogbench("cube-triple-play-v0", tmp_path / "a", shards=range(0, 5, 2))) == 12
    for shards in ([], [0, 0], "0", 3, [0.5]):
        assert "`shards` must be `None` or the numbers" in message(shards=shards)
    text = message(error=FileNotFoundError, folder=tmp_path)
    assert f"there are shards in {tmp_path / 'a'}. Write `load_ogbench(" in text
    text = message("cube-triple-play-1b-v0", FileNotFoundError, tmp_path / "none")
    assert "cube-triple-play-1b-v0/cube-triple-play-v0-000.npz`" in text
    split(tmp_path / "b", 4, total=True)
    (tmp_path / "b" / "cube-triple-play-v0-003-of-004.npz").unlink()
    text = message(error=FileNotFoundError, folder=tmp_path / "b")
    assert "`cube-triple-play-v0-003-of-004.npz` is missing" in text
    split(tmp_path / "b", 4)
    assert "must hold the shards of `cube-triple-play-v0` once" in message(folder=tmp_path / "b")
    split(tmp_path / "c", 2)
    wide = play((3, 3)) | {"observations": np.zeros((6, 9), np.float32)}
    write(tmp_path / "c", wide, "cube-triple-play-v0-002")
    assert "-002.npz` must be like that of" in message(folder=tmp_path / "c")
    (tmp_path / "c" / "cube-triple-play-v0-002.npz").write_bytes(b"PK")
    assert "-002.npz` must be an .npz file" in message(folder=tmp_path / "c")
    write(tmp_path, play())
    text = message(f"{NAME}-v0", folder=tmp_path, shards=[0])
    assert "`shards` must be `None`" in text and "is one file" in text


def corrupted(path):
    """The same archive, with a byte of a column changed."""
    data = bytearray(path.read_bytes())
    data[data.index(b"NUMPY") + 200] ^= 0xFF
    path.write_bytes(data)


def test_damaged_npz_files_are_named_with_their_key(tmp_path):
    good, path = play(), tmp_path / f"{NAME}-v0.npz"

    def message(**columns):
        if columns:
            write(tmp_path, good | columns)
        with pytest.raises(ValueError) as raised:
            ff.load_ogbench(f"{NAME}-v0", tmp_path)
        text = str(raised.value)
        assert f"`{path}`" in text and "rite " in text
        return text

    objects = np.array([{}] * 15, object)
    assert "`actions` of" in message(actions=objects) and "pickle" in message()
    assert "`observations` must be an array of real numbers, but got strings" in message(
        observations=np.array(["a"] * 15)
    )
    assert "`terminals` of" in message(terminals=np.full(15, 0.5)) and "0 or 1" in message()
    assert "shape (15, 2)" in message(terminals=np.zeros((15, 2)))
    assert "all 15 rows are the last" in message(terminals=np.ones(15))
    assert "'observations': 0" in message(observations=np.zeros(()))
    assert "'actions': 0" in message(actions=np.zeros((0, 2)))
    write(tmp_path, good)
    corrupted(path)
    assert "`observations` of" in message() and "copied in part" in message()
    np.save(path.with_suffix(".npy"), np.zeros(3))
    path.with_suffix(".npy").replace(path)
    assert "must be an .npz file" in message()
    with zipfile.ZipFile(path, "w") as file:
        for name in good:
            file.writestr(name, "text")
    assert "`observations` must be an array of real numbers" in message()


# --- D4RL -------------------------------------------------------------------------------------


def steps(**columns):
    """Ten steps: an episode that terminates at step 3, one cut off at 6, one that goes on."""
    rows = np.arange(10)
    default = {
        "observations": np.stack([rows, -rows], axis=1).astype(np.float64),
        "actions": np.linspace(-1, 1, 10)[:, None],
        "rewards": 0.5 * rows,
        "terminals": rows == 3,
        "timeouts": rows == 6,
    }
    return {name: x for name, x in (default | columns).items() if x is not None}


def write_hdf5(path, columns):
    with h5py.File(path, "w") as file:
        for name, column in columns.items():
            file[name] = column
    return path


@pytest.mark.parametrize("shape", [(10,), (10, 1)])
def test_d4rl_by_hand(tmp_path, shape):
    columns = steps()
    for name in ("rewards", "terminals", "timeouts"):
        columns[name] = columns[name].reshape(shape)
    t = ff.load_d4rl(write_hdf5(tmp_path / "hopper.hdf5", columns))
    kept = [0, 1, 2, 3, 4, 5, 7, 8]  # 6 is cut off, 9 is the last of the file
    following = [1, 2, 3, 4, 5, 6, 8, 9]
    assert t.observations[:, 0].tolist() == kept and t.next_observations[:, 0].tolist() == following
    assert t.rewards.tolist() == [0.5 * row for row in kept]
    assert t.masks.tolist() == [1, 1, 1, 0, 1, 1, 1, 1]
    assert np.flatnonzero(t.ends).tolist() == [3, 5, 7]
    actions = np.linspace(-1, 1, 10)
    actions[[0, -1]] = -(1 - 1e-5), 1 - 1e-5
    assert t.next_actions is not None
    assert np.allclose(t.actions[:, 0], actions[kept], rtol=1e-7, atol=1e-7)
    assert np.allclose(t.next_actions[:, 0], actions[following], rtol=1e-7, atol=1e-7)
    assert np.abs(t.actions).max() < 1
    assert {leaf.dtype for leaf in jax.tree.leaves(t)} == {np.dtype("float32"), np.dtype(bool)}


def test_d4rl_without_timeouts_counts_steps(tmp_path):
    path = write_hdf5(tmp_path / "old.hdf5", steps(timeouts=None))
    t = ff.load_d4rl(path, max_episode_steps=3)
    # Cut off at 2, terminated at 3, cut off at 6, and the last.
    assert t.observations[:, 0].tolist() == [0, 1, 3, 4, 5, 7, 8]
    assert np.flatnonzero(t.ends).tolist() == [1, 2, 4, 6]
    with pytest.warns(UserWarning, match="no `timeouts`.*`max_episode_steps=1000`"):
        assert len(ff.load_d4rl(path)) == 9
    ended = np.arange(10) % 5 == 4
    path = write_hdf5(tmp_path / "ended.hdf5", steps(timeouts=None, terminals=ended))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert np.flatnonzero(ff.load_d4rl(path).ends).tolist() == [4, 8]


@pytest.mark.parametrize("name", ["antmaze-umaze-v2", "Ant_maze_u-maze_noisy_multistart_False"])
def test_d4rl_maze_rewards(tmp_path, name):
    rewards = (np.arange(10) == 3).astype(np.float32)
    path = write_hdf5(tmp_path / f"{name}.hdf5", steps(rewards=rewards))
    with pytest.raises(ValueError, match=f"`maze_rewards` must be given for `{name}"):
        ff.load_d4rl(path)
    assert ff.load_d4rl(path, maze_rewards=True).rewards.tolist() == [-1, -1, -1, 0, *[-1] * 4]
    assert ff.load_d4rl(path, maze_rewards=False).rewards.tolist() == [0, 0, 0, 1, *[0] * 4]
    path = write_hdf5(tmp_path / "antmaze-large-v2.hdf5", steps(rewards=rewards - 1))
    with pytest.raises(ValueError, match="range from -1 to 0. Write `maze_rewards=False`"):
        ff.load_d4rl(path, maze_rewards=True)
    assert ff.load_d4rl(path).rewards.max() == 0


def test_d4rl_reads_the_pendulum_of_the_example(tmp_path):
    make_data("pendulum", tmp_path, 700)  # which are rounded up to 4 episodes of 200
    t = ff.load_d4rl(tmp_path / "pendulum-mixture.hdf5")
    assert np.flatnonzero(t.ends).tolist() == [198, 397, 596, 795] and len(t) == 796
    assert np.all(t.masks == 1) and list(tmp_path.iterdir()) == [tmp_path / "pendulum-mixture.hdf5"]
    # The reward that Gymnasium documents, of the torque that is twice the action.
    cos, sin, velocity = t.observations.T
    cost = np.arctan2(sin, cos) ** 2 + 0.1 * velocity**2 + 0.001 * (2 * t.actions[:, 0]) ** 2
    assert np.allclose(t.rewards, -cost, atol=1e-3)
    jumps = np.abs(t.next_observations - t.observations).max(axis=0)
    assert np.all(jumps < [0.5, 0.5, 2.0])  # no row leads into another episode


@pytest.mark.parametrize(
    "columns, message",
    [
        (
            steps(terminals=None),
            r"terminals is missing: it has actions, observations, rewards, tim",
        ),
        (
            steps(rewards=np.zeros((10, 2))),
            r"`rewards` of `.*` must have one entry a row.*\(10, 2\)",
        ),
        (steps(rewards=np.zeros(9)), r"same length.*'rewards': 9.*column\[:9\]"),
        (steps(rewards=np.full(10, np.nan)), r"`rewards` of `.*` must be finite, but 10 of 10"),
        (steps(actions=np.full((10, 1), 1.5)), r"between -1 and 1, but they range from 1.5 to 1.5"),
        (
            steps(terminals=np.zeros(10), timeouts=None),
            r"none of its 10 rows is marked.*`max_episode_steps=1000`",
        ),
    ],
)
def test_d4rl_errors(tmp_path, columns, message):
    path = write_hdf5(tmp_path / "bad.hdf5", columns)
    with pytest.raises(ValueError, match=message):
        ff.load_d4rl(path)


def change_hdf5(path, change):
    with h5py.File(path, "r+") as file:
        change(file)


def as_group(file):
    del file["observations"]
    file.create_group("observations")["joints"] = np.zeros((10, 2))


def replaced(name, value):
    def change(file):
        del file[name]
        file[name] = value

    return change


@pytest.mark.parametrize(
    "change, message",
    [
        (as_group, r"`observations` of `.*` must be a dataset, .*group that holds joints"),
        (replaced("actions", h5py.SoftLink("/gone")), r"`actions` of .* is a link to `/gone`"),
        (
            replaced("rewards", h5py.ExternalLink("gone.hdf5", "/rewards")),
            r"`rewards` of .*`/rewards` of `gone.hdf5`, which cannot be read",
        ),
        (replaced("timeouts", h5py.SoftLink("/gone")), r"`timeouts` of .* is a link to `/gone`"),
        (replaced("rewards", "many"), r"`rewards` must be an array of real numbers.*bad.hdf5"),
        (replaced("rewards", ["1"] * 10), r"`rewards` must be an array of real numbers"),
        (replaced("rewards", h5py.Empty("f4")), r"`rewards` must be an array of real numbers"),
        (replaced("rewards", np.ones(10, complex)), r"`rewards` must be .* complex128"),
        (
            replaced("observations", np.zeros(10, [("x", float)])),
            r"`observations` must be .* records",
        ),
        (replaced("actions", np.zeros((0, 1))), r"'actions': 0"),
        (replaced("actions", 0.5), r"'actions': 0"),
        (replaced("actions", np.zeros((10, 1), int)), r"`actions` of .* continuous, but got int64"),
        (replaced("timeouts", np.zeros((10, 2))), r"`timeouts` of .*one entry a row.*\(10, 2\)"),
        (replaced("terminals", np.arange(10)), r"`terminals` of .* 0 or 1, but ranges from 0 to 9"),
    ],
)
def test_damaged_hdf5_files_are_named_with_their_key(tmp_path, change, message):
    path = write_hdf5(tmp_path / "bad.hdf5", steps())
    change_hdf5(path, change)
    with pytest.raises(ValueError, match=f"(?s){message}") as raised:
        ff.load_d4rl(path)
    assert str(path) in str(raised.value) and "`" in str(raised.value).rpartition(". ")[2]


@pytest.mark.parametrize("share", [0.2, 0.5, 0.9, 0.999])
def test_an_hdf5_file_that_was_cut_is_named(tmp_path, share):
    path = write_hdf5(tmp_path / "cut.hdf5", steps(observations=np.zeros((10, 500))))
    data = path.read_bytes()
    path.write_bytes(data[: int(share * len(data))])
    with pytest.raises(ValueError, match=r"cut.hdf5.*HDF5 file.*in part only"):
        ff.load_d4rl(path)


@pytest.mark.filterwarnings("ignore:.*has no `timeouts`:UserWarning")  # if that name is damaged
@pytest.mark.parametrize("kind", ["hdf5", "npz"])
def test_whatever_is_damaged_is_named(tmp_path, kind):
    """A bit, some bits or the end of a file."""
    rng = np.random.default_rng(0)
    if kind == "hdf5":
        path = write_hdf5(tmp_path / "damaged.hdf5", steps())
        load = lambda: ff.load_d4rl(path)
    else:
        path = write(tmp_path, play(), "damaged-v0") / "damaged-v0.npz"
        load = lambda: ff.load_ogbench("damaged-v0", tmp_path)
    good, refused = path.read_bytes(), 0
    for trial in range(60):
        data = bytearray(good)
        for place in rng.integers(0, len(data), (0, 1, 30)[trial % 3]):
            data[place] ^= 1 << rng.integers(8)
        path.write_bytes(data if trial % 3 else data[: rng.integers(len(data))])
        try:
            load()
        except ValueError as error:
            refused += 1
            assert str(path) in str(error) and "`" in str(error).rpartition(". ")[2]
    assert refused > 20


def test_links_of_hdf5_that_lead_somewhere_are_followed(tmp_path):
    write_hdf5(tmp_path / "other.hdf5", {"rewards": np.arange(10.0)})
    path = write_hdf5(tmp_path / "links.hdf5", steps())
    change_hdf5(path, replaced("rewards", h5py.ExternalLink("other.hdf5", "/rewards")))
    assert ff.load_d4rl(path).rewards[:3].tolist() == [0, 1, 2]


def test_d4rl_wrong_files(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"gone.hdf5` is missing.*make_data.py halfcheetah"):
        ff.load_d4rl(tmp_path / "gone.hdf5")
    (tmp_path / "page.hdf5").write_text("<html>moved</html>")
    with pytest.raises(ValueError, match="must be an HDF5 file, but is not"):
        ff.load_d4rl(tmp_path / "page.hdf5")


# --- Minari -----------------------------------------------------------------------------------


OBSERVATIONS = gymnasium.spaces.Dict(
    camera=gymnasium.spaces.Box(0, 255, (4,), np.uint8),
    joints=gymnasium.spaces.Box(-1.0, 1.0, (2,), np.float64),
)


def episode(steps, terminates, scale=1.0):
    flags = [*[False] * (steps - 1), True]
    return EpisodeBuffer(
        observations={
            "camera": np.arange(4 * (steps + 1)).reshape(-1, 4).astype(np.uint8),
            "joints": np.linspace(0, 1, 2 * (steps + 1)).reshape(-1, 2),
        },
        actions=scale * np.linspace(-1, 1, steps)[:, None],  # pyright: ignore
        rewards=list(np.arange(float(steps))),
        terminations=flags if terminates else [False] * steps,
        truncations=[False] * steps if terminates else flags,
        infos={},
    )


def create(name, *episodes):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about an author, an algorithm and so on
        return minari.create_dataset_from_buffers(
            name,
            list(episodes),
            observation_space=OBSERVATIONS,
            action_space=gymnasium.spaces.Box(-2.0, 2.0, (1,), np.float64),
        )


@pytest.fixture(autouse=True)
def minari_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "minari"))


def test_minari_keeps_the_structure_of_observations():
    dataset = create("test/mixed-v0", episode(5, terminates=True), episode(4, terminates=False))
    t = ff.load_minari("test/mixed-v0")
    assert len(t) == 5 + 3
    assert t.masks.tolist() == [1, 1, 1, 1, 0, 1, 1, 1]
    assert t.rewards.tolist() == [0, 1, 2, 3, 4, 0, 1, 2]
    assert np.flatnonzero(t.ends).tolist() == [4, 7]
    camera, joints = t.observations["camera"], t.observations["joints"]
    assert camera.dtype == np.uint8 and camera[:, 0].tolist() == [0, 4, 8, 12, 16, 0, 4, 8]
    assert t.next_observations["camera"][:, 0].tolist() == [4, 8, 12, 16, 20, 4, 8, 12]
    assert joints.dtype == t.actions.dtype == t.rewards.dtype == np.float32
    assert t.next_actions is not None
    assert np.allclose(t.actions[5:, 0], [-1, -1 / 3, 1 / 3])
    assert np.allclose(t.next_actions[5:, 0], [-1 / 3, 1 / 3, 1])
    part = ff.load_minari(dataset.filter_episodes(lambda episode: bool(episode.terminations[-1])))
    assert all(jax.tree.leaves(jax.tree.map(np.array_equal, part, t[:5])))


def test_minari_bounds():
    dataset = create("test/wide-v0", episode(4, terminates=False, scale=2.0))
    with pytest.raises(ValueError, match=r"range from -2 to 2.*Box.*`bounds=\(-2, 2\)`"):
        ff.load_minari(dataset)
    assert ff.load_minari(dataset, bounds=(-2.0, 2.0)).actions.min() == -2


spaces = gymnasium.spaces


BOX = gymnasium.spaces.Box(-1, 1, (2,), np.float32)


class Anything(gymnasium.Env):
    def __init__(self, observation_space, action_space):
        self.observation_space, self.action_space = observation_space, action_space

    def reset(self, *, seed: Any = None, options=None):
        super().reset(seed=seed)
        self.observation_space.seed(seed)
        self.steps = 0
        return self.observation_space.sample(), {}

    def step(self, action):
        self.steps += 1
        return self.observation_space.sample(), 1.0, self.steps == 4, False, {}


def recorded(observation_space, action_space):
    env: Any = minari.DataCollector(Anything(observation_space, action_space))
    for seed in range(2):
        env.reset(seed=seed)
        env.action_space.seed(seed)
        for _ in range(4):
            env.step(env.action_space.sample())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about an author, an algorithm and so on
        dataset = env.create_dataset("test/any-v0")
    env._tmp_dir.cleanup()
    return dataset


@pytest.mark.parametrize(
    "space, shapes",
    [
        (spaces.Discrete(4, start=2), [()]),
        (spaces.MultiDiscrete([3, 4]), [(2,)]),
        (spaces.MultiDiscrete(np.array([[3, 4], [2, 2]])), [(2, 2)]),
        (spaces.MultiBinary(3), [(3,)]),
        (spaces.MultiBinary((2, 3)), [(2, 3)]),
        (spaces.Box(-np.inf, np.inf, ()), [()]),
        (spaces.Box(0, 255, (16, 16, 3), np.uint8), [(16, 16, 3)]),
        (spaces.Box(np.arange(2, dtype=np.float32), 2 * np.arange(2, dtype=np.float32)), [(2,)]),
        (spaces.Tuple((BOX, spaces.Dict(b=spaces.Discrete(3), a=BOX))), [(2,), (2,), ()]),
        (spaces.Dict({"z": BOX, "a": spaces.Tuple((BOX,))}), [(2,), (2,)]),
    ],
)
def test_minari_reads_every_space_of_numbers(space, shapes):
    dataset = recorded(space, BOX)
    t = ff.load_minari(dataset)
    leaves = jax.tree.leaves(t.observations)
    assert [leaf.shape for leaf in leaves] == [(8, *shape) for shape in shapes]
    assert t.masks.tolist() == 2 * [1, 1, 1, 0]
    assert jax.tree.structure(t.next_observations) == jax.tree.structure(t.observations)


@pytest.mark.parametrize(
    "space, name",
    [
        (spaces.Text(5), "observations"),
        (spaces.Dict(s=BOX, mission=spaces.Text(5)), r"observations\['mission'\]"),
        (spaces.Tuple((BOX, spaces.Text(3))), r"observations\[1\]"),
        (spaces.Dict(a=spaces.Dict(b=spaces.Text(3))), r"observations\['a'\]\['b'\]"),
        (spaces.Sequence(BOX), "observations"),
        (spaces.Graph(BOX, None), "observations"),
        (spaces.OneOf((BOX, spaces.Discrete(2))), "observations"),
    ],
)
def test_minari_refuses_observations_that_are_no_arrays(space, name):
    dataset = recorded(BOX, BOX)
    dataset._observation_space = space  # Minari itself cannot write some of them
    with pytest.raises(ValueError, match=rf"`{name}` of `test/any-v0` must be.*from_episodes"):
        ff.load_minari(dataset)


@pytest.mark.parametrize(
    "space, advice",
    [
        (spaces.Dict(arm=BOX, grip=BOX), r"np.concatenate\(\[episode.actions\[name\]"),
        (spaces.Tuple((BOX, spaces.Discrete(2))), r"np.concatenate\(episode.actions"),
        (spaces.Discrete(3), r"episode.actions.astype"),
        (spaces.MultiDiscrete([2, 3]), r"episode.actions.astype"),
        (spaces.MultiBinary(3), r"episode.actions.astype"),
        (spaces.Box(0, 9, (2,), np.int64), r"episode.actions.astype"),
        (spaces.Text(5), r"episode.actions.astype"),
        (spaces.Sequence(BOX), r"episode.actions.astype"),
        (spaces.Graph(BOX, BOX), r"episode.actions.astype"),
        (spaces.OneOf((BOX, BOX)), r"episode.actions.astype"),
    ],
)
def test_minari_refuses_actions_that_are_not_one_array(space, advice):
    dataset = recorded(BOX, BOX)
    dataset._action_space = space
    with pytest.raises(ValueError, match=rf"`action_space` of `test/any-v0` must be.*{advice}"):
        ff.load_minari(dataset)


def test_minari_bounds_of_each_entry():
    low, high = np.array([-1, -5, 0.3, -np.inf]), np.array([1, 5, 0.3, np.inf])
    box = spaces.Box(low, high, dtype=np.float64)
    dataset = recorded(BOX, box)
    for bounds in (box, (low, high), (low, np.full(4, np.inf)), None):
        t = ff.load_minari(dataset, bounds=bounds)
        assert t.actions.shape == (8, 4) and np.all(t.actions[:, 2] == np.float32(0.3))
    policy = ff.FlowPolicy(lambda t, x, o: 0 * x, (4,), bounds=dataset.action_space)
    for dtype in (np.float32, np.float64):
        assert policy.project(jax.numpy.full(4, 7, dtype)).tolist() == [1, 5, dtype(0.3), 7]
    for bounds, message in (
        ((low, np.array([1, 2, 0.3, 1e9])), r"`actions\[:, 1\]` of .* between -5 and 2,"),
        ((low + [0, 0, 0.1, 0], high + [0, 0, 0.1, 0]), r"`actions\[:, 2\]` .* 0.4 and 0.4, but"),
        ((high, low), r"`bounds` must be a pair.*dataset.action_space"),
        ((low[:2], high[:2]), r"`bounds` must be a pair .* shape \(4,\)"),
        (3.0, r"`bounds` must be a pair"),
        ((-1, 0, 1), r"`bounds` must be a pair"),
        ((np.nan, 1.0), r"`bounds` must be a pair"),
    ):
        with pytest.raises(ValueError, match=message):
            ff.load_minari(dataset, bounds=bounds)


def test_small_bounds_have_a_small_tolerance():
    actions = np.linspace(-1, 1, 5)[:, None]
    for scale in (1e-4, 1e4):
        bounds = (-scale, scale)
        _columns.check_actions("x", 1.0005 * scale * actions, bounds, "")
        with pytest.raises(ValueError, match="must lie between"):
            _columns.check_actions("x", 1.01 * scale * actions, bounds, "")


def test_minari_names_an_episode_that_lacks_an_observation():
    whole, short = episode(4, terminates=True), episode(5, terminates=False)
    cut = jax.tree.map(lambda leaf: leaf[:-1], short.observations)
    dataset = create("test/short-v0", whole, dataclasses.replace(short, observations=cut))
    message = r"Episode 1 of `test/short-v0` has 5 `observations`, 5 `actions`.*from_episodes"
    with pytest.raises(ValueError, match=message):
        ff.load_minari(dataset)
    kept = dataset.filter_episodes(lambda episode: episode.id != 1)
    assert len(ff.load_minari(kept)) == 4


def test_minari_errors():
    with pytest.raises(FileNotFoundError, match=r"`test/none-v0`; there are none\."):
        ff.load_minari("test/none-v0")
    long = episode(4, terminates=True)
    long.terminations[1] = True
    dataset = create("test/long-v0", long)
    with pytest.raises(FileNotFoundError, match=r"`test/none-v0`; there are test/long-v0\."):
        ff.load_minari("test/none-v0")
    with pytest.raises(ValueError, match=r"Episode 0 .* goes on .* at step 1 of 4"):
        ff.load_minari(dataset)
    with pytest.raises(ValueError, match="`test/long-v0` has no episodes"):
        ff.load_minari(dataset.filter_episodes(lambda episode: False))


@pytest.mark.parametrize(
    "package, load",
    [
        ("ogbench", lambda folder: ff.load_ogbench("cube-single-play-singletask-v0", folder)),
        ("h5py", lambda folder: ff.load_d4rl(folder / "hopper.hdf5")),
        ("minari", lambda folder: ff.load_minari("test/mixed-v0")),
    ],
)
def test_a_missing_package_is_named(tmp_path, monkeypatch, package, load):
    columns = play() | {"qpos": np.zeros((15, 21))}
    write(tmp_path, columns, "cube-single-play-v0")
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=r'not installed.*`pip install "fisher_flow\[data\]"`'):
        load(tmp_path)


@pytest.fixture
def offline_rl(monkeypatch) -> Any:
    monkeypatch.syspath_prepend(root / "examples")
    return importlib.import_module("offline_rl")


@needs_ogbench
def test_a_task_of_the_example_has_the_environment_of_its_data(tmp_path, offline_rl):
    """Whose name is another than that of the file."""
    rng = np.random.default_rng(0)
    columns = play() | {"observations": rng.normal(size=(15, 28)), "qpos": np.zeros((15, 21))}
    columns["actions"] = rng.uniform(-1, 1, (15, 5)).astype(np.float32)
    write(tmp_path, columns, "cube-single-play-v0")
    task = offline_rl.load_task("cube-single-play-singletask-v0", tmp_path)
    assert task.is_success
    env = task.make_env()
    assert env.action_space.shape == task.transitions.actions.shape[1:]
    assert env.observation_space.shape == task.transitions.observations.shape[1:]
    env.close()


def test_the_example_plays_a_file_of_d4rl(tmp_path, offline_rl):
    path = write_hdf5(tmp_path / "mine.hdf5", steps(timeouts=None))
    with pytest.raises(ValueError, match=r"`env` must be .*mine.hdf5.*`--env HalfCheetah-v5`"):
        offline_rl.load_task(str(path), tmp_path)
    task = offline_rl.load_task(str(path), tmp_path, "Pendulum-v1")
    space = task.make_env().action_space
    assert (space.low, space.high) == (-1, 1) and len(task.transitions) == 9


def test_the_example_rescales_the_actions_of_minari(tmp_path, offline_rl):
    env, steps = gymnasium.make("Pendulum-v1"), np.arange(5)
    buffer = EpisodeBuffer(
        observations=list(np.zeros((6, 3), np.float32)),
        actions=list(np.array([[-2], [2], [1], [0], [1]], np.float32)),
        rewards=list(-1.0 * steps),
        terminations=list(steps > 4),
        truncations=list(steps == 4),
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about an author, an algorithm and so on
        minari.create_dataset_from_buffers("test/pendulum-v0", [buffer], env=env)
    task = offline_rl.load_task("test/pendulum-v0", tmp_path)
    assert task.transitions.actions[:, 0].tolist() == [-1, 1, 0.5, 0]
    assert task.transitions.next_actions[:, 0].tolist() == [1, 0.5, 0, 0.5]
    space = task.make_env().action_space
    assert (space.low, space.high) == (-1, 1)


@pytest.mark.parametrize("reward, discount", [(-1.0, 0.99), (3.9, 0.995)])
@pytest.mark.parametrize("length", [50, 400])
def test_the_example_bins_returns_that_do_not_end(reward, discount, length, offline_rl):
    columns = [np.zeros((length + 1, 1)), np.zeros((length, 1)), np.full(length, reward)]
    o, a, r = ([column] * 3 for column in columns)
    transitions = ff.Transitions.from_episodes(o, a, r, [False] * 3)
    low, high = offline_rl.range_of_returns(transitions, discount)
    value = reward / (1 - discount)
    assert low < value < high and high - low < 0.5 * abs(value)


def test_the_example_bins_returns_that_end(offline_rl):
    columns = [np.zeros((11, 1)), np.zeros((10, 1)), np.arange(10) == 9]
    o, a, r = ([column] * 3 for column in columns)
    transitions = ff.Transitions.from_episodes(o, a, r, [True] * 3)
    low, high = offline_rl.range_of_returns(transitions, 0.99)
    assert 0.99**9 - 0.05 < low < 0.99**9 and 1 < high < 1.05
