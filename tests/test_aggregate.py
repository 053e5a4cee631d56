import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from helpers import dtypes, gaussian

import fisher_flow as ff


@dtypes
def test_lower_confidence_bound(dtype, getkey):
    values = jr.normal(getkey(), (7,), dtype)
    bound = ff.LowerConfidenceBound(1.5)(values)
    assert bound.dtype == dtype
    assert np.allclose(bound, np.mean(values) - 1.5 * np.std(values), rtol=1e-5)


def test_it_can_be_differentiated_where_all_agree():
    slope = jax.grad(ff.LowerConfidenceBound(1.0))(jnp.full(4, 2.0))
    assert np.allclose(slope, 0.25)


def test_pessimists_of_an_ensemble(getkey):
    a, o = jr.normal(getkey(), (2, 2))
    critics = [lambda o, a: a[0], lambda o, a: a[1] + o[0], lambda o, a: a[0] * a[1]]
    values = np.array([a[0], a[1] + o[0], a[0] * a[1]])
    assert np.allclose(ff.Ensemble(critics)(o, a), values.mean())
    assert np.allclose(ff.Ensemble(critics, jnp.min)(o, a), values.min())
    pessimist = ff.Ensemble(critics, ff.LowerConfidenceBound(2.0))
    assert np.allclose(pessimist(o, a), values.mean() - 2 * values.std())


def test_the_members_of_a_trained_ensemble(getkey):
    pessimist = ff.LowerConfidenceBound(1.0)
    critic = ff.QEnsemble(
        2, 2, num_members=5, width_size=8, depth=1, aggregate=pessimist, key=getkey()
    )
    o, a = jr.normal(getkey(), (2, 2))
    values = np.asarray(critic.values(o, a))
    assert np.allclose(eqx.filter_jit(critic)(o, a), values.mean() - values.std(), rtol=1e-5)


@dtypes
def test_categorical_critic(dtype, getkey):
    logits = jr.normal(getkey(), (11,), dtype)
    critic = ff.CategoricalCritic(lambda o, a: logits + a, (-5.0, 5.0), 11)
    p = np.exp(logits) / np.sum(np.exp(logits))
    mean = critic(None, jnp.zeros((), dtype))
    assert mean.dtype == dtype
    assert np.allclose(mean, p @ np.linspace(-5, 5, 11), rtol=1e-4)


def test_any_of_them_refines():
    policy = gaussian([0.0, 0.0], [[1.0, 0.0], [0.0, 0.5]]).policy()
    atoms = jnp.linspace(-5.0, 5.0, 21)
    distributional = ff.CategoricalCritic(lambda o, a: -((atoms - a[0]) ** 2), (-5.0, 5.0), 21)
    critic = ff.Ensemble([distributional, lambda o, a: a[0] - a[1]], ff.LowerConfidenceBound(0.5))
    refined = ff.refine(policy, critic, ff.NaturalStep(num_auxiliary=16))
    δ = refined.displacement(jnp.zeros(1), jnp.zeros(2))
    assert δ[0] > 0


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: ff.Ensemble([]), r"`critics` must be a sequence.*Ensemble\(\[critic, another\]\)"),
        (lambda: ff.Ensemble(lambda o, a: 0.0), r"`critics` must be a sequence"),  # pyright: ignore
        (lambda: ff.LowerConfidenceBound(-1.0), r"`scale` must be.*`scale=1.0`"),
        (
            lambda: ff.CategoricalCritic(lambda o, a: a, (1.0, -1.0), 3),
            r"`support` must be an increasing.*`support=\(-1.0, 1.0\)`",
        ),
        (
            lambda: ff.CategoricalCritic(lambda o, a: a, (0.0, 1.0), 3)(None, jnp.zeros(4)),
            r"`num_atoms=3` logits.*shape \(4,\).*`num_atoms=4`",
        ),
    ],
)
def test_errors(make, message):
    with pytest.raises(ValueError, match=message):
        make()
