import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from helpers import affine_kl, correlated, Critic, gaussian, shifted_policy

import fisher_flow as ff


g = np.array([0.8, -0.5])
covariance = np.asarray(correlated().covariances[0])
observations = jr.normal(jr.key(0), (256, 2))


def chain(critic, dtype=jnp.float64, *, radius=0.4, num_steps=2, **options):
    policy = shifted_policy(gaussian(correlated().means[0], covariance, dtype))
    metric = ff.ObservedInformation(ff.PerturbedScore(time=0.95), smoothing=jnp.asarray(0.0, dtype))
    method = ff.NaturalStep(
        metric, jnp.asarray(radius, dtype), damping=jnp.asarray(1e-6, dtype), num_witnesses=0
    )
    return policy, ff.refine_chain(
        policy,
        critic,
        method,
        num_steps=num_steps,
        observations=observations.astype(dtype),
        key=jr.key(1),
        **options,
    )


@pytest.fixture(scope="module")
def translated():
    """A linear critic moves a Gaussian along one line."""
    return chain(Critic(g, jnp.float64))


def test_kls_along_a_line(translated):
    _, result = translated
    assert result.rejected is None
    for i, report in enumerate(result.certificates, start=1):
        # Distances add up, and a KL is the square of one.
        kl = 0.4 * (i / 2) ** 2
        assert np.allclose([report.radius, report.kl, report.total_kl], kl, rtol=0.011)
        # The best of all translations at this KL gains sqrt(2 KL gᵀ Σ g).
        gain = np.sqrt(2 * kl * g @ covariance @ g)
        assert np.allclose(report.total_improvement, gain, rtol=0.006)
    gains = [report.improvement for report in result.certificates]
    assert np.allclose(sum(gains), result.certificates[-1].total_improvement, rtol=1e-6)


def test_true_kl_of_the_whole(translated, getkey):
    policy, result = translated
    o = jnp.asarray([0.4, -1.0])
    b = policy.draw(o, key=getkey())
    moved = result.policy.from_flow(o, b) - b
    kl = affine_kl(gaussian(correlated().means[0], covariance), np.zeros((2, 2)), np.asarray(moved))
    assert np.allclose(kl, 0.4, rtol=0.011)


def test_prints_and_plots(translated):
    _, result = translated
    lines = str(result).splitlines()
    assert len(lines) == 3 and "0.39" in lines[2]
    (axes,) = result.plot().axes
    assert np.allclose(axes.lines[0].get_xdata(), [0, 0.1, 0.4], rtol=0.02)
    assert np.allclose(axes.lines[0].get_ydata()[2], result.certificates[1].total_improvement)


def test_ends_where_the_gain_is_gone():
    # The best action lies within the first of four steps: the others can only overshoot it.
    _, result = chain(Critic([0.3, 0.0], jnp.float64, curvature=1.0), radius=40.0, num_steps=4)
    assert result.rejected is not None
    taken = result.certificates
    assert len(taken) < 4 and all(x.improvement > 2 * x.improvement_stderr for x in taken)
    assert not result.rejected.improvement > 2 * result.rejected.improvement_stderr
    assert "rejected" in str(result)
    # The policy is that of the last step which was taken.
    depth, policy = 0, result.policy
    while isinstance(policy, ff.RefinedPolicy):
        depth, policy = depth + 1, policy.policy
    assert depth == len(taken)
    result.plot()


def test_a_critic_with_nothing_to_say_leaves_the_policy():
    policy, result = chain(Critic([0.0, 0.0], jnp.float64))
    assert result.policy is policy and result.certificates == ()
    assert result.rejected is not None and result.rejected.improvement == 0


def test_same_key_same_chain(translated):
    _, result = translated
    _, again = chain(Critic(g, jnp.float64))
    assert jax.tree.structure(result) == jax.tree.structure(again)
    for one, other in zip(jax.tree.leaves(result), jax.tree.leaves(again), strict=True):
        assert np.array_equal(one, other, equal_nan=True)  # NaN: densities were not measured


def test_dtype():
    """Of a single step, as the others are compiled alike."""
    _, result = chain(Critic(g, jnp.float32), jnp.float32, num_steps=1)
    action = result.policy.sample(jnp.zeros(2, jnp.float32), key=jr.key(2))
    assert action.dtype == jnp.float32 and np.all(np.isfinite(action))


def test_follows_a_critic_that_bends():
    """Where one step leaves along a tangent, several follow the curve: more gain at one KL."""
    critic = Critic([0.0, 0.0], jnp.float64, waves=1.0)
    _, single = chain(critic, radius=0.5, num_steps=1)
    _, several = chain(critic, radius=0.5, num_steps=2)
    (single,), (_, last) = single.certificates, several.certificates
    assert last.total_kl < single.kl + 3 * (last.total_kl_stderr + single.kl_stderr)
    more = last.total_improvement - single.improvement
    assert more > 3 * jnp.hypot(last.total_improvement_stderr, single.improvement_stderr)
    assert last.folded <= 0.001


def test_goes_on_from_what_a_policy_has_spent(translated, monkeypatch):
    _, first = translated
    critic = Critic(g, jnp.float64)
    metric = ff.ObservedInformation(ff.PerturbedScore(time=0.95), smoothing=jnp.asarray(0.0))
    make = lambda radius: ff.NaturalStep(metric, jnp.asarray(radius), damping=jnp.asarray(1e-6))
    once = first.policy.policy  # after the first of two steps, which has spent 0.1
    # Of the second step what it is asked for is enough: the first is taken in its place.
    asked, refined = [], []

    def refine(policy, critic, method, **options):
        asked.append(method.radius)
        refined.append(ff.refine(policy, critic, method, **options) if not refined else refined[0])
        return refined[0]

    monkeypatch.setattr("fisher_flow._refinement._chain.refine", refine)
    result = ff.refine_chain(once, critic, make(0.4), num_steps=2, observations=observations)
    assert result.start is not None
    spent = result.start.total_kl
    assert np.allclose(spent, 0.1, rtol=0.02)
    # Equal distances: the roots of the KLs rise to that of 0.4 in equal steps.
    roots = np.sqrt(spent) + np.array([0.5, 1.0]) * (np.sqrt(0.4) - np.sqrt(spent))
    assert np.allclose(asked, roots**2)
    assert np.allclose(result.certificates[0].kl, asked[0], rtol=0.02)
    assert "start" in str(result) and np.size(result.plot().axes[0].lines[0].get_xdata()) == 4
    with pytest.raises(ValueError, match=r"its flow, 0\.(1|09\d*) nats.*NaturalStep\(radius=0\.15"):
        ff.refine_chain(once, critic, make(0.05), observations=observations)


def test_held_out_is_checked_before_the_first_step():
    policy = shifted_policy(correlated())
    with pytest.raises(ValueError, match=r"`held_out` must be a batch.*held_out=jax\.tree\.map"):
        ff.refine_chain(
            policy, Critic(g, jnp.float64), observations=observations, held_out=jnp.zeros((8, 3))
        )
