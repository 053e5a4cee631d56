"""A refinement is the same in whatever units the entries of an action are written."""

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from helpers import affine_kl, dtypes, gaussian

import fisher_flow as ff
from fisher_flow._geometry import in_continuous_time, measure_whitening
from fisher_flow._linalg import whiten_samples


class GaussianVelocity(eqx.Module):
    """Carries noise to a Gaussian along the straight path; entries may be constant."""

    mean: jax.Array
    basis: jax.Array
    deviation: jax.Array  # along each column of the basis

    def __call__(self, t, x, observation):
        variance = self.deviation**2
        z = self.basis.T @ (x - t * self.mean)  # in the basis every entry is on its own
        rate = (t * variance - (1 - t)) / (t**2 * variance + (1 - t) ** 2)
        return self.mean + self.basis @ (rate * z)


def policy_of(mean, deviation, basis=None, num_steps=50):
    basis = np.eye(len(mean)) if basis is None else basis
    arrays = (jnp.asarray(x, jnp.float32) for x in (mean, basis, deviation))
    return ff.FlowPolicy(GaussianVelocity(*arrays), (len(mean),), num_steps=num_steps)


class LinearCritic(eqx.Module):
    weights: jax.Array

    def __call__(self, observation, action):
        return jnp.sum(self.weights * action)


observations = jnp.zeros((32, 1), jnp.float32)


def refined_of(policy, weights, num_witnesses=0):
    weights = jnp.asarray(weights, jnp.float32)
    method = ff.NaturalStep(radius=0.5, num_calibration=512, num_witnesses=num_witnesses)
    return ff.refine(policy, LinearCritic(weights), method, observations=observations)


def true_kl(refined, mean, factor):
    """The KL of the affine map that the refinement of a Gaussian by a linear critic is."""
    # In coordinates in which the Gaussian is standard, where numbers are of order one.
    d = len(mean)
    steps = np.concatenate([np.zeros((1, d)), factor.T])
    points = jnp.asarray(np.asarray(mean) + steps, jnp.float32)
    moved = np.asarray(jax.vmap(lambda a: refined.displacement(observations[0], a))(points), float)
    b, *columns = np.linalg.solve(factor, moved.T).T
    return affine_kl(gaussian(np.zeros(d), np.eye(d)), np.stack(columns, axis=1) - b[:, None], b)


deviations = [(1.0, 1.0), (1.0, 1e-3), (1e3, 1e-3), (30.0, 1.0, 0.05)]


@pytest.mark.parametrize("deviation", deviations, ids=str)
def test_the_radius_and_the_gain_do_not_depend_on_the_units(deviation):
    deviation = np.asarray(deviation)
    mean = 0.5 * deviation
    # By scores alone, and once by densities too.
    num_witnesses = 128 if max(deviation) == 1e3 else 0
    refined = refined_of(policy_of(mean, deviation), 1 / deviation, num_witnesses)
    assert np.isclose(true_kl(refined, mean, np.diag(deviation)), 0.5, rtol=0.1)  # the promise
    # The best of all policies at this KL gains sqrt(2 ε wᵀ Σ w).
    a = jnp.asarray(mean, jnp.float32)
    gain = float(refined.displacement(observations[0], a) @ jnp.asarray(1 / deviation, jnp.float32))
    assert np.isclose(gain, np.sqrt(2 * 0.5 * len(deviation)), rtol=0.05)


def test_a_rotation_changes_little():
    c, s = np.cos(0.6), np.sin(0.6)
    basis, deviation = np.asarray([[c, -s], [s, c]]), np.asarray([1.0, 0.01])
    factor = basis @ np.diag(deviation)
    weights = np.linalg.solve(factor.T, np.ones(2))
    refined = refined_of(policy_of(np.zeros(2), deviation, basis), weights)
    assert np.isclose(true_kl(refined, np.zeros(2), factor), 0.5, rtol=0.06)


@pytest.mark.parametrize("constant", [pytest.param(0.0, marks=pytest.mark.slow), 0.7])
def test_padding_changes_nothing(constant):
    deviation = np.asarray([0.4, 0.3, 0.1])
    weights = np.asarray([1.0, 1.5, 2.0])
    plain = refined_of(policy_of(np.zeros(3), deviation), weights)
    mean = np.append(np.zeros(3), [constant, constant])
    padded_deviation = np.append(deviation, [0.0, 0.0])
    padded = refined_of(
        policy_of(mean, padded_deviation), np.append(weights, [3.0, -1.0]), num_witnesses=128
    )
    a = jnp.asarray([0.1, -0.2, 0.05], jnp.float32)
    expected = plain.displacement(observations[0], a)
    got = padded.displacement(observations[0], jnp.append(a, jnp.full(2, constant, jnp.float32)))
    assert np.allclose(got[:3], expected, rtol=0.03) and np.all(got[3:] == 0)


def test_whitening_of_samples():
    factor = np.diag([1e3, 1.0, 1e-3, 0.0]) @ np.tril(np.ones((4, 4)))
    samples = jr.normal(jr.key(0), (4096, 4), jnp.float32) @ jnp.asarray(factor.T, jnp.float32)
    whitening = whiten_samples(samples, jnp.zeros(4, jnp.float32), 1e-5)
    z = jax.vmap(whitening.whiten)(samples)
    assert np.allclose(z.T @ z / 4096, np.diag([1.0, 1.0, 1.0, 0.0]), atol=1e-3)
    v = jnp.asarray([300.0, -2.0, 1e-3, 0.0], jnp.float32)
    assert np.allclose(whitening.colour(whitening.whiten(v)), v, rtol=1e-3)
    g = jnp.asarray([1e-3, 2.0, 500.0, 0.0], jnp.float32)
    # A gradient and a displacement have the same product in all coordinates.
    product = whitening.whiten_gradient(g) @ whitening.whiten(v)
    assert np.isclose(product, g @ v, rtol=1e-3)
    assert whitening.rank == 3 and whitening.varies.sum() == 3


@dtypes
@pytest.mark.parametrize("scale, size, rtol", [(1.0, 4, 1e-3), (0.1, 16, 1e-5), (100.0, 6, 1e-3)])
def test_constant_entries_are_told_from_the_errors_of_a_solver(scale, size, rtol, dtype):
    # Half of the entries never vary; half of the others vary much less than the rest.
    varies = np.where(np.arange(size) % 4 == 0, 1.0, 0.02) * scale
    deviation = np.where(np.arange(size) % 2 == 0, varies, 1e-10)
    velocity = GaussianVelocity(
        jnp.full(size, 0.5 * scale, dtype),
        jnp.eye(size, dtype=dtype),
        jnp.asarray(deviation, dtype),
    )
    controller = diffrax.PIDController(rtol=rtol, atol=0.01 * rtol)
    policy = ff.FlowPolicy(
        velocity, (size,), solver=diffrax.Tsit5(), stepsize_controller=controller, num_steps=20
    )
    whitening = measure_whitening(policy, observations.astype(dtype), key=jr.key(0))
    expected = np.where(deviation > 1e-9, deviation, 0)
    assert np.allclose(np.sort(whitening.deviations), np.sort(expected), rtol=0.1, atol=0)


def test_a_score_has_a_time_for_every_unit():
    deviation = np.asarray([1.0, 1e-3])
    policy = policy_of(np.zeros(2), deviation)
    flow = in_continuous_time(policy, observations, key=jr.key(0))
    o = jnp.zeros(1, jnp.float32)
    draw = eqx.filter_jit(jax.vmap(lambda key: flow.draw(o, key=key)))
    actions = draw(jr.split(jr.key(1), 1024))
    score = ff.calibrate_score(flow, jnp.zeros((1024, 1)), actions, key=jr.key(2))
    assert len(score.times) == 2 and score.settled
    a = jnp.asarray([0.7, -5e-4], jnp.float32)
    assert np.allclose(score(flow, o, a), -np.asarray(a) / deviation**2, rtol=0.03)


def test_long_steps_do_not_stand_for_the_flow():
    narrow = policy_of(np.zeros(2), [1.0, 1e-2], num_steps=10)
    assert in_continuous_time(narrow, observations, key=jr.key(0)) is not narrow
    wide = policy_of(np.zeros(2), [1.0, 0.8], num_steps=50)
    assert in_continuous_time(wide, observations, key=jr.key(0)) is wide
    # Ten Euler steps end with almost no variation in a narrow direction; the flow does not.
    flow = in_continuous_time(narrow, observations, key=jr.key(0)).flow_policy
    whitening = measure_whitening(flow, observations, key=jr.key(1))
    assert np.allclose(np.sort(whitening.deviations), [1e-2, 1.0], rtol=0.1)


@pytest.mark.slow
def test_a_residual_does_not_depend_on_the_units(standard_promotion):
    deviation = np.asarray([1.0, 1e-3])
    method = ff.Residual(
        radius=0.5, num_updates=300, num_calibration=512, num_witnesses=0, progress=False
    )
    critic = LinearCritic(jnp.asarray(1 / deviation, jnp.float32))
    policy = policy_of(np.zeros(2), deviation)
    refined = ff.refine(policy, critic, method, observations=observations)
    a = jnp.asarray([0.3, -4e-4], jnp.float32)
    gain = refined.displacement(observations[0], a) @ critic.weights
    assert np.isclose(gain, np.sqrt(2), rtol=0.15)  # of the best of all policies at 0.5 nats
