"""Where an assumption fails, and what of it is measured. `docs/theory/limits.md` shows the rest."""

from typing import Any

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from helpers import gaussian
from scipy import stats

import fisher_flow as ff


class _Shift(ff.AbstractDisplacement):
    shift: float

    def __call__(self, policy, critic, observation, action):
        return jnp.full_like(action, self.shift)


@pytest.mark.parametrize("shift", [0.3, 1.0])
def test_clipping_spends_less_than_is_measured(shift):
    """Two clipped Gaussians on the line: two atoms and a density between them, by SciPy."""
    policy = gaussian([0.2], [[1.0]]).policy(bounds=(-1.0, 1.0))
    o, a = None, policy.draw(None, key=jr.key(0))
    measured = ff.TransportKL(ff.PerturbedScore(time=0.99))(
        policy, o, a, lambda a: jnp.full_like(a, shift)
    ).kl
    assert np.allclose(measured, 0.5 * shift**2, rtol=1e-3)

    before: Any = stats.norm(0.2)
    after: Any = stats.norm(0.2 + shift)
    atoms = np.array([[p.cdf(-1), p.sf(1)] for p in (before, after)])
    x = np.linspace(-1, 1, 20_001)
    between = np.trapezoid(after.pdf(x) * (after.logpdf(x) - before.logpdf(x)), x)
    executed = between + np.sum(atoms[1] * np.log(atoms[1] / atoms[0]))
    assert executed < 0.95 * measured

    # And the atoms are those of the samples.
    refined = ff.RefinedPolicy(policy, lambda o, a: jnp.sum(a), _Shift(shift), ff.NaturalStep())
    actions = jax.vmap(lambda key: refined.sample(o, key=key))(jr.split(jr.key(1), 4000))
    share = np.mean(np.asarray(actions) == 1.0)
    assert np.allclose(share, atoms[1, 1], atol=5 * np.sqrt(0.25 / 4000))


@pytest.mark.parametrize("size", [1, 5, 21])
def test_scaling_of_a_gaussian(size):
    """Where the divergence counts most: its closed form, and the paper's cost at (d + 2) / 2."""
    policy, score = gaussian(np.zeros(size), np.eye(size)).policy(), ff.PerturbedScore(time=0.99)
    actions = jr.normal(jr.key(0), (20_000, size))
    ε = np.sqrt(0.01 / size)
    true = size * (ε + 0.5 * ε**2 - np.log1p(ε))
    field = lambda a: ε * a

    def costs(a):
        fisher_rao = ff.FisherRao(score).cost(policy, None, a, field, key=jr.key(0))
        paper = ff.ScoreOuterProduct(score, normalise=False).cost(
            policy, None, a, field, key=jr.key(0)
        )
        return ff.TransportKL(score)(policy, None, a, field).kl, fisher_rao, paper

    kl, fisher_rao, paper = (np.mean(x) for x in jax.jit(jax.vmap(costs))(actions))
    # TransportKL is exact at every action; the others within the noise of a chi-squared, and
    # `FisherRao` up to its third order, of a share of ε / 3.
    assert np.allclose(kl, true, rtol=1e-2)
    assert np.allclose(fisher_rao / true, 1 + ε / 3, rtol=0.03)
    assert np.allclose(paper / true, (size + 2) / 2, rtol=0.1)


@pytest.mark.parametrize("sign", [1, -1], ids=["spread", "contract"])
@pytest.mark.parametrize("size", [1, 2])
def test_third_order_predicts_a_tenth_of_a_nat(size, sign):
    """Of a Gaussian that is scaled, where the second order is up to 10% off."""
    policy, score = gaussian(np.zeros(size), np.eye(size)).policy(), ff.PerturbedScore(time=0.99)
    ε = sign * np.sqrt(0.1 / size)
    true = size * (ε + 0.5 * ε**2 - np.log1p(ε))
    nodes, weights = np.polynomial.hermite_e.hermegauss(60)
    grids = np.meshgrid(*[nodes] * size)
    actions = jnp.asarray(np.stack(grids, axis=-1).reshape(-1, size))
    weights = np.prod(np.stack(np.meshgrid(*[weights] * size)), axis=0).reshape(-1)

    def predicted(order):
        metric = ff.FisherRao(score, order=order)
        cost = lambda a: metric.cost(policy, None, a, lambda a: ε * a, key=jr.key(0))
        return np.average(jax.jit(jax.vmap(cost))(actions), weights=weights)

    assert np.allclose(predicted(3), true, rtol=0.02)
    assert abs(predicted(2) / true - 1) > 0.05
