import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from helpers import (
    bimodal,
    dtypes,
    every_path,
    gaussian,
    observed_order,
    paths,
    scores,
    tree_allclose,
)

import fisher_flow as ff
from fisher_flow._geometry import unsettled_score


def over_actions(score, policy, actions):
    return jax.jit(jax.vmap(lambda a: score(policy, None, a)))(actions)


def on_the_line(dtype):
    return gaussian([0.5], [[0.3]], dtype)


@pytest.mark.parametrize(
    "make, path, dtype",
    [
        *((bimodal, path, jnp.float64) for path in paths),
        (bimodal, paths[1], jnp.float32),
        (on_the_line, paths[0], jnp.float32),
        (on_the_line, paths[3], jnp.float64),
    ],
)
def test_perturbed_score_is_that_of_the_smoothed_density(make, path, dtype, getkey):
    mixture = make(dtype)
    policy = mixture.policy(path)
    actions = jr.normal(getkey(), (20, *policy.action_shape), dtype)
    r2 = path.noise_ratio(jnp.asarray(0.9, dtype)) ** 2
    closed_form = jax.jit(lambda r2: jax.vmap(mixture.smoothed(r2).score)(actions))
    once = closed_form(r2)
    twice = 2 * closed_form(r2 / 2) - once
    # The velocity and the drift of the path cancel up to a share σ of each.
    tol = 1e-10 if dtype == jnp.float64 else 1e-3
    first = over_actions(ff.PerturbedScore(time=0.9, order=1), policy, actions)
    second = over_actions(ff.PerturbedScore(time=0.9, order=2), policy, actions)
    assert tree_allclose(first, once, rtol=tol, atol=tol)
    assert tree_allclose(second, twice, rtol=tol, atol=tol)


def order_of_bias(make_score, path):
    """Halves the noise ratio r, and with it the bias 2 to the order times."""
    mixture = bimodal()
    actions = mixture.sample(100, jr.key(0))
    exact = jax.jit(jax.vmap(mixture.score))(actions)
    policy = mixture.policy(path)

    @jax.jit
    def error(time):
        return jnp.max(jnp.abs(over_actions(make_score(time), policy, actions) - exact))

    ratios = jnp.asarray([0.02, 0.01, 0.005])
    return observed_order([error(time) for time in jax.vmap(path.time_at_noise_ratio)(ratios)])


@every_path
def test_bias_of_the_perturbed_score(path):
    for order, expected in (1, 2), (2, 4):
        orders = order_of_bias(lambda time, n=order: ff.PerturbedScore(time=time, order=n), path)
        assert np.allclose(orders, expected, atol=0.1), order


def test_bias_of_the_paper_score():
    orders = order_of_bias(lambda time: ff.PaperScore(time=time), ff.LinearPath())
    assert np.allclose(orders, 1, atol=0.1)


@dtypes
def test_paper_score_is_that_of_the_marginal(dtype, getkey):
    mixture = bimodal(dtype)
    actions = jr.normal(getkey(), (20, 2), dtype)
    marginal = mixture.at_time(ff.LinearPath(), jnp.asarray(0.8, dtype))
    tol = 1e-10 if dtype == jnp.float64 else 1e-4
    actual = over_actions(ff.PaperScore(time=0.8), mixture.policy(), actions)
    assert tree_allclose(actual, jax.jit(jax.vmap(marginal.score))(actions), rtol=tol, atol=tol)


@pytest.mark.parametrize("order", [1, 2])
def test_all_paths_agree_at_one_noise_ratio(order, getkey):
    mixture = bimodal()
    actions = jr.normal(getkey(), (20, 2))
    first, *others = (
        over_actions(
            ff.PerturbedScore(time=path.time_at_noise_ratio(0.05), order=order),
            mixture.policy(path),
            actions,
        )
        for path in paths
    )
    for other in others:
        assert tree_allclose(first, other, rtol=1e-9, atol=1e-9)


@dtypes
@pytest.mark.parametrize("score", scores, ids=repr)
def test_jit_vmap_and_dtype(score, dtype, getkey):
    policy = bimodal(dtype).policy()
    actions = jr.normal(getkey(), (2, 2), dtype)
    single = jnp.stack([score(policy, None, a) for a in actions])
    jitted = eqx.filter_jit(lambda a: score(policy, None, a))(actions[0])
    assert single.dtype == dtype
    # Rounding is multiplied by 1 / σ; a batch may be summed in another order.
    tol = 1e-12 if dtype == jnp.float64 else 1e-4
    assert tree_allclose(over_actions(score, policy, actions), single, rtol=tol, atol=tol)
    assert tree_allclose(jitted, single[0], rtol=tol, atol=tol)


@pytest.mark.parametrize("action_shape, dtype", [((), jnp.float64), ((2, 3), jnp.float32)])
@pytest.mark.parametrize("score", scores, ids=repr)
def test_action_shapes(score, action_shape, dtype, getkey):
    # N(o, 4 I) in any shape; order 1 sees the variance 4 + r².
    def velocity(t, x, observation):
        variance_dot_over_2 = 4 * t - (1 - t)
        return observation + variance_dot_over_2 / (4 * t**2 + (1 - t) ** 2) * (x - t * observation)

    if isinstance(score, ff.CalibratedScore):  # has a size
        score = unsettled_score(jnp.zeros(action_shape), dtype)
    observation, action = jr.normal(getkey(), (2, *action_shape), dtype)
    s = score(ff.FlowPolicy(velocity, action_shape), observation, action)
    if isinstance(score, ff.PaperScore):
        expected = -(action - 0.9 * observation) / (4 * 0.9**2 + 0.1**2)
    else:
        expected = -(action - observation) / 4
    assert s.shape == action_shape and s.dtype == dtype
    # The bias of order 1 is r² / 4 = 0.003.
    assert np.allclose(s, expected, rtol=0.005, atol=1e-5)


def test_policies_from_elsewhere(getkey):
    class Foreign:
        action_shape = (2,)
        path = paths[1]

        def velocity(self, t, x, observation):
            return bimodal().velocity(self.path)(t, x, observation)

    score, action = ff.PerturbedScore(), jr.normal(getkey(), (2,))
    expected = score(bimodal().policy(paths[1]), None, action)
    assert tree_allclose(score(Foreign(), None, action), expected, rtol=1e-12)
