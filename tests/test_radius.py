"""The search for the length of a step, on laws that are known."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fisher_flow.refinement._radius import scale_to_radius


def kl(scale):
    return (0.3 + scale) ** 2  # 0.09 is spent at a scale of zero


@pytest.mark.parametrize("folded", [0.0, 0.002])
def test_folds_of_earlier_maps_do_not_bind(folded):
    """They are there at a scale of zero."""
    measure = lambda scale: (kl(scale), jnp.where(scale > 0.8, 1.0, folded))
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


def test_the_first_map_is_allowed_its_share_only():
    measure = lambda scale: (scale**2, jnp.where(scale > 0.2, 0.002, 0.0))
    scale, _ = scale_to_radius(measure, 1.0, jnp.asarray(1.0), max_folded=0.001)
    assert np.allclose(scale, 0.2, rtol=0.01) and scale <= 0.2
