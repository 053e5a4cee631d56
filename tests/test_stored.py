"""Transitions on disk, and training that reads them from there."""

import contextlib
import dataclasses
import json
import mmap
import signal
import subprocess
import sys
import threading
import time
import tracemalloc
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import test_pixels
from test_train import agent, averaging, same, train, transitions

import fisher_flow as ff
from fisher_flow._data import _normaliser, _stored
from fisher_flow._training import _feed


pytestmark = pytest.mark.usefixtures("standard_promotion")


def nested(num=30, next_actions=True) -> Any:
    rng = np.random.default_rng(num)
    camera = rng.integers(0, 255, (num, 4, 4, 3), np.uint8)
    joints = rng.normal(size=(num, 2)).astype(np.float32)
    o = {"b": camera, "a": (joints, [joints[:, 0].astype(np.float64), None])}
    a = rng.uniform(-1, 1, (num, 3)).astype(np.float32)
    ends = rng.random(num) < 0.2
    r = rng.normal(size=num).astype(np.float32)
    masks = 1 - ends.astype(np.float32)
    return ff.Transitions(o, a, r, masks, o, a[::-1] if next_actions else None, ends)


def identical(x, y):
    pairs = zip(jax.tree.leaves(x), jax.tree.leaves(y), strict=True)
    return jax.tree.structure(x) == jax.tree.structure(y) and all(
        a.dtype == b.dtype and np.array_equal(a, b) for a, b in pairs
    )


def no_more_threads_than(before):
    for _ in range(100):  # those that end take a moment
        if threading.active_count() <= before:
            return True
        time.sleep(0.05)
    return False


def on_disk(column, folder):
    """A map of the user's own."""
    path = folder / f"{len(list(folder.iterdir()))}.bin"
    column = np.asarray(column)
    column.tofile(path)
    return np.memmap(path, column.dtype, "r", shape=column.shape)


@pytest.fixture
def optimised():
    """Compiles as users do. Else programs differ in their rounding that differ in where a batch
    comes from; agents have sizes of their own, as what was compiled before is used again."""
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", True)


@pytest.fixture
def stored(tmp_path):
    ff.save_transitions(tmp_path / "stored", transitions())
    return ff.open_transitions(tmp_path / "stored")


@pytest.mark.parametrize("next_actions", [True, False])
def test_parts_that_were_saved_open_as_one(tmp_path, next_actions):
    parts = [nested(num, next_actions) for num in (30, 1, 12)]
    ff.save_transitions(tmp_path / "new" / "folder", (part for part in parts))
    opened = ff.open_transitions(tmp_path / "new" / "folder")
    together = parts[0].concatenate(*parts[1:])
    assert len(opened) == 43 and identical(opened, together)
    assert all(isinstance(leaf, np.memmap) for leaf in jax.tree.leaves(opened))
    assert not any(leaf.flags.writeable for leaf in jax.tree.leaves(opened))
    assert _stored.stored_record(opened) is not None
    assert _stored.checksum(opened) == _stored.checksum(together)
    # Any other program can read the columns.
    path = tmp_path / "new" / "folder" / "rewards.npy"
    assert np.array_equal(np.load(path, allow_pickle=False), together.rewards)


def test_chunks_are_stored_with_their_masks(tmp_path):
    t = dataclasses.replace(transitions(), ends=np.arange(60) % 12 == 11)
    chunks = t.chunks(5, 0.9)
    assert not chunks.action_masks.all()
    ff.save_transitions(tmp_path, [chunks[:30], chunks[30:]])
    opened = ff.open_transitions(tmp_path)
    assert identical(opened, chunks[:30].concatenate(chunks[30:]))
    one: Any = ff.BehaviourCloning(flow=ff.BehaviourFlow(width_size=7, depth=1))
    in_memory = train(one, chunks[:30].concatenate(chunks[30:]), 3)
    assert same(train(one, opened, 3).states, in_memory.states)


def test_folders_that_are_older_than_the_masks_of_actions_open(tmp_path):
    ff.save_transitions(tmp_path, transitions())
    record = json.loads((tmp_path / "transitions.json").read_text())
    assert record["columns"].pop("action_masks", 0) is None
    (tmp_path / "transitions.json").write_text(json.dumps(record))
    opened = ff.open_transitions(tmp_path)
    assert identical(opened, transitions()[:]) and _stored.stored_record(opened) is not None


def test_arrays_on_the_device_and_maps_are_saved_too(tmp_path, stored):
    on_device = jax.tree.map(jnp.asarray, stored)
    for name, parts in (("device", on_device), ("again", stored), ("parts", [stored[:20]] * 2)):
        ff.save_transitions(tmp_path / name, parts)
    assert identical(ff.open_transitions(tmp_path / "device"), stored)
    assert identical(ff.open_transitions(tmp_path / "again"), stored)
    halves = stored[:20].concatenate(stored[:20])
    assert identical(ff.open_transitions(tmp_path / "parts"), halves)


@pytest.mark.parametrize("rows", [np.s_[3:20], np.s_[:], np.s_[-4:], np.s_[::2], np.s_[20:3:-1]])
def test_a_slice_is_a_view_of_the_rows_that_indices_choose(stored, rows):
    whole = ff.Transitions(*jax.tree.map(np.array, dataclasses.astuple(stored)))
    whole = dataclasses.replace(whole, ends=np.arange(len(whole)) % 7 == 6)
    assert identical(whole[rows], whole[np.arange(len(whole))[rows]])
    part = stored[rows]
    assert np.shares_memory(part.observations, stored.observations)
    assert _stored.stored_record(part) is None  # which would tell of the whole
    assert len(part) == len(stored) or _stored.checksum(part) != _stored.checksum(stored)
    scaled = eqx.tree_at(lambda t: t.rewards, stored, stored.rewards * 2)
    assert _stored.stored_record(scaled) is None


def test_what_a_stopped_writer_left_does_not_open_and_is_written_again(tmp_path):
    def stopped():
        yield transitions()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ff.save_transitions(tmp_path, stopped())
    assert (tmp_path / "rewards.npy").exists()
    with pytest.raises(ValueError, match="was not written to the end.*save_transitions"):
        ff.open_transitions(tmp_path)
    ff.save_transitions(tmp_path, nested())
    assert identical(ff.open_transitions(tmp_path), nested()[:])
    assert not list(tmp_path.glob("*unfinished"))


def test_a_second_writer_leaves_the_first_alone(tmp_path):
    def parts():
        yield transitions()
        with pytest.raises(ValueError, match=r"(?s)another is at work.*Wait.*_2'`"):
            ff.save_transitions(tmp_path, nested())
        yield transitions()

    ff.save_transitions(tmp_path, parts())
    assert len(ff.open_transitions(tmp_path)) == 120


@pytest.mark.skipif(_stored.fcntl is None, reason="only Unix has these locks")
def test_a_lock_ends_with_its_process(tmp_path):
    code = (
        "import sys, pathlib; from fisher_flow._data import _stored\n"
        "marker = _stored._claim(pathlib.Path(sys.argv[1])); print(flush=True); input()"
    )
    command: Any = [sys.executable, "-c", code, tmp_path]
    pipes: Any = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    with subprocess.Popen(command, **pipes) as writer:
        writer.stdout.readline()  # pyright: ignore
        with pytest.raises(ValueError, match="another is at work"):
            ff.save_transitions(tmp_path, transitions())
        writer.send_signal(signal.SIGKILL)
    ff.save_transitions(tmp_path, transitions())
    assert len(ff.open_transitions(tmp_path)) == 60


def test_a_checksum_is_of_every_bit():
    x = jnp.arange(6, dtype=jnp.bfloat16).reshape(2, 3)
    assert _stored.checksum(x) == _stored.checksum(np.asarray(x))
    assert _stored.checksum(x) != _stored.checksum(x.at[1, 2].set(5.03125))
    assert _stored.checksum(np.asarray(x).T) != _stored.checksum(x)
    assert _stored.checksum([1.0, np.zeros((0, 2))]) == _stored.checksum(np.ones(1))


derived = {
    "n_step": lambda t, folder: dataclasses.replace(t, ends=np.arange(60) % 12 == 11).n_step(
        3, 0.9
    ),
    "replace": lambda t, folder: dataclasses.replace(t, rewards=t.rewards * 2),
    "slice": lambda t, folder: t[5:40],
    "cast": lambda t, folder: dataclasses.replace(
        t, masks=on_disk(np.ones(60, np.int8), folder), ends=on_disk(np.eye(1, 60)[0], folder)
    ),
    "own": lambda t, folder: ff.Transitions(*(on_disk(x, folder) for x in jax.tree.leaves(t))),
}


@pytest.mark.parametrize("derive", derived.values(), ids=derived)
def test_what_is_derived_from_maps_streams(stored, tmp_path, derive):
    expected = train(averaging, derive(transitions(), tmp_path), 5, stream=False)
    t = derive(stored, tmp_path)
    assert any(map(_stored.is_mapped, jax.tree.leaves(t)))
    assert all(_stored.is_mapped(x) == isinstance(x, np.memmap) for x in jax.tree.leaves(t))
    assert same(expected.states, train(averaging, t, 5).states)


def test_what_numpy_copies_from_a_map_is_in_memory(stored):
    copied = jax.tree.map(lambda leaf: leaf.astype(leaf.dtype), stored)
    assert all(isinstance(leaf, np.memmap) for leaf in jax.tree.leaves(copied))
    assert not any(map(_stored.is_mapped, jax.tree.leaves(copied)))
    expected = train(averaging, transitions(), 5)
    for stream in (None, True):
        assert same(expected.states, train(averaging, copied, 5, stream=stream).states)


@pytest.mark.parametrize("context", ["64 bits", "32 bits", "partitionable", "not partitionable"])
def test_a_configuration_around_the_training_reaches_the_rows(stored, context):
    option = jax.enable_x64 if "bits" in context else jax.threefry_partitionable
    with option(context in ("64 bits", "partitionable")):
        expected = train(averaging, transitions(), 5)
        assert same(expected.states, train(averaging, stored, 5).states)


class Map(mmap.mmap):
    """Tells what was advised."""

    def madvise(self, *args):
        self.advice = [*getattr(self, "advice", []), *args]
        return super().madvise(*args)


@pytest.mark.skipif(not hasattr(mmap, "MADV_RANDOM"), reason="there is no advice here")
def test_maps_are_read_as_before_when_the_training_has_ended(stored, monkeypatch):
    monkeypatch.setattr(mmap, "mmap", Map)
    opened = ff.open_transitions(Path(stored.rewards.filename).parent)
    with contextlib.suppress(KeyboardInterrupt):
        train(averaging, opened, 20, loggers=[stop])
    rewards: Any = opened.rewards
    assert rewards._mmap.advice == [mmap.MADV_RANDOM, mmap.MADV_NORMAL]


def stop(seed, updates, values):
    raise KeyboardInterrupt


@pytest.mark.parametrize("row, ahead", [(1, 16), (2**17, 16), (2**21, 4), (2**25, 2)])
def test_the_blocks_in_flight_are_bounded(row, ahead):
    column = np.broadcast_to(np.uint8(0), (3, row))
    t = jax.tree.map(lambda leaf: column, transitions())
    feed = _feed.Streamed(t, jax.random.key(0), (0,), 4, 1000)
    options, size = feed._options, feed._length * 4 * 7 * row
    assert options.prefetch_buffer_size == options.num_threads
    assert options.num_threads == ahead and (ahead == 2 or ahead * size <= 2**28)


one_step = ff.OneStep(
    flow=ff.BehaviourFlow(width_size=7, depth=1),
    critic=ff.TemporalDifference(width_size=7, depth=1),
)


@pytest.mark.parametrize("vectorise", [False, True])
@pytest.mark.parametrize("agent", [averaging, one_step], ids=["averaging", "one-step"])
def test_streamed_it_ends_with_the_same_bits(stored, monkeypatch, request, agent, vectorise):
    if agent is one_step:
        request.getfixturevalue("optimised")
    options: Any = dict(seeds=[0, 3], vectorise=vectorise)
    in_memory = train(agent, transitions(), 25, **options)
    threads = threading.active_count()
    for length in (7, 100) if agent is averaging else (7,):
        monkeypatch.setattr(_feed, "_BLOCK_LENGTH", length)
        streamed = train(agent, stored, 25, **options)
        assert same(in_memory.states, streamed.states)
        assert streamed.transitions is stored
        assert no_more_threads_than(threads)


class AveragingImages(type(averaging)):
    def init(self, example, *, key):
        return super().init(self.flat(example), key=key)

    def update(self, state, batch, *, key):
        return super().update(state, self.flat(batch), key=key)

    def flat(self, t):
        columns = lambda t: (t.observations, t.next_observations)
        flat = (o["camera"].reshape(len(t), -1).astype(np.float32) for o in columns(t))
        return eqx.tree_at(columns, t, tuple(flat))


@pytest.mark.parametrize("vectorise", [False, True])
def test_streamed_images_are_cropped_to_the_same_bits(vectorise):
    agent: Any = AveragingImages()
    data, crop = test_pixels.transitions(shape=(2, 6, 6, 1)), ff.RandomCrop(1, probability=0.7)
    options: Any = dict(seeds=[0, 3], vectorise=vectorise)
    in_memory, streamed = (
        train(agent, data, 5, augment=crop, stream=stream, **options) for stream in (False, True)
    )
    assert same(in_memory.states, streamed.states)
    assert not same(in_memory.states, train(agent, data, 5, **options).states)


@pytest.mark.parametrize("size", [1, 1000])
def test_whether_to_stream_is_one_thing_and_where_the_data_lie_another(stored, monkeypatch, size):
    monkeypatch.setattr(_feed, "_BLOCK_SIZE", size)
    expected = train(averaging, transitions(), 9)
    streamed = train(averaging, transitions(), 9, stream=True)
    moved = train(averaging, stored, 9, stream=False)
    assert same(expected.states, streamed.states) and same(expected.states, moved.states)


def test_a_stream_that_was_stopped_goes_on_to_the_same_bits(stored, monkeypatch, tmp_path):
    monkeypatch.setattr(_feed, "_BLOCK_LENGTH", 7)
    once = train(averaging, transitions(), 40, folder=tmp_path / "once", checkpoint_every=10)

    def stop(seed, updates, values):
        if updates == 30:  # after the checkpoint at 20, amid a block
            raise KeyboardInterrupt

    options: Any = dict(folder=tmp_path / "twice", checkpoint_every=10)
    threads = threading.active_count()
    with pytest.raises(KeyboardInterrupt):
        train(averaging, stored, 40, loggers=[stop], **options)
    assert no_more_threads_than(threads)
    # In memory or not, it is the same run: the data have the same checksum.
    train(averaging, transitions(), 30, **options)
    twice = train(averaging, stored, 40, **options)
    assert same(once.states, twice.states)
    for file in ("train.csv", "run.json"):
        first, second = (tmp_path / name / file for name in ("once", "twice"))
        assert first.read_text() == second.read_text()


@pytest.mark.slow
def test_nothing_takes_memory_for_every_row(stored):
    """Files of holes: a terabyte in all, which takes no disk. Whoever reads it never returns."""
    train(averaging, stored, 10)  # to compile takes memory of its own
    rows = 2_000_000_000
    folder = Path(stored.rewards.filename).parent
    for leaf in jax.tree.leaves(stored):
        shape = (rows, *leaf.shape[1:])
        np.lib.format.open_memmap(leaf.filename, mode="w+", dtype=leaf.dtype, shape=shape)
    record = json.loads((folder / "transitions.json").read_text())
    (folder / "transitions.json").write_text(json.dumps(record | {"rows": rows}))
    tracemalloc.start()
    huge = ff.open_transitions(folder)
    assert len(huge) == rows and len(huge[-1000:]) == 1000
    train(averaging, huge, 10, folder=folder / "run")
    assert tracemalloc.get_traced_memory()[1] < 10e6
    tracemalloc.stop()


def test_a_normaliser_of_many_parts(monkeypatch, tmp_path):
    t = nested(101)
    t = eqx.tree_at(lambda t: t.observations, t, {"a": 1e4 + 3 * t.observations["a"][0]})
    t = eqx.tree_at(lambda t: t.next_observations, t, t.observations)
    ff.save_transitions(tmp_path, t)
    monkeypatch.setattr(_normaliser, "_PART_SIZE", 20)  # 10 rows
    normaliser = ff.Normaliser.of(t)
    assert identical(normaliser, ff.Normaliser.of(ff.open_transitions(tmp_path)))
    o = t.observations["a"].astype(np.float64)
    assert np.allclose(normaliser.mean["a"], o.mean(0), rtol=1e-6)
    assert np.allclose(normaliser.deviation["a"], o.std(0), rtol=1e-6)


def spoiled(folder, change):
    ff.save_transitions(folder, transitions())
    change(folder)
    return ff.open_transitions(folder)


def cut(folder):
    data = (folder / "rewards.npy").read_bytes()
    (folder / "rewards.npy").write_bytes(data[:-4])


def with_record(**changes):
    def change(folder):
        record = json.loads((folder / "transitions.json").read_text())
        (folder / "transitions.json").write_text(json.dumps(record | changes))

    return change


def pickled(folder):
    np.save(folder / "rewards.npy", np.array([{}] * 60), allow_pickle=True)


def without_rows(folder):
    record = json.loads((folder / "transitions.json").read_text())
    del record["rows"]
    (folder / "transitions.json").write_text(json.dumps(record))


def lettered(folder):
    np.save(folder / "rewards.npy", np.array(["a"] * 60))


def save_bfloat(folder):
    o = jnp.ones((2, 1), jnp.bfloat16)
    ff.save_transitions(folder, ff.Transitions(o, np.ones((2, 1)), [0, 0], [1, 1], o))


def save_module(folder):
    o = {3: np.ones((2, 1))}
    ff.save_transitions(folder, ff.Transitions(o, np.ones((2, 1)), [0, 0], [1, 1], o))


def save_nan(folder):
    t = transitions()
    ff.save_transitions(folder, eqx.tree_at(lambda t: t.rewards, t, t.rewards * np.nan))


def save_twice(folder):
    for _ in range(2):
        ff.save_transitions(folder, transitions())


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda f: ff.open_transitions(f / "none"), r"none` is missing.*save_transitions\('"),
        (lambda f: ff.open_transitions(f), r"has no files\..*save_transitions\('"),
        (lambda f: spoiled(f, cut), "rewards.npy` cannot be read .*copy it again"),
        (lambda f: spoiled(f, pickled), "rewards.npy` cannot be read .*Python objects"),
        (lambda f: spoiled(f, with_record(rows=7)), ".npy` has 60 rows, not 7"),
        (lambda f: spoiled(f, with_record(columns={"b": "b.npy"})), "the columns obs.*but has b"),
        (lambda f: spoiled(f, with_record(rows=None)), ".npy` has 60 rows, not None.*copy it"),
        (lambda f: spoiled(f, with_record(columns=3)), "transitions.json` must have the rows and"),
        (lambda f: spoiled(f, with_record(columns={"a": {"dict": 3}})), "transitions.json` must"),
        (lambda f: spoiled(f, without_rows), "transitions.json` must have .*KeyError.*opy the fo"),
        (lambda f: spoiled(f, lettered), "`rewards` must be an array of real numbers.*strings"),
        (lambda f: spoiled(f, with_record(format="else")), "this version.*actions.npy.*reader"),
        (save_bfloat, "`observations` must be numbers in arrays.*bfloat16"),
        (save_module, "`observations` must be numbers.*`dict`.*camera"),
        (save_nan, "`rewards` must be finite"),
        (save_twice, r"must be empty.*_2'`, or remove it first: `shutil.rmtree"),
        (lambda f: ff.save_transitions(f, []), r"at least one part.*parts=\(read\(path\)"),
        (lambda f: ff.save_transitions(f, iter("a")), r"`parts\[0\]` must.*from_episodes"),  # pyright: ignore
        (lambda f: ff.save_transitions(f, [nested(), transitions()]), r"`parts\[1\]` must be like"),
    ],
)
def test_messages(tmp_path, call, message):
    with pytest.raises((ValueError, FileNotFoundError), match=f"(?s){message}"):
        call(tmp_path)


def test_without_grain(stored, monkeypatch):
    monkeypatch.setitem(sys.modules, "grain", None)
    with pytest.raises(ImportError, match=r"pip install .*`stream=False`"):
        train(agent, stored, 1)
