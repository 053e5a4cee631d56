from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import lineax as lx
import numpy as np
import pytest
from helpers import (
    bimodal,
    correlated,
    Critic,
    dtypes,
    gaussian_kl,
    natural_step,
    shifted_policy,
    tree_allclose,
)

import fisher_flow as ff


g = np.array([0.8, -0.5])  # the gradient of the linear critics


def observations(dtype, num=64):
    return jr.normal(jr.key(7), (num, 2), dtype)


def refine(mixture, critic, *, key=jr.key(3), observations=observations, **options) -> Any:
    dtype = mixture.means.dtype
    method = natural_step(dtype, **options)
    policy = shifted_policy(mixture)
    return ff.refine(policy, critic, method, observations=observations(dtype), key=key)


@eqx.filter_jit
def displacements(refined, actions):
    o = jnp.zeros(2, actions.dtype)
    return jax.vmap(lambda a: refined.displacement(o, a))(actions)


@eqx.filter_jit
def samples(policy, keys):
    return jax.vmap(lambda key: policy.sample(jnp.zeros(2, policy_dtype(policy)), key=key))(keys)


def policy_dtype(policy):
    return policy.flow_policy.velocity_field.mixture.means.dtype


@dtypes
def test_gaussian_policy_and_linear_critic(dtype, getkey):
    # δ = sqrt(2 ε / gᵀ Σ g) Σ g: the best of all policies within the radius.
    base, radius = correlated(dtype), 0.3
    refined = refine(base, Critic(g, dtype), radius=radius, damping=1e-6, smoothing=0.0)
    δ = displacements(refined, base.sample(20, getkey()))
    covariance = np.asarray(base.covariances[0], float)
    expected = np.sqrt(2 * radius / (g @ covariance @ g)) * covariance @ g
    assert δ.dtype == dtype
    # The KL is met from below within 1%, and so the length within 0.5%; float32 adds its rounding,
    # which the Jacobian of the score multiplies by 1 / σ.
    δ = np.asarray(δ, float)
    assert np.allclose(δ, expected, rtol=0.006 if dtype == jnp.float64 else 0.01)
    assert np.all(0.5 * np.sum(δ * np.linalg.solve(covariance, δ.T).T, axis=1) < 1.01 * radius)


@pytest.mark.parametrize("num_steps", [1, 3])
def test_short_steps_compose(num_steps):
    # With N(o, Σ) and Q = g·u - ½ c |u|² a short step is u + η Σ (g - c u): it leaves u = g / c
    # where it is, and several of them are a power of the map u ↦ (I - η c Σ) u about it.
    base, radius, c = correlated(), 0.2, 0.4
    critic = Critic(g, jnp.float64, curvature=c)
    options: dict[str, Any] = dict(radius=radius, damping=1e-6, smoothing=0.0)
    refined = refine(base, critic, num_steps=num_steps, **options)
    mean, covariance = base.means[0], base.covariances[0]
    center = jnp.asarray(g / c)
    actions = center[None] + jnp.asarray([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    moved = actions + displacements(refined, actions)
    assert np.allclose(moved[0], center, atol=1e-6)
    T = np.asarray(moved[1:] - moved[:1]).T
    η = refined.displacement_field.scale / num_steps
    power = np.linalg.matrix_power(np.eye(2) - η * c * covariance, num_steps)
    # The score is Richardson's at time 0.95: off by r⁴ / σ⁴ = 0.1% where σ² is 0.09.
    assert np.allclose(T, power, atol=3e-3)
    kl = gaussian_kl(T @ (mean - center) + center, T @ covariance @ T.T, mean, covariance)
    # Measured on the draws of ten Euler steps.
    assert np.allclose(kl, radius, rtol=0.1)


@pytest.mark.parametrize("radius", [0.01, 0.1, 0.5])
@pytest.mark.parametrize("mixture", [correlated, bimodal])
def test_measured_kl_meets_the_radius(mixture, radius):
    critic = Critic(g, jnp.float64, curvature=0.3)
    refined = refine(mixture(), critic, radius=radius, damping=2.0)
    states = observations(jnp.float64) + 0.3
    report = ff.certify(refined, critic, states, num_actions=8192, num_witnesses=0, key=jr.key(5))
    # On other actions than it was calibrated on. Between the modes, where the map nearly folds, an
    # action contributes up to ten times the mean or more: 2% of error in the mean of 8192.
    assert np.allclose(report.kl, radius, rtol=0.1)
    assert report.improvement > 10 * report.improvement_stderr
    assert report.folded <= 0.02 + 0.01 and report.non_finite == 0
    assert np.allclose(report.radius, radius)


def test_damping_rises_where_folds_forbid():
    # At the initial damping the map folds between the modes long before it spends the radius.
    critic = Critic(g, jnp.float64)
    small, large = (refine(bimodal(), critic, radius=radius) for radius in (0.001, 0.5))
    assert large.displacement_field.damping > 3 * small.displacement_field.damping
    report = ff.certify(
        large, critic, observations(jnp.float64), num_actions=8192, num_witnesses=0, key=jr.key(5)
    )
    assert report.folded <= 0.02 + 0.01
    assert np.allclose(report.kl, 0.5, rtol=0.1)


@pytest.mark.parametrize("radius", [0.5])
def test_measured_kl_meets_the_radius_at_every_state(radius):
    critic = Critic(g, jnp.float64, curvature=0.3)
    refined = refine(correlated(), critic, radius=radius, observations=lambda dtype: None)
    states = observations(jnp.float64, num=128)
    report = ff.certify(refined, critic, states, num_actions=512, num_witnesses=0, key=jr.key(5))
    # Each state has a length of its own, from 64 actions: an error of 12% or so, averaged over 128.
    assert np.allclose(report.kl, radius, rtol=0.1)
    assert report.improvement > 10 * report.improvement_stderr


def test_zero_radius_is_the_identity(getkey):
    # With a length for each state; with one length for all, in `test_refinement.py`.
    base, critic, keys = bimodal(), Critic(g, jnp.float64, curvature=0.3), jr.split(getkey(), 20)
    refined = refine(base, critic, radius=0.0, observations=lambda dtype: None)
    assert np.array_equal(samples(refined, keys), samples(shifted_policy(base), keys))


@dtypes
def test_affine_changes_of_the_critic_change_nothing(dtype, getkey):
    base, actions = bimodal(dtype), bimodal(dtype).sample(20, getkey())
    δ = displacements(refine(base, Critic(g, dtype, curvature=0.3)), actions)
    tol = 1e-9 if dtype == jnp.float64 else 1e-3  # the search for the length may round otherwise
    for scale, offset in (100.0, 0.0), (0.01, 0.0), (1.0, 50.0):
        critic = Critic(g, dtype, curvature=0.3, scale=scale, offset=offset)
        changed = displacements(refine(base, critic), actions)
        assert tree_allclose(changed, δ, rtol=tol, atol=tol)


def test_gains_more_than_a_euclidean_step_of_the_same_kl():
    base, radius = correlated(), 0.2
    precision = np.linalg.inv(base.covariances[0])
    policy, critic = shifted_policy(base), Critic(g, jnp.float64)
    lengths, gains = [], []
    options: dict[str, Any] = dict(radius=radius, damping=1e-6, smoothing=0.0)
    euclidean = ff.NaturalStep(ff.Euclidean(), radius, num_calibration=64, num_witnesses=0)
    for method in natural_step(jnp.float64, **options), euclidean:
        refined = ff.refine(policy, critic, method, observations=observations(jnp.float64))
        δ = displacements(refined, jnp.zeros((1, 2)))[0]
        lengths.append(0.5 * δ @ precision @ δ)
        gains.append(g @ δ)
    assert np.allclose(lengths, radius, rtol=0.02)
    expected = np.sqrt((g @ base.covariances[0] @ g) * (g @ precision @ g)) / (g @ g)
    assert expected > 1.2, "an anisotropic Gaussian"
    assert np.allclose(gains[0] / gains[1], expected, rtol=0.02)


def test_a_critic_that_is_broken_in_places(getkey):
    base, cutoff = bimodal(), 0.2
    critic = Critic(g, jnp.float64, cutoff=cutoff)
    refined = refine(base, critic)
    actions = base.sample(50, getkey())
    δ = displacements(refined, actions)
    broken = actions[:, 0] > cutoff
    assert np.any(broken) and not np.all(broken)
    assert np.all(δ[broken] == 0) and np.all(np.any(δ[~broken] != 0, axis=1))
    keys = jr.split(getkey(), 50)
    before, after = samples(shifted_policy(base), keys), samples(refined, keys)
    assert np.array_equal(before[:, 0] > cutoff, np.all(before == after, axis=1))


def test_the_certificate_counts_what_is_broken():
    critic = Critic(g, jnp.float64, cutoff=0.2)
    refined = refine(bimodal(), critic)
    states = jnp.zeros((64, 2))
    report = ff.certify(refined, critic, states, num_witnesses=0, key=jr.key(5))
    actions = bimodal().sample(100_000, jr.key(0))
    share = np.mean(actions[:, 0] > 0.2)
    # Five standard errors of a share of 4096 actions, and Euler's error in the samples.
    assert np.allclose(report.non_finite, share, atol=0.04 + 0.02)
    assert np.isfinite(report.kl) and np.isfinite(report.improvement) and report.improvement > 0


@dtypes
def test_a_critic_that_is_broken_everywhere_moves_nothing(dtype, getkey):
    actions = bimodal(dtype).sample(20, getkey())
    for states in observations, lambda dtype: None:
        refined = refine(bimodal(dtype), Critic(g, dtype, cutoff=-jnp.inf), observations=states)
        assert np.all(displacements(refined, actions) == 0)


@jax.custom_jvp
def _one(x):
    return jnp.ones_like(x)


@_one.defjvp
def _one_jvp(primals, tangents):
    return _one(*primals), jnp.nan * tangents[0]


@jax.custom_jvp
def _identity(x):
    return x


@_identity.defjvp
def _identity_jvp(primals, tangents):
    return primals[0], _one(*primals) * tangents[0]


def test_a_critic_without_a_second_derivative_moves_nothing(getkey):
    # Its gradient is finite, but the KL of a step along it cannot be measured.
    gradient = jnp.asarray(g)
    critic = lambda observation, action: _identity(jnp.sum(gradient * action))
    actions = bimodal().sample(20, getkey())
    assert np.all(np.isfinite(jax.vmap(jax.grad(lambda a: critic(None, a)))(actions)))
    assert np.all(displacements(refine(bimodal(), critic), actions) == 0)


def test_the_same_key_gives_the_same_step(getkey):
    critic, actions = Critic(g, jnp.float64, curvature=0.3), bimodal().sample(20, getkey())
    first, same, other = (
        displacements(refine(bimodal(), critic, key=key), actions)
        for key in (jr.key(0), jr.key(0), jr.key(1))
    )
    assert np.array_equal(first, same) and not np.array_equal(first, other)


def test_jit_and_vmap(getkey):
    critic, actions = Critic(g, jnp.float64, curvature=0.3), bimodal().sample(3, getkey())
    refined, o = refine(bimodal(), critic), jnp.zeros(2)
    loop = jnp.stack([refined.displacement(o, a) for a in actions])
    assert tree_allclose(displacements(refined, actions), loop, rtol=1e-10)
    transported = jax.vmap(lambda a: refined.transport(o, a))(actions)
    assert tree_allclose(transported, actions + loop, rtol=1e-10)
    # `refine` itself under `jit`, its radius an argument of the compiled function
    inside = jax.jit(lambda radius: refine(bimodal(), critic, radius=radius).displacement(o, o))
    outside = refine(bimodal(), critic, radius=0.05).displacement(o, o)
    assert tree_allclose(inside(jnp.asarray(0.05)), outside, rtol=1e-6)


def test_compiles_once(getkey):
    traces = []

    class Counting(eqx.Module):
        inner: Critic

        def __call__(self, observation, action):
            traces.append(None)
            return self.inner(observation, action)

    counts = []
    for scale in 1.0, 2.0, 3.0:
        critic = Counting(Critic(g, jnp.float32, scale=scale))
        refined = refine(correlated(jnp.float32), critic, radius=0.1 * scale, key=getkey())
        refined.sample(jnp.zeros(2, jnp.float32), key=getkey())
        counts.append(len(traces))
    assert counts[0] > 0 and counts[0] == counts[1] == counts[2]


def test_bounds(getkey):
    policy = shifted_policy(correlated(jnp.float32), bounds=(-1.0, 1.0))
    critic = Critic(g, jnp.float32)
    method = natural_step(jnp.float32, radius=0.5, num_calibration=256)
    refined = ff.refine(policy, critic, method, observations=observations(jnp.float32))
    keys = jr.split(getkey(), 200)
    actions = samples(refined, keys)
    assert refined.bounds == policy.bounds and actions.dtype == jnp.float32
    assert np.all(np.abs(actions) <= 1) and np.any(np.abs(actions) == 1)
    critic_of = lambda a: np.mean(a @ g.astype(np.float32))
    assert critic_of(actions) > critic_of(samples(policy, keys)) + 0.1


def test_solvers_agree(getkey):
    solver = lx.CG(rtol=1e-6, atol=1e-6)
    critic, actions = Critic(g, jnp.float64), bimodal().sample(5, getkey())
    expected = refine(bimodal(), critic)
    actual = refine(bimodal(), critic, solver=solver)
    tol = dict(rtol=1e-4, atol=1e-4)
    assert tree_allclose(displacements(actual, actions), displacements(expected, actions), **tol)


class Foreign:
    """A flow from elsewhere, in any shape: carries N(0, I) to N(observation, ¼ I)."""

    def __init__(self, action_shape):
        self.action_shape = action_shape

    def velocity(self, t, x, observation):
        o = observation["mean"]
        return o + (0.25 * t - (1 - t)) / (0.25 * t**2 + (1 - t) ** 2) * (x - t * o)


@pytest.mark.parametrize("action_shape, calibrated", [((), True), ((2, 3), False)], ids=str)
def test_any_shape_any_observation_and_flows_from_elsewhere(action_shape, calibrated, getkey):
    # For N(o, ¼ I), with any damping: δ = sqrt(2 ε / (¼ |g|²)) ¼ g.
    gradient = jnp.asarray(np.linspace(1, 2, int(np.prod(action_shape))).reshape(action_shape))
    critic = lambda observation, action: jnp.sum(gradient * action) + observation["bonus"]
    states = dict(mean=jr.normal(getkey(), (8, *action_shape)), bonus=jnp.ones(8))
    method = ff.NaturalStep(radius=0.1, num_calibration=64, num_auxiliary=8)
    given = states if calibrated else None
    refined = ff.refine(Foreign(action_shape), critic, method, observations=given, key=getkey())
    o = jax.tree.map(lambda leaf: leaf[0], states)
    action = refined.sample(o, key=getkey())
    δ = refined.displacement(o, action)
    assert action.shape == δ.shape == action_shape
    expected = np.sqrt(2 * 0.1 / (0.25 * np.sum(gradient**2))) * 0.25 * gradient
    assert np.allclose(δ, expected, rtol=0.006)
