from collections.abc import Callable

import equinox as eqx
import helpers
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

import fisher_flow as ff


paths = [path for path in helpers.paths if not isinstance(path, helpers.UserPath)]
kinds = [None, *helpers.predictions]
everything = [(path, kind, reverse) for path in paths for kind in kinds for reverse in (0, 1)]

mean, variance = np.array([0.5, -1.0]), np.array([0.2, 1.5])
actions = jnp.asarray(mean + np.sqrt(variance) * np.asarray(jr.normal(jr.key(0), (512, 2))))


class Network(eqx.Module):
    """What a network trained on a Gaussian gives, in each of the ways to train one.

    The choices are numbers, so that all of them share one compilation.
    """

    path: jax.Array
    kind: jax.Array
    reverse: jax.Array

    def __call__(self, t, x, observation):
        t = jnp.where(self.reverse, 1 - t, t)
        schedule = [lambda t, path=path: jnp.stack(path.schedule(t)) for path in paths]
        α, σ, α_dot, σ_dot = jax.lax.switch(self.path, schedule, t)
        s = -(x - α * mean) / (α**2 * variance + σ**2)
        noise, data = -σ * s, (x + σ**2 * s) / α
        velocity = (α_dot * data + σ_dot * noise) * jnp.where(self.reverse, -1.0, 1.0)
        output = {
            None: velocity,
            ff.NoisePrediction: noise,
            ff.DataPrediction: data,
            ff.VPrediction: α * noise - σ * data,
            ff.ScorePrediction: s,
        }
        return jnp.stack([output[kind] for kind in kinds])[self.kind]


def trained(path, kind, reverse):
    numbers = paths.index(path), kinds.index(kind), reverse
    return Network(*(jnp.asarray(number) for number in numbers))


def policy_of(network, path, kind, reverse):
    if kind is None:
        field = ff.ReversedVelocity(network) if reverse else network
    else:
        field = kind(ff.ReversedTime(network) if reverse else network, path)
    return ff.FlowPolicy(field, (2,), path=path)


def check(policy):
    return ff.check_convention(policy, jnp.zeros((512, 1)), actions, key=jr.key(1))


@pytest.fixture(scope="module")
def tables():
    """For each of the 30 networks, declared rightly, the errors of all 30 declarations."""
    return {truth: check(policy_of(trained(*truth), *truth)) for truth in everything}


def test_the_truth_is_accepted_and_best(tables):
    for (path, kind, reverse), errors in tables.items():
        best, *others = errors.items()
        name, error = best
        assert name.endswith(f"path={type(path).__name__}()")
        assert ("Reversed" in name) == bool(reverse)
        assert name.startswith("network" if kind is None and not reverse else "") and (
            kind is None or name.startswith(kind.__name__)
        )
        # So any other declaration is refused with this one as the suggestion.
        assert all(other > 1.03 * error for _, other in others), (name, others[0], error)


def test_the_least_error_is_that_of_the_best_denoiser(tables):
    # The mean over four sizes of noise of E Var[x₁ | x₁ + r x₀], relative to the variance.
    total = np.mean(np.var(np.asarray(actions), axis=0))
    r2 = total * np.array([[0.25], [0.5], [1.0], [2.0]]) ** 2
    expected = np.mean(variance * r2 / (variance + r2)) / total
    for errors in tables.values():
        assert np.allclose(next(iter(errors.values())), expected, rtol=0.1)


@pytest.mark.parametrize("declared", [everything[0], everything[3], everything[16]])
@pytest.mark.parametrize("truth", [everything[1], everything[10], everything[27]])
def test_a_wrong_declaration_is_refused_with_the_right_one(truth, declared, tables):
    best = next(iter(tables[truth]))
    with pytest.raises(ValueError) as error:
        check(policy_of(trained(*truth), *declared))
    assert f"Write `FlowPolicy({best}, ...)`" in str(error.value)


def test_a_path_of_the_user_is_among_the_candidates():
    class Own(ff.AbstractAffineGaussianPath):
        def alpha(self, t):
            return t**2

        def sigma(self, t):
            return 1 - t**2

    velocity = ff.GaussianMixtureVelocity(
        jnp.asarray(mean)[None], jnp.diag(jnp.asarray(variance))[None], path=Own()
    )
    errors = check(ff.FlowPolicy(velocity, (2,), path=Own()))
    assert next(iter(errors)) == "network, path=Own()" and len(errors) == 40


@pytest.mark.slow
@pytest.mark.usefixtures("standard_promotion")
def test_learned_networks_are_told_apart_too():
    # Learned along the linear path, so imperfect: the declarations still differ by far more.
    noise = np.asarray(jr.normal(jr.key(2), (4096, 2)))
    data = jnp.asarray(mean + np.sqrt(variance) * noise, jnp.float32)
    observations = jnp.zeros((4096, 1), jnp.float32)
    network = ff.VelocityMLP(1, (2,), width_size=64, depth=2, dtype=jnp.float32, key=jr.key(3))
    policy = ff.fit_flow(
        ff.FlowPolicy(network, (2,)), observations, data, num_updates=1500, progress=False,
        key=jr.key(4),
    )  # fmt: skip
    network = policy.velocity_field
    held_out = jnp.asarray(actions, jnp.float32)
    check = lambda policy: ff.check_convention(policy, observations[:512], held_out, key=jr.key(5))
    assert next(iter(check(policy))) == "network, path=LinearPath()"
    for path, kind, reverse in everything:
        if (type(path), kind, reverse) != (ff.LinearPath, None, 0):
            with pytest.raises(ValueError, match=r"Write `FlowPolicy\(network, path=LinearPath"):
                check(policy_of(network, path, kind, reverse))


def test_a_prediction_along_another_path_is_refused():
    network = trained(paths[2], ff.NoisePrediction, 0)
    with pytest.raises(
        ValueError, match=r"`path` must be the path of `velocity`.*path=velocity.path"
    ):
        ff.FlowPolicy(ff.NoisePrediction(network, paths[0]), (2,), path=paths[2])


def test_a_prediction_of_the_user_is_checked_for_path_and_time():
    class Half(ff.AbstractPrediction):  # predicts half the noise
        network: Callable
        path: ff.AbstractAffineGaussianPath

        def data_and_noise(self, t, x, observation):
            noise = 2 * self.network(t, x, observation)
            return (x - self.path.sigma(t) * noise) / self.path.alpha(t), noise

    noise = trained(paths[0], ff.NoisePrediction, 0)
    half = lambda t, x, o: noise(t, x, o) / 2
    errors = check(ff.FlowPolicy(Half(half, paths[0]), (2,)))
    assert next(iter(errors)) == "network, path=LinearPath()"
