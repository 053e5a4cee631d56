from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from helpers import dtypes

import fisher_flow as ff


@dtypes
def test_ensemble(dtype, getkey):
    observation = dict(x=jnp.ones(2, dtype), y=jnp.ones((), dtype))
    action, key = jr.normal(getkey(), (2, 2), dtype), getkey()
    options: dict[str, Any] = dict(num_members=3, width_size=8, depth=1, dtype=dtype, key=key)
    mean, minimum = (
        ff.QEnsemble(3, 4, aggregate=aggregate, **options) for aggregate in (jnp.mean, jnp.min)
    )
    values = mean.values(observation, action)
    assert values.shape == (3,) and values.dtype == dtype
    assert len(set(values.tolist())) == 3, "members start from different parameters"
    assert np.allclose(mean(observation, action), np.mean(values), rtol=1e-6)
    assert minimum(observation, action) == np.min(values)


@pytest.fixture(scope="module")
def fit(standard_promotion):
    """Three states. The first pays 1 and leads to the second, which pays 4 and ends the episode;
    the third pays ½ for ever."""
    states = jnp.eye(3, dtype=jnp.float32)
    data = dict(
        observations=states,
        actions=jnp.zeros((3, 1), jnp.float32),
        rewards=jnp.asarray([1.0, 4.0, 0.5], jnp.float32),
        next_observations=states[jnp.asarray([1, 0, 2])],
        next_actions=jnp.zeros((3, 1), jnp.float32),
        masks=jnp.asarray([1.0, 0.0, 1.0], jnp.float32),
    )
    critic = ff.QEnsemble(3, 1, width_size=16, depth=1, dtype=jnp.float32, key=jr.key(0))

    def fit(key):
        fitted = ff.fit_critic(
            critic, **data, discount=0.5, target_rate=0.1, num_updates=1000, batch_size=16,
            learning_rate=3e-3, progress=False, key=key,
        )  # fmt: skip
        return fitted, jax.vmap(fitted)(states, data["actions"])

    return fit


def test_values_of_a_small_decision_process(fit, capfd):
    critic, values = fit(jr.key(1))
    # Q₁ = 1 + ½ Q₂, Q₂ = 4, Q₃ = ½ + ½ Q₃; Adam at a constant rate leaves a per cent or two.
    assert values.dtype == jnp.float32
    assert np.allclose(values, [3, 4, 1], rtol=0.05)
    assert eqx.tree_equal(fit(jr.key(1))[0], critic), "the same key gives the same critic"
    assert capfd.readouterr() == ("", ""), "`progress=False` is silent"


def test_other_numbers_do_not_compile_anew(standard_promotion):
    traces = []

    def counted(values):
        traces.append(None)
        return jnp.mean(values)

    o, a, r = jnp.ones((4, 3), jnp.float32), jnp.ones((4, 1), jnp.float32), jnp.ones(4, jnp.float32)
    critic = ff.QEnsemble(
        3, 1, width_size=4, depth=1, aggregate=counted, dtype=jnp.float32, key=jr.key(0)
    )

    def fit(**numbers: Any):
        options: dict[str, Any] = dict(num_updates=2, batch_size=2, progress=False, key=jr.key(0))
        return ff.fit_critic(critic, o, a, r, o, a, r, **numbers, **options)

    fit(discount=0.9, target_rate=0.1, learning_rate=1e-2)
    before = len(traces)
    fit(discount=0.8, target_rate=0.2, learning_rate=1e-3)
    assert 0 < before == len(traces)


@pytest.mark.parametrize("name", ["discount", "target_rate", "learning_rate"])
def test_numbers_are_checked(name):
    critic = ff.QEnsemble(1, 1, width_size=4, depth=1, key=jr.key(0))
    rows, column = jnp.ones((2, 1)), jnp.ones(2)
    options: dict[str, Any] = {name: -0.5}
    with pytest.raises(ValueError, match=f"`{name}` must be .*-0.5.*`{name}=0"):
        ff.fit_critic(critic, rows, rows, column, rows, rows, column, **options, key=jr.key(0))
