"""One policy written in several frameworks, and refined inside somebody else's transformations."""

import os
import subprocess
import sys
import textwrap

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
import pytest
from flax import nnx
from helpers import bimodal, paths
from jax.tree_util import Partial

import fisher_flow as ff


pytestmark = pytest.mark.usefixtures("standard_promotion", "standard_broadcasting")


@pytest.fixture(scope="module")
def standard_broadcasting():
    """What other people write is not held to this library's own rules."""
    with jax.numpy_rank_promotion("allow"):
        yield


weights = [
    0.5 * jr.normal(jr.key(i), shape, jnp.float32) for i, shape in enumerate([(5, 32), (32, 2)])
]
biases = [0.1 * jr.normal(jr.key(9), (32,), jnp.float32), jnp.zeros(2, jnp.float32)]


def inputs(t, x, observation):
    return jnp.concatenate([jnp.broadcast_to(t[..., None], (*x.shape[:-1], 1)), x, observation], -1)


def plain(t, x, observation):
    h = jnp.tanh(inputs(t, x, observation) @ weights[0] + biases[0])
    return h @ weights[1] + biases[1]


def in_equinox():
    mlp = eqx.nn.MLP(5, 2, 32, 1, jnp.tanh, dtype=jnp.float32, key=jr.key(0))
    where = lambda mlp: [x for layer in mlp.layers for x in (layer.weight, layer.bias)]
    new = [x for w, b in zip(weights, biases, strict=True) for x in (w.T, b)]

    class Velocity(eqx.Module):
        mlp: eqx.nn.MLP

        def __call__(self, t, x, observation):
            return self.mlp(inputs(t, x, observation))

    return Velocity(eqx.tree_at(where, mlp, new))


class Linen(nn.Module):
    @nn.compact
    def __call__(self, t, x, observation):
        h = jnp.tanh(nn.Dense(32)(inputs(t, x, observation)))
        return nn.Dense(2)(h)


def in_linen():
    layers = [dict(kernel=w, bias=b) for w, b in zip(weights, biases, strict=True)]
    return Partial(Linen().apply, {"params": {f"Dense_{i}": x for i, x in enumerate(layers)}})


class NNX(nnx.Module):
    def __init__(self, dropout=0.0):
        self.first = nnx.Linear(5, 32, rngs=nnx.Rngs(0))
        self.dropout = nnx.Dropout(dropout, rngs=nnx.Rngs(1))
        self.second = nnx.Linear(32, 2, rngs=nnx.Rngs(2))

    def __call__(self, t, x, observation):
        return self.second(self.dropout(jnp.tanh(self.first(inputs(t, x, observation)))))


def in_nnx():
    model = NNX()
    for layer, w, b in zip((model.first, model.second), weights, biases, strict=True):
        layer.kernel[...] = w
        assert layer.bias is not None
        layer.bias[...] = b
    model.eval()
    return model


def in_haiku_style():
    def apply(parameters, t, x, observation):
        first, second = parameters["linear"], parameters["linear_1"]
        h = jnp.tanh(inputs(t, x, observation) @ first["w"] + first["b"])
        return h @ second["w"] + second["b"]

    layers = [dict(w=w, b=b) for w, b in zip(weights, biases, strict=True)]
    return Partial(apply, dict(zip(["linear", "linear_1"], layers, strict=True)))


def batched_only():
    def network(t, x, observation):
        assert t.shape == (1,) and x.shape == (1, 2) and observation.shape == (1, 2)
        return plain(t, x, observation)

    return ff.BatchedVelocity(network)


frameworks = {
    "plain function": lambda: plain,
    "Equinox": in_equinox,
    "Flax linen": in_linen,
    "Flax NNX": in_nnx,
    "a pair of init and apply": in_haiku_style,
    "batches only": batched_only,
}


def critic(observation, action):
    return jnp.sum(jnp.sin(action + observation))


def refined_actions(velocity):
    # Without observations, so that the calibration is a part of the sample: one program.
    policy = ff.FlowPolicy(velocity, (2,), dtype=jnp.float32)
    observations = jr.normal(jr.key(1), (16, 2), jnp.float32)
    method = ff.NaturalStep(ff.ObservedInformation(ff.PerturbedScore(0.9)), 0.2, num_auxiliary=16)
    refined = ff.refine(policy, critic, method)
    keys = jr.split(jr.key(2), 16)
    return jax.vmap(lambda o, key: refined.sample(o, key=key))(observations, keys)


@pytest.fixture(scope="module")
def expected():
    return refined_actions(plain)


@pytest.mark.parametrize("framework", frameworks)
def test_the_same_policy_gives_the_same_refined_actions(framework, expected):
    actions = refined_actions(frameworks[framework]())
    assert actions.dtype == jnp.float32
    assert np.max(np.abs(actions - expected)) < 1e-5


def test_batches_of_one_become_one_batch():
    policy = ff.FlowPolicy(ff.BatchedVelocity(plain), (2,), dtype=jnp.float32)
    velocity = jax.vmap(lambda x: policy.velocity(0.5, x, jnp.zeros(2, jnp.float32)))
    jaxpr = jax.make_jaxpr(velocity)(jnp.zeros((128, 2), jnp.float32))
    products = [e for e in jaxpr.eqns if e.primitive.name == "dot_general"]
    assert len(products) == 2
    for product in products:
        (_, _), (batch, _) = product.params["dimension_numbers"]
        assert batch == (), "a product for every row, rather than one for all"


@pytest.mark.parametrize(
    "framework", ["Equinox", "Flax linen", "Flax NNX", "a pair of init and apply"]
)
def test_parameters_stay_trainable(framework):
    policy = ff.FlowPolicy(frameworks[framework](), (2,), dtype=jnp.float32)
    observations = jnp.zeros((256, 2), jnp.float32)
    actions = 0.3 + 0.1 * jr.normal(jr.key(0), (256, 2), jnp.float32)

    def loss(policy):
        one = lambda o, a, key: ff.flow_matching_loss(policy, o, a, key=key)
        return jnp.mean(jax.vmap(one)(observations, actions, jr.split(jr.key(3), 256)))

    fitted = ff.fit_flow(
        policy, observations, actions, num_updates=200, progress=False, key=jr.key(1)
    )
    assert loss(fitted) < 0.7 * loss(policy)


@pytest.mark.parametrize("framework", ["Equinox", "Flax NNX"])
def test_networks_in_training_mode_are_refused(framework):
    class Velocity(eqx.Module):
        dropout: eqx.nn.Dropout

        def __call__(self, t, x, observation):
            return self.dropout(x)

    equinox = Velocity(eqx.nn.Dropout(0.5))
    model = NNX(dropout=0.5)
    training = equinox if framework == "Equinox" else model
    hint = "inference_mode" if framework == "Equinox" else r"model.eval\(\)"
    with pytest.raises(ValueError, match=f"`velocity` has a `Dropout` layer in training.*{hint}"):
        ff.FlowPolicy(training, (2,))
    with pytest.raises(ValueError, match="in training mode"):
        ff.FlowPolicy(ff.BatchedVelocity(training), (2,))  # however deep it lies
    if framework == "Equinox":
        ff.FlowPolicy(eqx.nn.inference_mode(equinox), (2,))
        # The dropout of an attention layer has a rate of zero, and does nothing.
        attention = eqx.nn.MultiheadAttention(1, 2, key=jr.key(0))
        ff.FlowPolicy(Partial(lambda layer, t, x, o: x, attention), (2,))
    else:
        model.eval()
        ff.FlowPolicy(model, (2,))


def test_an_observation_may_be_a_dictionary_with_an_image():
    def velocity(t, x, observation):
        image = observation["image"].astype(x.dtype) / 255
        return plain(t, x, jnp.stack([jnp.mean(image), observation["state"][0]]))

    policy = ff.FlowPolicy(velocity, (2,), dtype=jnp.float32)
    observations = {
        "image": jr.randint(jr.key(0), (32, 6, 6, 3), 0, 256).astype(jnp.uint8),
        "state": jr.normal(jr.key(1), (32, 1), jnp.float32),
    }
    value = lambda o, a: critic(o["state"], a)
    metric = ff.ObservedInformation(ff.PerturbedScore(0.9))
    method = ff.NaturalStep(metric, radius=0.1, num_calibration=256, num_witnesses=0)
    refined = ff.refine(policy, value, method, observations=observations)
    certificate = ff.certify(
        refined, value, observations, num_actions=256, num_witnesses=0, key=jr.key(2)
    )
    assert certificate.kl < 0.13 and certificate.improvement > 0


# Refining inside the transformations of a user's own training step, on traced parameters.

linen_critic = nn.Sequential([nn.Dense(16), jnp.tanh, nn.Dense(1)])


def value_of(parameters):
    joined = lambda o, a: jnp.concatenate([o, a])
    return lambda o, a: linen_critic.apply(parameters, joined(o, a))[0]


def gentle(t, x, observation):
    return 0.5 * jnp.tanh(plain(t, x, observation)) - 0.5 * x


def refined_sample(parameters, observation, key):
    policy = ff.FlowPolicy(gentle, (2,), dtype=jnp.float32)
    method = ff.NaturalStep(ff.ObservedInformation(ff.PerturbedScore(0.9)), 0.2, num_auxiliary=8)
    refined = ff.refine(policy, value_of(parameters), method)
    return refined.sample(observation, key=key)


@pytest.fixture(scope="module")
def critic_parameters():
    return linen_critic.init(jr.key(0), jnp.zeros(4, jnp.float32))


def test_inside_jit_and_vmap(critic_parameters):
    observations, keys = jr.normal(jr.key(1), (4, 2), jnp.float32), jr.split(jr.key(2), 4)
    alone = jax.jit(refined_sample)
    one_by_one = [
        alone(critic_parameters, o, key) for o, key in zip(observations, keys, strict=True)
    ]
    batch = jax.jit(jax.vmap(refined_sample, in_axes=(None, 0, 0)))
    together = batch(critic_parameters, observations, keys)
    assert np.allclose(together, jnp.stack(one_by_one), atol=1e-5)
    # and over an ensemble of critics
    ensemble = jax.vmap(lambda key: linen_critic.init(key, jnp.zeros(4, jnp.float32)))(keys)
    several = jax.jit(jax.vmap(refined_sample))(ensemble, observations, keys)
    third = jax.tree.map(lambda leaf: leaf[2], ensemble)
    assert np.allclose(several[2], alone(third, observations[2], keys[2]), atol=1e-5)


def test_inside_a_scan_with_optax(critic_parameters):
    optimiser = optax.adam(1e-2)

    def update(state, key):
        parameters, optimiser_state = state
        observation = jr.normal(key, (2,), jnp.float32)
        action = refined_sample(parameters, observation, key)

        def loss(parameters):
            return (value_of(parameters)(observation, action) + jnp.sum(action**2)) ** 2

        value, gradient = jax.value_and_grad(loss)(parameters)
        updates, optimiser_state = optimiser.update(gradient, optimiser_state)
        return (optax.apply_updates(parameters, updates), optimiser_state), value

    state = critic_parameters, optimiser.init(critic_parameters)
    _, losses = jax.jit(lambda s, k: jax.lax.scan(update, s, k))(state, jr.split(jr.key(3), 100))
    assert np.all(np.isfinite(losses))
    assert np.mean(losses[-20:]) < 0.5 * np.mean(losses[:20])


@pytest.mark.slow
def test_inside_shard_map():
    # Devices are counted when JAX starts: hence another process.
    code = """
    import flax.linen as nn, jax, jax.numpy as jnp, jax.random as jr
    import fisher_flow as ff
    from jax.sharding import PartitionSpec as P
    from jax.tree_util import Partial

    mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    model = nn.Sequential([nn.Dense(16), jnp.tanh, nn.Dense(2)])
    parameters = model.init(jr.key(0), jnp.zeros(5))

    def apply(parameters, t, x, o):
        return model.apply(parameters, jnp.concatenate([t[None], x, o]))

    policy = ff.FlowPolicy(Partial(apply, parameters), (2,))
    critic = lambda o, a: -jnp.sum((a - o) ** 2)
    observations, keys = jr.normal(jr.key(1), (32, 2)), jr.split(jr.key(2), 32)
    method = ff.NaturalStep(num_calibration=128, num_witnesses=0)
    refined = ff.refine(policy, critic, method, observations=observations)
    place = jax.sharding.NamedSharding(mesh, P("data"))
    observations, keys = jax.device_put(observations, place), jax.device_put(keys, place)
    act = jax.vmap(lambda o, key: refined.sample(o, key=key))
    # Diffrax does not say which of its values vary over devices.
    options = dict(mesh=mesh, in_specs=P("data"), out_specs=P("data"), check_vma=False)
    sharded = jax.shard_map(act, **options)
    actions = jax.jit(sharded)(observations, keys)
    assert len(actions.sharding.device_set) == 4
    assert jnp.allclose(actions, act(observations, keys), atol=1e-5)

    def refine_and_act(o, keys):  # every device refines for its own observations
        method = ff.NaturalStep(num_calibration=64, num_witnesses=0)
        refined = ff.refine(policy, critic, method, observations=o)
        return jax.vmap(lambda o, key: refined.sample(o, key=key))(o, keys)

    own = jax.shard_map(refine_and_act, **options)
    assert jnp.all(jnp.isfinite(jax.jit(own)(observations, keys)))
    """
    environment = os.environ | {
        "XLA_FLAGS": "--xla_force_host_platform_device_count=4",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
    }
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr


def test_the_same_policy_on_every_path_and_in_both_directions_of_time():
    mixture = bimodal(jnp.float64)
    actions = mixture.sample(200, jr.key(0))
    true = jax.vmap(mixture.smoothed(0.05**2).score)(actions)
    for path in paths:
        velocity = mixture.velocity(path)
        reversed_velocity = lambda t, x, o, v=velocity: -v(1 - t, x, o)
        score = ff.PerturbedScore(path.time_at_noise_ratio(jnp.asarray(0.05)), order=1)
        evaluate = jax.vmap(score, in_axes=(None, None, 0))
        for field in (velocity, ff.ReversedVelocity(reversed_velocity)):
            policy = ff.FlowPolicy(field, (2,), path=path, dtype=jnp.float64)
            assert np.max(np.abs(evaluate(policy, None, actions) - true)) < 1e-3
