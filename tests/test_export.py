"""Samplers as files that run without the library."""

import functools
import subprocess
import sys

import diffrax
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from helpers import bimodal

import fisher_flow as ff


pytestmark = pytest.mark.usefixtures("standard_promotion")


def critic(observation, action):
    return jnp.sum(jnp.sin(action)) + 0.1 * jnp.sum(observation)


@functools.cache
def policies():
    base = bimodal(jnp.float32).policy(bounds=(-2.0, 2.0))
    method = ff.NaturalStep(
        ff.ObservedInformation(ff.PerturbedScore(0.95)), 0.2, num_calibration=128, num_witnesses=0
    )
    observations = jnp.zeros((8, 3), jnp.float32)
    refined = ff.refine(base, critic, method, observations=observations)
    return {"flow": base, "refined": refined, "best of": ff.BestOf(refined, critic, 4)}


@pytest.mark.parametrize("name", ["flow", "refined", "best of"])
def test_the_file_draws_what_the_policy_draws(name, tmp_path):
    policy = policies()[name]
    path = tmp_path / "policy.jax"
    data = ff.export_sampler(policy, jnp.zeros(3, jnp.float32), path)
    assert path.read_bytes() == data
    assert [x.name for x in tmp_path.iterdir()] == ["policy.jax"], "nothing half-written is left"

    observations = jr.normal(jr.key(0), (5, 3), jnp.float32)
    actions = jax.export.deserialize(bytearray(data)).call(observations, jnp.uint32(7))
    keys = jax.vmap(lambda row: jr.fold_in(jr.key(7), row))(jnp.arange(5))
    expected = jax.vmap(lambda o, key: policy.sample(o, key=key))(observations, keys)
    assert np.allclose(actions, expected, atol=1e-5)


def test_the_file_needs_nothing_but_jax(tmp_path):
    ff.export_sampler(policies()["refined"], jnp.zeros(3, jnp.float32), tmp_path / "policy.jax")
    code = (
        "import sys, jax.export, jax.numpy as jnp\n"
        "jax.config.update('jax_enable_x64', True)\n"
        "sampler = jax.export.deserialize(bytearray(open('policy.jax', 'rb').read()))\n"
        "jnp.linalg.eigh(jnp.eye(1))\n"  # as the documentation says
        "one = sampler.call(jnp.zeros((1, 3), jnp.float32), jnp.uint32(0))\n"
        "many = sampler.call(jnp.zeros((9, 3), jnp.float32), jnp.uint32(0))\n"
        "assert one.shape == (1, 2) and many.shape == (9, 2)\n"
        "assert {'fisher_flow', 'equinox', 'diffrax', 'lineax'}.isdisjoint(sys.modules)\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr


def test_for_other_platforms():
    policy = policies()["refined"]
    data = ff.export_sampler(policy, jnp.zeros(3, jnp.float32), platforms=("cpu", "cuda", "tpu"))
    assert jax.export.deserialize(bytearray(data)).platforms == ("cpu", "cuda", "tpu")


@pytest.mark.slow
def test_chunks_and_dictionaries():
    def velocity(t, x, observation):
        return observation["goal"][None] - 0.5 * x

    policy = ff.FlowPolicy(velocity, (6, 7))
    method = ff.NaturalStep(
        ff.ObservedInformation(ff.PerturbedScore(0.95)), 0.2, num_calibration=16, num_witnesses=0
    )
    observations = {"goal": jnp.zeros((8, 7))}
    refined = ff.refine(policy, lambda o, a: jnp.sum(jnp.sin(a)), method, observations=observations)
    data = ff.export_sampler(refined, {"goal": jnp.zeros(7)})
    actions = jax.export.deserialize(bytearray(data)).call(observations, jnp.uint32(0))
    assert actions.shape == (8, 6, 7) and np.all(np.isfinite(actions))


def test_adaptive_steps_are_refused():
    policy = bimodal().policy(
        solver=diffrax.Tsit5(), stepsize_controller=diffrax.PIDController(rtol=1e-3, atol=1e-3)
    )
    with pytest.raises(ValueError, match="calls back into Python.*without a `stepsize_controller`"):
        ff.export_sampler(policy, jnp.zeros(3))
