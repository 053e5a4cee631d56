import dataclasses
from typing import Any

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


@pytest.mark.parametrize("horizon", [1, 2, 3])
@pytest.mark.parametrize("next_actions", [True, False])
def test_chunks_are_slices_of_their_trajectory(horizon, next_actions):
    t, discount = logged(next_actions), 0.9
    chunks: Any = t.chunks(horizon, discount)
    actions = np.asarray(t.actions)
    expected, start = [], 0
    for length in LENGTHS:
        end = start + length
        # What was done in this trajectory, and after it unless it was over.
        known = next_actions and t.masks[end - 1] > 0
        done = list(actions[start:end]) + ([t.next_actions[end - 1]] if known else [])
        for row in range(start, end - horizon + 1):
            terminates = (t.masks[row : row + horizon] == 0).any()
            following = done[row - start + horizon : row - start + 2 * horizon]
            if terminates or len(following) == horizon:
                expected.append((row, None if terminates else following))
        start = end
    assert chunks.observations["row"].astype(int).tolist() == [row for row, _ in expected]
    assert any(following is None for _, following in expected)
    assert any(following is not None for _, following in expected)
    trajectory = np.repeat(np.arange(len(LENGTHS)), LENGTHS)
    rows = np.array([row for row, _ in expected])
    consecutive = (np.diff(rows) == 1) & (np.diff(trajectory[rows]) == 0)
    assert chunks.ends.tolist() == [*~consecutive, True] and consecutive.any()
    multi = t.n_step(horizon, discount)
    assert chunks.actions.shape == chunks.next_actions.shape == (len(expected), horizon, 2)
    for i, (row, following) in enumerate(expected):
        assert np.array_equal(chunks.actions[i], actions[row : row + horizon])
        assert chunks.rewards[i] == multi.rewards[row] and chunks.masks[i] == multi.masks[row]
        assert chunks.next_observations["row"][i] == 1000 + row + horizon - 1
        if following is None:
            assert chunks.masks[i] == 0
        else:
            assert chunks.masks[i] > 0
            assert np.array_equal(chunks.next_actions[i], following)


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


def test_replacing_a_column_checks_it():
    t = logged()
    assert np.array_equal(dataclasses.replace(t, rewards=t.rewards / 2).ends, t.ends)
    with pytest.raises(ValueError, match="same length"):
        dataclasses.replace(t, rewards=t.rewards[1:])


def transitions(**columns):
    o = np.zeros((4, 2), np.float32)
    defaults = dict(observations=o, actions=o, rewards=o[:, 0], masks=o[:, 0], next_observations=o)
    return ff.Transitions(**(defaults | columns))


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


def test_normaliser():
    rng = np.random.default_rng(0)
    o = {"a": rng.normal(5, 3, (201, 3)).astype(np.float32), "b": np.full((201, 1), 7.0)}
    t = ff.Transitions.from_episodes([o], [np.zeros((200, 1))], [np.zeros(200)], [True])
    normaliser = ff.Normaliser.of(t)
    normalised = normaliser.transitions(t)
    a = normalised.observations["a"]
    assert isinstance(a, np.ndarray) and a.dtype == np.float32
    assert np.allclose(a.mean(0), 0, atol=1e-5) and np.allclose(a.std(0), 1, atol=1e-5)
    assert np.all(normalised.observations["b"] == 0)  # never varies: shifted, not scaled
    batch = normaliser(jax.tree.map(lambda leaf: leaf[:5], t.next_observations))
    single = normaliser(jax.tree.map(lambda leaf: leaf[4], t.next_observations))
    assert np.allclose(batch["a"], normalised.next_observations["a"][:5], atol=1e-6)
    assert np.allclose(single["a"], batch["a"][4], atol=1e-6)
    assert batch["a"].dtype == jnp.float32 and batch["b"].dtype == jnp.float64
    double = normaliser({"a": np.zeros(3, np.float64), "b": np.zeros(1)})
    assert double["a"].dtype == jnp.float32
    images = transitions(observations=np.zeros((4, 2), np.uint8))
    with pytest.raises(ValueError, match=r"`transitions.observations` must.*uint8.*astype"):
        ff.Normaliser.of(images)
