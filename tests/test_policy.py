import math
from typing import Any

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from helpers import (
    bimodal,
    bimodal_1d,
    correlated,
    Critic,
    dtypes,
    gaussian,
    observed_order,
    policies,
    random_covariance,
    shifted_policy,
    tree_allclose,
    UserPath,
    within,
)

import fisher_flow as ff


def as_tolerances(dtype):
    """Of `log_prob`: it integrates with tolerances of 1e-7 or 1e-5 a step."""
    return dict(rtol=1e-5, atol=1e-5) if dtype == jnp.float64 else dict(rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    "path, dtype",
    [
        (ff.LinearPath(), jnp.float64),
        (ff.LinearPath(), jnp.float32),
        (ff.CosinePath(), jnp.float32),
        (UserPath(), jnp.float64),
    ],
)
def test_log_prob_of_a_correlated_gaussian(path, dtype, getkey):
    base = gaussian([0.5, -1.0, 0.2], random_covariance(getkey(), 3), dtype)
    policy, actions = base.policy(path), base.sample(20, getkey())
    log_p = jax.jit(jax.vmap(lambda a: policy.log_prob(None, a)))(actions)
    assert tree_allclose(log_p, jax.vmap(base.log_prob)(actions), **as_tolerances(dtype))


def test_log_prob_of_a_mixture_and_its_gradient(getkey):
    mixture = bimodal()
    policy, actions = mixture.policy(), mixture.sample(20, getkey())
    log_p = jax.jit(jax.vmap(jax.value_and_grad(lambda a: policy.log_prob(None, a))))
    value, gradient = log_p(actions)
    assert np.allclose(value, jax.vmap(mixture.log_prob)(actions), rtol=1e-5, atol=1e-5)
    assert np.allclose(gradient, jax.vmap(mixture.score)(actions), rtol=1e-4, atol=1e-4)
    single = policy.log_prob(None, actions[0])
    assert tree_allclose(single, value[0], rtol=1e-6, atol=1e-6)


def test_density_integrates_to_one():
    policy = bimodal_1d().policy()
    grid, step = jnp.linspace(-6, 6, 301, retstep=True)
    log_p = jax.jit(jax.vmap(lambda a: policy.log_prob(None, a[None])))(grid)
    assert np.allclose(jnp.exp(log_p).sum() * step, 1, rtol=1e-5)


def test_hutchinson_log_prob_is_unbiased(getkey):
    base = gaussian([0.5, -1.0, 0.2], random_covariance(getkey(), 3))
    policy, action = base.policy(), jnp.asarray([0.3, 0.0, -0.4])
    estimate = jax.jit(jax.vmap(lambda key: policy.log_prob(None, action, num_probes=2, key=key)))(
        jr.split(getkey(), 2000)
    )
    assert within(estimate, base.log_prob(action))


def test_moments_of_samples(getkey):
    mixture = bimodal()
    policy = mixture.policy(solver=diffrax.Heun(), num_steps=100)
    n = 20_000
    samples = jax.jit(jax.vmap(lambda key: policy.sample(None, key=key)))(jr.split(getkey(), n))
    weights = mixture.weights / mixture.weights.sum()
    second = mixture.covariances + jax.vmap(jnp.outer)(mixture.means, mixture.means)
    assert within(samples, weights @ mixture.means)
    products = jax.vmap(jnp.outer)(samples, samples)
    assert within(products, jnp.tensordot(weights, second, axes=1))


def exact_flow(base, noise):
    """A Gaussian's flow stays in the eigenbasis of the covariance: x(1) = mean + Σ^½ x(0)."""
    λ, V = np.linalg.eigh(base.covariances[0])
    return base.means[0] + (V * np.sqrt(λ)) @ V.T @ noise


@pytest.mark.parametrize("solver, order", [(diffrax.Euler(), 1), (diffrax.Heun(), 2)], ids=repr)
def test_order_of_convergence(solver, order, getkey):
    base = gaussian([0.5, -1.0], [[0.5, 0.3], [0.3, 0.9]])
    noise = jr.normal(getkey(), (2,))
    errors = []
    for num_steps in 64, 128, 256:
        policy = base.policy(solver=solver, num_steps=num_steps)
        error = eqx.filter_jit(policy.flow)(None, noise) - exact_flow(base, noise)
        errors.append(np.linalg.norm(error))
    assert np.allclose(observed_order(errors), order, atol=0.15)


@dtypes
def test_adaptive_steps(dtype, getkey):
    base = gaussian([0.5, -1.0], [[0.5, 0.3], [0.3, 0.9]], dtype)
    tol = 1e-10 if dtype == jnp.float64 else 1e-5
    controller = diffrax.PIDController(rtol=tol, atol=tol)
    policy = base.policy(solver=diffrax.Tsit5(), stepsize_controller=controller)
    noise = jr.normal(getkey(), (2,), dtype)
    x = eqx.filter_jit(policy.flow)(None, noise)
    assert x.dtype == dtype
    assert np.allclose(x, exact_flow(base, noise), rtol=100 * tol, atol=100 * tol)


@dtypes
def test_steps_to_uneven_times(dtype, getkey):
    base = gaussian([0.5, -1.0], [[0.5, 0.3], [0.3, 0.9]], dtype)
    ts = np.asarray([0, 0.4, 0.7, 0.9, 1], dtype)
    policy = base.policy(stepsize_controller=diffrax.StepTo(ts=ts), num_steps=3)
    noise = expected = jr.normal(getkey(), (2,), dtype)
    for t0, t1 in zip(ts[:-1], ts[1:], strict=True):
        expected = expected + (t1 - t0) * policy.velocity(t0, expected, None)
    tol = 1e-13 if dtype == jnp.float64 else 1e-6
    assert tree_allclose(eqx.filter_jit(policy.flow)(None, noise), expected, rtol=tol, atol=tol)


@dtypes
def test_controllers_with_times_of_their_own(dtype, getkey):
    # In either direction, in 64 bits or not, the times fit those of the solve.
    base = gaussian([0.5, -1.0], [[0.5, 0.3], [0.3, 0.9]], dtype)
    noise = jr.normal(getkey(), (2,), dtype)
    fine = diffrax.PIDController(rtol=1e-6, atol=1e-6)
    for controller in (
        diffrax.ClipStepSizeController(fine, step_ts=[0.3, 0.9], jump_ts=jnp.asarray([0.5])),
        diffrax.StepTo(ts=jnp.linspace(0, 1, 41) ** 0.8),
        diffrax.StepTo(ts=jnp.cumsum(jnp.full(33, 1 / 32)) - 1 / 32),
    ):
        policy = base.policy(solver=diffrax.Tsit5(), stepsize_controller=controller)
        action = policy.flow(None, noise)
        assert tree_allclose(action, exact_flow(base, noise), rtol=1e-4, atol=1e-4)
        log_p = policy.log_prob(
            None, action, solver=diffrax.Tsit5(), stepsize_controller=controller
        )
        assert tree_allclose(log_p, base.log_prob(action), rtol=1e-3, atol=1e-3)
    falling = diffrax.StepTo(ts=jnp.linspace(1, 0, 41))
    log_p = policy.log_prob(None, action, solver=diffrax.Tsit5(), stepsize_controller=falling)
    assert tree_allclose(log_p, base.log_prob(action), rtol=1e-3, atol=1e-3)


@dtypes
@pytest.mark.parametrize("uneven", [False, True], ids=["even", "uneven"])
@pytest.mark.parametrize("solver", [diffrax.Euler(), diffrax.Heun(), diffrax.Tsit5()], ids=repr)
def test_fixed_steps_are_the_steps_of_a_solve(solver, uneven, dtype, getkey):
    # With another adjoint the same steps go through `diffrax.diffeqsolve`.
    ts = jnp.asarray([0.0, 0.1, 0.4, 0.8, 1.0], dtype)
    controller = diffrax.StepTo(ts=ts) if uneven else diffrax.ConstantStepSize()
    velocity = shifted_policy(bimodal(dtype)).velocity_field
    options: Any = dict(solver=solver, stepsize_controller=controller, num_steps=7)
    plain = ff.FlowPolicy(velocity, (2,), **options)
    solved = ff.FlowPolicy(velocity, (2,), adjoint=diffrax.DirectAdjoint(), **options)
    o, z = jr.normal(getkey(), (2,), dtype), jr.normal(getkey(), (2,), dtype)

    @eqx.filter_jit
    def sample_density_and_slope(z, policy):
        backwards = lambda a: policy.log_prob(o, a, solver=solver, stepsize_controller=controller)
        forwards = lambda z: jnp.sum(policy.flow(o, z) ** 2)
        return policy.flow(o, z), backwards(z), jax.grad(forwards)(z)

    results = [sample_density_and_slope(z, policy) for policy in (plain, solved)]
    assert tree_allclose(*results, rtol=1e-4 if dtype == jnp.float32 else 1e-10)


@pytest.mark.parametrize("ts", [[0, 0.5, 0.4, 1], [0, 2.5, 5, 10], [0.1, 0.5, 1]], ids=str)
def test_times_that_do_not_lead_from_noise_to_action(ts):
    with pytest.raises(ValueError, match=r"`stepsize_controller=diffrax.StepTo\(ts="):
        bimodal().policy(stepsize_controller=diffrax.StepTo(ts=jnp.asarray(ts)))


def test_steps_that_nothing_can_adapt():
    controller = diffrax.PIDController(rtol=1e-3, atol=1e-3)
    with pytest.raises(ValueError, match=r"`solver=diffrax.Tsit5\(\)`"):
        bimodal().policy(stepsize_controller=controller)


@pytest.mark.parametrize(
    "adjoint, differentiate",
    [
        (diffrax.RecursiveCheckpointAdjoint(), jax.jacrev),
        (diffrax.RecursiveCheckpointAdjoint(), jax.jacfwd),
        (diffrax.ForwardMode(), jax.jacfwd),
    ],
    ids=["reverse", "forward", "forward mode"],
)
def test_derivative_of_a_sample(adjoint, differentiate, getkey):
    # Moving the mean of a Gaussian moves every sample along with it, whatever the step size.
    key = getkey()

    def sample(mean):
        velocity = ff.GaussianMixtureVelocity(mean[None], jnp.diag(jnp.asarray([0.5, 2.0]))[None])
        return ff.FlowPolicy(velocity, (2,), adjoint=adjoint).sample(None, key=key)

    jacobian = jax.jit(differentiate(sample))(jnp.asarray([0.5, -1.0]))
    assert np.allclose(jacobian, np.eye(2), atol=1e-12)


class Scaled(eqx.Module):
    """Carries N(0, I) to N(observation, I) in any shape."""

    def __call__(self, t, x, observation):
        o = observation["mean"]
        return o + (2 * t - 1) / (t**2 + (1 - t) ** 2) * (x - t * o)


@dtypes
@pytest.mark.parametrize("action_shape", [(), (2, 3)], ids=str)
def test_shapes_dtypes_jit_and_vmap(action_shape, dtype, getkey):
    policy = ff.FlowPolicy(Scaled(), action_shape)
    observations = dict(mean=jr.normal(getkey(), (3, *action_shape), dtype))
    keys = jr.split(getkey(), 3)
    row = lambda i: jax.tree.map(lambda leaf: leaf[i], observations)
    tol = 1e-12 if dtype == jnp.float64 else 1e-5

    batch = jax.vmap(lambda o, key: policy.sample(o, key=key))(observations, keys)
    loop = jnp.stack([policy.sample(row(i), key=keys[i]) for i in range(3)])
    assert batch.shape == (3, *action_shape) and batch.dtype == dtype
    assert tree_allclose(batch, loop, rtol=tol, atol=tol)

    log_p = jax.vmap(policy.log_prob)(observations, batch)
    expected = -0.5 * jnp.sum((batch - observations["mean"]).reshape(3, -1) ** 2, axis=1)
    expected = expected - 0.5 * batch[0].size * math.log(2 * math.pi)
    assert tree_allclose(log_p, expected, **as_tolerances(dtype))


def test_where_the_dtype_comes_from():
    dtype_of = lambda policy, o: policy.sample(o, key=jr.key(0)).dtype
    plain = lambda t, x, observation: -x
    single, double = jnp.zeros(2, jnp.float32), jnp.zeros(2, jnp.float64)
    assert dtype_of(gaussian([0.0], [[1.0]], jnp.float32).policy(), double) == jnp.float32
    assert dtype_of(ff.FlowPolicy(plain, (2,)), single) == jnp.float32
    assert dtype_of(ff.FlowPolicy(plain, (2,)), None) == jnp.float64
    assert dtype_of(ff.FlowPolicy(plain, (2,), dtype=jnp.float32), double) == jnp.float32


def test_the_same_key_gives_the_same_sample(getkey):
    policy, key = bimodal().policy(), getkey()
    first = policy.sample(None, key=key)
    assert np.array_equal(first, policy.sample(None, key=key))
    assert not np.array_equal(first, policy.sample(None, key=getkey()))


low, high = np.array([-0.5, -1.0]), 0.3


@pytest.mark.parametrize(
    "name, dtype", [*((name, jnp.float32) for name in policies), ("FlowPolicy", jnp.float64)]
)
def test_samples_are_draws_held_to_the_bounds(name, dtype, getkey):
    flow = shifted_policy(correlated(dtype), bounds=(low, high))
    policy = policies[name](flow, Critic([0.8, -0.5], dtype))
    keys, o = jr.split(getkey(), 50), jnp.full(2, 0.2, dtype)

    @jax.jit
    @jax.vmap
    def both(key):
        return policy.sample(o, key=key), policy.draw(o, key=key)

    samples, free = map(np.asarray, both(keys))
    assert samples.shape == (50, 2) and samples.dtype == dtype
    assert np.all(samples >= low.astype(dtype)) and np.all(samples <= dtype(high))
    assert np.allclose(samples, np.clip(free, low, high), rtol=1e-5, atol=1e-5)
    assert np.any(samples != free)


def test_compiles_once(getkey):
    traces = []

    def velocity(t, x, observation):
        traces.append(None)
        return observation - x

    policy = ff.FlowPolicy(velocity, (2,))
    results = []
    for _ in range(3):
        action = policy.sample(jr.normal(getkey(), (2,)), key=getkey())
        policy.log_prob(jr.normal(getkey(), (2,)), action)
        results.append(len(traces))
    assert results[0] > 0 and results[0] == results[1] == results[2]
