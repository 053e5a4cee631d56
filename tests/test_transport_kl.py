import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from helpers import (
    affine_kl,
    bimodal_1d,
    dtypes,
    gaussian,
    random_covariance,
    tree_allclose,
    within,
)

import fisher_flow as ff


def over_actions(measure, policy, actions, displacement):
    return jax.jit(jax.vmap(lambda a: measure(policy, None, a, displacement)))(actions)


@dtypes
def test_translation_of_a_gaussian(dtype, getkey):
    # ½ δᵀ P δ at every single action; order 1 sees the precision P of the smoothed density.
    base = gaussian([0.5, -1.0, 0.0], random_covariance(getkey(), 3), dtype)
    δ = jnp.asarray([0.5, 1.0, -2.0], dtype)
    measure = ff.TransportKL(ff.PerturbedScore(time=0.9, order=1))
    terms = over_actions(measure, base.policy(), base.sample(20, getkey()), lambda a: δ)
    covariance = base.smoothed((0.1 / 0.9) ** 2).covariances[0]
    assert terms.kl.dtype == terms.stein.dtype == dtype
    tol = 1e-10 if dtype == jnp.float64 else 1e-4  # rounding, multiplied by 1 / σ
    assert np.allclose(terms.kl, 0.5 * δ @ jnp.linalg.solve(covariance, δ), rtol=tol, atol=tol)
    assert not np.any(terms.folded)


@pytest.mark.parametrize("scale", [0.01, 0.3, 1.0])
def test_affine_maps_of_a_gaussian(scale, getkey):
    base = gaussian([0.5, -1.0, 0.0], random_covariance(getkey(), 3))
    # One-to-one: the eigenvalues of a rotation are imaginary, those of a contraction in (-1, 0).
    A = scale * jnp.asarray([[0.3, 1.0, 0.0], [-1.0, 0.2, 0.0], [0.0, 0.4, -0.5]])
    b = scale * jnp.asarray([0.3, -0.2, 0.1])
    measure = ff.TransportKL(ff.PerturbedScore(time=0.99))  # a bias of r⁴ = 1e-8
    actions = base.sample(50_000, getkey())
    terms = over_actions(measure, base.policy(), actions, lambda a: A @ a + b)
    assert not np.any(terms.folded)
    assert within(terms.kl, affine_kl(base, np.asarray(A), np.asarray(b)))
    assert within(terms.stein, 0)


def test_nonlinear_map_of_a_mixture():
    mixture = bimodal_1d()
    displacement = lambda a: 0.4 * jnp.sin(2 * a) + 0.3
    measure = ff.TransportKL(ff.PerturbedScore(time=0.99), num_nodes=8)
    grid, step = jnp.linspace(-7, 7, 4001, retstep=True)
    terms = over_actions(measure, mixture.policy(), grid[:, None], displacement)

    # KL = ∫ p (log p - log|det(I + ∇δ)| - log p∘T), by the trapezium rule.
    log_p = jax.jit(jax.vmap(lambda a: mixture.log_prob(a[None])))
    slope = 0.8 * jnp.cos(2 * grid)
    nats = log_p(grid) - jnp.log1p(slope) - log_p(grid + displacement(grid))
    density = jnp.exp(log_p(grid)) * step
    assert np.allclose(density.sum(), 1, rtol=1e-9)
    # The bias of the score is r⁴ = 1e-8 times its curvatures.
    assert np.allclose(density @ terms.kl, density @ nats, rtol=1e-5)
    assert np.allclose(density @ terms.stein, 0, atol=1e-5)


def test_folds_are_seen(getkey):
    policy = gaussian([0.0, 0.0], np.eye(2)).policy()
    actions = jr.normal(getkey(), (200, 2))
    # The first entry a goes to a - a², which turns back where a > ½.
    terms = over_actions(
        ff.TransportKL(), policy, actions, lambda a: jnp.stack([-(a[0] ** 2), 0.0 * a[1]])
    )
    assert np.array_equal(terms.folded, actions[:, 0] > 0.5)
    assert np.any(terms.folded) and not np.all(terms.folded)


def test_what_is_not_finite_is_not_counted(getkey):
    policy = gaussian([0.0, 0.0], np.eye(2)).policy()
    actions = jr.normal(getkey(), (50, 2))
    broken = actions[:, 0] > 0
    terms = over_actions(
        ff.TransportKL(), policy, actions, lambda a: jnp.where(a[0] > 0, jnp.nan, 0.1 * a)
    )
    assert np.array_equal(terms.folded, broken)
    assert np.all(terms.kl[broken] == 0) and np.all(terms.stein[broken] == 0)
    assert np.all(terms.kl[~broken] > 0)


def test_no_displacement_costs_nothing(getkey):
    terms = ff.TransportKL()(bimodal_1d().policy(), None, jr.normal(getkey(), (1,)), jnp.zeros_like)
    assert terms.kl == 0 and terms.stein == 0 and not terms.folded


@dtypes
@pytest.mark.parametrize("action_shape", [(), (2, 3)], ids=str)
def test_action_shapes_and_jit(action_shape, dtype, getkey):
    # N(0, I) in any shape, moved by δ: ½ |δ|² / (1 + r²).
    def velocity(t, x, observation):
        return (2 * t - 1) / (t**2 + (1 - t) ** 2) * x

    policy = ff.FlowPolicy(velocity, action_shape)
    action, δ = jr.normal(getkey(), (2, *action_shape), dtype)
    measure = ff.TransportKL(ff.PerturbedScore(time=0.9, order=1))
    terms = measure(policy, None, action, lambda a: δ)
    tol = 1e-10 if dtype == jnp.float64 else 1e-4  # rounding, multiplied by 1 / σ
    assert np.allclose(terms.kl, 0.5 * jnp.sum(δ**2) / (1 + (0.1 / 0.9) ** 2), rtol=tol, atol=tol)
    jitted = jax.jit(lambda a: measure(policy, None, a, lambda a: δ))(action)
    assert tree_allclose(jitted, terms, rtol=tol, atol=tol)
