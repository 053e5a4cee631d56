"""Reads files in the formats of OGBench, D4RL and Minari, made here: nothing is downloaded."""

import importlib
import importlib.util
import subprocess
import sys
import warnings
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
    assert "qpos is missing" in message(good, name=f"{NAME}-singletask-v0")
    assert f"{NAME}-v0.npz" in message({}, FileNotFoundError, "antmaze-large-navigate-v0")
    endless = good | {"terminals": np.zeros(15, bool)}
    assert "none of its 15 rows is marked" in message(endless)
    bad = good["observations"].copy()
    bad[[4, 7], 1] = np.nan
    assert "2 of 15 rows are not, the first of them row 4" in message(good | {"observations": bad})
    assert "from -2 to 2" in message(good | {"actions": np.linspace(-2, 2, 15)[:, None]})
    assert "continuous, but got int64" in message(good | {"actions": np.zeros((15, 1), int)})
    assert "'actions': 14" in message(good | {"actions": good["actions"][1:]})
    scene = good | {"qpos": np.zeros((15, 21))}
    write(tmp_path, scene, "scene-play-v0")
    with pytest.raises(ValueError, match="button_states is missing"):
        ff.load_ogbench("scene-play-singletask-v0", tmp_path)
    whole = (tmp_path / "scene-play-v0.npz").read_bytes()
    (tmp_path / "scene-play-v0.npz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="must be an .npz file, but is not, or was copied in part"):
        ff.load_ogbench("scene-play-v0", tmp_path)


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
