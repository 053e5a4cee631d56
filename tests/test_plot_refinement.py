from typing import Any

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from helpers import correlated, Critic, gaussian, shifted_policy
from matplotlib.collections import QuadMesh
from matplotlib.patches import Ellipse
from matplotlib.quiver import Quiver

import fisher_flow as ff


o = jnp.asarray([0.3, 0.1])
covariance = np.asarray(correlated().covariances[0])


@pytest.fixture(scope="module")
def drawn():
    policy = shifted_policy(gaussian(correlated().means[0], covariance), num_steps=20)
    method = ff.NaturalStep(
        ff.ObservedInformation(ff.PerturbedScore(time=0.99), smoothing=0.0),
        0.2,
        damping=0.1,
        num_witnesses=0,
    )
    critic = Critic([0.8, -0.5], jnp.float64)
    observations = jr.normal(jr.key(0), (64, 2))
    refined = ff.refine(policy, critic, method, observations=observations)
    options: dict[str, Any] = dict(
        metric=method.metric, resolution=30, num_ellipses=3, key=jr.key(1)
    )
    return refined, ff.plot_refinement(refined, o, **options)


def of_kind(axes, kind):
    return [x for x in (*axes.collections, *axes.patches) if isinstance(x, kind)]


def test_arrows_are_displacements(drawn):
    refined, figure = drawn
    (quiver,) = of_kind(figure.axes[0], Quiver)
    starts = jnp.asarray(np.stack([quiver.X, quiver.Y], axis=1))
    ends = jax.vmap(lambda a: refined.transport(o, a))(starts)
    assert np.allclose(np.stack([quiver.U, quiver.V], axis=1), ends - starts, atol=1e-8)
    assert len(starts) == 150


@pytest.mark.parametrize("panel", [0, 1])
def test_densities_hold_all_the_mass(panel, drawn):
    _, figure = drawn
    (mesh,) = of_kind(figure.axes[panel], QuadMesh)
    points = np.asarray(mesh.get_coordinates())
    density = np.asarray(mesh.get_array()).reshape(46, 46)
    edges = points[1:, 1:] - points[:-1, :-1], points[1:, :-1] - points[:-1, 1:]
    areas = 0.5 * np.abs(edges[0][..., 0] * edges[1][..., 1] - edges[0][..., 1] * edges[1][..., 0])
    centre = 0.25 * (density[1:, 1:] + density[1:, :-1] + density[:-1, 1:] + density[:-1, :-1])
    assert np.allclose(np.sum(areas * centre), 1, atol=0.03)


def test_ellipses_have_the_axes_of_the_covariance(drawn):
    # The metric is the inverse covariance, with the damping that the step has settled.
    refined, figure = drawn
    ellipses = of_kind(figure.axes[0], Ellipse)
    precision = np.linalg.inv(covariance)
    w, V = np.linalg.eigh(precision + float(refined.displacement_field.damping) * np.eye(2))
    assert len(ellipses) == 3
    for ellipse in ellipses:
        assert np.allclose(ellipse.width / ellipse.height, np.sqrt(w[1] / w[0]), rtol=0.02)
        angle = np.degrees(np.arctan2(V[1, 0], V[0, 0]))
        assert np.isclose((ellipse.angle - angle + 90) % 180 - 90, 0, atol=1)


def test_renders(drawn, tmp_path):
    drawn[1].savefig(tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 20_000


def test_other_sizes_are_refused():
    policy = ff.FlowPolicy(lambda t, x, o: -x, (3,))
    refined = ff.refine(policy, lambda o, a: jnp.sum(a))
    with pytest.raises(ValueError, match=r"two entries.*certify\(policy, critic"):
        ff.plot_refinement(refined, o)


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(limits=(1.0, -1.0, 0.0, 1.0)), r"Write `limits=\(-1\.0, 1\.0, -1\.0, 1\.0\)`"),
        (dict(num_ellipses=0), "`num_ellipses` must be an integer of at least 1"),
    ],
)
def test_messages(options, message, drawn):
    with pytest.raises(ValueError, match=message):
        ff.plot_refinement(drawn[0], o, **options)
