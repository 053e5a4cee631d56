import diffrax
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from helpers import (
    bimodal,
    bimodal_1d,
    dtypes,
    gaussian,
    gaussian_kl,
    log_ratios,
    random_covariance,
    UserPath,
    within,
)

import fisher_flow as ff


by_name = pytest.mark.parametrize("log_ratio", log_ratios, ids=lambda x: type(x).__name__)


def tilted(mixture, w, path, strength=1.0):
    """The steering whose end is `p exp(w · x)` of a Gaussian: h is linear in x at every time.

    With C = α² Σ + σ² I the marginal's covariance, ∇h = α C⁻¹ Σ w, and Δ = b ∇h with
    b = σ (α̇ σ - α σ̇) / α.
    """
    v = mixture.velocity(path)
    (covariance,) = mixture.covariances

    def steered(t, x):
        α, σ, α_dot, σ_dot = path.schedule(t)
        C = α**2 * covariance + σ**2 * jnp.eye(x.size, dtype=x.dtype)
        Δ = σ * (α_dot * σ - α * σ_dot) * jnp.linalg.solve(C, covariance @ w)
        return v(t, x, None), strength * Δ

    return steered


def over(log_ratio, policy, steered, noises, key=None):
    return jax.jit(jax.vmap(lambda z: log_ratio(policy, steered, None, z, key=key)))(noises)


@dtypes
@pytest.mark.parametrize("path", [ff.LinearPath(), UserPath()], ids=["linear", "cosine"])
@by_name
def test_tilt_of_a_gaussian(log_ratio, path, dtype, getkey):
    # q = N(μ + Σ w, Σ): log q/p = w·(a - μ) - ½ wᵀ Σ w, at every single action.
    base = gaussian([0.5, -1.0, 0.0], random_covariance(getkey(), 3), dtype)
    (mean,), (covariance,) = base.means, base.covariances
    w = jnp.asarray([0.5, -0.3, 0.8], dtype)
    policy = base.policy(path, solver=diffrax.Heun(), num_steps=64)
    noises = jr.normal(getkey(), (16, 3), dtype)
    if isinstance(log_ratio, ff.DensityLogRatio) and dtype == jnp.float32:
        finer = diffrax.PIDController(rtol=1e-6, atol=1e-6)
        log_ratio = ff.DensityLogRatio(stepsize_controller=finer)
    actions, r = over(log_ratio, policy, tilted(base, w, path), noises)
    assert actions.dtype == r.dtype == dtype
    # What the discrete sampler draws is a Gaussian too, but not quite this one.
    # Two adaptive solves err by their tolerances at every step.
    exact = 2e-5 if dtype == jnp.float64 else 2e-4
    tol = exact if isinstance(log_ratio, ff.DensityLogRatio) else 4e-3
    expected = (np.asarray(actions) - np.asarray(mean)) @ w - 0.5 * w @ covariance @ w
    assert np.allclose(r, expected, atol=tol)


@by_name
def test_no_steering_has_no_log_ratio(log_ratio, getkey):
    mixture = bimodal()
    v = mixture.velocity()
    policy = mixture.policy(solver=diffrax.Heun(), num_steps=10)
    noises = jr.normal(getkey(), (16, 2))
    actions, r = over(log_ratio, policy, lambda t, x: (v(t, x, None), jnp.zeros_like(x)), noises)
    tol = 1e-4 if isinstance(log_ratio, ff.DensityLogRatio) else 1e-9
    assert np.allclose(r, 0, atol=tol)
    if not isinstance(log_ratio, ff.DensityLogRatio):
        assert np.allclose(actions, jax.vmap(lambda z: policy.flow(None, z))(noises), atol=1e-12)


def bent(v, strength=0.7):
    """Some steering that is not the gradient of anything."""

    def steered(t, x):
        waves = jnp.sin(2 * x[::-1] + 3 * t) + 0.5
        return v(t, x), strength * (1 - t) * waves

    return steered


def test_path_and_density_agree_on_a_mixture(getkey):
    mixture = bimodal()
    policy = mixture.policy(solver=diffrax.Heun(), num_steps=256)
    steered = bent(lambda t, x: policy.velocity(t, x, None))
    noises = jr.normal(getkey(), (16, 2))
    _, by_path = over(ff.PathLogRatio(), policy, steered, noises)
    actions, by_density = over(ff.DensityLogRatio(), policy, steered, noises)
    assert np.allclose(by_path, by_density, atol=5e-3)
    back = jax.vmap(lambda a: ff.PathLogRatio().backward(policy, steered, a))(actions)
    assert np.allclose(back, by_density, atol=5e-3)
    _, by_steps = over(ff.ExecutedLogRatio(), policy, steered, noises)
    assert np.allclose(by_steps, by_density, atol=5e-3)


@pytest.mark.parametrize(
    "steps",
    [
        dict(solver=diffrax.Euler(), num_steps=10),
        dict(solver=diffrax.Midpoint(), num_steps=10),
        dict(stepsize_controller=diffrax.StepTo(ts=jnp.linspace(0, 1, 11) ** 0.8)),
    ],
    ids=["euler", "midpoint", "uneven"],
)
def test_kl_of_the_sampler_that_acts(steps):
    # In one dimension: change of variables of both samplers on a grid of noises.
    mixture = bimodal_1d()
    policy = mixture.policy(**steps)
    steered = bent(lambda t, x: policy.velocity(t, x, None), strength=1.0)
    moved = ff.FlowPolicy(lambda t, x, o: sum(steered(t, x)), (1,), **steps)
    grid, step = jnp.linspace(-6, 6, 2401, retstep=True)

    @jax.jit
    @jax.vmap
    def draws(z):
        p = lambda z: policy.flow(None, z[None])[0]
        q = lambda z: moved.flow(None, z[None])[0]
        log_z = jax.scipy.stats.norm.logpdf(z)
        density = lambda f: log_z - jnp.log(jax.grad(f)(z))
        return p(z), density(p), q(z), density(q)

    a_p, log_p, a_q, log_q = map(np.asarray, draws(grid))
    assert np.all(np.diff(a_p) > 0) and np.all(np.diff(a_q) > 0)
    inside = (a_q > a_p[0]) & (a_q < a_p[-1])
    expected = log_q - np.interp(a_q, a_p, log_p)
    weight = np.asarray(jax.scipy.stats.norm.pdf(grid)) * float(step)
    exact = np.sum((weight * expected)[inside])
    assert exact > 0.1
    _, r = over(ff.ExecutedLogRatio(), policy, steered, grid[:, None])
    assert np.allclose(r[inside], expected[inside], atol=1e-3)
    found = inside & np.isfinite(r)
    assert np.isclose(np.sum(weight[found] * r[found]), exact, rtol=1e-3)


def test_where_the_unsteered_sampler_never_goes(getkey):
    # Its last step squashes everything into (-1, 1); the steering leaves that.
    v = lambda t, x: jnp.where(t > 0.4, 2 * (jnp.tanh(x) - x), jnp.zeros_like(x))
    policy = ff.FlowPolicy(lambda t, x, o: v(t, x), (1,), num_steps=2)
    steered = lambda t, x: (v(t, x), jnp.full_like(x, 1.0))
    noises = jr.normal(getkey(), (50, 1))
    actions, r = over(ff.ExecutedLogRatio(), policy, steered, noises)
    outside = np.abs(actions[:, 0]) > 1
    assert np.any(outside) and not np.all(outside)
    assert np.array_equal(np.isnan(r), outside)


@by_name
def test_mean_with_and_without_control(log_ratio, getkey):
    base = gaussian([0.5, -1.0], random_covariance(getkey(), 2))
    (mean,), (covariance,) = base.means, base.covariances
    w = 0.2 * jnp.asarray([0.5, 1.0])
    path = ff.LinearPath()
    policy = base.policy(solver=diffrax.Heun(), num_steps=64)
    noises = jr.normal(getkey(), (2000, 2))
    _, r = over(log_ratio, policy, tilted(base, w, path), noises)
    exact = gaussian_kl(mean + covariance @ w, covariance, mean, covariance)
    value, stderr = ff.mean_log_ratio(r)
    plain = np.std(r) / np.sqrt(len(r))
    assert abs(value - exact) < 5 * stderr + 0.01 * exact
    assert stderr < 0.2 * plain
    assert within(r, exact)


def test_control_along_the_unsteered_trajectory(getkey):
    mixture = bimodal()
    policy = mixture.policy(solver=diffrax.Heun(), num_steps=64)
    steered = bent(lambda t, x: policy.velocity(t, x, None), strength=0.1)
    noises = jr.normal(getkey(), (2000, 2))
    measure = ff.PathLogRatio()
    control = jax.jit(jax.vmap(lambda z: measure.control(policy, steered, None, z)))(noises)
    assert within(control, 0.0)
    _, r = over(measure, policy, steered, noises)
    value, stderr = ff.mean_log_ratio(r, control)
    other, other_stderr = ff.mean_log_ratio(r)
    assert abs(value - other) < 5 * (stderr + other_stderr)
    assert stderr < 0.3 * np.std(r) / np.sqrt(len(r))


@pytest.mark.parametrize("log_ratio", log_ratios[:2], ids=["path", "density"])
def test_probes_are_unbiased(log_ratio, getkey):
    mixture = bimodal()
    policy = mixture.policy(solver=diffrax.Heun(), num_steps=32)
    steered = bent(lambda t, x: policy.velocity(t, x, None))
    noise = jr.normal(getkey(), (2,))
    few = type(log_ratio)(num_probes=1)
    keys = jr.split(getkey(), 500)
    r = jax.jit(jax.vmap(lambda key: few(policy, steered, None, noise, key=key).log_ratio))(keys)
    exact = log_ratio(policy, steered, None, noise).log_ratio
    assert abs(np.mean(r) - exact) < 5 * np.std(r) / np.sqrt(len(r)) + 5e-3
    with pytest.raises(ValueError, match="key=jax.random.key"):
        few(policy, steered, None, noise)


@by_name
def test_derivative_in_the_strength(log_ratio, getkey):
    mixture = bimodal()
    policy = mixture.policy(solver=diffrax.Heun(), num_steps=16)
    noise = jr.normal(getkey(), (2,))

    @jax.jit
    def r(strength):
        steered = bent(lambda t, x: policy.velocity(t, x, None), strength)
        return log_ratio(policy, steered, None, noise).log_ratio

    numerical = (r(0.51) - r(0.49)) / 0.02
    assert np.isclose(jax.grad(r)(0.5), numerical, rtol=2e-2, atol=1e-3)


def test_steps_that_cannot_be_inverted_are_refused():
    controller = diffrax.PIDController(rtol=1e-3, atol=1e-3)
    policy = bimodal().policy(solver=diffrax.Tsit5(), stepsize_controller=controller)
    steered = lambda t, x: (policy.velocity(t, x, None), jnp.zeros_like(x))
    with pytest.raises(ValueError, match="DensityLogRatio"):
        ff.ExecutedLogRatio()(policy, steered, None, jnp.zeros(2))
