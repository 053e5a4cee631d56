from typing import Any

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from helpers import (
    affine_kl,
    bimodal,
    costs,
    dtypes,
    gaussian,
    Mixture,
    random_covariance,
    tree_allclose,
    within,
)

import fisher_flow as ff


score = ff.PerturbedScore(time=0.9)


# The estimates of the score have laws of their own, in `test_score.py`: one of them will do here.
@dtypes
@pytest.mark.parametrize("name", costs)
def test_laws_of_a_cost(name, dtype, getkey):
    cost = costs[name](score)
    policy = bimodal(dtype).policy(num_steps=1)
    displacement = jnp.asarray([0.3, -0.7], dtype)
    key = getkey()

    def evaluate(a):
        of = lambda field: cost.cost(policy, None, a, field, key=key)
        values = dict(
            constant=of(lambda a: displacement),
            zero=of(jnp.zeros_like),
            bent=of(jnp.sin),
            axes=jnp.stack([of(lambda a, e=e: e) for e in jnp.eye(2, dtype=dtype)]),
            mean_eigenvalue=cost.mean_eigenvalue(policy, None, a, key=key),
        )
        if isinstance(cost, ff.AbstractMetric):
            G = cost.operator(policy, None, a, key=key)
            values |= dict(matrix=G.as_matrix(), quadratic=0.5 * displacement @ G.mv(displacement))
        return values

    # The last is far out, where the score is large.
    actions = jnp.stack([*jr.normal(getkey(), (3, 2), dtype), jnp.asarray([4.0, -5.0], dtype)])
    batch = jax.jit(jax.vmap(evaluate))(actions)
    assert {leaf.dtype for leaf in jax.tree.leaves(batch)} == {jnp.dtype(dtype)}
    assert np.all(batch["zero"] == 0)
    # Outside `jit`, and for one action. Rounding is multiplied by up to 1 / σ².
    tol = 1e-9 if dtype == jnp.float64 else 1e-3
    single = cost.cost(policy, None, actions[0], jnp.sin, key=key)
    assert tree_allclose(batch["bent"][0], single, rtol=tol, atol=tol)

    tol = 1e-12 if dtype == jnp.float64 else 1e-5
    largest = 2 * np.max(batch["axes"], axis=1)
    scale = tol * np.maximum(largest, 1)
    assert np.all(np.abs(batch["mean_eigenvalue"] - np.sum(batch["axes"], axis=1)) <= scale)
    if "matrix" in batch:
        G = np.asarray(batch["matrix"])
        largest = np.abs(G).max(axis=(1, 2))
        assert np.all(np.abs(G - G.swapaxes(1, 2)) <= tol * largest[:, None, None])
        assert np.all(np.linalg.eigvalsh(G) >= -tol * largest[:, None])
        # Where two terms of the score cancel, the quadratic form and the square round differently.
        scale = tol * np.maximum(largest, 1)
        assert np.all(np.abs(batch["constant"] - batch["quadratic"]) <= scale)


def test_normalised_metrics_have_trace_one(getkey):
    policy, action = bimodal().policy(num_steps=2), jr.normal(getkey(), (2,))
    for name in "ScoreOuterProduct", "AveragedFisher":
        metric: Any = costs[name](score)
        G = metric.operator(policy, None, action, key=getkey()).as_matrix()
        assert np.allclose(np.trace(G), 1)


def test_score_outer_product_where_the_score_vanishes():
    # At the mode of a Gaussian: the metric is zero there, and so, not NaN, is its gradient.
    policy = gaussian([0.0, 0.0], np.eye(2)).policy()
    metric = ff.ScoreOuterProduct(ff.PerturbedScore(order=1))
    cost = lambda a: metric.cost(policy, None, a, jnp.ones_like, key=jr.key(0))
    value, gradient = jax.value_and_grad(cost)(jnp.zeros(2))
    assert value == 0 and np.all(gradient == 0)


@dtypes
@pytest.mark.parametrize("size", [1, 3])
def test_observed_information_of_a_gaussian_is_its_precision(size, dtype, getkey):
    base = gaussian(np.ones(size), random_covariance(getkey(), size), dtype)
    metric = ff.ObservedInformation(ff.PerturbedScore(time=0.9, order=1), smoothing=0.0)
    action = jr.normal(getkey(), (size,), dtype)
    G = metric.operator(base.policy(), None, action, key=getkey()).as_matrix()
    precision = np.linalg.inv(base.smoothed((0.1 / 0.9) ** 2).covariances[0])
    # Rounding in the Jacobian of the score is multiplied by 1 / σ.
    assert np.allclose(G, precision, rtol=1e-10 if dtype == jnp.float64 else 1e-4, atol=1e-4)


def test_observed_information_can_be_differentiated(getkey):
    # At an isotropic Gaussian all its eigenvalues agree, and it is the same at every action.
    metric = ff.ObservedInformation(ff.PerturbedScore(), smoothing=0.0)
    policy = gaussian(np.zeros(3), 0.5 * np.eye(3)).policy()
    matrix = lambda a: metric.operator(policy, None, a, key=jr.key(0)).as_matrix()
    action = jr.normal(getkey(), (3,))
    first, second = jax.jit(lambda a: (jax.jacfwd(matrix)(a), jax.jacfwd(jax.jacfwd(matrix))(a)))(
        action
    )
    assert np.allclose(first, 0, atol=1e-8) and np.allclose(second, 0, atol=1e-6)
    assert np.allclose(jax.jit(jax.jacrev(matrix))(action), 0, atol=1e-8)


def test_derivative_of_observed_information_matches_finite_differences(getkey):
    metric, policy = ff.ObservedInformation(ff.PerturbedScore()), bimodal().policy()
    action, direction = jr.normal(getkey(), (2, 2))

    def curve(t):
        return metric.operator(policy, None, action + t * direction, key=jr.key(0)).as_matrix()

    derivative, curve = jax.jit(jax.jacfwd(curve)), jax.jit(curve)
    difference = (curve(1e-5) - curve(-1e-5)) / 2e-5
    assert np.allclose(derivative(0.0), difference, rtol=1e-4, atol=1e-4)


def test_averaged_fisher_of_a_gaussian_is_its_precision(getkey):
    base = gaussian([0.5, -0.5], [[0.6, 0.2], [0.2, 0.3]])
    metric = ff.AveragedFisher(
        ff.PerturbedScore(), num_samples=20_000, damping=0.0, normalise=False
    )
    policy = base.policy(num_steps=200)  # Euler's error in the samples: half a per cent
    G = jax.jit(lambda key: metric.operator(policy, None, jnp.zeros(2), key=key).as_matrix())
    precision = np.linalg.inv(base.covariances[0])
    # Of 20,000 samples, each entry has a standard error of at most 1% of the norm.
    assert np.allclose(G(getkey()), precision, rtol=0, atol=0.05 * np.linalg.norm(precision))


def mean_cost(metric, base, displacement, num):
    """Over exact samples, a few thousand at a time."""
    policy = base.policy()
    cost = lambda a: metric.cost(policy, None, a, displacement, key=jr.key(0))
    mean = jax.jit(lambda a: jnp.mean(jax.lax.map(cost, a, batch_size=2000)))
    return float(mean(base.sample(num, jr.key(1))))


@pytest.mark.parametrize("size", [1, 2, 8])
def test_fisher_rao_predicts_the_kl_of_small_maps(size):
    ε = 0.02
    keys = jr.split(jr.key(size), 4)
    base = gaussian(jr.normal(keys[0], (size,)), random_covariance(keys[1], size))
    A = ε * jr.normal(keys[2], (size, size)) / np.sqrt(size)
    b = ε * jr.normal(keys[3], (size,))
    predicted = mean_cost(ff.FisherRao(), base, lambda a: A @ a + b, num=40_000)
    # The cost has a standard deviation of up to four times its mean: 2% for the mean of 40,000.
    assert np.allclose(predicted, affine_kl(base, A, b), rtol=0.05)


@pytest.mark.parametrize("order", [2, 3])
def test_order_of_fisher_rao(order):
    """The error falls by 2 to the power of order + 1 when the displacement is halved."""
    base = Mixture(jnp.asarray([[-1.0], [1.5]]), jnp.asarray([[[0.6]], [[0.9]]]), jnp.ones(2))
    policy, score = base.policy(), ff.PerturbedScore(time=0.999)
    actions = jnp.linspace(-9, 10, 4001)[:, None]  # far into tails that are negligible
    weights = jnp.exp(jax.vmap(base.log_prob)(actions))
    field = lambda a: jnp.sin(a) + 0.5 * a

    @jax.jit
    @jax.vmap
    def error(ε):
        δ = lambda a: ε * field(a)

        def terms(a):
            log_det = jnp.log1p(jax.jacfwd(δ)(a)[0, 0])
            true = base.log_prob(a) - base.log_prob(a + δ(a)) - log_det
            metric = ff.FisherRao(score, order=order)
            return metric.cost(policy, None, a, δ, key=jr.key(0)) - true

        return jnp.abs(jnp.average(jax.vmap(terms)(actions), weights=weights))

    errors = error(jnp.asarray([0.04, 0.02, 0.01]))
    falls = np.log2(errors[:-1] / errors[1:])
    assert np.allclose(falls, order + 1, atol=0.3)


@dtypes
def test_third_order_is_second_order_for_small_displacements(dtype, getkey):
    policy = bimodal(dtype).policy()
    actions = jr.normal(getkey(), (50, 2), dtype)

    @jax.jit
    def mean_costs(ε):
        field = lambda a: ε * jnp.sin(jnp.asarray([[1, 2], [-1, 1]], dtype) @ a)

        def costs(a):
            metrics = [ff.FisherRao(order=order) for order in (2, 3)]
            return [metric.cost(policy, None, a, field, key=jr.key(0)) for metric in metrics]

        return [jnp.mean(x) for x in jax.vmap(costs)(actions)]

    second, third = mean_costs(jnp.asarray(1e-3, dtype))
    assert third.dtype == jnp.dtype(dtype)
    assert np.allclose(second, third, rtol=1e-2, atol=0) and second != third
    assert mean_costs(jnp.asarray(0, dtype))[1] == 0
    assert jax.grad(lambda ε: mean_costs(ε)[1])(jnp.asarray(0, dtype)) == 0


@pytest.mark.parametrize("num_probes, order", [(1, 3), (3, 2)])
def test_probes_are_unbiased(num_probes, order, getkey):
    policy, action = bimodal().policy(), jnp.asarray([0.3, -0.4])
    scale = {2: 1, 3: 0.1}[order]  # that of third order agrees up to the fourth
    field = lambda a: scale * jnp.sin(jnp.asarray([[1.0, 2.0], [-1.0, 0.5]]) @ a)
    exact = ff.FisherRao(order=order).cost(policy, None, action, field, key=getkey())
    metric = ff.FisherRao(num_probes=num_probes, order=order)
    estimate = jax.jit(jax.vmap(lambda key: metric.cost(policy, None, action, field, key=key)))
    assert within(estimate(jr.split(getkey(), 20_000)), exact)
