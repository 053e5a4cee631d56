"""Large actions: metrics and Jacobians that are known by their products only."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
import scipy.linalg
from helpers import dtypes, gaussian, Mixture, random_covariance, tree_allclose, within

import fisher_flow as ff
from fisher_flow._linalg import damped_solve, WhitenedOperator
from fisher_flow._linalg._krylov import arnoldi, KrylovPositivePart, trace_and_log_det


class ChunkVelocity(eqx.Module):
    """The exact velocity of a Gaussian of independent entries around the observation."""

    variance: jax.Array

    def __call__(self, t, x, observation):
        S = t**2 * self.variance + (1 - t) ** 2
        return observation + (t * self.variance - (1 - t)) / S * (x - t * observation)


def chunk_policy(shape, dtype=jnp.float64, **options):
    variance = jnp.linspace(0.2, 2.0, int(np.prod(shape)), dtype=dtype).reshape(shape)
    return ff.FlowPolicy(ChunkVelocity(variance), shape, **options), variance


def krylov_operator(rank, *args):
    operator = ff.ObservedInformation(ff.PerturbedScore(0.95), rank=rank).operator(
        *args, key=jr.key(0)
    )
    assert isinstance(operator, WhitenedOperator)
    assert isinstance(operator.operator, KrylovPositivePart)
    return operator


def mixture(size, key):
    covariance_key, mean_key = jr.split(key)
    covariances = jnp.stack([random_covariance(k, size) for k in jr.split(covariance_key)])
    return Mixture(0.7 * jr.normal(mean_key, (2, size)), covariances, jnp.ones(2))


@dtypes
def test_arnoldi_projects_onto_an_orthonormal_basis(dtype, getkey):
    A = jr.normal(getkey(), (9, 9), dtype)
    V, H = arnoldi(lambda z: A @ z, jr.normal(getkey(), (9,), dtype), 5)
    tol = 1e-4 if dtype == jnp.float32 else 1e-10
    assert tree_allclose(V @ V.T, jnp.eye(5, dtype=dtype), atol=tol)
    assert tree_allclose(H, V @ A @ V.T, atol=tol)
    assert tree_allclose(jnp.tril(H, -2), jnp.zeros((5, 5), dtype), atol=tol)


def test_a_space_that_is_exhausted_early_can_be_differentiated(getkey):
    # The images of an eigenvector span one dimension: all further directions are noise.
    def projected(scale):
        V, H = arnoldi(lambda z: scale * z, jnp.ones(9), 4)
        return V.T @ (H @ (V @ jnp.ones(9)))

    value, slope = jax.jvp(projected, (jnp.asarray(3.0),), (jnp.asarray(1.0),))
    assert tree_allclose(value, jnp.full(9, 3.0))
    assert tree_allclose(slope, jnp.ones(9), rtol=1e-6)


def test_at_full_rank_it_is_the_dense_metric(getkey):
    policy = mixture(5, getkey()).policy()
    a, g = jr.normal(getkey(), (2, 5))
    metric = ff.ObservedInformation(ff.PerturbedScore(0.95))
    dense = metric.operator(policy, None, a, key=getkey())
    assert isinstance(dense, WhitenedOperator)
    krylov = krylov_operator(5, policy, None, a)
    # The width of its corner is measured in the space, which is everything here.
    assert tree_allclose(krylov.as_matrix(), dense.as_matrix(), rtol=1e-6, atol=1e-8)
    # The damping is a share of the precision of each entry.
    damped = dense.as_matrix() + 0.3 * jnp.diag(1 / dense.whitening.deviations**2)
    solved = damped_solve(krylov, g, jnp.asarray(0.3), ff.NaturalStep().solver)
    assert tree_allclose(solved, jnp.linalg.solve(damped, g), rtol=1e-6)


@pytest.mark.parametrize("scale", [0.1, 0.3])
def test_projections_estimate_trace_and_determinant(scale, getkey):
    size = 40
    J = scale * jr.normal(getkey(), (size, size)) / size**0.5 + 0.2 * jnp.eye(size)
    trace, log_det, sign = trace_and_log_det(J, size)
    assert np.allclose(log_det, np.linalg.slogdet(np.eye(size) + J)[1])

    measure = ff.TransportKL()
    policy, _ = chunk_policy((size,))
    points = jr.normal(getkey(), (2000, size))

    def estimate(a):
        δ, projections = measure.linearise(policy, lambda a: J @ a, a)
        return jnp.stack([*trace_and_log_det(projections, size)[:2], jnp.sum((δ - J @ a) ** 2)])

    traces, log_dets, errors = jax.lax.map(estimate, points, batch_size=500).T
    assert within(traces, trace) and within(log_dets, log_det) and np.max(errors) < 1e-20
    assert sign == 1


def test_projections_find_a_reversal(getkey):
    # One direction of forty is turned around.
    J = 0.3 * jr.normal(getkey(), (40, 40)) / 40**0.5
    normal = jr.normal(getkey(), (40,))
    J = J - 1.8 * jnp.outer(normal, normal) / jnp.sum(normal**2)
    assert np.linalg.slogdet(np.eye(40) + J)[0] == -1
    measure, (policy, _) = ff.TransportKL(), chunk_policy((40,))

    def sign(a):
        return trace_and_log_det(measure.linearise(policy, lambda a: J @ a, a)[1], 40)[2]

    signs = jax.lax.map(sign, jr.normal(getkey(), (200, 40)), batch_size=50)
    assert np.mean(signs == -1) > 0.9


@pytest.mark.parametrize("strength", [0.9, 1.05, 1.3])
def test_actions_that_fold_do_not_spoil_the_mean(strength, getkey):
    # One entry of forty folds where the slope of its displacement is below -1.
    policy, _ = chunk_policy((40,))
    measure = ff.TransportKL(ff.PerturbedScore(0.95))
    field = lambda a: jnp.zeros_like(a).at[0].set(-strength * jnp.tanh(a[0]))
    points = jr.normal(getkey(), (400, 40))
    terms = jax.lax.map(lambda a: measure(policy, jnp.zeros(40), a, field), points, batch_size=100)
    slopes = 1 - strength / np.cosh(np.asarray(points[:, 0])) ** 2
    assert np.mean(terms.folded) == pytest.approx(np.mean(slopes <= 0), abs=0.03)
    assert np.all(np.asarray(terms.kl)[np.asarray(terms.folded)] == 0)
    assert np.max(np.abs(terms.kl)) < 60  # before, up to 600


def test_kl_with_probes_agrees_with_the_exact_one(getkey):
    base = gaussian(jnp.zeros(6), random_covariance(getkey(), 6))
    policy = base.policy()
    A = 0.15 * jr.normal(getkey(), (6, 6))
    actions = base.sample(4000, getkey())
    exact, probed = (
        jax.vmap(lambda a, measure=measure: measure(policy, None, a, lambda a: A @ a))(actions)
        for measure in (
            ff.TransportKL(ff.PerturbedScore(0.95)),
            ff.TransportKL(ff.PerturbedScore(0.95), num_probes=2),
        )
    )
    assert within(probed.kl - exact.kl, 0)
    assert within(probed.stein - exact.stein, 0)
    assert not np.any(probed.folded)


def test_a_step_of_a_chunk_meets_its_radius(getkey):
    dtype = jnp.float32  # with 64-bit floats enabled the harder one to preserve
    policy, variance = chunk_policy((6, 7), dtype, num_steps=30)
    observations = jr.normal(getkey(), (32, 6, 7), dtype)
    weights = jr.normal(getkey(), (6, 7), dtype)
    critic = lambda o, a: jnp.sum(weights * (a - o)) - jnp.mean((a - o) ** 2)
    score = ff.PerturbedScore(time=jnp.asarray(0.97, dtype))
    method = ff.NaturalStep(
        ff.ObservedInformation(score),
        jnp.asarray(0.3, dtype),
        num_calibration=512,
        num_witnesses=0,
    )
    refined = ff.refine(policy, critic, method, observations=observations, key=getkey())
    certificate = ff.certify(
        refined, critic, observations, num_actions=512, num_witnesses=0, key=getkey()
    )
    assert certificate.kl.dtype == dtype
    assert abs(certificate.kl - 0.3) < 0.03
    assert certificate.improvement > 0 and certificate.folded == 0

    # The step of an affine critic gradient is affine: A a + b, with the KL of Gaussians.
    o = observations[0]
    field = lambda u: refined.displacement(o, o + u.reshape(6, 7)).reshape(-1)
    u = 0.1 * jr.normal(getkey(), (42,), dtype)
    T = np.eye(42) + np.asarray(jax.jacfwd(field)(u), float)
    b = np.asarray(field(jnp.zeros(42, dtype)), float)
    C = np.diag(np.asarray(variance, float).reshape(-1))
    precision = np.linalg.inv(C)
    kl = 0.5 * (np.trace(precision @ T @ C @ T.T) + b @ precision @ b - 42)
    kl -= np.linalg.slogdet(T)[1]
    assert abs(kl - 0.3) < 0.05


def test_few_dimensions_gain_as_much_as_all(getkey):
    policy, variance = chunk_policy((6, 7))
    weights = jr.normal(getkey(), (42,))
    o = jnp.zeros((6, 7))
    critic = lambda o, a: jnp.sum(jnp.sin(weights * a.reshape(-1)))
    gains = []
    for rank in (4, 42):
        G = krylov_operator(rank, policy, o, o)
        g = jax.grad(critic, argnums=1)(o, o).reshape(-1)
        step = damped_solve(G, g, jnp.mean(1 / variance) * 0.2, ff.NaturalStep().solver)
        # the gain per root of the cost, both to lowest order
        gains.append(jnp.dot(g, step) / jnp.sqrt(jnp.sum(step**2 / variance.reshape(-1))))
    assert gains[0] > 0.98 * gains[1]


@pytest.mark.slow
def test_memory_is_linear_in_the_chunk():
    def memory(horizon):
        policy = ff.FlowPolicy(ff.VelocityMLP(3, (horizon, 7), key=jr.key(0)), (horizon, 7))
        critic = lambda o, a: -jnp.mean((a - 1.0) ** 2)
        method = ff.NaturalStep(ff.ObservedInformation(ff.PerturbedScore(0.95)), num_calibration=8)
        refined = ff.refine(policy, critic, method, observations=jnp.zeros((8, 3)))
        keys = jr.split(jr.key(0), 64)
        sample = jax.jit(jax.vmap(lambda key: refined.sample(jnp.zeros(3), key=key)))
        analysis = sample.lower(keys).compile().memory_analysis()
        assert analysis is not None
        return analysis.temp_size_in_bytes

    small, large = memory(16), memory(64)
    assert large < 4.5 * small


def test_functions_of_matrices_agree_with_scipy(getkey):
    # The quadrature for the logarithm, on a matrix with rotations in it.
    J = 0.4 * jr.normal(getkey(), (1, 8, 8)) / 8**0.5
    _, log_det, _ = trace_and_log_det(J, 1)
    expected = np.asarray(scipy.linalg.logm(np.eye(8) + np.asarray(J[0])))[0, 0]
    assert np.allclose(log_det, expected, atol=1e-8)
