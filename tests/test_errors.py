# ruff: noqa: E501
"""The messages that users see, which name the argument, show what arrived, and say what to write.

They are raised in an interpreter without the type checker of this suite, which would speak first.
"""

import json
import re
import subprocess
import sys

import pytest


preamble = """
import json, sys
import diffrax, equinox as eqx, jax, jax.numpy as jnp, jax.random as jr, numpy as np
import fisher_flow as ff

key = jr.key(0)
policy = ff.FlowPolicy(lambda t, x, observation: -x, (2,))
critic = lambda observation, action: action.sum()
observations, actions = jnp.ones((4, 3)), jnp.ones((4, 2))
observation, action = observations[0], actions[0]
small = ff.FlowPolicy(ff.VelocityMLP(3, (2,), width_size=4, depth=1, key=key), (2,))
fit = dict(num_updates=1, batch_size=1, progress=False, key=key)
refined = ff.refine(policy, critic, ff.NaturalStep(radius=0.0))
q = ff.QEnsemble(3, 2, width_size=4, depth=1, key=key)
rewards = masks = jnp.ones(4)
data = ff.Transitions(observations, actions, rewards, masks, observations, actions)
trained = ff.Trained(ff.OneStep(), (0,), (None,), None, 1)
"""

# What is written, the argument that the message names, what it says arrived, what it says to write.
# fmt: off
cases = [
    # a class in place of an instance
    ("ff.NaturalStep(ff.ObservedInformation)", "metric", "`ObservedInformation`", "metric=ObservedInformation()"),
    ("ff.NaturalStep(measure=ff.TransportKL)", "measure", "`TransportKL`", "measure=TransportKL()"),
    ("ff.refine(policy, critic, ff.NaturalStep)", "method", "`NaturalStep`", "method=NaturalStep()"),
    ("ff.ObservedInformation(ff.PaperScore)", "score", "`PaperScore`", "score=PaperScore()"),
    ("ff.AveragedFisher(ff.PaperScore)", "score", "`PaperScore`", "score=PaperScore()"),
    ("ff.ScoreOuterProduct(ff.PaperScore)", "score", "`PaperScore`", "score=PaperScore()"),
    ("ff.FisherRao(order=4)", "order", "`4`", "order=2"),
    ("ff.FisherRao(ff.PaperScore)", "score", "`PaperScore`", "score=PaperScore()"),
    ("ff.TransportKL(ff.PaperScore)", "score", "`PaperScore`", "score=PaperScore()"),
    ("ff.FlowPolicy(critic, (2,), path=ff.LinearPath)", "path", "`LinearPath`", "path=LinearPath()"),
    ("ff.FlowPolicy(critic, (2,), solver=diffrax.Heun)", "solver", "`Heun`", "solver=Heun()"),
    ("ff.FlowPolicy(ff.VelocityMLP, (2,))", "velocity", "VelocityMLP", "FlowPolicy("),
    ("ff.refine(ff.FlowPolicy, critic)", "policy", "`FlowPolicy`", "FlowPolicy("),
    ("ff.refine(policy, ff.QEnsemble)", "critic", "QEnsemble", "critic=lambda"),
    ("ff.fit_flow(ff.FlowPolicy, observations, actions, **fit)", "policy", "`FlowPolicy`", "policy="),
    ("ff.train(ff.OneStep, None, 1)", "agent", "`OneStep`", "agent=OneStep()"),
    ("ff.train(ff.OneStep(), observations, 1)", "transitions", "ArrayImpl", "transitions=Transitions.from_episodes("),
    ("ff.fine_tune(ff.OneStep(), None, 1, normaliser=None)", "trained", "`OneStep`", "trained=fisher_flow.train("),
    ("ff.fine_tune(trained, None, 1, normaliser=ff.Normaliser)", "normaliser", "`Normaliser`", "normaliser=Normaliser.of("),
    ("ff.fine_tune(trained, None, 1, normaliser=None)", "envs", "`None`", "envs=gymnasium.vector.SyncVectorEnv("),
    ("ff.FisherDecorator(ff.FisherRao)", "metric", "`FisherRao`", "metric=FisherRao()"),
    ("ff.OneStep(flow=ff.BehaviourFlow)", "flow", "`BehaviourFlow`", "flow=BehaviourFlow()"),
    ("ff.OneStep(critic=None)", "critic", "`None`", "critic=fisher_flow.TemporalDifference()"),
    ("ff.BehaviourCloning(flow=policy)", "flow", "FlowPolicy", "flow=fisher_flow.BehaviourFlow()"),
    ("ff.FlowQLearning(critic=ff.BehaviourFlow())", "critic", "BehaviourFlow", "critic=fisher_flow.TemporalDifference()"),
    # one thing for another
    ("ff.FisherDecorator(radius='0.5')", "radius", "'0.5'", "radius=0.5"),
    ("ff.FlowQLearning(learning_rate=-1)", "learning_rate", "-1", "learning_rate=0.0003"),
    ("ff.ImplicitQLearning(expectile=1.5)", "expectile", "from 0 to 1, but got 1.5", "expectile=0.9"),
    ("ff.normalised_score('antmaze-large-navigate-v0', [-200.0])", "task", "one of D4RL's `halfcheetah-...`", "task=(low, high)"),
    ("ff.published_settings('antmaze-large-navigate-v0')", "task", "navigate", "published_settings('antmaze-large-navigate-singletask-v0')"),
    ("ff.published_settings('cube-single-play-v0')", "task", "cube-single", "published_settings('cube-single-play-singletask-v0')"),
    ("ff.OneStep(learning_rate='3e-4')", "learning_rate", "'3e-4'", "learning_rate=0.0003"),
    ("ff.TemporalDifference(aggregate='min')", "aggregate", "'min'", "aggregate=jax.numpy.min"),
    ("ff.ValueFlow(discount=1.5)", "discount", "1.5", "discount=0.99"),
    ("ff.train(ff.OneStep(), data, 1, seeds=3)", "seeds", "`3`", "seeds=range(3)"),
    ("ff.train(ff.OneStep(), data, 1, seeds=(0, 1.5))", "seeds", "(0, 1.5)", "seeds=range(5)"),
    ("ff.Transitions.from_episodes([np.zeros(3)], [actions[:2]], [np.zeros(2)], False)", "terminated", "`False`", "terminated=[False]"),
    ("ff.Transitions.from_episodes([np.zeros(3)], [actions[:2]], [np.zeros(2)], [np.zeros(2), np.zeros(3)])", "terminated", "[array", "terminated=[bool(end[-1]) for end in terminated]"),
    # shapes
    ("ff.Ensemble([critic, lambda o, a: a])(observation, action)", "critics", "(2,)", "lambda observation, action: critic(observation, action).mean()"),
    ("ff.published_settings('reacher-v2')", "task", "reacher-v2", "FisherDecorator("),
    ("ff.FlowPolicy(lambda t, x, o: x[:1], (2,)).sample(observation, key=key)", "velocity", "(1,)", "FlowPolicy(velocity, action_shape=(1,))"),
    ("policy.log_prob(observation, jnp.ones(3))", "velocity", "(3,)", "FlowPolicy(velocity, action_shape=(3,))"),
    ("policy.log_prob(observation, actions)", "velocity", "(4, 2)", "jax.vmap(policy"),
    ("ff.FlowPolicy(critic, 5)", "action_shape", "`5`", "action_shape=(5,)"),
    ("ff.FlowPolicy(critic, (0,))", "action_shape", "`(0,)`", "action_shape=(5,)"),
    ("ff.GaussianMixtureVelocity(jnp.ones(2), jnp.eye(2))", "means", "(2,)", "GaussianMixtureVelocity(mean[None], covariance[None])"),
    ("ff.refine(policy, lambda o, a: a, observations=observations)", "critic", "(2,)", "critic=lambda observation, action: critic(observation, action).mean()"),
    ("ff.refine(policy, lambda o, a: a[:1], observations=observations)", "critic", "(1,)", "critic=lambda observation, action: critic(observation, action).squeeze()"),
    ("ff.BestOf(policy, lambda o, a: a).sample(observation, key=key)", "critic", "(2,)", "critic=lambda"),
    ("ff.fit_flow(small, observations, jnp.ones((4, 3)), **fit)", "actions", "(4, 3)", "action_shape=(3,)"),
    ("ff.fit_flow(small, observations, actions[:, :, None], **fit)", "actions", "(4, 2, 1)", "actions=actions.reshape("),
    ("ff.fit_critic(q, observations, actions, jnp.ones((4, 1)), observations, actions, masks, **fit)", "rewards", "(4, 1)", "rewards=rewards.reshape(-1)"),
    # batches
    ("ff.refine(policy, critic, observations=dict(x=jnp.ones((4, 1)), y=jnp.ones(3)))", "observations", "'y'", "observations=jax.tree.map("),
    ("ff.refine(policy, critic, observations=jnp.ones(()))", "observations", "f32[]", "observations=jax.tree.map("),
    ("ff.refine(policy, critic, observations=jnp.ones((0, 3)))", "observations", "empty", "observations="),
    ("ff.certify(refined, critic, dict(x=jnp.ones((4, 1)), y=jnp.ones(3)), key=key)", "observations", "'y'", "observations=jax.tree.map("),
    ("ff.fit_flow(small, observations, actions[:3], **fit)", "actions", "'actions': 3", "observations=observations[:3]"),
    ("ff.fit_critic(q, observations, actions, rewards[:3], observations, actions, masks, **fit)", "rewards", "'rewards': 3", "observations=observations[:3]"),
    # values
    ("ff.NaturalStep(radius=-1.0)", "radius", "-1.0", "radius=0.5"),
    ("ff.NaturalStep(radius=float('nan'))", "radius", "nan", "radius=0.5"),
    ("ff.Residual(radius=-1.0)", "radius", "-1.0", "radius=0.5"),
    ("ff.NaturalStep(damping=-1.0)", "damping", "-1.0", "damping=0.2"),
    ("ff.NaturalStep(num_calibration=0)", "num_calibration", "`0`", "num_calibration="),
    ("ff.ObservedInformation(smoothing=-0.5)", "smoothing", "-0.5", "smoothing=0.1"),
    ("ff.FlowPolicy(critic, (2,), num_steps=1.5)", "num_steps", "`1.5`", "num_steps=10"),
    ("ff.FlowPolicy(critic, (2,), bounds=(1.0, -1.0))", "bounds", "low=[1.0, 1.0]", "bounds=(-1.0, 1.0)"),
    ("ff.FlowPolicy(critic, (2,), bounds=1.0)", "bounds", "`1.0`", "bounds=(-1.0, 1.0)"),
    ("ff.PaperScore(time=1.0)", "time", "`1.0`", "time=0.95"),
    ("ff.PerturbedScore(time=0)", "time", "`0`", "time=0.95"),
    ("ff.PerturbedScore(order=3)", "order", "`3`", "PerturbedScore(order=2)"),
    ("ff.BestOf(policy, critic, 0)", "n", "`0`", "n=8"),
    ("ff.Resample(policy, critic, radius=-1.0)", "radius", "-1.0", "radius=0.5"),
    ("ff.Resample(policy, critic, radius=3.0, n=8)", "radius", "n=8", "radius=1"),
    ("ff.NaturalStep(num_steps=0)", "num_steps", "`0`", "num_steps=1"),
    ("policy.log_prob(observation, action, num_probes=4)", "num_probes", "num_probes=4", "key=jax.random.key(0)"),
    ("ff.fit_flow(small, observations, actions.at[0].set(jnp.nan), **fit)", "actions", "not", "actions=actions[keep]"),
    ("ff.fit_flow(small, observations.at[0].set(jnp.inf), actions, **fit)", "observations", "not", "keep = "),
    # pieces that do not fit together
    ("ff.NaturalStep(ff.FisherRao())", "metric", "`FisherRao()`", "NaturalStep(metric=ObservedInformation())"),
    ("ff.refine(policy, critic, ff.Residual())", "observations", "`None`", "refine(policy, critic, Residual(), observations=observations)"),
    ("ff.refine(ff.BestOf(policy, critic), critic)", "policy", "BestOf", "BestOf(refine(policy, critic), critic, n)"),
    ("ff.refine(critic, critic)", "policy", "<lambda>", "FlowPolicy(velocity, action_shape=(5,))"),
    ("ff.certify(policy, critic, observations, key=key)", "policy", "FlowPolicy", "refine(policy, critic)"),
    ("ff.certify(ff.BestOf(policy, critic), critic, observations, key=key)", "policy", "`BestOf` of a `FlowPolicy`", "BestOf(refine(policy, critic), critic, ...)"),
    ("ff.BestOf(policy, 8)", "critic", "`8`", "critic=lambda"),
    ("ff.calibrate_score(policy, observations, actions.at[0].set(jnp.nan), key=key)", "actions", "finite", "actions=actions[jnp.isfinite(actions)"),
    ("ff.refine(policy, critic, actions=actions)", "actions", "`None`", "observations=observations, actions=actions)"),
    ("ff.refine(policy, critic, observations=observations, actions=actions[:2])", "actions", "'actions': 2", "observations=observations[:2]"),
    ("ff.calibrate_score(policy, observations, actions[:, :1], key=key)", "actions", "(4, 1)", "action_shape=(1,)"),
    ("ff.BestOf(critic, critic)", "policy", "<lambda>", "refine(policy, critic)"),
]
# fmt: on


@pytest.fixture(scope="module")
def messages():
    """The type and the text of what each case raises, all from one interpreter."""
    script = f"""{preamble}
def outcome(line):
    try:
        eval(line)
    except Exception as error:
        return type(error).__name__, str(error)
    return "nothing", ""

print(json.dumps({{line: outcome(line) for line in json.load(sys.stdin)}}))
"""
    result = subprocess.run(
        [sys.executable, "-c", script],
        input=json.dumps([line for line, *_ in cases]),
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


@pytest.mark.parametrize("line, argument, arrived, suggestion", cases, ids=[c[0] for c in cases])
def test_message(line, argument, arrived, suggestion, messages):
    error, message = messages[line]
    assert error == "ValueError", f"{error}: {message}"
    assert re.search(rf"`{argument}\b", message), f"does not name `{argument}`: {message}"
    assert arrived in message, f"does not show what arrived: {message}"
    code = re.findall(r"`([^`]*)`", message)
    assert any(suggestion in span for span in code), f"does not say what to write: {message}"
