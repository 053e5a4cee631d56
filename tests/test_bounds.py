import gymnasium
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
import scipy.integrate
import scipy.special
from helpers import bimodal_1d, dtypes, gaussian, tree_allclose

import fisher_flow as ff


@dtypes
def test_unproject_is_the_inverse(dtype, getkey):
    bounds = ff.TanhBounds(low=(-1.0, 0.0), high=(1.0, 4.0))
    u = jr.normal(getkey(), (50, 2), dtype)
    actions = jax.vmap(bounds.project)(u)
    assert actions.dtype == dtype
    inside = np.asarray(actions)
    assert np.all(inside > [-1, 0]) and np.all(inside < [1, 4])
    assert tree_allclose(bounds.unproject(actions), u, rtol=1e-3, atol=1e-4)


def test_actions_at_the_bounds_are_moved_inside():
    bounds = ff.TanhBounds(-2.0, 2.0, margin=1e-3)
    assert np.all(np.isfinite(bounds.unproject(jnp.asarray([-2.0, 2.0]))))
    assert np.allclose(bounds.project(bounds.unproject(jnp.asarray([2.0]))), 2 * (1 - 1e-3))


@dtypes
def test_log_det(dtype, getkey):
    bounds = ff.TanhBounds((-1.0, 0.0, 1.0), (1.0, 4.0, 1.5))
    for scale in (1.0, 4.0):
        u = scale * jr.normal(getkey(), (3,), dtype)
        u64 = np.asarray(u, np.float64)
        half = np.array([1, 2, 0.25])
        expected = np.sum(np.log(half) - 2 * np.log(np.cosh(u64)))
        assert np.allclose(bounds.log_det(u), expected, rtol=1e-4)


def test_the_density_of_the_actions_integrates_to_one():
    bounds = ff.TanhBounds(-1.0, 3.0)
    policy = bimodal_1d().policy(bounds=bounds)

    def density(action):
        u = bounds.unproject(jnp.asarray([action]))
        return float(jnp.exp(policy.log_prob(None, u) - bounds.log_det(u)))

    total, _ = scipy.integrate.quad(density, -1 + 1e-3, 3 - 1e-3, limit=60, epsabs=1e-4)
    # what lies outside the range of the quadrature
    edge = np.arctanh(1 - 0.5e-3)
    tail = sum(
        w * scipy.special.ndtr((s * m - edge) / v**0.5)
        for w, m, v in ((0.4, -1.0, 0.3), (0.6, 1.2, 0.6))
        for s in (-1, 1)
    )
    assert abs(total + tail - 1) < 1e-3


def test_refines_through_the_squashing(getkey):
    base = gaussian([0.3, -0.2], [[0.3, 0.1], [0.1, 0.2]])
    policy = base.policy(bounds=ff.TanhBounds((-1.0, -1.0), (1.0, 1.0)))
    critic = lambda o, a: a[0] - a[1]
    # The same policy without bounds, and the squashing in its critic.
    squashed = lambda o, u: critic(o, jnp.tanh(u))
    score = ff.PerturbedScore(0.95)
    method = ff.NaturalStep(
        ff.ObservedInformation(score), 0.1, num_calibration=256, num_witnesses=0
    )
    observations = jnp.zeros((8, 1))
    one = ff.refine(policy, critic, method, observations=observations)
    other = ff.refine(base.policy(), squashed, method, observations=observations)
    key = getkey()
    a = one.sample(observations[0], key=key)
    assert tree_allclose(a, jnp.tanh(other.sample(observations[0], key=key)), rtol=1e-6)
    assert np.all(np.abs(a) < 1)


def test_the_box_of_an_environment_will_do(getkey):
    box = gymnasium.make("Pendulum-v1").action_space
    policy = gaussian([0.0], [[9.0]]).policy(bounds=box)
    actions = jax.vmap(lambda key: policy.sample(None, key=key))(jr.split(getkey(), 100))
    assert np.max(actions) == 2 and np.min(actions) == -2


@dtypes
def test_a_locked_entry_is_its_constant(dtype, getkey):
    low, high = np.array([-1, 0.3, -np.inf, 0]), np.array([2, 0.3, np.inf, 0])
    box = gymnasium.spaces.Box(low, high, dtype=np.float64)
    for bounds in ((low, high), box):
        policy = ff.FlowPolicy(lambda t, x, o: 5 * x, (4,), bounds=bounds)
        noise = jr.normal(getkey(), (50, 4), dtype)
        actions = np.asarray(jax.vmap(policy.project)(100 * noise))
        assert np.all(actions[:, 1] == dtype(0.3)) and np.all(actions[:, 3] == 0)
        assert actions[:, 0].min() == -1 and actions[:, 0].max() == 2
        assert np.abs(actions[:, 2]).max() > 100 and actions.dtype == dtype
        slope = jax.jacobian(policy.project)(jnp.zeros(4, dtype))
        assert np.diag(slope)[[0, 2]].tolist() == [1, 1] and np.isfinite(slope).all()


@pytest.mark.parametrize(
    "make, message",
    [
        (
            lambda: ff.TanhBounds((-1.0, 0.3), (1.0, 0.3)),
            r"`low` must be below.*constant.*`bounds=\(low, high\)`, which clips",
        ),
        (
            lambda: ff.FlowPolicy(lambda t, x, o: x, (2,), bounds=((1, 0), (0, 0))),
            r"`bounds` must not have `low` above.*`bounds=\(0.0, 1.0\)`",
        ),
        (
            lambda: ff.FlowPolicy(lambda t, x, o: x, (2,), bounds=(np.nan, 1)),
            r"`bounds` must not have `low` above",
        ),
        (lambda: ff.TanhBounds(-np.inf, 1.0), r"must be finite.*`bounds=None`"),
        (lambda: ff.TanhBounds(1.0, -1.0), r"`low` must be below `high`.*TanhBounds\(low, high\)"),
        (lambda: ff.TanhBounds(-1.0, 1.0, margin=0.0), r"`margin` must lie.*`margin=1e-4`"),
        (
            lambda: ff.FlowPolicy(
                lambda t, x, o: x, (2,), bounds=ff.TanhBounds((0, 0, 0), (1, 1, 1))
            ),
            r"`bounds` must be `None`, a `TanhBounds`.*`bounds=\(-1.0, 1.0\)`",
        ),
    ],
)
def test_errors(make, message):
    with pytest.raises(ValueError, match=message):
        make()
