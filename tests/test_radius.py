"""The search for the length of a step, on laws that are known."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fisher_flow as ff
from fisher_flow._refinement._radius import scale_to_radius, scaled


def kl(scale):
    return (0.3 + scale) ** 2  # 0.09 is spent at a scale of zero


@pytest.mark.parametrize("folded", [0.0, 0.002])
def test_folds_of_earlier_maps_do_not_bind(folded):
    """They are there at a scale of zero."""
    measure = lambda scale: (kl(scale), jnp.asarray(jnp.where(scale > 0.8, 1.0, folded)))
    settle = jax.jit(lambda initial: scale_to_radius(
        measure, 1.0, initial, max_folded=0.001, after_others=True
    ))  # fmt: skip
    for initial in (0.01, 0.7, 40.0):
        scale, measured = settle(jnp.asarray(initial))
        assert np.allclose(measured, 1.0, rtol=0.01) and measured <= 1
        assert np.allclose(scale, 0.7, rtol=0.01)


def test_further_folds_bind():
    measure = lambda scale: (kl(scale), 0.002 + jnp.where(scale > 0.4, 0.001, 0.0))
    scale, _ = scale_to_radius(
        measure, 1.0, jnp.asarray(0.1), max_folded=0.001, after_others=True
    )  # fmt: skip
    assert np.allclose(scale, 0.4, rtol=0.01) and scale <= 0.4


@pytest.mark.parametrize("radius, nothing", [(0.01, 0.0), (1.0, jnp.nan)])
def test_what_is_spent_or_not_finite_leaves_no_length(radius, nothing):
    # A radius below what has been spent, or a KL that is unknown even with no step.
    measure = lambda scale: (kl(scale) + nothing, jnp.zeros(()))
    scale, measured = scale_to_radius(
        measure, radius, jnp.asarray(0.1), max_folded=0.0, after_others=True
    )
    assert scale == 0 and measured == 0


@pytest.mark.parametrize("initial", [1e-4, 1e-2, 1.0])
def test_what_is_left_of_a_radius_is_found(initial):
    measure = lambda scale: ((0.95 + scale) ** 2, jnp.zeros(()))
    scale, measured = scale_to_radius(
        measure, 1.0, jnp.asarray(initial), max_folded=0.0, after_others=True
    )
    assert measured >= 0.99 and np.allclose(scale, 0.05, rtol=0.11)


def test_a_displacement_that_is_not_finite_is_no_fold_of_earlier_maps():
    policy = ff.FlowPolicy(lambda t, x, o: (2 * t - 1) / (t**2 + (1 - t) ** 2) * x, (1,))
    a = jnp.linspace(-1.0, 1.0, 10)[:, None]
    δ = jnp.where(jnp.arange(10)[:, None] < 3, jnp.inf, 1.0)

    def measure(scale):
        terms = jax.vmap(lambda a, δ: ff.TransportKL().terms(policy, None, a, δ, jnp.zeros((1, 1))))
        kl, folded, _ = terms(a, scaled(scale, δ))
        return jnp.mean(kl), jnp.mean(folded)

    scale, _ = scale_to_radius(
        measure, 1.0, jnp.asarray(0.5), max_folded=0.01, after_others=True
    )  # fmt: skip
    assert scale == 0


def test_the_first_map_is_allowed_its_share_only():
    measure = lambda scale: (scale**2, jnp.where(scale > 0.2, 0.002, 0.0))
    scale, _ = scale_to_radius(measure, 1.0, jnp.asarray(1.0), max_folded=0.001)
    assert np.allclose(scale, 0.2, rtol=0.01) and scale <= 0.2
