import collections
import dataclasses
import types
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fisher_flow as ff


LENGTHS = (9, 1, 4, 12, 2)


def logged(next_actions=True) -> Any:
    """Trajectories of which every number is known: the observation of row `i` is `i`, and where
    it led is `1000 + i`. Some terminate at their end, one in its midst, as play does."""
    rng = np.random.default_rng(0)
    rows = sum(LENGTHS)
    ends = np.isin(np.arange(rows), np.cumsum(LENGTHS) - 1)
    masks = np.ones(rows, np.float32)
    masks[[9, 13, 18]] = 0  # the only row of the second, the end of the third, amid the fourth
    actions = rng.uniform(-1, 1, (rows + 1, 2)).astype(np.float32)
    following = actions[1:].copy()
    following[ends] = rng.uniform(-1, 1, (len(LENGTHS), 2))
    return ff.Transitions(
        {"row": np.arange(rows, dtype=np.float32)},
        actions[:-1],
        rng.normal(size=rows).astype(np.float32),
        masks,
        {"row": 1000 + np.arange(rows, dtype=np.float32)},
        following if next_actions else None,
        ends,
    )


def test_from_episodes_by_hand():
    t = ff.Transitions.from_episodes(
        observations=[np.array([[0.0], [1.0], [2.0], [3.0]]), np.array([[10.0], [11.0], [12.0]])],
        actions=[np.array([[0.1], [0.2], [0.3]]), np.array([[0.4], [0.5]])],
        rewards=[np.array([1.0, 2.0, 3.0]), np.array([4.0, 5.0])],
        terminated=[False, True],
    )
    assert len(t) == 4
    assert t.observations[:, 0].tolist() == [0, 1, 10, 11]
    assert t.next_observations[:, 0].tolist() == [1, 2, 11, 12]
    assert t.actions[:, 0].tolist() == [0.1, 0.2, 0.4, 0.5]
    assert t.next_actions is not None and t.next_actions[:3, 0].tolist() == [0.2, 0.3, 0.5]
    assert t.rewards.tolist() == [1, 2, 4, 5]
    assert t.masks.tolist() == [1, 1, 1, 0]
    assert t.ends.tolist() == [False, True, False, True]


@pytest.mark.parametrize("num_steps", [1, 2, 3, 20])
@pytest.mark.parametrize("next_actions", [True, False])
def test_n_step_returns_are_those_of_a_loop(num_steps, next_actions):
    t, discount = logged(next_actions), 0.9
    multi = t.n_step(num_steps, discount)
    assert len(multi) == len(t) == sum(LENGTHS)
    crossed = 0
    for row in range(len(t)):
        total, stop = 0.0, row
        for i in range(num_steps):
            stop = row + i
            total += discount**i * float(t.rewards[stop])
            if t.ends[stop] or t.masks[stop] == 0:
                crossed += i + 1 < num_steps
                break
        assert np.isclose(multi.rewards[row], total, rtol=1e-5)
        assert np.isclose(multi.masks[row], discount ** (stop - row) * t.masks[stop])
        assert multi.next_observations["row"][row] == 1000 + stop
        if next_actions:
            assert np.array_equal(multi.next_actions[row], t.next_actions[stop])
    assert (multi.next_actions is None) == (not next_actions)
    assert crossed > 0 or num_steps == 1
    assert multi.rewards.dtype == multi.masks.dtype == np.float32


def test_one_step_changes_nothing():
    t = logged()
    multi = t.n_step(1, 0.9)
    assert all(jax.tree.leaves(jax.tree.map(np.array_equal, multi, t)))


def chunk_by_hand(t, row, end, horizon, discount):
    """A chunk from `row` on, of a trajectory that ends before row `end`; and the last of its rows
    whose reward counts."""
    taken = [t.actions[i] for i in range(row, min(row + horizon, end))]
    rows = list(range(row, min(row + horizon, end)))
    for i in rows:
        if t.masks[i] == 0:
            rows = rows[: i - row + 1]
    over = t.masks[rows[-1]] == 0
    following = list(t.actions[rows[-1] + 1 : end])
    if t.next_actions is not None and t.masks[end - 1] > 0:
        following.append(t.next_actions[end - 1])
    if not following and not over:
        rows, following = rows[:-1], [t.actions[end - 1]]
    if not rows:
        return None
    total = sum(discount**k * float(t.rewards[i]) for k, i in enumerate(rows))
    mask = 0.0 if over else discount ** (len(rows) - 1)
    following = None if over else (following + horizon * following[-1:])[:horizon]
    return taken, total, mask, following, rows[-1]


@pytest.mark.parametrize("horizon", [1, 2, 3, 8])
@pytest.mark.parametrize("next_actions", [True, False])
def test_chunks_are_slices_of_their_trajectory(horizon, next_actions):
    t, discount = logged(next_actions), 0.9
    chunks: Any = t.chunks(horizon, discount)
    ends = np.repeat(np.cumsum(LENGTHS), LENGTHS)
    by_hand = {r: chunk_by_hand(t, r, ends[r], horizon, discount) for r in range(len(t))}
    expected = {row: chunk for row, chunk in by_hand.items() if chunk is not None}
    rows = np.array(list(expected))
    assert chunks.observations["row"].astype(int).tolist() == rows.tolist()
    # A row is missing only where a trajectory was cut off, and what was done next is not known.
    alone = np.isin(np.arange(len(t)), np.cumsum(LENGTHS) - 1) & (t.masks > 0)
    assert len(rows) == len(t) - (0 if next_actions else alone.sum())
    consecutive = (np.diff(rows) == 1) & (np.diff(ends[rows]) == 0)
    assert chunks.ends.tolist() == [*~consecutive, True] and consecutive.any()
    assert chunks.actions.shape == chunks.next_actions.shape == (len(rows), horizon, 2)
    assert chunks.action_masks.shape == (len(rows), horizon)
    seen = set()
    for i, (taken, total, mask, following, stop) in enumerate(expected.values()):
        assert chunks.action_masks[i].tolist() == [1] * len(taken) + [0] * (horizon - len(taken))
        filled = taken + [taken[-1]] * (horizon - len(taken))
        assert np.array_equal(chunks.actions[i], filled)
        assert np.isclose(chunks.rewards[i], total, rtol=1e-5, atol=1e-6)
        assert np.isclose(chunks.masks[i], mask)
        assert chunks.next_observations["row"][i] == 1000 + stop
        assert following is None or np.array_equal(chunks.next_actions[i], following)
        seen.add((len(taken) < horizon, following is None))
    assert len(seen) == (2 if horizon == 1 else 4 if next_actions or horizon > 2 else 3)


def test_the_fixed_point_of_a_critic_of_chunks_is_the_return():
    """At the end too, whether a trajectory terminates there or is cut off."""
    n, horizon, discount = 9, 4, 0.9
    rewards = np.random.default_rng(0).normal(size=n)
    left = [sum(discount**k * r for k, r in enumerate(rewards[i:])) for i in range(n)]
    o = np.arange(n + 1.0)[:, None]
    for terminated in (True, False):
        t = ff.Transitions.from_episodes([o], [o[:-1]], [rewards], [terminated])
        chunks = t.chunks(horizon, discount)
        value = np.append(left, np.nan)[chunks.next_observations[:, 0].astype(int)]
        target = chunks.rewards + discount * chunks.masks * np.where(chunks.masks > 0, value, 0)
        assert np.allclose(target, left[: len(chunks)]) and len(chunks) == n - (not terminated)


def test_chunks_of_chunks_know_what_was_taken():
    t = logged()
    inner = t.chunks(2, 0.9)
    outer: Any = inner.chunks(3, 0.81)
    assert outer.actions.shape[1:] == (3, 2, 2) and outer.action_masks.shape[1:] == (3, 2)
    assert outer.action_masks[0].all() and not outer.action_masks.all()
    assert np.array_equal(outer[:0].action_masks, outer.action_masks[:0])


def test_the_loss_of_a_chunk_is_that_of_the_actions_that_were_taken(getkey):
    policy = ff.FlowPolicy(lambda t, x, o: 0.3 * x + o, (4, 2))  # no entry sees another
    key, o = getkey(), jnp.asarray(0.5)
    a, b = jax.random.normal(getkey(), (2, 4, 2))
    mask = jnp.asarray([1.0, 1.0, 0.0, 0.0])
    mixed = jnp.where(mask[:, None] > 0, a, b)
    loss = lambda action, mask: ff.flow_matching_loss(policy, o, action, mask, key=key)
    assert jnp.allclose(loss(a, mask), loss(mixed, mask)) and not jnp.allclose(
        loss(a, None), loss(mixed, None)
    )
    assert jnp.allclose(loss(a, jnp.ones(4)), loss(a, None))
    assert jnp.allclose(0.5 * (loss(a, mask) + loss(a, 1 - mask)), loss(a, None))
    assert loss(a, jnp.zeros(4)) == 0
    assert jax.grad(lambda action: loss(action, mask))(a)[2:].tolist() == [[0, 0], [0, 0]]


@pytest.mark.usefixtures("standard_promotion")
def test_fitting_honours_the_masks(getkey):
    o, key = np.zeros((64, 1), np.float32), getkey()
    a = np.full((64, 2, 1), 3.0, np.float32)
    a[:, 1] = np.random.default_rng(0).choice([-1e3, 1e3], (64, 1))
    masks = np.tile(np.array([1.0, 0.0], np.float32), (64, 1))
    field = ff.VelocityMLP(1, (2, 1), width_size=8, depth=1, key=getkey())
    fit = lambda masks: ff.fit_flow(
        ff.FlowPolicy(field, (2, 1)), o, a, masks, num_updates=3, progress=False, key=key
    )
    weights = lambda masks: fit(masks).velocity_field.network.layers[-1].weight
    masked, last = weights(masks), field.network.layers[-1].weight
    assert np.array_equal(masked[1], last[1]) and not np.array_equal(masked[0], last[0])
    assert not np.array_equal(weights(None)[1], last[1])
    with pytest.raises(ValueError, match=r"`action_masks` must.*shape \(64,\).*transitions.act"):
        fit(masks[:, 0])


def test_rows_out_of_their_order_are_no_trajectory():
    t = logged()
    assert np.array_equal(t[3:7].ends, [False, False, False, True])
    order = np.random.default_rng(1).permutation(len(t))
    shuffled = t[order]
    apart = np.diff(order) != 1
    assert apart.any() and shuffled.ends[:-1][apart].all() and shuffled.ends[-1]
    kept = t[t.rewards > 0]
    assert np.array_equal(kept.rewards, t.rewards[t.rewards > 0])
    one_step, three_step = kept[kept.ends], kept.n_step(3, 0.9)[kept.ends]
    assert np.array_equal(one_step.rewards, three_step.rewards) and 0 < len(one_step) < len(kept)
    assert t[4].rewards == t.rewards[4]


def test_parts_do_not_run_into_each_other():
    t = logged()
    joined = t[:5].concatenate(t[20:], t[3:8])
    endless = dataclasses.replace(t, ends=np.zeros(len(t), bool))
    assert np.flatnonzero(endless.concatenate(endless).ends).tolist() == [27, 55]
    multi = joined.n_step(4, 0.9)
    apart = [part.n_step(4, 0.9) for part in (t[:5], t[20:], t[3:8])]
    assert len(joined) == 5 + len(t) - 20 + 5
    assert np.array_equal(multi.rewards, np.concatenate([part.rewards for part in apart]))
    assert np.array_equal(multi.masks, np.concatenate([part.masks for part in apart]))


def test_integers_and_lists_become_numbers():
    o = np.zeros((3, 1), np.float32)
    t = ff.Transitions(o, [[0.1], [0.2], [0.3]], [0, 0, 1], np.array([True, True, False]), o)
    assert t.rewards.dtype == t.masks.dtype == np.float32
    assert t.masks.tolist() == [1, 1, 0] and t.ends.tolist() == [True] * 3
    on_device = ff.Transitions(*jax.tree.map(jnp.asarray, (o, o, o[:, 0], o[:, 0], o)))
    assert isinstance(on_device.rewards, jax.Array)


class Table:
    """As a table of pandas or Polars: its index selects by label, and NumPy sees its rows."""

    def __init__(self, values):
        self.values, self.dtype, self.shape = values, values.dtype, values.shape

    def __array__(self, dtype=None, copy=None):
        return np.asarray(self.values, dtype)

    def __len__(self):
        return len(self.values)

    def __getitem__(self, rows):
        raise AssertionError("selected by label")


@pytest.mark.parametrize("wrap", [Table, np.ndarray.tolist, jnp.asarray, memoryview])
def test_a_column_is_anything_that_numpy_makes_an_array_of(wrap):
    o = np.random.default_rng(0).normal(size=(5, 2))
    column = o[:, 0].copy()
    one_dimensional = wrap(column)
    t = ff.Transitions(wrap(o), wrap(o), one_dimensional, np.ones(5), wrap(o))
    for rows in ([3, 1], np.s_[1:3], np.array([0, 1, 0, 1, 0], bool), Table(np.array([4, 0]))):
        index = np.arange(5)[np.asarray(rows) if isinstance(rows, Table) else rows]
        part = t[rows]
        for leaf in (part.observations, part.actions, part.next_observations):
            assert np.array_equal(leaf, o[index])
        assert np.array_equal(part.rewards, o[index, 0])
    assert len(t[[]]) == 0
    o_of, a_of, r_of = [wrap(o)], [wrap(o[1:])], [column[1:]]
    episode = ff.Transitions.from_episodes(o_of, a_of, r_of, [True])
    assert np.array_equal(episode.observations, o[:-1])


def test_tables_of_pandas_go_by_position():
    pandas = pytest.importorskip("pandas")
    order = np.random.default_rng(0).permutation(8)
    frame = pandas.DataFrame({"x": np.arange(8.0), "done": np.arange(8) % 2 == 0}).iloc[order]
    frame["n"] = pandas.array(np.arange(8), "Int64")
    a = np.zeros((8, 1))
    seen = frame[["x", "done"]]
    t = ff.Transitions(seen, a, frame["x"], frame["done"], seen, ends=frame["done"])
    assert np.array_equal(t[:3].rewards, order[:3]) and t.ends.dtype == bool
    assert np.array_equal(t[np.arange(3)].observations, np.stack([order, order % 2 == 0], 1)[:3])
    assert np.array_equal(t[frame["x"] > 3].rewards, order[order > 3])
    nullable = frame[["x", "n"]]
    t = dataclasses.replace(t, observations=nullable, next_observations=nullable)
    assert np.array_equal(t.observations[:, 1], np.arange(8))
    missing = frame["x"].where(frame["x"] > 2)
    with pytest.raises(ValueError, match=r"`rewards` must be finite, but 3 of 8 rows"):
        dataclasses.replace(t, rewards=missing)


class Named(NamedTuple):
    eye: Any
    arm: Any


@pytest.mark.parametrize(
    "make",
    [
        lambda eye, arm: collections.OrderedDict(eye=eye, arm=arm),
        lambda eye, arm: types.MappingProxyType({"eye": eye, "arm": arm}),
        lambda eye, arm: collections.UserDict(eye=eye, arm=arm),
        lambda eye, arm: collections.ChainMap({"eye": eye}, {"arm": arm}),
    ],
)
def test_mappings_are_dictionaries(make, getkey):
    rng = np.random.default_rng(0)
    eye, arm = rng.normal(3, 2, (7, 2)), rng.normal(size=(7, 1))
    plain: Any = {"eye": eye, "arm": arm}
    a = np.zeros((7, 1))
    t: Any = ff.Transitions((make(**plain), [make(**plain)]), a, a[:, 0], a[:, 0], (plain, [plain]))
    assert jax.tree.structure(t.observations) == jax.tree.structure((plain, [plain]))
    assert np.array_equal(t[2:4].observations[1][0]["eye"], eye[2:4])
    simple = ff.Transitions(make(**plain), a, a[:, 0], a[:, 0], plain)
    normaliser = ff.Normaliser.of(simple)
    one = make(eye=eye[0], arm=arm[0])
    assert np.allclose(normaliser(one)["eye"], (eye[0] - eye.mean(0)) / eye.std(0))
    episodes = ff.Transitions.from_episodes([make(**plain)], [a[1:]], [a[1:, 0]], [True])
    assert np.array_equal(episodes.observations["arm"], arm[:-1])
    # A network sees the entries in one order, whatever mapping they come in.
    policy = ff.FlowPolicy(ff.VelocityMLP(3, (1,), width_size=8, depth=1, key=getkey()), (1,))
    key = getkey()
    action = policy.sample({"eye": eye[0], "arm": arm[0]}, key=key)
    ordered = collections.OrderedDict(eye=eye[0], arm=arm[0])
    assert np.array_equal(policy.sample(ordered, key=key), action)


def test_named_tuples_keep_their_names(tmp_path):
    rng = np.random.default_rng(0)
    o = Named(rng.integers(0, 255, (7, 4, 4, 3), np.uint8), rng.normal(size=(7, 2)))
    a = np.zeros((7, 1))
    t: Any = ff.Transitions(o, a, a[:, 0], a[:, 0], o)
    assert t[:3].observations.arm.shape == (3, 2)
    ff.save_transitions(tmp_path, t)
    opened = ff.open_transitions(tmp_path)
    assert isinstance(opened.observations, tuple) and len(opened.observations) == 2
    for normaliser in (ff.Normaliser.of(t), ff.Normaliser.of(opened)):
        assert np.array_equal(normaliser.transitions(t).observations.eye, o.eye)
        assert np.allclose(normaliser(o).arm, (o.arm - o.arm.mean(0)) / o.arm.std(0))


def test_numbers_that_jax_cannot_hold_as_they_are():
    o = np.arange(12.0).reshape(6, 2)
    swapped = o.astype(">f4")
    t = ff.Transitions(
        swapped, o.astype(np.longdouble), o[:, 0].astype(">i2"), o[:, 0] > 3, swapped
    )
    on_device = jax.tree.map(jnp.asarray, t)
    assert np.array_equal(on_device.observations, o) and np.array_equal(on_device.rewards, o[:, 0])
    large = np.arange(6)[:, None] + 2**40
    with jax.enable_x64(False), pytest.raises(ValueError, match=r"integers from -2147483648 to 2"):
        ff.Transitions(large, o, o[:, 0], o[:, 0] > 3, large)
    assert transitions(observations=np.ones(4, bool), next_observations=np.ones(4, bool))


def test_replacing_a_column_checks_it():
    t = logged()
    assert np.array_equal(dataclasses.replace(t, rewards=t.rewards / 2).ends, t.ends)
    with pytest.raises(ValueError, match="same length"):
        dataclasses.replace(t, rewards=t.rewards[1:])


def transitions(**columns):
    o = np.zeros((4, 2), np.float32)
    defaults = dict(observations=o, actions=o, rewards=o[:, 0], masks=o[:, 0], next_observations=o)
    return ff.Transitions(**(defaults | columns))


def columns_of(column):
    return transitions(observations=column, next_observations=column)


def ragged(sizes):
    """As a column of lists in a file of Parquet."""
    column = np.empty(2 * len(sizes), object)
    column[:] = [np.zeros(size) for size in 2 * sizes]
    return column


def many(convert, rows=9):
    o = np.zeros((rows, 2))
    return ff.Transitions(convert(o), o, o[:, 0], o[:, 0], o)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: transitions(rewards=np.zeros((4, 1))), r"`rewards` must.*`rewards=rewards.resh"),
        (lambda: transitions(actions=np.zeros((3, 2))), r"must have the same length"),
        (lambda: transitions(actions=np.zeros(4, int)), r"`actions` must be.*int64.*astype"),
        (lambda: transitions(masks=np.full(4, 2.0)), r"`masks` must be between.*2 to 2.*`masks=1"),
        (lambda: transitions(next_observations=np.zeros((4, 3))), r"`next_observations` must be"),
        (lambda: transitions(next_actions=np.zeros((4, 3))), r"`next_actions` must be like"),
        (
            lambda: transitions(
                observations={"a": np.ones(4)},
                next_observations={"a": np.array([0.0, 1.0, np.nan, 0.0])},
            ),
            r"`next_observations\['a'\]` must be finite, but 1 of 4 rows.* row 2\.",
        ),
        (
            lambda: transitions(rewards=np.array([0.0, 1.0, np.nan, np.inf])),
            r"`rewards` must be finite, but 2 of 4 rows are not, the first of them row 2.*isfinite",
        ),
        (lambda: columns_of(ragged([3, 3])), r"Python objects.*one shape.*=np.stack\(obs"),
        (lambda: columns_of(ragged([3, 2])), r"`observations` .*Drop the rows.*one shape"),
        (lambda: columns_of(np.array([1.0, None] * 2)), r"Python objects.*missing entries"),
        (lambda: columns_of(np.array(["go", "stop"] * 2)), r"got strings.*np.eye\(len\(names"),
        (lambda: columns_of(np.array([b"go"] * 4)), r"got bytes.*np.unique"),
        (lambda: columns_of(np.array(["go", "up"] * 2, object)), r"such as `'go'`.*np.unique"),
        (
            lambda: columns_of(np.arange(4).astype("datetime64[s]")),
            r"got dtype datetime64.*seconds: `observations=\(\(obs.*timedelta64\(1, 's'\)",
        ),
        (lambda: columns_of(np.arange(4).astype("timedelta64[s]")), r"got dtype timedelta64"),
        (lambda: columns_of(np.ones(4, complex)), r"got dtype complex128.*\.real"),
        (lambda: columns_of(np.zeros(4, [("x", float), ("y", int)])), r"records.*dtype.names"),
        (lambda: columns_of(jax.random.split(jax.random.key(0), 4)), r"got dtype key<fry>"),
        (
            lambda: columns_of([[1.0, 2.0], [1.0]] * 2),
            r"cannot convert.*Give all rows",
        ),
        (lambda: columns_of({1.0, 2.0}), r"of type `set`.*np.stack\(list"),
        (lambda: columns_of(["go", "stop"] * 2), r"`observations` .* strings.*np.unique"),
        (lambda: columns_of({"arm": object()}), r"`observations\['arm'\]`.*type `object`"),
        (
            lambda: columns_of(np.ma.masked_equal(np.arange(4.0), 1)),
            r"no masked entries, but 1 of 4.*filled",
        ),
        (lambda: transitions(rewards=np.array(["1"] * 4)), r"`rewards` must be an array of real"),
        (lambda: transitions(masks=np.ones(4, complex)), r"`masks` must be an array of real"),
        (lambda: transitions(ends=np.array(["no"] * 4)), r"`ends` must be an array of real"),
        (lambda: transitions(ends=[1, 2, 3, 4]), r"`ends` must be True or False.*np.isin"),
        (lambda: transitions(actions=np.ones((4, 2), bool)), r"`actions` must be.*bool.*astype"),
        (lambda: transitions(action_masks=np.ones(4)), r"`action_masks` .*\(4,\).*chunks\(hor"),
        (lambda: transitions(action_masks=np.full((4, 2), -1)), r"`action_masks` .* -1 to -1"),
        (
            lambda: many(lambda o: list(o)),
            r"a list of 9 arrays, one for each row.*np.stack\(obs",
        ),
        (lambda: many(tuple, 3), r"a list of 3 arrays, one for each row"),
        (
            lambda: many(lambda o: [{"x": x} for x in o]),
            r"a list of 9 dictionaries.*jax.tree.map",
        ),
        (
            lambda: transitions(masks=np.ones(4), ends=[False, False, True, True]).chunks(4, 0.9),
            r"at least one chunk.*at most 3 rows",
        ),
        (
            lambda: ff.Transitions.from_episodes([np.zeros(3)], [np.zeros(2)], [1.0], [True]),
            r"single numbers in episode 0.*from_episodes\(\[obs",
        ),
        (
            lambda: ff.Transitions.from_episodes(
                [ragged([3, 3])], [np.zeros(3)], [np.zeros(3)], [True]
            ),
            r"`observations\[0\]` must be an array of real numbers",
        ),
        (lambda: logged().chunks(13, 0.9), r"`horizon` must leave.*at most 12 rows.*`horizon=6`"),
        (lambda: logged().n_step(0, 0.9), r"`num_steps` must be an integer.*`num_steps=3`"),
        (lambda: logged().n_step(2, -1.0), r"`discount` must be.*`discount=0.99`"),
        (lambda: logged().n_step(2, 1.5), r"`discount` must be .* from 0 to 1, but got 1.5"),
        (
            lambda: transitions(masks=np.ones(4)).n_step(2, 0.9),
            r"`ends` must say .* several steps ahead, but every one of the 4 rows",
        ),
        (lambda: transitions(masks=np.ones(4)).chunks(2, 0.9), r"`ends` must .* chunks of several"),
        (
            lambda: ff.Transitions.from_episodes(
                [np.zeros((3, 2)), np.zeros((3, 4))],
                [np.zeros((2, 1))] * 2,
                [np.zeros(2)] * 2,
                [True, True],
            ),
            r"`observations\[1\]` must have rows like .*\[3,4\].*\[3,2\]",
        ),
        (
            lambda: ff.Transitions.from_episodes(
                [np.zeros((2, 1))], [np.zeros((1, 1))], [np.zeros(1)], [False]
            ),
            r"`actions` must have an episode .* got episodes of \[1\] steps",
        ),
        (lambda: logged().concatenate(logged(False)), r"(?s)`others\[0\]` must.*next_actions=None"),
        (
            lambda: ff.Transitions.from_episodes(*[[np.zeros(3)]] * 3, [True]),  # pyright: ignore
            r"Episode 0 has 3 rewards, 3 actions and \[3\] observations.*last_observation",
        ),
        (lambda: ff.Transitions.from_episodes([], [], [], []), r"one entry an episode.*0, 0, 0"),
    ],
)
def test_errors(make, message):
    with pytest.raises(ValueError, match=message):
        make()
