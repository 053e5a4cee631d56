import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from helpers import correlated, Critic, dtypes, gaussian, natural_step, shifted_policy
from scipy import stats

import fisher_flow as ff


g = np.array([0.8, -0.5])


def certificate(dtype, *, radius=0.2, num_observations=64, damping=1e-6, num_witnesses=0):
    policy, critic = shifted_policy(correlated(dtype)), Critic(g, dtype)
    observations = jr.normal(jr.key(7), (num_observations, 2), dtype)
    method = natural_step(dtype, radius=radius, damping=damping, smoothing=0.0)
    calibration = jr.normal(jr.key(8), (64, 2), dtype)
    refined = ff.refine(policy, critic, method, observations=calibration)
    return ff.certify(refined, critic, observations, num_witnesses=num_witnesses, key=jr.key(9))


@pytest.fixture(scope="module")
def report():
    return certificate(jnp.float64, num_witnesses=512)


def test_gaussian_policy_and_linear_critic(report):
    # δ = sqrt(2 ε / gᵀ Σ g) Σ g, whose gain is sqrt(2 ε gᵀ Σ g) at every action.
    gain = np.sqrt(2 * 0.2 * g @ correlated().covariances[0] @ g)
    # The KL is met from below within 1%, and so the gain within 0.5%.
    assert np.allclose(report.kl, 0.2, rtol=0.011)
    assert np.allclose(report.kl_predicted, 0.2, rtol=0.011)
    assert np.allclose(report.gains, gain, rtol=0.006)
    assert np.allclose(report.improvement, gain, rtol=0.006)
    assert report.folded == 0 and report.non_finite == 0
    assert np.abs(report.stein) < 5 * report.stein_stderr


def test_curve_along_the_displacement(report):
    # The KL of a fraction of a translation is quadratic in it.
    assert np.allclose(report.kl_by_fraction, report.kl * report.fractions**2, rtol=1e-6)
    assert report.fractions[0] == 0 and np.all(np.diff(report.fractions) > 0)


@dtypes
def test_dtype(dtype):
    report = eqx.tree_at(lambda report: report.score, certificate(dtype), None)
    leaves = jax.tree.leaves(eqx.filter(report, eqx.is_inexact_array))
    assert {leaf.dtype for leaf in leaves} == {jnp.dtype(dtype)}


def test_zero_radius_costs_and_gains_exactly_nothing():
    report = certificate(jnp.float64, radius=0.0, num_witnesses=64)
    assert report.kl == report.kl_predicted == report.improvement == report.stein == 0
    assert report.folded == 0 and np.all(report.gains == 0)


def test_standard_errors_over_observations_and_over_actions(report):
    assert report.num_observations == 64 and report.num_actions == 4096
    single = certificate(jnp.float64, num_observations=1)
    assert single.num_observations == 1 and single.num_actions == 4096
    # The Stein residual s·δ of N(·, Σ) has variance δᵀ Σ⁻¹ δ = 2 KL; Euler's samples a little less.
    for stderr in report.stein_stderr, single.stein_stderr:
        assert np.allclose(stderr, np.sqrt(2 * 0.2 / 4096), rtol=0.4)
    assert np.allclose(report.kl, single.kl, rtol=1e-4)


def test_the_same_key_gives_the_same_certificate(report):
    assert eqx.tree_equal(certificate(jnp.float64, num_witnesses=512), report)


def test_prints_as_a_table(report):
    lines = str(report).splitlines()
    for name, value in [
        ("measured KL", report.kl),
        ("asked for", report.radius),
        ("gain in Q", report.improvement),
    ]:
        line = next(line for line in lines if name in line)
        assert f"{value:.4g}" in line


def test_plots(report):
    left, right = report.plot().axes
    measured, predicted = left.get_lines()[:2]
    assert np.allclose(measured.get_ydata(), report.kl_by_fraction)
    assert np.allclose(predicted.get_ydata(), report.kl_predicted * report.fractions**2)
    assert sum(bar.get_height() for bar in right.patches) == report.num_actions


@pytest.mark.parametrize("n", [8])
def test_totals_of_a_choice_after_a_step(n):
    # On the line with a linear critic the step is a translation, and after it BestOf keeps the
    # largest of n: the density n F^(n - 1) p of the translated Gaussian, here by quadrature.
    base = gaussian([0.3], [[0.5]])
    policy = base.policy(solver=diffrax.Tsit5(), num_steps=8)
    critic = Critic([1.0], jnp.float64)
    method = natural_step(jnp.float64, radius=0.2, smoothing=0.0)
    refined = ff.refine(policy, critic, method, observations=jnp.zeros((64, 1)))
    report = ff.certify(
        ff.BestOf(refined, critic, n),
        critic,
        jnp.zeros((256, 1)),
        num_actions=8192,
        num_witnesses=0,
        key=jr.key(0),
    )
    x, dx = np.linspace(-6, 8, 4001, retstep=True)
    shift = np.sqrt(2 * 0.2 * 0.5)
    scale = 0.5**0.5
    log_p, log_moved = (stats.norm.logpdf(x, mean, scale) for mean in (0.3, 0.3 + shift))
    log_q = np.log(n) + (n - 1) * stats.norm.logcdf(x, 0.3 + shift, scale) + log_moved
    kl = np.sum(np.exp(log_q) * (log_q - log_p)) * dx
    gain = np.sum(np.exp(log_q) * x) * dx - 0.3
    assert np.abs(report.total_kl - kl) <= 5 * report.total_kl_stderr + 0.01 * kl
    assert np.abs(report.total_improvement - gain) <= 5 * report.total_improvement_stderr
    # The certificate of the step itself is not touched.
    assert np.allclose(report.kl, 0.2, rtol=0.011)


def test_totals_of_resampling_after_a_step():
    # With a linear critic both move a Gaussian: by sqrt(2 radius) deviations each.
    base = gaussian([0.3], [[0.5]])
    policy = base.policy(solver=diffrax.Tsit5(), num_steps=8)
    critic = Critic([1.0], jnp.float64)
    method = natural_step(jnp.float64, radius=0.2, smoothing=0.0)
    refined = ff.refine(policy, critic, method, observations=jnp.zeros((64, 1)))
    chosen = ff.Resample(refined, critic, 0.1, n=256)
    report = ff.certify(
        chosen, critic, jnp.zeros((64, 1)), num_actions=2**15, num_witnesses=0, key=jr.key(0)
    )
    deviations = np.sqrt(2 * 0.2) + np.sqrt(2 * 0.1)
    # A choice among 256 gains a little less than one among all.
    assert np.allclose(report.total_kl, deviations**2 / 2, rtol=0.05)
    assert np.allclose(report.total_improvement, deviations * np.sqrt(0.5), rtol=0.05)


def test_a_critic_that_is_broken_in_places_has_totals():
    policy = shifted_policy(correlated())
    value = lambda o, a: jnp.where(a[0] < -0.5, jnp.nan * a[0], a[1])
    method = natural_step(jnp.float64, radius=0.05)
    refined = ff.refine(policy, value, method, observations=jnp.zeros((64, 2)))
    best = ff.BestOf(refined, value, 4)
    report = ff.certify(
        best, value, jnp.zeros((32, 2)), num_actions=512, num_witnesses=0, key=jr.key(0)
    )
    assert report.total_improvement > 0 and np.isfinite(report.total_kl)
    assert report.non_finite > 0


def test_totals_of_one_step_are_its_own(report):
    assert np.allclose(report.total_kl, report.kl, rtol=1e-9)
    assert np.allclose(report.total_improvement, report.improvement, rtol=1e-9)
