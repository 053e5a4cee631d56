"""Every agent's update against the published losses, written out once more in plain JAX.

The losses here know nothing of the library's modules: networks are evaluated from their weights,
flows are integrated by hand, and gradients are stopped where the papers stop them. Adam's first
step from rest is -rate · g / (|g| + 1e-8), so one update shows the gradient of every network: what
leaked from one loss into another network would change it.
"""

import dataclasses
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from jax.lax import stop_gradient as sg

import fisher_flow as ff


pytestmark = pytest.mark.usefixtures("standard_promotion")
rate, discount, target_rate = 3e-4, 0.9, 0.25
observation_size, action_size, rows, num_steps = 3, 2, 12, 4

flow = ff.BehaviourFlow(width_size=16, depth=2, num_steps=num_steps, learning_rate=rate)
critic = ff.TemporalDifference(
    width_size=16, depth=2, aggregate=jnp.min, discount=discount, target_rate=target_rate
)


@pytest.fixture
def batch():
    rng = np.random.default_rng(0)
    return ff.Transitions(
        observations=jnp.asarray(rng.normal(size=(rows, observation_size))),
        actions=jnp.asarray(rng.uniform(-1, 1, (rows, action_size))),
        rewards=jnp.asarray(rng.normal(size=rows)),
        masks=jnp.asarray(rng.integers(0, 2, rows).astype(float)),
        next_observations=jnp.asarray(rng.normal(size=(rows, observation_size))),
        next_actions=jnp.asarray(rng.uniform(-1, 1, (rows, action_size))),
    )


# --- Networks, from their weights ---------------------------------------------------------------


def mlp(network, *inputs):
    h = jnp.concatenate(inputs)
    *hidden, last = network.layers
    for layer in hidden:
        h = jax.nn.gelu(layer.weight @ h + layer.bias)
    return last.weight @ h + last.bias


def normed_mlp(network, *inputs):
    h = jnp.concatenate(inputs)
    *hidden, last = network.layers
    for layer, norm in zip(hidden, network.norms, strict=True):
        h = layer.weight @ h + layer.bias
        h = (h - h.mean()) / jnp.sqrt(h.var() + 1e-5) * norm.weight + norm.bias
        h = jax.nn.gelu(h)
    return (last.weight @ h + last.bias)[0]


def q_values(ensemble, o, a):
    members = [jax.tree.map(lambda leaf, i=i: leaf[i], ensemble.members) for i in range(2)]
    return jnp.stack([normed_mlp(member, o, a) for member in members])


def q_min(ensemble, o, a):
    return jnp.min(q_values(ensemble, o, a))


def integrate(field, o, noise):
    x = noise
    for k in range(num_steps):
        t = jnp.full(1, k / num_steps)
        x = x + mlp(field.network, o, x, t) / num_steps
    return x


def clip(a):
    return jnp.clip(a, -1, 1)


# --- Losses -------------------------------------------------------------------------------------


def flow_loss(field, batch, key):
    def one(o, a, key):
        noise_key, time_key = jr.split(key)
        x_0, t = jr.normal(noise_key, a.shape, a.dtype), jr.uniform(time_key, (), a.dtype)
        velocity = mlp(field.network, o, (1 - t) * x_0 + t * a, t[None])
        return jnp.mean((velocity - (a - x_0)) ** 2)

    return jnp.mean(jax.vmap(one)(batch.observations, batch.actions, jr.split(key, rows)))


def critic_loss(ensemble, batch, y):
    values = jax.vmap(lambda o, a: q_values(ensemble, o, a))(batch.observations, batch.actions)
    return jnp.mean((values[:, 0] - y) ** 2 + (values[:, 1] - y) ** 2)


def bellman(batch, next_values):
    return sg(batch.rewards + discount * batch.masks * next_values)


def check_adam_step(before, after, gradient):
    """Every parameter has moved by one step of Adam along the gradient found here."""
    triples = zip(*map(jax.tree.leaves, (before, after, gradient)), strict=True)
    assert any(np.any(np.abs(g) > 1e-6) for g in jax.tree.leaves(gradient))
    for old, new, g in triples:
        # Where the gradient is far below 1, rounding in it shows beside the 1e-8.
        expected = -rate * g / (jnp.abs(g) + 1e-8)
        assert np.allclose(new - old, expected, rtol=1e-3, atol=1e-3 * rate)


def parameters(module):
    return eqx.filter(module, eqx.is_inexact_array)


def check_target_follows(old, critic, target):
    expected = jax.tree.map(
        lambda q, t: target_rate * q + (1 - target_rate) * t, parameters(critic), parameters(old)
    )
    for x, y in zip(jax.tree.leaves(parameters(target)), jax.tree.leaves(expected), strict=True):
        assert np.allclose(x, y, rtol=1e-12)


def perturbed(module, key):
    """Other parameters, so that a target differs from its critic and nothing is zero."""
    leaves, structure = jax.tree.flatten(module)
    keys = jr.split(key, len(leaves))
    leaves = [
        leaf + 0.3 * jr.normal(key, leaf.shape, leaf.dtype) if eqx.is_inexact_array(leaf) else leaf
        for leaf, key in zip(leaves, keys, strict=True)
    ]
    return jax.tree.unflatten(structure, leaves)


def start(agent, batch, getkey):
    """A state like one in the midst of training, but with optimisers at rest."""
    state = agent.init(batch, key=getkey())
    for name in (field.name for field in dataclasses.fields(state)):
        part = getattr(state, name)
        if hasattr(part, "model"):
            part = eqx.tree_at(lambda p: p.model, part, perturbed(part.model, getkey()))
        if hasattr(part, "target"):
            part = eqx.tree_at(lambda p: p.target, part, perturbed(part.target, getkey()))
        state = eqx.tree_at(lambda s, name=name: getattr(s, name), state, part)
    return state


def grad(loss, model, *args):
    """The value and the gradient in all the inexact arrays of a network."""
    return eqx.filter_value_and_grad(loss)(model, *args)


# --- Agents -------------------------------------------------------------------------------------


def test_behaviour_cloning(batch, getkey):
    agent, key = ff.BehaviourCloning(flow=flow), getkey()
    state = agent.init(batch, key=getkey())
    new, logs = agent.update(state, batch, key=key)
    loss, gradient = grad(flow_loss, state.model, batch, key)
    assert np.allclose(logs["flow_loss"], loss, rtol=1e-10)
    check_adam_step(parameters(state.model), parameters(new.model), gradient)


def test_one_step(batch, getkey):
    agent, key = ff.OneStep(flow=flow, critic=critic), getkey()
    state = start(agent, batch, getkey)
    new, logs = eqx.filter_jit(agent.update)(state, batch, key=key)

    q_bar = jax.vmap(lambda o, a: q_min(state.critic.target, o, a))
    y = bellman(batch, q_bar(batch.next_observations, batch.next_actions))
    loss, gradient = grad(critic_loss, state.critic.model, batch, y)
    assert np.allclose(logs["critic_loss"], loss, rtol=1e-10)
    check_adam_step(parameters(state.critic.model), parameters(new.critic.model), gradient)
    check_target_follows(state.critic.target, new.critic.model, new.critic.target)
    loss, gradient = grad(flow_loss, state.flow.model, batch, key)
    assert np.allclose(logs["flow_loss"], loss, rtol=1e-10)
    check_adam_step(parameters(state.flow.model), parameters(new.flow.model), gradient)


def test_implicit_q_learning(batch, getkey):
    agent = ff.ImplicitQLearning(flow=flow, critic=critic, expectile=0.8)
    key, state = getkey(), start(agent, batch, getkey)
    new, logs = eqx.filter_jit(agent.update)(state, batch, key=key)

    def value_loss(value):
        def one(o, a):
            u = sg(q_min(state.critic.target, o, a)) - normed_mlp(value.network, o)
            return jnp.where(u > 0, 0.8, 0.2) * u**2

        return jnp.mean(jax.vmap(one)(batch.observations, batch.actions))

    loss, gradient = grad(value_loss, state.value.model)
    assert np.allclose(logs["value_loss"], loss, rtol=1e-10)
    check_adam_step(parameters(state.value.model), parameters(new.value.model), gradient)
    next_v = jax.vmap(lambda o: normed_mlp(state.value.model.network, o))(batch.next_observations)
    loss, gradient = grad(critic_loss, state.critic.model, batch, bellman(batch, next_v))
    assert np.allclose(logs["critic_loss"], loss, rtol=1e-10)
    check_adam_step(parameters(state.critic.model), parameters(new.critic.model), gradient)
    check_target_follows(state.critic.target, new.critic.model, new.critic.target)
    _, gradient = grad(flow_loss, state.flow.model, batch, key)
    check_adam_step(parameters(state.flow.model), parameters(new.flow.model), gradient)


@pytest.mark.parametrize("normalise_q", [True, False])
def test_flow_q_learning(normalise_q, batch, getkey):
    agent = ff.FlowQLearning(flow=flow, critic=critic, coefficient=2.5, normalise_q=normalise_q)
    key, state = getkey(), start(agent, batch, getkey)
    new, logs = eqx.filter_jit(agent.update)(state, batch, key=key)
    flow_key, next_key, noise_key = jr.split(key, 3)
    μ = state.actor.model
    shape, dtype = batch.actions.shape, batch.actions.dtype

    next_z = jax.vmap(lambda key: jr.normal(key, shape[1:], dtype))(jr.split(next_key, rows))
    next_a = jax.vmap(lambda o, z: clip(mlp(μ.network.mlp, o, z)))(batch.next_observations, next_z)
    next_q = jax.vmap(lambda o, a: q_min(state.critic.target, o, a))(
        batch.next_observations, next_a
    )
    loss, gradient = grad(critic_loss, state.critic.model, batch, bellman(batch, next_q))
    assert np.allclose(logs["critic_loss"], loss, rtol=1e-10)
    check_adam_step(parameters(state.critic.model), parameters(new.critic.model), gradient)
    check_target_follows(state.critic.target, new.critic.model, new.critic.target)

    z = jr.normal(noise_key, shape, dtype)

    def actor_loss(μ):
        def one(o, z):
            a = mlp(μ.network.mlp, o, z)
            taught = sg(clip(integrate(state.flow.model, o, z)))
            return jnp.mean((a - taught) ** 2), q_min(state.critic.model, o, clip(a))

        distances, q = jax.vmap(one)(batch.observations, z)
        scale = sg(jnp.mean(jnp.abs(q))) if normalise_q else 1.0
        return 2.5 * jnp.mean(distances) - jnp.mean(q) / scale

    _, gradient = grad(actor_loss, μ)
    check_adam_step(parameters(μ), parameters(new.actor.model), gradient)
    _, gradient = grad(flow_loss, state.flow.model, batch, flow_key)
    check_adam_step(parameters(state.flow.model), parameters(new.flow.model), gradient)


def fisher_rao_cost(field, δ, o, a, key):
    """½ (s · δ + ∇ · δ)² with the score extrapolated from two times."""
    t_1 = 0.9  # as before it is settled. r² = ((1 - t) / t)²; the second time has half of it
    r = (1 - t_1) / t_1
    t_2 = 1 / (1 + r / 2**0.5)

    def score(t):
        x = t * a
        v = mlp(field.network, o, x, jnp.asarray(t)[None])
        return t * (t * v - x) / (1 - t)

    s = 2 * score(t_2) - score(t_1)
    J = jax.jacfwd(lambda a: mlp(δ, o, a))(a)
    return 0.5 * (s @ mlp(δ, o, a) + jnp.trace(J)) ** 2


def paper_score(field, o, a):
    t = 0.8
    return (t * mlp(field.network, o, a, jnp.full(1, t)) - a) / (1 - t)


def rank_one_cost(field, δ, o, a, key):
    """½ (s · δ)² / |s|²."""
    s = paper_score(field, o, a)
    return 0.5 * (s @ mlp(δ, o, a)) ** 2 / (s @ s)


def averaged_cost(field, δ, o, a, key):
    """½ δᵀ (F + 10⁻³ I) δ / tr(F + 10⁻³ I) with F the mean of s sᵀ over four samples."""
    keys = jr.split(key, 4)
    samples = [integrate(field, o, jr.normal(key, a.shape, a.dtype)) for key in keys]
    scores = jnp.stack([paper_score(field, o, sample) for sample in samples])
    F = jnp.einsum("ki, kj -> ij", scores, scores) / 4 + 1e-3 * jnp.eye(action_size)
    return 0.5 * mlp(δ, o, a) @ F @ mlp(δ, o, a) / jnp.trace(F)


def euclidean_cost(field, δ, o, a, key):
    return 0.5 * jnp.sum(mlp(δ, o, a) ** 2)


@pytest.mark.parametrize(
    "make, cost_of_one, from_data",
    [
        (lambda **options: ff.FisherDecorator(radius=0.3, **options), fisher_rao_cost, False),
        (lambda **options: ff.FisherDecorator.paper(0.3, **options), rank_one_cost, False),
        (lambda **options: ff.FisherDecorator.released(0.3, **options), averaged_cost, False),
        (lambda **options: ff.FisherDecorator.deflow(2, 0.3, **options), euclidean_cost, False),
        (lambda **options: ff.FisherDecorator.deflow(2, 0.3, **options), euclidean_cost, True),
    ],
    ids=["Fisher-Rao", "paper", "released", "DeFlow", "DeFlow, actions of the data"],
)
def test_fisher_decorator(make, cost_of_one, from_data, batch, getkey):
    agent = make(flow=flow, critic=critic, from_data=from_data)
    key, state = getkey(), start(agent, batch, getkey)
    new, logs = eqx.filter_jit(agent.update)(state, batch, key=key)
    flow_key, next_key, base_key, cost_key = jr.split(key, 4)
    field, δ = state.flow.model, state.residual.model.mlp
    shape, dtype = batch.actions.shape, batch.actions.dtype

    def draw(o, key):
        return integrate(field, o, jr.normal(key, shape[1:], dtype))

    if from_data:
        a, next_a = batch.actions, batch.next_actions
    else:
        a = jax.vmap(draw)(batch.observations, jr.split(base_key, rows))
        next_a = jax.vmap(draw)(batch.next_observations, jr.split(next_key, rows))

    next_q = jax.vmap(lambda o, a: q_min(state.critic.target, o, clip(a + mlp(δ, o, a))))(
        batch.next_observations, next_a
    )
    loss, gradient = grad(critic_loss, state.critic.model, batch, bellman(batch, next_q))
    assert np.allclose(logs["critic_loss"], loss, rtol=1e-10)
    check_adam_step(parameters(state.critic.model), parameters(new.critic.model), gradient)
    check_target_follows(state.critic.target, new.critic.model, new.critic.target)

    cost_keys = jr.split(cost_key, rows)

    def residual_loss(δ):
        def one(o, a, key):
            cost = cost_of_one(sg_tree(field), δ, o, sg(a), key)
            return q_min(state.critic.model, o, clip(sg(a) + mlp(δ, o, sg(a)))), cost

        q, cost = jax.vmap(one)(batch.observations, a, cost_keys)
        scale = sg(jnp.mean(jnp.abs(q)))
        return -jnp.mean(q) / scale + jnp.exp(state.log_dual) * jnp.mean(cost) / 0.3

    _, gradient = grad(residual_loss, δ)
    check_adam_step(parameters(δ), parameters(new.residual.model.mlp), gradient)
    cost = jnp.mean(
        jax.vmap(lambda o, a, key: cost_of_one(field, δ, o, a, key))(
            batch.observations, a, cost_keys
        )
    )
    assert np.allclose(logs["cost"], cost, rtol=1e-5)
    step = 0.01 * np.clip(cost / 0.3 - 1, -1, 1)
    assert np.allclose(new.log_dual, state.log_dual + step, rtol=1e-10)
    _, gradient = grad(flow_loss, field, batch, flow_key)
    check_adam_step(parameters(field), parameters(new.flow.model), gradient)


@pytest.mark.parametrize("metric", [ff.FisherRao(), ff.Euclidean()], ids=["Fisher-Rao", "L2"])
def test_a_radius_of_zero_leaves_the_flow_as_it_is(metric, getkey):
    agent = ff.FisherDecorator(metric, 0.0, num_candidates=1, **small)
    trained = ff.train(agent, bandit(200), 120, batch_size=32, progress=False)
    policy, o, key = trained.policy(), jr.normal(getkey(), (1,)), getkey()
    assert np.array_equal(policy.sample(o, key=key), policy.flow_policy.sample(o, key=key))


def sg_tree(module):
    return jax.tree.map(lambda leaf: sg(leaf) if eqx.is_array(leaf) else leaf, module)


M, mean, least = 1_000_000, jnp.mean, jnp.min


# Updates, discount, aggregates of FiDec and of the others, radius, divergence, coefficient.
@pytest.mark.parametrize(
    "task, expected",
    [
        ("cube-single-play-singletask-v0", (M, 0.99, mean, mean, 0.001, 0.001, 300)),
        ("antmaze-giant-navigate-singletask-task3-v0", (M, 0.995, least, least, 0.01, 0.01, 10)),
        ("antmaze-large-navigate-singletask-v0", (M, 0.99, least, least, 0.01, 0.01, 10)),
        ("humanoidmaze-large-navigate-singletask-v0", (M, 0.995, mean, mean, 0.001, 0.001, 30)),
        ("antsoccer-arena-navigate-singletask-v0", (M, 0.995, mean, mean, 0.01, 0.01, 10)),
        ("puzzle-3x3-play-singletask-v0", (M, 0.99, mean, mean, 0.005, 0.005, 1000)),
        (
            "visual-cube-double-play-singletask-task1-v0",
            (M / 2, 0.99, mean, mean, 0.001, 0.001, 100),
        ),
        (
            "visual-puzzle-3x3-play-singletask-task1-v0",
            (M / 2, 0.99, mean, mean, 0.005, 0.0005, 300),
        ),
        ("antmaze-large-play-v2", (M / 2, 0.99, least, mean, 0.001, 0.015, 3)),
        ("antmaze-umaze-v2", (M / 2, 0.99, least, mean, 0.001, 0.015, 10)),
        ("pen-human-v1", (M / 2, 0.99, least, least, 0.001, 0.01, 10_000)),
        ("pen-expert-v1", (M / 2, 0.99, least, least, 0.001, 0.01, 3000)),
        ("hammer-cloned-v1", (M / 2, 0.99, least, least, 0.001, 0.001, 10_000)),
        ("relocate-cloned-v1", (M / 2, 0.99, least, least, 0.001, 0.001, 30_000)),
    ],
)
def test_published_settings(task, expected):
    settings: Any = ff.published_settings(task)
    num_updates, discount, aggregate, rival_aggregate, radius, divergence, coefficient = expected
    assert settings.num_updates == num_updates
    fidec, deflow = settings.fisher_decorator(), settings.deflow(4)
    fql, ifql = settings.flow_q_learning(num_candidates=2), settings.implicit_q_learning()
    for agent in (fidec, ifql):
        assert agent.critic.discount == discount and agent.critic.aggregate == aggregate
    for agent in (fql, deflow):
        assert agent.critic.discount == discount and agent.critic.aggregate == rival_aggregate
    assert fidec.radius == radius and isinstance(fidec.metric, ff.ScoreOuterProduct)
    assert deflow.radius == 2 * divergence and isinstance(deflow.metric, ff.Euclidean)
    assert (fql.coefficient, fql.normalise_q, fql.num_candidates) == (coefficient, False, 2)
    assert settings.critic(width_size=8).width_size == 8


# --- What they are for --------------------------------------------------------------------------


def bandit(num=2000):
    """One-step episodes; the best action, 0.6, is rare in the data."""
    rng = np.random.default_rng(0)
    o = rng.normal(size=(num, 1)).astype(np.float32)
    a = np.clip(0.3 * rng.normal(size=(num, 1)), -1, 1).astype(np.float32)
    reward = -((a[:, 0] - 0.6) ** 2)
    return ff.Transitions(o, a, 4 * reward, np.zeros_like(reward), o, a)


small_flow = ff.BehaviourFlow(width_size=32, depth=2, learning_rate=2e-3)
small_critic = ff.TemporalDifference(width_size=32, depth=2)
small: Any = dict(flow=small_flow, critic=small_critic, learning_rate=2e-3)


def mean_action(policy):
    actions = jax.vmap(lambda o, key: policy.sample(o, key=key))(
        jr.normal(jr.key(0), (500, 1), jnp.float32), jr.split(jr.key(1), 500)
    )
    assert actions.dtype == jnp.float32
    return np.mean(actions)


# The behaviour has a mean of 0 and a standard deviation of 0.3.
@pytest.mark.parametrize(
    "agent, least",
    [
        (
            ff.ImplicitQLearning(
                refinement=ff.NaturalStep(num_witnesses=0), num_candidates=4, **small
            ),
            0.35,
        ),
        (ff.FlowQLearning(coefficient=5.0, **small), 0.35),
    ],
    ids=lambda x: type(x).__name__ if isinstance(x, ff.AbstractAgent) else str(x),
)
def test_moves_towards_the_best_action(agent, least):
    trained = ff.train(agent, bandit(), 1000, batch_size=128, progress=False)
    assert least < mean_action(trained.policy()) < 0.75


@pytest.mark.slow
def test_moves_as_far_as_the_radius_allows():
    agent = ff.FisherDecorator(radius=0.5, num_candidates=1, **small)
    trained = ff.train(agent, bandit(), 1500, batch_size=128, progress=False)
    policy = trained.policy()
    assert 0.1 < mean_action(policy) < 0.75
    report = ff.certify(policy, policy.critic, np.zeros((256, 1), np.float32), key=jr.key(0))
    assert report.improvement > 0.5
    # The KL of the flow or of what acts, whichever is larger, is the radius.
    largest = max((report.by_density, report.by_steps), key=lambda witness: float(witness.kl))
    assert abs(largest.kl - 0.5) < 0.05 + 2 * largest.kl_stderr
    # The time of the score was settled, and on the way.
    score = trained.states[0].metric.score
    assert isinstance(score, ff.CalibratedScore) and 0 < score.relative_error < 0.5
