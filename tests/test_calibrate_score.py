from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from helpers import bimodal, Critic, dtypes, every_path, gaussian, tree_allclose, UserPath

import fisher_flow as ff


class RoughVelocity(eqx.Module):
    """An exact velocity and a fine ripple, as a trained network has one."""

    velocity: ff.GaussianMixtureVelocity
    size: float = eqx.field(static=True)

    def __call__(self, t, x, observation):
        ripple = jnp.sin(7 * jnp.stack([x[1], x[0]]) + jnp.asarray([0.3, 1.0], x.dtype))
        return self.velocity(t, x, observation) + self.size * ripple


def calibrate(policy, actions, **options):
    observations = jnp.zeros((len(actions), 1), actions.dtype)
    return ff.calibrate_score(policy, observations, actions, key=jr.key(1), **options)


@every_path
def test_criterion_of_a_gaussian(path):
    # The score of N(0, σ² I) smoothed by r is -a / (σ² + r²).
    variance, size = 0.6, 2
    base = gaussian(np.zeros(size), variance * np.eye(size))
    actions = base.sample(4096, jr.key(0))
    score = calibrate(base.policy(path), actions)
    # The noise is a share of the deviation of the actions, which was measured.
    factor, deviations = score.whitening.factor, score.whitening.deviations
    r2 = (score.ratios * jnp.exp(jnp.mean(jnp.log(deviations)))) ** 2
    slopes = [-1 / (variance + r2), -2 / (variance + r2 / 2) + 1 / (variance + r2)]
    # A score s is Lᵀ s in the coordinates a = L z.
    square, trace = jnp.mean(jnp.sum((actions @ factor) ** 2, axis=1)), jnp.sum(factor**2)
    expected = [0.5 * b**2 * square + b * trace for b in slopes]
    assert np.allclose(score.criterion, expected, rtol=1e-8)
    # A regression on the estimates accounts for all of the score of these actions, -a / E[a²], and
    # for a hundredth more by chance.
    second_moment = float(jnp.mean(actions**2))
    errors = [np.abs(1 + second_moment * b) for b in slopes]
    assert np.allclose(score.relative_errors**2, np.square(errors), atol=0.02)
    chosen = score.relative_errors[score.order - 1, score.ratios == score.ratio]
    assert score.relative_error == chosen
    assert np.allclose(path.noise_ratio(score.time) ** 2, r2[score.ratios == score.ratio])
    assert score.relative_error**2 < 0.02


@pytest.mark.parametrize("path, size", [(ff.LinearPath(), 0.02), (UserPath(), 0.1)])
def test_chooses_the_least_error(size, path):
    mixture = bimodal()
    policy = ff.FlowPolicy(RoughVelocity(mixture.velocity(path), size), (2,), path=path)
    actions = mixture.sample(65_536, jr.key(0))
    score = calibrate(policy, actions, num_actions=65_536)
    whiten = jax.vmap(score.whitening.whiten_gradient)
    true = whiten(jax.vmap(mixture.score)(actions))

    def error(score):
        estimate = whiten(jax.jit(jax.vmap(lambda a: score(policy, None, a)))(actions))
        return float(jnp.sqrt(jnp.sum((estimate - true) ** 2) / jnp.sum(true**2)))

    smallest = jnp.min(score.whitening.deviations)
    times = [path.time_at_noise_ratio(ratio * smallest) for ratio in score.ratios[1::2]]
    errors = [error(ff.PerturbedScore(time, order)) for order in (1, 2) for time in times]
    # The criterion is known up to the noise of the actions.
    assert error(score) <= min(errors) + 0.02
    # And of less use would be the default.
    assert error(score) < 0.5 * error(ff.PerturbedScore(time=0.99, order=2))
    # The information of so many actions is known to a hundredth or two.
    assert abs(error(score) ** 2 - score.relative_error**2) < 0.02


def test_probes_estimate_the_same_criterion():
    policy, actions = bimodal().policy(), bimodal().sample(8192, jr.key(0))
    exact, probed = calibrate(policy, actions), calibrate(policy, actions, num_probes=4)
    scale = np.abs(exact.criterion).max()
    assert np.allclose(exact.criterion, probed.criterion, atol=0.02 * scale)
    assert not np.array_equal(exact.criterion, probed.criterion)


@dtypes
def test_dtypes_and_jit(dtype):
    policy, actions = bimodal(dtype).policy(), bimodal(dtype).sample(512, jr.key(0))
    score = calibrate(policy, actions)
    traced = eqx.filter_jit(lambda actions: calibrate(policy, actions))(actions)
    assert isinstance(score.order, int) and eqx.is_array(traced.order)
    arrays = score.time, score.relative_error, score.times, score.criterion, score.relative_errors
    assert {x.dtype for x in arrays} == {jnp.dtype(dtype)}
    # Chosen inside `jit`, the order is a value, not a part of the program.
    estimates = [s(policy, None, actions[0]) for s in (score, traced)]
    assert estimates[0].dtype == dtype
    assert tree_allclose(*estimates, rtol=1e-4 if dtype == jnp.float32 else 1e-9)


@pytest.mark.slow
def test_refine_calibrates_where_no_time_was_given():
    policy, critic = bimodal(jnp.float32).policy(), Critic([1.0, 0.5], jnp.float32)
    observations = jnp.zeros((64, 2), jnp.float32)
    actions = bimodal(jnp.float32).sample(64, jr.key(0))

    def scores(metric, **options):
        method = ff.NaturalStep(metric, 0.1, num_calibration=64, num_witnesses=0)
        method: Any = ff.refine(policy, critic, method, **options).method
        return method.metric.score, method.measure.score

    by_default = scores(ff.ObservedInformation(), observations=observations)
    assert all(isinstance(score, ff.CalibratedScore) for score in by_default)
    on_data = scores(ff.ObservedInformation(), observations=observations, actions=actions)
    assert not np.array_equal(on_data[0].criterion, by_default[0].criterion)
    # What the user chose stays, and without observations there is nothing to calibrate on.
    chosen = scores(ff.ObservedInformation(ff.PerturbedScore(0.9)), observations=observations)
    assert all(isinstance(score, ff.PerturbedScore) and score.time == 0.9 for score in chosen)
    assert not any(isinstance(s, ff.CalibratedScore) for s in scores(ff.ObservedInformation()))


def test_a_chain_calibrates_the_flow_underneath():
    policy, critic = bimodal(jnp.float32).policy(), Critic([1.0, 0.5], jnp.float32)
    radius = jnp.asarray(0.05, jnp.float32)
    method = ff.NaturalStep(radius=radius, num_calibration=64, num_witnesses=0)
    refined = ff.refine(policy, critic, method, observations=jnp.zeros((64, 2), jnp.float32))
    actions = bimodal(jnp.float32).sample(64, jr.key(0))
    assert eqx.tree_equal(calibrate(refined, actions), calibrate(policy, actions))


def test_certificate_says_which_score(getkey):
    policy, critic = bimodal(jnp.float32).policy(), Critic([1.0, 0.5], jnp.float32)
    radius = jnp.asarray(0.05, jnp.float32)
    method = ff.NaturalStep(radius=radius, num_calibration=64, num_witnesses=0)
    observations = jnp.zeros((64, 2), jnp.float32)
    refined = ff.refine(policy, critic, method, observations=observations)
    report = ff.certify(
        refined, critic, observations, num_actions=64, num_witnesses=0, key=getkey()
    )
    score: Any = refined.method.measure.score
    assert f"time {score.time:.3f}, order {score.order}" in str(report)


def test_plot():
    figure = calibrate(bimodal().policy(), bimodal().sample(64, jr.key(0))).plot()
    assert len(figure.axes[0].lines) == 4


def test_velocities_without_a_reverse_derivative():
    """A square root beyond the data, whose derivative is NaN in reverse mode, changes nothing."""
    velocity = bimodal().velocity()

    def masked(t, x, observation):
        beyond = jnp.sqrt(x - 100)
        return jnp.where(x > 100, beyond, velocity(t, x, observation))

    actions = bimodal().sample(2048, jr.key(0))
    expected = calibrate(bimodal().policy(), actions)
    score = calibrate(ff.FlowPolicy(masked, (2,)), actions)
    assert np.allclose(score.relative_errors, expected.relative_errors, rtol=1e-6)
    assert np.all(score.relative_errors > 0)
