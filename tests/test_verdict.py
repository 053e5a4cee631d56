"""The certificate agrees with closed forms, or says that it does not know."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from helpers import correlated, Critic, gaussian, gaussian_kl, shifted_policy
from scipy import stats

import fisher_flow as ff
from fisher_flow._refinement._limits import (
    binomial_limit,
    error_at_these_observations,
    normal_quantile,
)
from fisher_flow._refinement._witness import absent_witness, beyond_chance


pytestmark = pytest.mark.xdist_group("verdict")
dtype = jnp.float32
observations = jr.normal(jr.key(0), (64, 2), dtype)
critic = Critic([0.8, -0.5], dtype)


def refined_at(time, num_steps=50, critic=critic, radius=0.3):
    """By a score at a fixed time: an early one is that of a blurred density."""
    policy = shifted_policy(correlated(dtype), num_steps=num_steps)
    method = ff.NaturalStep(
        ff.ObservedInformation(ff.PerturbedScore(time=time)), radius, num_calibration=512
    )
    return ff.refine(policy, critic, method, observations=observations)


def certify(policy, critic=critic, **options: Any):
    settings: dict[str, Any] = dict(num_actions=512, num_witnesses=256, key=jr.key(1))
    return ff.certify(policy, critic, observations, **(settings | options))


@pytest.fixture(scope="module")
def healthy():
    return refined_at(0.97)


@pytest.fixture(scope="module")
def report(healthy):
    return certify(healthy)


def test_a_healthy_refinement_holds(report):
    assert report.holds and report.verdict is ff.Verdict.holds
    assert str(report).splitlines()[-1].startswith("holds: ")
    for witness in report.by_density, report.by_steps:
        assert np.isclose(witness.kl, report.kl, rtol=0.1) and witness.unknown == 0
        assert np.abs(witness.normalisation - 1) < 4 * witness.normalisation_stderr + 1e-3
    assert report.kl <= report.kl_upper < 1.2 * 0.3


def test_a_blurred_score_meets_the_radius_all_the_same():
    refined = refined_at(0.6)
    found = certify(refined)
    # By this score the KL is another one. The densities know better, and the length follows them.
    assert not np.isclose(found.kl_by_score, 0.3, rtol=0.15)
    assert np.isclose(found.kl, 0.3, rtol=0.1) and np.isclose(refined.reached.kl, 0.3, rtol=0.1)


def test_a_sampler_that_is_not_its_flow_is_told():
    narrow = gaussian([0.0, 0.0], np.diag([1.0, 0.02**2]), dtype)
    policy = shifted_policy(narrow, num_steps=8)
    method = ff.NaturalStep(radius=0.3, num_calibration=512)
    steep = Critic([1.0, 50.0], dtype)
    found = certify(ff.refine(policy, steep, method, observations=observations), steep)
    assert found.verdict is ff.Verdict.sampler_differs and not found.holds
    # The flow itself stays within the radius.
    assert np.isclose(found.kl, 0.3, rtol=0.1)


def test_a_broken_critic_and_a_flat_one(healthy):
    broken = Critic([0.8, -0.5], dtype, cutoff=0.5)
    found = certify(eqx.tree_at(lambda refined: refined.critic, healthy, broken))
    assert found.verdict is ff.Verdict.critic_not_finite
    assert certify(healthy, Critic([0.0, 0.0], dtype)).verdict is ff.Verdict.no_gain


def test_without_a_witness_nothing_is_promised(healthy, report):
    found = certify(healthy, num_witnesses=0)
    assert found.verdict is ff.Verdict.unchecked and np.isnan(found.by_density.kl)
    with pytest.raises(RuntimeError, match="unchecked: "):
        certify(healthy, num_witnesses=0, throw=True)


def test_any_pair_of_flows():
    mean, covariance = [0.3, -0.2], [[0.8, 0.3], [0.3, 0.6]]
    base_mean, base_covariance = [0.0, 0.1], [[1.0, 0.2], [0.2, 0.5]]
    policy = shifted_policy(gaussian(mean, covariance, dtype), num_steps=150)
    base = shifted_policy(gaussian(base_mean, base_covariance, dtype), num_steps=150)
    found = certify(policy, base=base)
    expected = gaussian_kl(mean, covariance, base_mean, base_covariance)
    assert np.isclose(found.kl, expected, rtol=0.1)
    # A hundred and fifty Euler steps are nearly the flow.
    allowed = 0.05 * expected + 4 * float(found.by_steps.kl_stderr)
    assert abs(float(found.by_steps.kl) - expected) < allowed


def test_a_policy_without_a_density_is_estimated():
    # Both of standard deviation 0.8 about the observation, half a deviation apart.
    policy = ff.OneStepPolicy(lambda o, z: o + 0.8 * z + 0.4, (2,), dtype=dtype)
    base = shifted_policy(gaussian([0.0, 0.0], 0.64 * np.eye(2), dtype), num_steps=50)
    found = certify(policy, base=base)
    assert found.verdict is ff.Verdict.estimated
    assert np.isclose(found.kl, 0.25, rtol=0.3)
    assert np.isclose(certify(base, base=policy).kl, 0.25, rtol=0.3)


def test_more_actions_are_drawn_until_the_error_is_small(healthy):
    bent = refined_at(0.97, critic=Critic([0.8, -0.5], dtype, curvature=2.0))
    options: dict[str, Any] = dict(num_actions=64, num_witnesses=0)
    few, many = (certify(policy, **options) for policy in (healthy, bent))
    assert few.num_actions == 64  # a translation, whose KL is the same at every action
    assert 64 < many.num_actions <= 8 * 64 and many.num_actions % 64 == 0
    assert many.gains.shape == (many.num_actions,)


@pytest.mark.parametrize("radius", [0.0, 0.3])
def test_where_nothing_moves_nothing_is_checked(radius):
    flat = Critic([0.0, 0.0], dtype)
    found = certify(refined_at(0.97, critic=flat, radius=radius), critic=flat)
    assert found.verdict is (ff.Verdict.holds if radius == 0 else ff.Verdict.no_gain)
    assert found.kl == 0 and np.isnan(found.by_density.kl)


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_what_chance_accounts_for_is_no_correction(scale):
    witness = eqx.tree_at(
        lambda w: w.difference_stderr, absent_witness(jnp.float64), jnp.asarray(scale)
    )
    part = lambda d: beyond_chance(
        eqx.tree_at(lambda w: w.difference, witness, jnp.asarray(d * scale))
    )
    assert part(1.9) == part(-1.9) == 0
    assert 0 < part(2.01) < 0.03 * scale  # no jump
    assert np.isclose(part(-4), -3 * scale, rtol=1e-9, atol=1e-10)
    assert np.isclose(part(100), 100 * scale, rtol=1e-3)


@pytest.mark.parametrize("num_actions", [1, 4, 64])
def test_the_error_at_these_observations_leaves_out_how_they_differ(num_actions):
    means, noise = 3 * jr.normal(jr.key(0), (512, 1)), jr.normal(jr.key(1), (512, num_actions))
    error = error_at_these_observations(means + noise)
    deviation = 10**0.5 if num_actions == 1 else 1.0  # one action cannot tell the two apart
    assert np.isclose(error, deviation / (512 * num_actions) ** 0.5, rtol=0.1)


def test_a_steered_policy_is_certified_by_what_acts():
    policy = shifted_policy(correlated(dtype), num_steps=20)
    method = ff.Steering(radius=0.2, num_calibration=256)
    steered = ff.refine(policy, critic, method, observations=observations)
    found = certify(steered)
    assert np.isclose(found.by_steps.kl, 0.2, rtol=0.1) and found.kl == found.by_steps.kl
    assert found.improvement > 0


@pytest.mark.parametrize("count, num", [(0, 100), (3, 100), (50, 4096)])
def test_limits(count, num):
    expected = stats.beta.ppf(0.95, count + 1, num - count)
    assert np.isclose(binomial_limit(count, num, 0.95), expected, rtol=1e-3)
    assert binomial_limit(num, num, 0.95) == 1
    assert np.isclose(normal_quantile(0.95), stats.norm.ppf(0.95))


def test_pairs_of_other_shapes_are_refused(healthy):
    other = ff.FlowPolicy(lambda t, x, o: -x, (3,))
    with pytest.raises(
        ValueError, match=r"`base` must draw .*\(2,\).*\(3,\).*`base=policy_before`"
    ):
        certify(healthy, base=other)


def test_jit_free_of_the_certificate_but_not_of_the_policy(healthy):
    sample = jax.jit(lambda o, key: healthy.sample(o, key=key))
    assert np.all(np.isfinite(sample(observations[0], jr.key(2))))
