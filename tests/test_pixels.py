"""Images in observations: encoders, crops, stacks of frames, and agents that learn from them."""

import dataclasses
import itertools
import sys
from pathlib import Path
from typing import Any

import equinox as eqx
import gymnasium
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from gymnasium.wrappers import AddRenderObservation, FrameStackObservation, TransformObservation
from helpers import agents, critic_learnings, encoders

import fisher_flow as ff


pytestmark = pytest.mark.usefixtures("standard_promotion")
(encoder,) = encoders
sizes: Any = dict(width_size=8, depth=1, encoder=encoder)
flow = ff.BehaviourFlow(**sizes, num_steps=4)
critic = ff.TemporalDifference(**sizes)


def images(num, *shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (num, *shape), dtype=np.uint8)


def transitions(num=12, shape=(8, 8, 3), dtype=np.float32):
    """One trajectory of images beside vectors."""
    rng = np.random.default_rng(1)
    o = {"camera": images(num + 1, *shape), "joints": rng.normal(size=(num + 1, 2)).astype(dtype)}
    a = rng.uniform(-1, 1, (num + 1, 1)).astype(dtype)
    return ff.Transitions(
        jax.tree.map(lambda leaf: leaf[:-1], o),
        a[:-1],
        rng.normal(size=num).astype(dtype),
        np.ones(num, dtype),
        jax.tree.map(lambda leaf: leaf[1:], o),
        a[1:],
        np.arange(num) == num - 1,
    )


def parameters(module):
    return jax.tree.leaves(eqx.filter(module, eqx.is_inexact_array))


# --- The encoder --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "shape, layer_norm, dtype",
    [((9, 6, 3), False, jnp.float32), ((2, 8, 8, 1), True, jnp.float64)],
    ids=["odd", "frames"],
)
def test_an_encoder_makes_vectors_that_depend_on_every_parameter(shape, layer_norm, dtype, getkey):
    settings = ff.ImpalaEncoder(widths=(3, 4), num_blocks=2, output_size=16, layer_norm=layer_norm)
    observations = {"camera": jnp.asarray(images(5, *shape)), "joints": jr.normal(getkey(), (5, 2))}
    one = jax.tree.map(lambda leaf: leaf[0], observations)
    network = settings.init(one, dtype=dtype, key=getkey())
    features = eqx.filter_jit(eqx.filter_vmap(network))(observations)
    assert features.shape == (5, 16 + 2) and features.dtype == dtype
    assert np.allclose(features[0], network(one), rtol=1e-5, atol=1e-6)
    assert np.array_equal(features[:, 16:], observations["joints"].astype(dtype))

    @eqx.filter_jit
    @eqx.filter_grad
    def gradient(network):
        return jnp.sum(jax.vmap(network)(observations) ** 2)

    for leaf in parameters(gradient(network)):
        assert leaf.dtype == dtype and jnp.any(leaf != 0)


def test_a_convolution_is_one_on_every_platform(getkey):
    from fisher_flow._networks._impala import _as_convolution, _as_product

    x, weight = jr.normal(getkey(), (7, 5, 2)), jr.normal(getkey(), (3, 3, 2, 4))
    assert np.allclose(_as_convolution(x, weight), _as_product(x, weight))
    corner = np.einsum("ijc,ijcd->d", x[:2, :2], weight[1:, 1:])
    assert np.allclose(_as_product(x, weight)[0, 0], corner)


def test_pixels_are_scaled_and_frames_are_channels(getkey):
    stacked = jnp.asarray(images(2, 4, 4, 3))
    flat = jnp.concatenate(list(stacked), axis=-1)
    key = getkey()
    network, other = encoder.init(stacked, key=key), encoder.init(flat, key=key)
    assert np.array_equal(network(stacked), other(flat))
    # Without biases, which start at zero but in the last layer, the network is homogeneous.
    bias = lambda network: network.networks[0].last.bias
    other = eqx.tree_at(bias, other, jnp.zeros_like(bias(other)))
    white = other(jnp.full_like(flat, 255))
    assert np.allclose(white, 5 * other(jnp.full_like(flat, 51)), rtol=1e-5)


def test_every_image_has_stacks_of_its_own(getkey):
    o = {"left": jnp.asarray(images(4, 4, 3)), "right": jnp.asarray(images(6, 6, 1, seed=1))}
    network = encoder.init(o, key=getkey())
    assert network(o).shape == (16,)
    turned = network(o | {"right": o["right"][::-1]})
    assert np.array_equal(turned[:8], network(o)[:8]) and not np.array_equal(turned, network(o))


# --- Encoded once -------------------------------------------------------------------------------


def convolutions(function, *args):
    """How many images a program convolves in all, and how many of them in a loop."""

    def count(jaxpr, looped):
        total = np.zeros(2, int)
        for equation in jaxpr.eqns:
            if equation.primitive.name == "conv_general_dilated":
                num_images = equation.invars[0].aval.shape[0]
                total += (num_images, num_images * looped)
            inside = looped or equation.primitive.name in ("while", "scan")
            for inner in jax.tree.leaves(equation.params):
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    total += count(inner, inside)
        return total

    return tuple(count(jax.make_jaxpr(function)(*args).jaxpr, False))


def with_field(policy, field):
    return eqx.tree_at(lambda policy: policy.velocity_field, policy, field)


@pytest.fixture
def learned(getkey):
    """A flow and a critic, fresh, and an observation."""
    data = jax.tree.map(jnp.asarray, transitions())
    o = jax.tree.map(lambda leaf: leaf[0], data.observations)
    policy = flow.policy(flow.init(data, key=getkey()))
    return policy, critic.init(o, data.actions[0], key=getkey()), o


def test_a_solve_encodes_once(learned, getkey):
    policy, _, o = learned
    key = getkey()
    once = convolutions(policy.velocity_field.encoder, o)
    assert once == (3, 0)
    assert convolutions(lambda o: policy.sample(o, key=key), o) == once
    assert convolutions(lambda o: policy.log_prob(o, jnp.zeros(1)), o) == once
    score = ff.PaperScore(0.9)
    assert convolutions(lambda o: score(policy, o, jnp.zeros(1)), o) == once
    reversed_twice = ff.ReversedVelocity(ff.ReversedVelocity(policy.velocity_field))
    again = with_field(policy, reversed_twice)
    assert convolutions(lambda o: again.sample(o, key=key), o) == once
    assert np.allclose(again.sample(o, key=key), policy.sample(o, key=key), rtol=1e-5)


def test_choosing_among_many_encodes_once(learned, getkey):
    policy, critic, o = learned
    key, a = getkey(), jnp.zeros(1)
    assert convolutions(lambda o: critic(o, a), o) == (3, 0)  # for both members
    best = ff.BestOf(policy, critic, 16)
    assert convolutions(lambda o: best.sample(o, key=key), o) == (6, 0)


@pytest.mark.parametrize("make", critic_learnings.values(), ids=critic_learnings)
def test_a_critic_encodes_once(make, learned, getkey):
    _, _, o = learned
    a = jnp.zeros(1)
    critic = make(**sizes).init(o, a, key=getkey())
    assert convolutions(lambda o: critic(o, a), o) == (3, 0)


def test_gradients_through_a_solve_reach_the_encoder(learned, getkey):
    policy, _, o = learned
    noise = jr.normal(getkey(), (1,), jnp.float32)

    def plainly(field):  # without `given`
        x = noise
        for i in range(policy.num_steps):
            x = x + field(jnp.asarray(i / policy.num_steps, x.dtype), x, o) / policy.num_steps
        return jnp.sum(x**2)

    def by_the_policy(field):
        return jnp.sum(with_field(policy, field).flow(o, noise) ** 2)

    expected = eqx.filter_jit(eqx.filter_grad(plainly))(policy.velocity_field)
    arrived = eqx.filter_jit(eqx.filter_grad(by_the_policy))(policy.velocity_field)
    assert any(jnp.any(leaf != 0) for leaf in parameters(expected.encoder))
    for x, y in zip(parameters(arrived), parameters(expected), strict=True):
        assert np.allclose(x, y, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
def test_the_rest_of_the_library_sees_observations(learned, tmp_path, getkey):
    policy, critic, _ = learned
    observations = jax.tree.map(jnp.asarray, transitions().observations)
    method = ff.NaturalStep(radius=0.1, num_calibration=32, num_witnesses=0)
    refined = ff.refine(policy, critic, method, observations=observations)
    # With a radius of zero its network is made, and not trained.
    residual = ff.Residual(radius=0.0, width_size=8, depth=1, encoder=encoder)
    learned_map = ff.refine(policy, critic, residual, observations=observations)
    o = jax.tree.map(lambda leaf: leaf[0], observations)
    for improved in (refined, learned_map):
        assert jnp.all(jnp.isfinite(improved.sample(o, key=getkey())))
    with pytest.raises(ValueError, match=r"Residual\(encoder=fisher_flow.ImpalaEncoder\(\)\)"):
        ff.refine(policy, critic, ff.Residual(num_updates=1), observations=observations)
    one_step = ff.distill(
        policy, observations, critic=critic, encoder=encoder, width_size=8, depth=1,
        num_samples=16, num_updates=2, batch_size=4, progress=False, key=getkey(),
    ).policy  # fmt: skip
    exported = ff.export_sampler(one_step, o)
    actions = jax.export.deserialize(bytearray(exported)).call(observations, jnp.uint32(0))
    assert actions.shape == (12, 1)


# --- Crops --------------------------------------------------------------------------------------


def test_a_crop_is_one_of_the_padded_image(getkey):
    padding = 2
    batch = jax.tree.map(jnp.asarray, transitions(64, (2, 5, 6, 3)))
    cropped = eqx.filter_jit(ff.RandomCrop(padding, probability=1.0))(batch, key=getkey())
    places = set()
    for i in range(len(batch)):
        padded = [
            np.pad(column["camera"][i], ((0, 0), *[(padding, padding)] * 2, (0, 0)), mode="edge")
            for column in (batch.observations, batch.next_observations)
        ]
        found = {
            (y, x)
            for y in range(2 * padding + 1)
            for x in range(2 * padding + 1)
            if all(
                np.array_equal(image[:, y : y + 5, x : x + 6], column["camera"][i])
                for image, column in zip(
                    padded, (cropped.observations, cropped.next_observations), strict=True
                )
            )
        }
        assert len(found) == 1, "the same crop for both observations and all frames"
        places |= found
    assert len(places) > 15 and {y for y, _ in places} == {x for _, x in places} == set(range(5))
    rest = lambda t: eqx.tree_at(
        lambda t: (t.observations["camera"], t.next_observations["camera"]), t, (0, 0)
    )
    assert eqx.tree_equal(rest(cropped), rest(batch))
    assert cropped.observations["camera"].dtype == jnp.uint8


def test_how_likely_a_crop_is(getkey):
    batch = jax.tree.map(jnp.asarray, transitions(400, (5, 5, 1)))
    assert eqx.tree_equal(ff.RandomCrop(probability=0.0)(batch, key=getkey()), batch)
    cropped = ff.RandomCrop(4, probability=0.5)(batch, key=getkey())
    same = batch.observations["camera"] == cropped.observations["camera"]
    share = jnp.mean(jnp.all(same, axis=(1, 2, 3)))
    assert abs(share - (0.5 + 0.5 / 81)) < 5 * (0.25 / 400) ** 0.5


def train(agent, data, num_updates, **options):
    return ff.train(agent, data, num_updates, batch_size=4, log_every=10, progress=False, **options)


def test_training_with_a_crop(tmp_path):
    agent, data = ff.BehaviourCloning(flow=flow), transitions()
    crop = ff.RandomCrop(padding=2)
    plain, augmented = train(agent, data, 3), train(agent, data, 3, augment=crop)
    leaves = lambda trained: parameters(trained.states)
    untouched = train(agent, data, 3, augment=ff.RandomCrop(2, probability=0.0))
    assert all(map(np.array_equal, leaves(untouched), leaves(plain)))
    assert not all(map(np.array_equal, leaves(augmented), leaves(plain)))
    train(agent, data, 1, augment=crop, folder=tmp_path)
    resumed = train(agent, data, 3, augment=crop, folder=tmp_path)
    assert all(map(np.array_equal, leaves(resumed), leaves(augmented)))
    with pytest.raises(ValueError, match="holds a run with other `augment`"):
        train(agent, data, 3, folder=tmp_path)
    both = train(agent, data, 3, augment=crop, seeds=[0, 1], vectorise=True)
    for x, y in zip(parameters(both.states[0]), leaves(augmented), strict=True):
        assert np.allclose(x, y, rtol=1e-4, atol=1e-5)


# --- Agents -------------------------------------------------------------------------------------


@pytest.mark.parametrize("agent", agents(**sizes), ids=lambda agent: type(agent).__name__)
def test_agents_learn_from_images(agent, getkey):
    data = jax.tree.map(jnp.asarray, transitions(4))
    state = agent.init(data, key=getkey())
    update = eqx.filter_jit(agent.update)
    for _ in range(2):  # a residual starts from zero, and so does the gradient of what is below
        old, (state, logs) = state, update(state, data, key=getkey())
    assert all(jnp.isfinite(value) for value in logs.values())
    # Each network has an encoder of its own, which its loss trains; targets follow theirs.
    encoders = lambda state: [
        leaf
        for leaf in jax.tree.leaves(state, is_leaf=lambda x: type(x).__name__ == "ImpalaNetwork")
        if type(leaf).__name__ == "ImpalaNetwork"
    ]
    # Of the optimisers too, whose moments have the structure of the network.
    pairs = list(zip(encoders(old), encoders(state), strict=True))
    assert len(pairs) >= 3
    for before, after in pairs:
        for x, y in zip(parameters(before), parameters(after), strict=True):
            assert jnp.any(x != y)
    policy = agent.policy(state, data.observations, key=getkey())
    o = jax.tree.map(lambda leaf: leaf[0], data.observations)
    action = policy.sample(o, key=getkey())
    assert action.shape == (1,) and action.dtype == jnp.float32 and jnp.all(jnp.abs(action) <= 1)


# --- Stacks of frames ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pixels():
    """The example, which draws a pendulum."""
    sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))
    try:
        import pixels  # pyright: ignore

        yield pixels
    finally:
        sys.path.pop(0)


@pytest.mark.parametrize("num_frames", [1, 4])
def test_stacks_are_those_of_the_wrapper(pixels, num_frames):
    env = pixels.make_env()
    seen = FrameStackObservation(pixels.make_env(), num_frames)
    rng = np.random.default_rng(0)
    episodes, expected, expected_next = [], [], []
    for seed, length in enumerate((3, 1, 5)):
        single, stack = env.reset(seed=seed)[0], seen.reset(seed=seed)[0]
        images, actions = [single], rng.uniform(-1, 1, (length, 1)).astype(np.float32)
        for action in actions:
            expected.append(stack)
            single, stack = env.step(action)[0], seen.step(action)[0]
            images.append(single)
            expected_next.append(stack)
        episodes.append((np.stack(images), actions, np.zeros(length, np.float32)))
    o, a, r = map(list, zip(*episodes, strict=True))
    stacked = ff.Transitions.from_episodes(o, a, r, [True] * 3).stack_frames(num_frames)
    assert stacked.observations.dtype == np.uint8
    assert isinstance(stacked.observations, np.ndarray)
    assert np.array_equal(stacked.observations, expected)
    assert np.array_equal(stacked.next_observations, expected_next)
    assert len(np.unique(expected, axis=0)) == 9, "the pendulum has moved"


def test_every_leaf_is_stacked_and_nothing_else_changes():
    data = transitions()
    stacked = data.stack_frames(3)
    assert stacked.observations["camera"].shape == (12, 3, 8, 8, 3)
    assert stacked.observations["joints"].shape == (12, 3, 2)
    last = jax.tree.map(lambda leaf: leaf[:, -1], stacked.next_observations)
    assert eqx.tree_equal(last, data.next_observations)
    assert stacked.actions is data.actions and stacked.ends is data.ends
    # Steps may be taken together afterwards.
    o = np.concatenate([data.observations["joints"], data.next_observations["joints"][-1:]])
    assert np.array_equal(stacked.n_step(2, 0.9).next_observations["joints"][3], o[[3, 4, 5]])


def test_load_ogbench_reads_images(tmp_path):
    rows = 22
    ends = np.arange(rows) % 11 == 10
    columns = dict(
        observations=images(rows, 64, 64, 3),
        actions=np.random.default_rng(0).uniform(-1, 1, (rows, 5)).astype(np.float32),
        terminals=ends,
    )
    np.savez(tmp_path / "visual-cube-single-play-v0.npz", **columns)  # pyright: ignore
    data = ff.load_ogbench("visual-cube-single-play-v0", tmp_path)
    o = columns["observations"]
    assert data.observations.dtype == data.next_observations.dtype == np.uint8
    assert np.array_equal(data.observations, o[~ends])
    assert np.array_equal(data.next_observations, o[np.flatnonzero(~ends) + 1])
    assert data.stack_frames(3).observations.shape == (20, 3, 64, 64, 3)
    with pytest.raises(ValueError, match="Do without a normaliser"):
        ff.Normaliser.of(data)


# --- A task -------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_pendulum_is_seen(pixels):
    """The actions of a controller are told from pictures better than from blank ones."""
    data = pixels.play(10, seed=0, shares=[0.0]).stack_frames(pixels.num_frames)
    blank = dataclasses.replace(data, observations=np.zeros_like(data.observations))

    def loss(data):  # of the same rows and noise for both
        losses = []
        ff.train(
            pixels.agents()["behaviour"],
            data,
            400,
            batch_size=32,
            log_every=300,
            loggers=[lambda seed, updates, values: losses.append(values["flow_loss"])],
            progress=False,
        )
        return losses[-1]

    assert loss(data) < 0.88 * loss(blank)


def make_rendered_env(num_frames=3):
    """Every twentieth pixel of the pictures that Gymnasium shows to people."""
    env = gymnasium.make("Pendulum-v1", render_mode="rgb_array", max_episode_steps=8)
    env = TransformObservation(
        AddRenderObservation(env),
        lambda image: image[::20, ::20],
        gymnasium.spaces.Box(0, 255, (25, 25, 3), np.uint8),
    )
    return env if num_frames == 1 else FrameStackObservation(env, num_frames)


@pytest.mark.slow
def test_agents_are_trained_on_the_pictures_of_gymnasium_and_play():
    env, rng = make_rendered_env(num_frames=1), np.random.default_rng(0)
    seen, actions, rewards = [env.reset(seed=0)[0]], [], []
    for _ in range(8):
        actions.append(rng.uniform(-2, 2, 1).astype(np.float32))
        image, reward, *_ = env.step(actions[-1])
        seen.append(image)
        rewards.append(np.float32(reward))
    env.close()
    assert all(np.any(image != after) for image, after in itertools.pairwise(seen))
    episode = (np.stack(seen), np.stack(actions), np.stack(rewards))
    data = ff.Transitions.from_episodes(*([column] for column in episode), terminated=[False])
    wide = ff.BehaviourFlow(**sizes, num_steps=2, bounds=(-2.0, 2.0))
    agent = ff.ImplicitQLearning(flow=wide, critic=critic, num_candidates=2)
    trained = train(agent, data.stack_frames(3), 3, augment=ff.RandomCrop(2))
    envs = gymnasium.vector.SyncVectorEnv([make_rendered_env] * 2)
    episodes = ff.rollout(trained.policy(), envs, seed=1)
    envs.close()
    assert episodes.lengths.tolist() == [8, 8] and np.all(np.isfinite(episodes.returns))


# --- Messages -----------------------------------------------------------------------------------


def test_messages(getkey):
    data = transitions()
    blind = ff.BehaviourFlow(width_size=8, depth=1)
    o, r = np.zeros((2, 1), np.float32), np.zeros(2, np.float32)
    vectors = ff.Transitions(o, o, r, r, o)
    for make, argument, line in (
        (lambda: ff.BehaviourCloning(flow=blind).init(data, key=getkey()),
         r"`observation\['camera'\]` is an image, of shape \(8, 8, 3\)",
         "BehaviourFlow(encoder=fisher_flow.ImpalaEncoder())"),
        (lambda: ff.OneStep(flow=flow).init(data, key=getkey()),
         "flattened to 192 entries",
         "TemporalDifference(encoder=fisher_flow.ImpalaEncoder())"),
        (lambda: encoder.init(jnp.zeros(3), key=getkey()),
         "`observation` must have an image",
         "(255 * image).astype(np.uint8)"),
        (lambda: encoder.init(images(2, 8, 8, 3), key=getkey())(images(8, 8, 3)),
         r"shapes \(\(2, 8, 8, 3\),\)",
         "FrameStackObservation(env, num_frames)"),
        (lambda: ff.ImpalaEncoder(widths=()), "`widths`", "widths=(16, 32, 32)"),
        (lambda: ff.RandomCrop()(vectors, key=getkey()),
         "`batch.observations` must have an image", "augment=None"),
        (lambda: ff.RandomCrop()(transitions(4, (4, 5, 84)), key=getkey()),
         r"got shape \(4, 5, 84\)", "GrayscaleObservation(env, keep_dim=True)"),
        (lambda: encoder.init(images(4, 84, 84), key=getkey()),
         r"at most 32, but got shape \(4, 84, 84\)", "image[..., None]"),
        (lambda: encoder.init(images(4, 20, 20), key=getkey()),
         r"got shape \(4, 20, 20\)", "image[..., None]"),
        (lambda: ff.BehaviourCloning(flow=blind).init(
            eqx.tree_at(lambda t: t.observations["camera"], data, images(12, 8, 8)), key=getkey()),
         r"\['camera'\]` looks like a greyscale image, of shape \(8, 8\)", "image[..., None]"),
        (lambda: encoder.init(images(2, 3, 64, 64), key=getkey()),
         "`observation` must have images of shape", "np.moveaxis(image, -3, -1)"),
        (lambda: ff.RandomCrop(probability=3.0), "`probability` must be .* from 0 to 1, but got 3",
         "probability=0.5"),
        (lambda: train(ff.BehaviourCloning(flow=flow), data, 1, augment=ff.RandomCrop),
         "`augment` must be a function", "augment=fisher_flow.RandomCrop()"),
        (lambda: dataclasses.replace(data, ends=np.ones(12, bool)).stack_frames(3),
         "`ends` must say where trajectories end", "Transitions.from_episodes(...)"),
        (lambda: data.n_step(3, 0.9).stack_frames(3),
         "`next_observations` must be", "transitions.stack_frames(3)"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=argument) as error:
            make()
        assert line in str(error.value)
