"""Observations of mean 0 and deviation 1, and images that are left alone."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fisher_flow as ff


def transitions(o):
    num = len(jax.tree.leaves(o)[0])
    return ff.Transitions(o, np.zeros((num, 1)), np.zeros(num), np.ones(num), o)


def test_mean_and_deviation():
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


def test_images_and_integers_are_left_alone():
    rng = np.random.default_rng(0)
    state = rng.normal(50, 9, (30, 3)).astype(np.float32)
    image = rng.integers(0, 255, (30, 4, 4, 3), np.uint8)
    o: Any = {"eyes": (image, [image[:, :2], None]), "gripper": image[:, 0, 0, 0] > 9, "s": state}
    t = transitions(o)
    normaliser = ff.Normaliser.of(t)
    for result, rows in ((normaliser.transitions(t).observations, 30), (normaliser(o), 30)):
        assert jax.tree.structure(result) == jax.tree.structure(o)
        assert np.array_equal(result["eyes"][0], image) and result["eyes"][0].dtype == np.uint8
        assert result["gripper"].dtype == bool and result["eyes"][1][1] is None
        assert len(result["s"]) == rows and np.allclose(result["s"].std(0), 1, atol=1e-4)
    velocity = lambda t, x, o: x + o["s"] + o["eyes"][0].sum().astype(x.dtype)
    policy = ff.NormalisedPolicy(ff.FlowPolicy(velocity, (3,)), normaliser)
    one = jax.tree.map(lambda leaf: leaf[0], o)
    assert policy.sample(one, key=jax.random.key(0)).shape == (3,)
    for name in ("mean", "deviation"):
        assert len(jax.tree.leaves(getattr(normaliser, name))) == 1


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("scale", [1e-12, 1e-3, 1e6])
def test_no_unit_is_too_small(scale, dtype):
    o = np.random.default_rng(0).normal(2, 1, (99, 2))
    normalised = ff.Normaliser.of(transitions((scale * o).astype(dtype)))((scale * o).astype(dtype))
    assert np.allclose(normalised, (o - o.mean(0)) / o.std(0), atol=1e-4)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("value", [0.0, 0.1, -1e-20, 1e7 + 0.3])
def test_constant_entries_are_not_scaled(value, dtype, monkeypatch):
    monkeypatch.setattr("fisher_flow._data._normaliser._PART_SIZE", 70)
    o = np.full((1001, 1), value, dtype)
    normaliser = ff.Normaliser.of(transitions(o))
    assert np.all(np.asarray(normaliser.deviation) == 1)
    near = o[0] + np.asarray(0.5, dtype)
    assert np.allclose(normaliser(near), near - np.asarray(normaliser.mean))


def test_errors():
    with pytest.raises(ValueError, match=r"`transitions.observations` must.*uint8.*astype"):
        ff.Normaliser.of(transitions(np.zeros((4, 2), np.uint8)))
    normaliser = ff.Normaliser.of(transitions({"a": np.ones((3, 2)), "b": np.ones((3, 2))}))
    with pytest.raises(ValueError, match=r"`observation` must have the structure.*'a'.*'c'"):
        normaliser({"a": np.ones(2), "c": np.ones(2)})
