from typing import Any

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from helpers import bimodal_1d, Critic, natural_step, shifted_policy, within

import fisher_flow as ff


class _Nowhere(ff.AbstractDisplacement):
    """Folds the line at zero: a ↦ 1 + a², so that nothing is mapped to zero."""

    def __call__(self, policy, critic, observation, action):
        return 1 + action**2 - action


o = jnp.full(1, 0.2)
grid, step = jnp.linspace(-4, 5.5, 401, retstep=True)  # beyond it there is a mass of 1e-6
radius = 0.1


def chain(dtype, length):
    """A mixture on the line, refined `length` times by one critic."""
    options = dict(solver=diffrax.Heun(), num_steps=50)
    policy = shifted_policy(bimodal_1d(dtype), **options)
    critic = Critic([1.0], dtype, curvature=0.4)
    observations = jnp.full((64, 1), 0.2, dtype)
    # Damped until the map is one-to-one on the whole of the grid, and smooth enough for quadrature.
    method = natural_step(dtype, radius=radius, damping=4.0, smoothing=1.0)
    policies: list[Any] = [policy]
    for i in range(length):
        refined = ff.refine(policies[-1], critic, method, observations=observations, key=jr.key(i))
        policies.append(refined)
    return policies


@pytest.fixture(scope="module")
def policies():
    return chain(jnp.float64, 2)


@eqx.filter_jit
def log_density(policy, points):
    return jax.vmap(lambda a: policy.log_prob(o, a[None]))(points)


@pytest.fixture(scope="module")
def log_probs(policies):
    return [log_density(policy, grid) for policy in policies]


def test_densities_integrate_to_one(log_probs):
    for log_p in log_probs:
        assert np.allclose(jnp.exp(log_p).sum() * step, 1, rtol=1e-4)


def test_each_step_spends_the_radius(log_probs):
    # Measured independently: by quadrature of the two densities.
    for before, after in zip(log_probs[:-1], log_probs[1:], strict=True):
        kl = jnp.sum(jnp.exp(after) * (after - before)) * step
        # The length was calibrated on 16384 actions.
        assert np.allclose(kl, radius, rtol=0.1)


def test_densities_are_those_of_the_samples(policies, log_probs, getkey):
    draw = eqx.filter_jit(lambda policy, keys: jax.vmap(lambda k: policy.draw(o, key=k))(keys))
    for policy, log_p in zip(policies, log_probs, strict=True):
        samples = draw(policy, jr.split(getkey(), 5000))
        for moment in 1, 2, 3:
            expected = jnp.sum(jnp.exp(log_p) * grid**moment) * step
            assert within(samples**moment, expected)


@pytest.mark.parametrize("length", [1, 2])
def test_inverse_undoes_transport(length, policies, getkey):
    refined, actions = policies[length], 2 * jr.normal(getkey(), (50, 1))
    there = jax.vmap(lambda a: refined.transport(o, a))(actions)
    back = jax.vmap(lambda a: refined.inverse(o, a))(there)
    assert np.all(there != actions)
    assert np.allclose(back, actions, atol=1e-7)


def test_where_there_is_no_inverse_there_is_no_density():
    policy = shifted_policy(bimodal_1d())
    critic = Critic([1.0], jnp.float64)
    field = _Nowhere()
    refined = ff.RefinedPolicy(policy, critic, field, natural_step(jnp.float64))
    action = jnp.zeros(1)
    assert np.isnan(refined.inverse(o, action)).all()
    with pytest.raises(Exception, match="folds near `action`.*lower `radius`"):
        refined.inverse(o, action, throw=True)
    assert np.isnan(refined.log_prob(o, action))
    assert np.isnan(ff.PerturbedScore()(refined, o, action)).all()


class _Backwards(ff.AbstractDisplacement):
    """a ↦ -2 a, which turns the line around."""

    def __call__(self, policy, critic, observation, action):
        return -3 * action


def test_a_preimage_in_a_fold_is_no_inverse():
    method = natural_step(jnp.float64)
    refined = ff.RefinedPolicy(
        shifted_policy(bimodal_1d()), Critic([1.0], jnp.float64), _Backwards(), method
    )
    assert np.isnan(refined.inverse(o, jnp.ones(1))).all()


def test_score_is_the_derivative_of_the_log_density(policies):
    score = ff.PerturbedScore(time=0.99)  # a bias of r⁴ = 1e-8, times curvatures
    points, h = jnp.linspace(-2, 3, 80), 0.005
    scores = jax.jit(jax.vmap(lambda a: score(policies[2], o, a)))(points[:, None])
    # By differences: to the fourth order in h, and as many points as the grid has.
    around = jnp.concatenate([points + i * h for i in (-2, -1, 1, 2)])
    log_p = log_density(policies[2], jnp.resize(around, grid.shape))
    far_left, left, right, far_right = log_p[: around.size].reshape(4, -1)
    derivatives = (8 * (right - left) - (far_right - far_left)) / (12 * h)
    # `log_prob` is integrated with a tolerance of 1e-7 a step.
    assert np.allclose(scores[:, 0], derivatives, rtol=1e-3, atol=1e-3)


def test_drawn_with_its_log_density(policies):
    policy, key = policies[2], jr.key(3)
    action, log_p = policy.draw_and_log_prob(o, key=key)
    assert np.allclose(action, policy.draw(o, key=key), rtol=1e-12)
    assert np.allclose(log_p, policy.log_prob(o, action), atol=1e-6)  # that one by inverting
    # On the line a probe of random signs is exact.
    _, probed = policy.draw_and_log_prob(o, key=key, num_probes=1)
    assert np.allclose(log_p, probed, atol=1e-6)


@pytest.mark.parametrize("known", [True, False])
def test_kl_from_the_flow(known, policies, log_probs):
    """Of the second map after the first, from the flow on: by quadrature of their densities."""
    _, before, after = policies
    measure = ff.TransportKL(ff.PerturbedScore(time=0.99), whole_chain=True)

    def terms(key):
        b = before.flow_policy.draw(o, key=key)
        a = before.from_flow(o, b)
        δ, J = measure.linearise(before, lambda a: after.displacement(o, a), a)
        return measure.terms(before, o, a, δ, J, b if known else None)

    kls = eqx.filter_jit(lambda keys: jax.lax.map(terms, keys))(jr.split(jr.key(4), 2048)).kl
    kl = jnp.sum(jnp.exp(log_probs[2]) * (log_probs[2] - log_probs[0])) * step
    assert kl > 1.5 * radius and within(kls, kl)


def test_certificate_of_a_chain(policies, log_probs):
    refined = policies[-1]
    report = ff.certify(
        refined, refined.critic, o[None], num_actions=2048, num_witnesses=0, key=jr.key(9)
    )
    assert np.allclose(report.kl, radius, rtol=0.1) and report.folded <= 0.02
    assert np.abs(report.stein) < 5 * report.stein_stderr
    # And its totals are those of the whole, here by quadrature.
    first, *_, last = log_probs
    kl = jnp.sum(jnp.exp(last) * (last - first)) * step
    assert np.abs(report.total_kl - kl) <= 5 * report.total_kl_stderr
    values = jax.vmap(lambda a: refined.critic(o, a[None]))(grid)
    gain = jnp.sum((jnp.exp(last) - jnp.exp(first)) * values) * step
    assert np.abs(report.total_improvement - gain) <= 5 * report.total_improvement_stderr


def test_float32_is_kept(getkey):
    dtype = jnp.float32  # with 64-bit floats enabled the harder one to preserve
    refined = chain(dtype, 1)[1]
    action = jnp.full(1, 0.3, dtype)
    observation = jnp.full(1, 0.2, dtype)
    results = (
        refined.sample(observation, key=getkey()),
        refined.displacement(observation, action),
        refined.transport(observation, action),
        refined.inverse(observation, action),
        refined.log_prob(observation, action),
        ff.PerturbedScore()(refined, observation, action),
    )
    assert {x.dtype for x in results} == {jnp.dtype(dtype)}
    assert all(np.all(np.isfinite(x)) for x in results)


def test_flow_underneath(policies):
    assert all(eqx.tree_equal(policy.flow_policy, policies[0]) for policy in policies)
