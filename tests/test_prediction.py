import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from helpers import bimodal, dtypes, every_path, paths, predictions

import fisher_flow as ff


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
    exact_networks = networks(mixture, path)
    for kind in predictions:
        network = exact_networks[kind]
        yield kind.__name__, kind(network, path)
        turned = ff.ReversedTime(lambda t, x, o, network=network: network(1 - t, x, o))
        yield f"{kind.__name__}, reversed", kind(turned, path)


@every_path
def test_every_prediction_gives_the_same_velocity_and_score(path, getkey):
    actions, times = mixture.sample(8, getkey()), jnp.asarray([0.05, 0.5, 0.95])
    score = ff.PerturbedScore(time=0.95)

    @jax.jit
    def evaluate(actions):
        def of(velocity):
            policy = ff.FlowPolicy(velocity, (2,), path=path, dtype=jnp.float64)
            at_times = jax.vmap(lambda t: jax.vmap(lambda a: velocity(t, a, None))(actions))
            return at_times(times), jax.vmap(lambda a: score(policy, None, a))(actions)

        exact = of(mixture.velocity(path))
        return exact, {name: of(velocity) for name, velocity in velocities(mixture, path)}

    exact, of_predictions = evaluate(actions)
    for name, found in of_predictions.items():
        for x, expected in zip(found, exact, strict=True):
            assert np.allclose(x, expected, rtol=1e-6, atol=1e-6), name


def test_scores_agree_over_the_paths(getkey):
    # The same noise, whatever the time at which a path has it.
    actions, ratio = mixture.sample(8, getkey()), 0.05
    values = []
    for path in paths:
        score = ff.PerturbedScore(time=path.time_at_noise_ratio(ratio))
        policy = mixture.policy(path)
        values.append(jax.jit(jax.vmap(lambda a, s=score, p=policy: s(p, None, a)))(actions))
    assert np.allclose(values, values[0], rtol=1e-5, atol=1e-5)


def test_samples_agree(getkey):
    path = paths[0]
    # From time 0 on, where the predictions of the noise are 0 / 0.
    key = getkey()

    @jax.jit
    def drawn(key):
        expected = mixture.policy(path).draw(None, key=key)
        draw = lambda field: ff.FlowPolicy(field, (2,), path=path, dtype=jnp.float64).draw
        return expected, {name: draw(v)(None, key=key) for name, v in velocities(mixture, path)}

    expected, of_predictions = drawn(key)
    for name, action in of_predictions.items():
        assert np.allclose(action, expected, atol=5e-3), name


@dtypes
def test_dtypes(dtype, getkey):
    mixture, path = bimodal(dtype), ff.CosinePath()
    x = jr.normal(getkey(), (2,), dtype)
    for name, velocity in velocities(mixture, path):
        assert velocity(jnp.asarray(0.3, dtype), x, None).dtype == dtype, name
