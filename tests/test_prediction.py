import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from helpers import bimodal, dtypes, UserPath

import fisher_flow as ff


paths = [ff.LinearPath(), ff.CosinePath(), ff.VariancePreservingPath(), UserPath()]
every_path = pytest.mark.parametrize("path", paths, ids=lambda path: type(path).__name__)
mixture = bimodal()


def networks(mixture, path):
    """What each kind of network would predict, from the exact score of the marginal."""

    def of_kind(predict):
        def network(t, x, observation):
            α, σ = path.alpha(t), path.sigma(t)
            s = mixture.at_time(path, t).score(x)
            return predict(α, σ, s, x)

        return network

    return {
        ff.ScorePrediction: of_kind(lambda α, σ, s, x: s),
        ff.NoisePrediction: of_kind(lambda α, σ, s, x: -σ * s),
        ff.DataPrediction: of_kind(lambda α, σ, s, x: (x + σ**2 * s) / α),
        ff.VPrediction: of_kind(lambda α, σ, s, x: -α * σ * s - σ * (x + σ**2 * s) / α),
    }


def velocities(mixture, path):
    exact = mixture.velocity(path)
    yield "reversed", ff.ReversedVelocity(lambda t, x, o: -exact(1 - t, x, o))
    for kind, network in networks(mixture, path).items():
        yield kind.__name__, kind(network, path)
        turned = ff.ReversedTime(lambda t, x, o, network=network: network(1 - t, x, o))
        yield f"{kind.__name__}, reversed", kind(turned, path)


@every_path
def test_every_prediction_gives_the_same_velocity(path, getkey):
    exact, x = mixture.velocity(path), jr.normal(getkey(), (2,))
    for t in jnp.asarray([0.05, 0.5, 0.95]):
        expected = exact(t, x, None)
        for name, velocity in velocities(mixture, path):
            assert np.allclose(velocity(t, x, None), expected, rtol=1e-6, atol=1e-6), name


@every_path
def test_every_prediction_gives_the_same_score(path, getkey):
    actions = mixture.sample(8, getkey())
    score = ff.PerturbedScore(time=0.95)
    scores = lambda policy: jax.jit(jax.vmap(lambda a: score(policy, None, a)))(actions)
    expected = scores(mixture.policy(path))
    for name, velocity in velocities(mixture, path):
        policy = ff.FlowPolicy(velocity, (2,), path=path, dtype=jnp.float64)
        assert np.allclose(scores(policy), expected, rtol=1e-6, atol=1e-6), name


def test_scores_agree_over_the_paths(getkey):
    # The same noise, whatever the time at which a path has it.
    actions, ratio = mixture.sample(8, getkey()), 0.05
    values = []
    for path in paths:
        score = ff.PerturbedScore(time=path.time_at_noise_ratio(ratio))
        policy = mixture.policy(path)
        values.append(jax.jit(jax.vmap(lambda a, s=score, p=policy: s(p, None, a)))(actions))
    assert np.allclose(values, values[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("path", paths[:1], ids=lambda path: type(path).__name__)
def test_samples_agree(path, getkey):
    # From time 0 on, where the predictions of the noise are 0 / 0.
    key, exact = getkey(), mixture.policy(path)
    expected = exact.draw(None, key=key)
    for name, velocity in velocities(mixture, path):
        policy = ff.FlowPolicy(velocity, (2,), path=path, dtype=jnp.float64)
        assert np.allclose(policy.draw(None, key=key), expected, atol=5e-3), name


@dtypes
def test_dtypes(dtype, getkey):
    mixture, path = bimodal(dtype), ff.CosinePath()
    x = jr.normal(getkey(), (2,), dtype)
    for name, velocity in velocities(mixture, path):
        assert velocity(jnp.asarray(0.3, dtype), x, None).dtype == dtype, name
