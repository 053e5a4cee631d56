"""What is fitted to a policy, and what is said of it."""

from typing import Any

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from helpers import bimodal, correlated, Critic, gaussian, gaussian_kl, shifted_policy

import fisher_flow as ff
from fisher_flow._refinement._fidelity import measure_fidelity


pytestmark = pytest.mark.usefixtures("standard_promotion")
observations = jnp.zeros((256, 2))
linear = Critic([0.8, -0.5], jnp.float64)
mean, covariance = np.asarray(correlated().means[0]), np.asarray(correlated().covariances[0])
accurate: dict[str, Any] = dict(solver=diffrax.Heun(), num_steps=40)


def fidelity_of(original, fitted, critic=linear, **options):
    return measure_fidelity(original, fitted, critic, observations, key=jr.key(1), **options)


def test_fidelity_of_a_policy_to_itself():
    policy = gaussian(mean, covariance).policy(**accurate)
    fidelity = fidelity_of(policy, policy)
    assert fidelity.lost == fidelity.lost_stderr == fidelity.improvement == 0
    assert np.allclose(fidelity.energy, 0, atol=1e-12)
    assert np.allclose(fidelity.kl, 0, atol=1e-3)  # up to the error of the sampler


def test_fidelity_between_gaussians():
    other_mean, other = np.array([0.6, 0.1]), np.array([[0.8, 0.1], [0.1, 0.6]])
    original = gaussian(mean, covariance).policy(**accurate)
    fitted = gaussian(other_mean, other).policy(**accurate)
    fidelity = fidelity_of(original, fitted)
    kl = gaussian_kl(mean, covariance, other_mean, other)
    assert abs(fidelity.kl - kl) < 5 * fidelity.kl_stderr and fidelity.kl_stderr < 0.15 * kl
    lost = np.array([0.8, -0.5]) @ (mean - other_mean)
    assert abs(fidelity.lost - lost) < 5 * fidelity.lost_stderr
    assert np.isnan(fidelity.distance)  # neither follows the noise of the other
    assert fidelity.num_actions == 4096 and fidelity.num_observations == 512


def test_energy_coefficient():
    # On the line E|X - Y| has a closed form for Gaussians: with D = X - Y ~ N(m, v),
    # E|D| = sqrt(2 v / π) exp(-m² / 2v) + m erf(m / sqrt(2 v)).
    def expected(m, v):
        return np.sqrt(2 * v / np.pi) * np.exp(-(m**2) / (2 * v)) + m * float(
            jax.scipy.special.erf(m / np.sqrt(2 * v))
        )

    make = lambda m, v: ff.OneStepPolicy(lambda o, z: m + v**0.5 * z, (1,), dtype=jnp.float64)
    critic = Critic([1.0], jnp.float64)
    fidelity = fidelity_of(make(0.0, 1.0), make(1.5, 0.5), critic, num_actions=64)
    between, within = expected(1.5, 1.5), expected(0.0, 2.0) + expected(0.0, 1.0)
    assert np.allclose(fidelity.energy, (2 * between - within) / (2 * between), rtol=0.05)


def test_density_of_the_original_is_that_of_its_sampler():
    # Two Euler steps of a Gaussian's flow make an affine map of the noise, whose KL is known.
    original = gaussian([0.4, 0.0], 0.3 * np.eye(2)).policy(num_steps=2)
    ends = jax.vmap(lambda z: original.flow(None, z))(
        jnp.concatenate([jnp.zeros((1, 2)), jnp.eye(2)])
    )
    matrix = np.asarray(ends[1:] - ends[:1]).T
    fitted = gaussian(mean, covariance).policy(**accurate)
    kl = gaussian_kl(np.asarray(ends[0]), matrix @ matrix.T, mean, covariance)
    fidelity = fidelity_of(original, fitted)
    assert abs(fidelity.kl - kl) < 5 * fidelity.kl_stderr


def learned_flow(key, num_updates=1500):
    velocity = ff.VelocityMLP(2, (2,), width_size=32, depth=2, dtype=jnp.float64, key=key)
    policy = ff.FlowPolicy(velocity, (2,))
    actions = bimodal().sample(8192, key)
    o = jnp.zeros((8192, 2))
    return ff.fit_flow(policy, o, actions, num_updates=num_updates, progress=False, key=key)


@pytest.fixture(scope="module")
def refined():
    with jax.numpy_dtype_promotion("standard"):
        method = ff.NaturalStep(num_witnesses=0)
        flow = learned_flow(jr.key(0))
        return ff.refine(flow, linear, method, observations=observations, key=jr.key(1))


@eqx.filter_jit
def value(policy):
    """The mean value of its actions, drawn afresh."""
    act = lambda key: policy.draw(jnp.zeros(2), key=key)
    return jnp.mean(jax.vmap(lambda key: linear(jnp.zeros(2), act(key)))(jr.split(jr.key(4), 2048)))


def test_absorb_a_refined_policy(refined):
    flow = refined.flow_policy
    absorbed, fidelity = ff.absorb(
        refined, observations, num_samples=8192, num_updates=1500, progress=False, key=jr.key(2)
    )
    assert isinstance(absorbed, ff.FlowPolicy)
    assert absorbed.num_steps == flow.num_steps and absorbed.action_shape == flow.action_shape
    # The flow that it started from was as far from the refined policy as the refinement moved it.
    before = fidelity_of(refined, flow)
    assert np.allclose(before.lost, before.improvement)
    assert 0 < before.kl and fidelity.kl < 0.3 * before.kl
    assert abs(fidelity.lost) < 0.3 * fidelity.improvement
    assert fidelity.energy < 0.3 * before.energy
    assert np.allclose(fidelity.improvement, value(refined) - value(flow), atol=0.08)


def test_absorb_a_choice_among_several(refined):
    best = ff.BestOf(refined, linear, 4)
    absorbed, fidelity = ff.absorb(
        best, observations, num_samples=8192, num_updates=1500, progress=False, key=jr.key(2)
    )
    assert np.isnan(fidelity.kl) and "-" in str(fidelity).splitlines()[0]
    assert fidelity.improvement > 0.5 and abs(fidelity.lost) < 0.3 * fidelity.improvement
    gain = value(best) - value(refined.flow_policy)
    assert np.allclose(fidelity.improvement, gain, atol=0.08)
    assert np.allclose(value(best) - value(absorbed), fidelity.lost, atol=0.08)


class Linear(eqx.Module):
    """Affine in the noise, whatever the observation."""

    weight: jax.Array
    bias: jax.Array

    def __call__(self, observation, noise):
        return self.weight @ noise + self.bias


def test_distil_an_affine_flow():
    policy = shifted_policy(gaussian(mean, covariance), num_steps=10)
    network = Linear(jnp.eye(2), jnp.zeros(2))
    fitted, fidelity = ff.distill(
        policy, observations, critic=linear, network=network, num_samples=4096,
        num_updates=1500, learning_rate=3e-2, progress=False, key=jr.key(3),
    )  # fmt: skip
    # The steps of the sampler included: the map is exactly affine.
    ends = jax.vmap(lambda z: policy.flow(jnp.zeros(2), z))(
        jnp.concatenate([jnp.zeros((1, 2)), jnp.eye(2)])
    )
    assert np.allclose(fitted.network.bias, ends[0], atol=1e-4)
    assert np.allclose(fitted.network.weight, (ends[1:] - ends[:1]).T, atol=1e-4)
    assert fidelity.distance < 1e-3 and fidelity.energy < 1e-6 and np.isnan(fidelity.kl)
    assert abs(fidelity.lost) < 1e-3
    # The same key draws the same noise, and so the same action.
    key = jr.key(9)
    assert np.allclose(
        fitted.draw(jnp.zeros(2), key=key), policy.draw(jnp.zeros(2), key=key), atol=1e-3
    )


def test_distil_a_refined_policy(refined):
    fitted, fidelity = ff.distill(
        refined, observations, width_size=64, depth=2, num_samples=8192, num_updates=2000,
        progress=False, key=jr.key(3),
    )  # fmt: skip
    assert isinstance(fitted, ff.OneStepPolicy)
    keys = jr.split(jr.key(5), 512)
    x, y = (
        jax.vmap(lambda key, p=policy: p.draw(jnp.zeros(2), key=key))(keys)
        for policy in (refined, fitted)
    )
    distance = np.sqrt(np.mean(np.sum((x - y) ** 2, 1)) / (2 * np.var(x, axis=0).sum()))
    assert np.allclose(fidelity.distance, distance, rtol=0.3) and distance < 0.2
    assert abs(fidelity.lost) < 0.3 * fidelity.improvement


def test_what_is_fitted_has_the_bounds_of_the_policy(monkeypatch):
    for module in "_absorb", "_distill":  # what the fits cost is not asked here
        name = f"fisher_flow._refinement.{module}.measure_fidelity"
        monkeypatch.setattr(name, lambda *args, **options: None)
    bounds = ff.TanhBounds(-0.5, 0.5)
    policy = shifted_policy(gaussian(mean, covariance), bounds=bounds)
    options: dict[str, Any] = dict(
        critic=linear, num_samples=64, num_updates=2, progress=False, key=jr.key(0)
    )
    for fitted in (
        ff.absorb(policy, observations, **options).policy,
        ff.distill(policy, observations, **options).policy,
    ):
        assert fitted.bounds == bounds
        actions = jax.vmap(lambda key, p=fitted: p.sample(jnp.zeros(2), key=key))(
            jr.split(jr.key(0), 64)
        )
        assert np.all(np.abs(actions) <= 0.5)


@pytest.mark.parametrize("bounds", [(-0.5, 0.5), ff.TanhBounds(-0.5, 0.5)])
def test_a_flow_without_the_bounds_is_refused(bounds):
    policy = shifted_policy(gaussian(mean, covariance), bounds=bounds)
    unbounded = ff.FlowPolicy(policy.velocity_field, (2,))
    with pytest.raises(ValueError, match=r"bounds of the policy.*\n?.*Write `flow=.*, bounds="):
        ff.absorb(policy, observations, critic=linear, flow=unbounded, key=jr.key(0))


def test_fidelity_of_large_actions():
    """Beyond 32 entries the density of the fitted policy is estimated from probes."""
    size = 33
    options: dict[str, Any] = dict(solver=diffrax.Heun(), num_steps=20)
    original = gaussian(np.zeros(size), np.eye(size)).policy(**options)
    fitted = gaussian(np.full(size, 0.1), 0.8 * np.eye(size)).policy(**options)
    critic = Critic(np.ones(size), jnp.float64)
    o = jnp.zeros((64, size))
    fidelity = measure_fidelity(
        original, fitted, critic, o, num_observations=64, num_actions=4, key=jr.key(1)
    )
    kl = gaussian_kl(np.zeros(size), np.eye(size), np.full(size, 0.1), 0.8 * np.eye(size))
    assert abs(fidelity.kl - kl) < 5 * fidelity.kl_stderr and fidelity.kl_stderr < 0.2 * kl


@pytest.mark.parametrize("shape", [(), (3, 2)])
def test_any_shape_of_action_and_observation(shape):
    """In float32, with a dictionary for an observation."""
    velocity = lambda t, x, o: (o["goal"].sum() - x) * jnp.ones(shape, x.dtype)
    policy = ff.FlowPolicy(velocity, shape, dtype=jnp.float32)
    o = {"goal": jnp.zeros((16, 2), jnp.float32), "image": jnp.ones((16, 2, 2), jnp.float32)}
    critic = lambda observation, action: jnp.sum(action)
    fitted, fidelity = ff.distill(
        policy, o, critic=critic, width_size=8, depth=1, num_samples=64, num_updates=3,
        progress=False, key=jr.key(0),
    )  # fmt: skip
    action = fitted.sample(jax.tree.map(lambda leaf: leaf[0], o), key=jr.key(1))
    assert action.shape == shape and action.dtype == jnp.float32
    leaves = jax.tree.leaves(eqx.filter(fidelity, eqx.is_inexact_array))
    assert {leaf.dtype for leaf in leaves} == {jnp.dtype(jnp.float32)}


def test_bounds_are_kept():
    policy = shifted_policy(gaussian(mean, covariance), bounds=(-0.5, 0.5))
    fitted = ff.OneStepPolicy(lambda o, z: 10 * z, (2,), bounds=policy.bounds)
    actions = jax.vmap(lambda key: fitted.sample(None, key=key))(jr.split(jr.key(0), 64))
    assert np.all(np.abs(actions) <= 0.5) and np.any(np.abs(actions) == 0.5)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda p: ff.absorb(p, observations, key=jr.key(0)), r"Write `critic=critic`"),
        (
            lambda p: ff.absorb(
                ff.refine(ff.FlowPolicy(lambda t, x, o: -x, (2,)), linear),
                observations,
                key=jr.key(0),
            ),
            r"Write `flow=FlowPolicy\(VelocityMLP\(observation_size, \(2,\)",
        ),
        (lambda p: ff.absorb("policy", observations, key=jr.key(0)), "must be a flow policy"),
        (
            lambda p: ff.distill(
                shifted_policy(correlated()),
                jnp.full((8, 2), jnp.nan),
                critic=linear,
                num_samples=8,
                key=jr.key(0),
            ),
            r"must draw finite actions.*observations=observations\[keep\]",
        ),
        (
            lambda p: ff.distill(
                p, observations, critic=linear, network=lambda o, z: z, key=jr.key(0)
            ),
            "`network` must hold arrays to train",
        ),
        (
            lambda p: ff.distill(p, observations, critic=lambda o, a: a, key=jr.key(0)),
            r"`critic\(observation, action\)` must return a scalar",
        ),
        (
            lambda p: ff.distill(
                p, observations, critic=linear, held_out=jnp.zeros(2), key=jr.key(0)
            ),
            r"`held_out` must be a batch",
        ),
        (
            lambda p: ff.distill(ff.BestOf(p, linear, 2), observations, key=jr.key(0)),
            r"Write `policy=absorb\(policy, observations, key=key\)\.policy`",
        ),
        (
            lambda p: ff.OneStepPolicy(ff.VelocityMLP, (2,)),  # pyright: ignore[reportArgumentType]
            r"Write `OneStepPolicy\(lambda",
        ),
        (
            lambda p: ff.OneStepPolicy(lambda o, z: z[:1], (2,)).sample(None, key=jr.key(0)),
            r"action_shape=\(1,\)",
        ),
    ],
)
def test_messages(call, message):
    with pytest.raises(ValueError, match=message):
        call(correlated().policy())
