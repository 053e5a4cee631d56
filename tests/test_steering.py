from typing import Any

import diffrax
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from helpers import (
    bimodal,
    bimodal_1d,
    Critic,
    gaussian,
    potentials,
    random_covariance,
    shifted_policy,
    UserPath,
)

import fisher_flow as ff


def steering(radius=0.3, **options):
    settings: Any = dict(num_calibration=256, num_auxiliary=64) | options
    return ff.Steering(radius, **settings)


def drawn(policy, num, key, observation):
    draw = lambda key: policy.draw_and_log_ratio(observation, key=key)
    return jax.jit(jax.vmap(draw))(jr.split(key, num))


def observations(size, dtype=jnp.float64, num=4):
    return jnp.zeros((num, size), dtype)


@pytest.mark.parametrize(
    "path, dtype",
    [(ff.LinearPath(), jnp.float32), (UserPath(), jnp.float64)],
    ids=["linear", "cosine"],
)
def test_a_linear_critic_tilts_a_mixture_exactly(path, dtype, getkey):
    # π* = p exp(k w·a) / Z, of which the log-ratio is known at every single action.
    mixture = bimodal(dtype)
    w = jnp.asarray([1.0, -0.5], dtype)
    policy = mixture.policy(path, solver=diffrax.Heun(), num_steps=64)
    method = steering(0.4, potential=ff.TiltedAction(reach=1e6))
    steered = ff.refine(policy, Critic(w, dtype), method, observations=observations(2, dtype))
    k = steered.strength
    assert k.dtype == dtype
    actions, r = drawn(steered, 200, getkey(), jnp.zeros(2, dtype))
    assert actions.dtype == r.dtype == dtype
    means = mixture.means @ w
    quadratic = 0.5 * jnp.einsum("i,kij,j->k", w, mixture.covariances, w)
    weights = mixture.weights / mixture.weights.sum()
    log_z = jax.scipy.special.logsumexp(k * means + k**2 * quadratic, b=weights)
    expected = k * (actions @ w) - log_z
    # What is left is the error of the steps, and of a steering that stands still before t = 0.02.
    assert np.sqrt(np.mean((r - expected) ** 2)) < 0.02
    kl, stderr = ff.mean_log_ratio(r)
    assert abs(kl - 0.4) < 0.04 + 3 * stderr


@pytest.mark.parametrize(
    "potential",
    [
        ff.TiltedAction(sigma_points=False),
        *(x for x in potentials if not isinstance(x, ff.TimeWeighted)),
    ],
    ids=lambda x: type(x).__name__,
)
def test_every_moment_of_a_gaussian(potential, getkey):
    # N(μ, Σ) and a linear critic: all of these are exact, N(μ + k Σ w, Σ).
    base = gaussian([0.5, -1.0, 0.0], random_covariance(getkey(), 3))
    (covariance,) = base.covariances
    w = jnp.asarray([0.5, -0.3, 0.8])
    policy = base.policy(solver=diffrax.Heun(), num_steps=64)
    critic = Critic(w, jnp.float64)
    method = steering(0.4, potential=potential, num_calibration=4096)
    steered = ff.refine(policy, critic, method, observations=observations(3))
    keys = jr.split(getkey(), 64)
    before = jax.vmap(lambda key: policy.draw(jnp.zeros(3), key=key))(keys)
    after = jax.jit(jax.vmap(lambda key: steered.draw(jnp.zeros(3), key=key)))(keys)
    # From the same noise: every action moves by k Σ w.
    shift = np.asarray(steered.strength * covariance @ w)
    assert np.allclose(after, np.asarray(before) + shift, atol=0.03 * np.abs(shift).max())
    exact = 0.5 * steered.strength**2 * w @ covariance @ w
    assert np.isclose(exact, 0.4, rtol=0.1)
    assert np.isclose(steered.reached.kl, 0.4, rtol=0.02)


@pytest.mark.parametrize("solver", [diffrax.Euler(), diffrax.Heun()], ids=["euler", "heun"])
def test_the_radius_holds_for_ten_steps(solver):
    mixture = bimodal_1d()
    policy = mixture.policy(solver=solver, num_steps=10)
    critic = Critic(jnp.ones(1), jnp.float64, curvature=0.3)
    method = steering(0.3, num_calibration=2048)
    steered = ff.refine(policy, critic, method, observations=observations(1))
    grid, step = jnp.linspace(-6, 6, 2401, retstep=True)

    @jax.jit
    @jax.vmap
    def draws(z):
        p = lambda z: policy.flow(jnp.zeros(1), z[None])[0]
        q = lambda z: steered.flow(jnp.zeros(1), z[None])[0]
        log_z = jax.scipy.stats.norm.logpdf(z)
        density = lambda f: log_z - jnp.log(jax.grad(f)(z))
        return p(z), density(p), q(z), density(q)

    a_p, log_p, a_q, log_q = map(np.asarray, draws(grid))
    assert np.all(np.diff(a_p) > 0) and np.all(np.diff(a_q) > 0)
    inside = (a_q > a_p[0]) & (a_q < a_p[-1])
    weight = np.asarray(jax.scipy.stats.norm.pdf(grid)) * float(step)
    assert weight[inside].sum() > 0.999
    kl = np.sum((weight * (log_q - np.interp(a_q, a_p, log_p)))[inside])
    assert np.isclose(kl, 0.3, rtol=0.05)


def test_a_radius_of_zero_changes_nothing(getkey):
    policy = shifted_policy(bimodal(jnp.float32))
    critic = Critic(jnp.ones(2), jnp.float32)
    keys, rows = jr.split(getkey(), 20), jr.normal(getkey(), (20, 2), jnp.float32)
    sample = lambda policy: jax.vmap(lambda o, key: policy.sample(o, key=key))(rows, keys)
    for o in (None, observations(2, jnp.float32)):
        steered = ff.refine(policy, critic, steering(0.0), observations=o)
        assert np.array_equal(sample(steered), sample(policy))


def test_a_broken_critic_moves_nothing(getkey):
    policy = bimodal().policy()
    critic = lambda o, a: jnp.where(a[0] > 0, jnp.nan, a[0])
    guided = ff.guide(policy, lambda t, x, o: jnp.where(t > 0.5, jnp.nan, 1.0) * x, weight=0.1)
    action, r = drawn(guided, 10, getkey(), None)
    assert np.all(np.isfinite(action)) and np.all(np.isfinite(r))
    everywhere = lambda o, a: jnp.nan * a[0]
    steered = ff.refine(policy, everywhere, steering(), observations=observations(2))
    key = getkey()
    assert np.array_equal(steered.draw(jnp.zeros(2), key=key), policy.draw(None, key=key))
    somewhere = ff.refine(policy, critic, steering(), observations=observations(2))
    actions, r = drawn(somewhere, 100, getkey(), jnp.zeros(2))
    assert np.all(np.isfinite(actions))


def test_the_scale_of_the_critic_does_not_matter(getkey):
    policy, dtype = bimodal().policy(), jnp.float64
    w = jnp.asarray([1.0, 0.5])
    critics = [
        Critic(w, dtype, curvature=0.4),
        Critic(w, dtype, curvature=0.4, scale=1e4, offset=-30.0),
    ]
    one, other = (
        ff.refine(policy, critic, steering(), observations=observations(2)) for critic in critics
    )
    key = getkey()
    assert np.allclose(drawn(one, 10, key, jnp.zeros(2))[0], drawn(other, 10, key, jnp.zeros(2))[0])


def test_every_state_spends_the_radius(getkey):
    # A critic that is three times as steep at the second state.
    policy = bimodal().policy(num_steps=5)
    critic = lambda o, a: o[0] * (a[0] - 0.3 * a[1])
    steered = ff.refine(policy, critic, steering(0.3, num_auxiliary=128))
    strengths = [steered.strength(jnp.asarray([scale])) for scale in (1.0, 3.0)]
    assert np.isclose(strengths[0] / strengths[1], 3.0, rtol=0.3)
    for scale, strength in zip((1.0, 3.0), strengths, strict=True):
        fixed = ff.SteeredPolicy(
            policy,
            critic,
            steered.method,
            type(steered.velocity_field)(policy, steered.velocity_field.guidance, strength),
            steered.log_ratio,
        )
        o = jnp.asarray([scale])
        _, r = drawn(fixed, 500, getkey(), o)
        kl, stderr = ff.mean_log_ratio(r)
        assert abs(kl - 0.3) < 0.06 + 3 * stderr
        key = getkey()
        assert np.allclose(steered.draw(o, key=key), fixed.draw(o, key=key))


@pytest.mark.slow
def test_densities_and_scores_agree(getkey):
    policy = bimodal().policy(solver=diffrax.Heun(), num_steps=64)
    critic = Critic(jnp.asarray([1.0, 0.5]), jnp.float64, curvature=0.5)
    method = steering(0.3, num_calibration=64)
    steered = ff.refine(policy, critic, method, observations=observations(2))
    o, key = jnp.zeros(2), getkey()
    action, r = steered.draw_and_log_ratio(o, key=key)
    assert np.allclose(action, steered.draw(o, key=key))
    assert np.isclose(r, steered.log_prob(o, action) - policy.log_prob(o, action), atol=5e-3)
    step = 1e-3 * jnp.eye(2)
    log_prob = jax.vmap(lambda a: steered.log_prob(o, a))
    numerical = (log_prob(action[None] + step) - log_prob(action[None] - step)) / 2e-3
    score = ff.PerturbedScore(time=0.98)(steered, o, action)
    assert np.allclose(score, numerical, rtol=0.02, atol=0.02)


@pytest.mark.slow
def test_the_best_policy_needs_no_weights(getkey):
    # A linear critic: the steering is the best one, so all weights are alike.
    policy = bimodal().policy(solver=diffrax.Heun(), num_steps=32)
    critic = Critic(jnp.asarray([1.0, 0.5]), jnp.float64)
    good = ff.refine(
        policy,
        critic,
        steering(0.3, potential=ff.TiltedAction(reach=1e6)),
        observations=observations(2),
    )
    rough = ff.refine(
        policy,
        critic,
        steering(2.0, potential=ff.ProjectedAction(jacobian=False)),
        observations=observations(2),
    )
    o = jnp.zeros(2)
    shares = [ff.ExactResample(s, critic).effective_share(o, key=getkey()) for s in (good, rough)]
    assert shares[0] > 0.97 > 0.9 > shares[1] > 0
    chosen = ff.ExactResample(good, critic, n=4)
    _, spent = jax.vmap(lambda key: chosen.draw_and_kl(o, key=key))(jr.split(getkey(), 300))
    stderr = np.std(spent) / np.sqrt(300)
    assert abs(np.mean(spent) - 0.3) < 0.05 + 4 * stderr


def test_weights_take_back_what_was_overshot(getkey):
    # Self-normalised over many actions, the mean is that of π*, whatever the steering.
    mixture = bimodal()
    policy = mixture.policy(solver=diffrax.Heun(), num_steps=32)
    critic = Critic(jnp.asarray([1.0, 0.5]), jnp.float64, curvature=0.5)
    steered = ff.refine(
        policy, critic, steering(0.5, potential=ff.ProjectedAction()), observations=observations(2)
    )
    chosen = ff.ExactResample(steered, critic, inverse_temperature=1.0)
    actions, r = drawn(steered, 4000, getkey(), jnp.zeros(2))
    values = jax.vmap(lambda a: critic(jnp.zeros(2), a))(actions)
    w = np.asarray(jax.nn.softmax(chosen.log_weights(jnp.zeros(2), values, r)))
    exact = mixture.sample(200_000, getkey())
    v = np.asarray(jax.nn.softmax(jax.vmap(lambda a: critic(jnp.zeros(2), a))(exact)))
    assert np.allclose(w @ np.asarray(actions), v @ np.asarray(exact), atol=0.06)


def test_any_field_by_its_radius(getkey):
    policy = bimodal().policy(num_steps=8)
    other = gaussian([1.0, 1.0], 0.5 * np.eye(2)).velocity()
    field = ff.ClassifierFree(other, policy.velocity_field)
    guided = ff.guide(policy, field, radius=0.2, observations=observations(2), num_calibration=512)
    _, r = drawn(guided, 1000, getkey(), jnp.zeros(2))
    kl, stderr = ff.mean_log_ratio(r)
    assert abs(kl - 0.2) < 0.02 + 4 * stderr
    same = ff.guide(policy, field, weight=guided.strength)
    key = getkey()
    assert np.array_equal(same.draw(jnp.zeros(2), key=key), guided.draw(jnp.zeros(2), key=key))
    with pytest.raises(ValueError, match="Write `radius=0.5`"):
        ff.guide(policy, field)


@pytest.mark.slow
def test_a_steered_policy_is_a_flow(getkey, standard_promotion):
    policy = shifted_policy(bimodal(), bounds=(-1.0, 1.0))
    critic = Critic(jnp.ones(2), jnp.float64)
    o = jr.normal(getkey(), (8, 2))
    steered = ff.refine(policy, critic, steering(0.2, num_calibration=64), observations=o)
    samples = jax.vmap(lambda o, key: steered.sample(o, key=key))(o, jr.split(getkey(), 8))
    assert np.all(np.abs(samples) <= 1)
    twice = ff.refine(steered, critic, steering(0.2, num_calibration=64), observations=o)
    assert np.isclose(twice.reached.kl, 0.2, rtol=0.05)
    gradient = jax.grad(lambda x: jnp.sum(steered.velocity(0.5, x, o[0])))(jnp.zeros(2))
    assert np.all(np.isfinite(gradient))
    fitted = ff.distill(
        steered,
        o,
        num_samples=64,
        num_updates=2,
        width_size=8,
        depth=1,
        progress=False,
        key=getkey(),
    )
    assert fitted.policy.action_shape == (2,)
    refined = ff.refine(policy, critic, ff.NaturalStep(num_auxiliary=4))
    with pytest.raises(ValueError, match="absorb"):
        ff.refine(refined, critic, steering())


@pytest.mark.slow
def test_chunks_have_probes(getkey):
    size = (16, 7)
    policy = ff.FlowPolicy(lambda t, x, o: -x * (1 - t), size, num_steps=4)
    critic = lambda o, a: jnp.sum(jnp.sin(a))
    log_ratio = ff.DensityLogRatio(num_probes=1, solver=diffrax.Heun())
    method = steering(0.3, num_calibration=16, log_ratio=log_ratio)
    steered = ff.refine(policy, critic, method, observations=jnp.zeros((4, 1)))
    assert np.isclose(steered.reached.kl, 0.3, rtol=0.02)
    action, r = steered.draw_and_log_ratio(jnp.zeros(1), key=getkey())
    assert action.shape == size and np.isfinite(r)
