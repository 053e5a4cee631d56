"""Closed forms, and the lists over which laws are tested.

The closed forms come from SciPy's distributions and quadrature, never from the library.
"""

import json
import os
import subprocess
import sys
import textwrap

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import jax.scipy as jsp
import numpy as np
import pytest

import fisher_flow as ff
from fisher_flow._geometry import unsettled_score


dtypes = pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64], ids=["float32", "float64"])


class UserPath(ff.AbstractAffineGaussianPath):
    """A schedule of which only the two functions are written."""

    def alpha(self, t):
        return jnp.sin(jnp.pi / 2 * t)

    def sigma(self, t):
        return jnp.cos(jnp.pi / 2 * t)


# Each list holds every public class of its kind; `test_structure.py` says so when one is missing.

paths = [ff.LinearPath(), ff.CosinePath(), ff.VariancePreservingPath(), UserPath()]
every_path = pytest.mark.parametrize("path", paths, ids=lambda path: type(path).__name__)

scores = [
    ff.PaperScore(time=0.9),
    ff.PerturbedScore(time=0.9, order=1),
    ff.PerturbedScore(time=0.9, order=2),
    unsettled_score(jnp.zeros(2), jnp.float32),  # of actions with two entries
]

# Every cost of a displacement, as a function of the estimate of the score.
costs = {
    "Euclidean": lambda score: ff.Euclidean(),
    "ScoreOuterProduct": lambda score: ff.ScoreOuterProduct(score),
    "ScoreOuterProduct in nats": lambda score: ff.ScoreOuterProduct(score, normalise=False),
    "AveragedFisher": lambda score: ff.AveragedFisher(score),
    "AveragedFisher in nats": lambda score: ff.AveragedFisher(score, normalise=False),
    "ObservedInformation": lambda score: ff.ObservedInformation(score),
    "FisherRao": lambda score: ff.FisherRao(score),
    "FisherRao with probes": lambda score: ff.FisherRao(score, num_probes=2),
}

predictions = [ff.NoisePrediction, ff.DataPrediction, ff.VPrediction, ff.ScorePrediction]

# Every choice among several actions, as a function of a policy, a critic and their number.
selections = {
    "BestOf": ff.BestOf,
    "Resample": lambda policy, critic, n: ff.Resample(policy, critic, 0.5, n),
}

# Every way to refine, as a function of the radius.
refinements = {
    "NaturalStep": lambda radius: natural_step(jnp.float32, radius=radius, num_calibration=64),
    "Residual": lambda radius: ff.Residual(
        radius=radius, width_size=8, depth=1, num_updates=2, num_calibration=64, progress=False
    ),
    "Steering": lambda radius: ff.Steering(radius, num_calibration=64, num_auxiliary=8),
}

potentials = [
    ff.TiltedAction(),
    ff.ProjectedAction(),
    ff.PosteriorMean(num_samples=4),
    ff.TimeWeighted(ff.TiltedAction(), lambda t: t),
]

log_ratios = [
    ff.PathLogRatio(solver=diffrax.Heun()),
    ff.DensityLogRatio(),
    ff.ExecutedLogRatio(),
]

encoders = [ff.ImpalaEncoder(widths=(4,), output_size=8)]

# Every way to learn a critic, and every agent, as functions of the sizes of their networks.
critic_learnings = {
    "TemporalDifference": lambda **sizes: ff.TemporalDifference(**sizes),
    "HLGauss": lambda **sizes: ff.HLGauss((-5.0, 5.0), 11, **sizes),
    "ValueFlow": lambda **sizes: ff.ValueFlow(**sizes, num_steps=2),
}


def agents(**sizes):
    """Every agent, between them with every way to learn a critic."""
    flow = ff.BehaviourFlow(**sizes, num_steps=4)
    by_difference, by_histogram, by_flow = (make(**sizes) for make in critic_learnings.values())
    return [
        ff.BehaviourCloning(flow=flow),
        ff.OneStep(flow=flow, critic=by_histogram, refinement=None),
        ff.ImplicitQLearning(flow=flow, critic=by_difference, num_candidates=4),
        ff.FlowQLearning(flow=flow, critic=by_flow),
        ff.FisherDecorator(flow=flow, critic=by_difference, num_witnesses=0),
    ]


# Every policy, as a function of a flow policy and a critic, on two entries of an action.
policies = {
    "FlowPolicy": lambda flow, critic: flow,
    "OneStepPolicy": lambda flow, critic: ff.OneStepPolicy(
        lambda o, z: o + 2 * z, (2,), bounds=flow.bounds, dtype=critic.linear.dtype
    ),
    "RefinedPolicy": lambda flow, critic: ff.refine(
        flow, critic, natural_step(critic.linear.dtype, num_auxiliary=4)
    ),
    "NormalisedPolicy": lambda flow, critic: ff.NormalisedPolicy(
        flow, ff.Normaliser(jnp.ones_like(critic.linear), jnp.full_like(critic.linear, 2))
    ),
    "SteeredPolicy": lambda flow, critic: _steered(flow, critic),
    "ExactResample": lambda flow, critic: ff.ExactResample(_steered(flow, critic), critic, 2),
    **{
        name: lambda flow, critic, make=make: make(flow, critic, 4)
        for name, make in selections.items()
    },
}


def _steered(flow, critic):
    observations = jnp.zeros((4, 2), critic.linear.dtype)
    return ff.refine(flow, critic, refinements["Steering"](0.1), observations=observations)


def tree_allclose(x, y, *, rtol=1e-5, atol=1e-8):
    """Whether two PyTrees agree: in structure, in shapes and dtypes, and up to rounding."""
    return bool(eqx.tree_equal(x, y, typematch=True, rtol=rtol, atol=atol))


class Mixture(eqx.Module):
    """A Gaussian mixture and its closed forms."""

    means: jax.Array
    covariances: jax.Array
    weights: jax.Array

    def log_prob(self, x):
        components = jax.vmap(jsp.stats.multivariate_normal.logpdf, in_axes=(None, 0, 0))
        return jsp.special.logsumexp(
            components(x, self.means, self.covariances), b=self.weights / self.weights.sum()
        )

    def score(self, x):
        return jax.grad(self.log_prob)(x)

    def sample(self, num, key):
        """Exact samples, without a flow."""
        row_key, noise_key = jr.split(key)
        rows = jr.categorical(row_key, jnp.log(self.weights), shape=(num,))
        noise = jr.normal(noise_key, (num, self.means.shape[1]), self.means.dtype)
        roots = jnp.linalg.cholesky(self.covariances)
        return self.means[rows] + jnp.einsum("nij,nj->ni", roots[rows], noise)

    def smoothed(self, variance):
        identity = jnp.eye(self.means.shape[1], dtype=self.means.dtype)
        return Mixture(self.means, self.covariances + variance * identity[None], self.weights)

    def at_time(self, path, t):
        """The marginal along a path at time `t`."""
        identity = jnp.eye(self.means.shape[1], dtype=self.means.dtype)
        α, σ = path.alpha(t), path.sigma(t)
        return Mixture(
            α * self.means, α**2 * self.covariances + σ**2 * identity[None], self.weights
        )

    def velocity(self, path: ff.AbstractAffineGaussianPath = ff.LinearPath()):
        return ff.GaussianMixtureVelocity(self.means, self.covariances, self.weights, path=path)

    def policy(self, path=ff.LinearPath(), **options):
        return ff.FlowPolicy(self.velocity(path), self.means.shape[1:], path=path, **options)


def gaussian(mean, covariance, dtype=jnp.float64):
    mean, covariance = jnp.asarray(mean, dtype), jnp.asarray(covariance, dtype)
    return Mixture(mean[None], covariance[None], jnp.ones(1, dtype))


def random_covariance(key, size, dtype=jnp.float64):
    """Eigenvalues between 0.25 and 2, in a random basis."""
    basis_key, value_key = jr.split(key)
    basis = jnp.linalg.qr(jr.normal(basis_key, (size, size), dtype))[0]
    values = jr.uniform(value_key, (size,), dtype, 0.25, 2.0)
    covariance = basis @ jnp.diag(values) @ basis.T
    return 0.5 * (covariance + covariance.T)


def bimodal(dtype=jnp.float64):
    """Two unequal modes in the plane."""
    return Mixture(
        jnp.asarray([[-1.0, 0.5], [1.5, 0.0]], dtype),
        jnp.asarray([[[0.6, 0.2], [0.2, 0.3]], [[0.2, 0.0], [0.0, 0.8]]], dtype),
        jnp.asarray([0.4, 0.6], dtype),
    )


def correlated(dtype=jnp.float64):
    """One Gaussian in the plane, written with two components: the shapes of `bimodal`."""
    mean, covariance = jnp.asarray([0.3, -0.2], dtype), jnp.asarray([[1.0, 0.5], [0.5, 0.4]], dtype)
    return Mixture(jnp.stack([mean] * 2), jnp.stack([covariance] * 2), jnp.ones(2, dtype))


def bimodal_1d(dtype=jnp.float64):
    return Mixture(
        jnp.asarray([[-1.0], [1.2]], dtype),
        jnp.asarray([[[0.3]], [[0.6]]], dtype),
        jnp.asarray([0.4, 0.6], dtype),
    )


def gaussian_kl(mean, covariance, base_mean, base_covariance):
    """KL(N(mean, covariance) ‖ N(base_mean, base_covariance)), in nats."""
    arguments = mean, covariance, base_mean, base_covariance
    mean, covariance, base_mean, base_covariance = map(np.asarray, arguments)
    precision, difference = np.linalg.inv(base_covariance), mean - base_mean
    return 0.5 * (
        np.trace(precision @ covariance)
        + difference @ precision @ difference
        - len(mean)
        + np.linalg.slogdet(base_covariance)[1]
        - np.linalg.slogdet(covariance)[1]
    )


def affine_kl(base, A, b):
    """The KL that the map a ↦ a + A a + b of a Gaussian costs."""
    (mean,), (covariance,), T = base.means, base.covariances, A + np.eye(len(b))
    return gaussian_kl(T @ mean + b, T @ covariance @ T.T, mean, covariance)


class ShiftedVelocity(eqx.Module):
    """A mixture whose means are moved by the observation."""

    mixture: ff.GaussianMixtureVelocity

    def __call__(self, t, x, observation):
        α, _, α_dot, _ = self.mixture.path.schedule(t)
        return self.mixture(t, x - α * observation, None) + α_dot * observation


class Critic(eqx.Module):
    """offset + scale · (linear · u - ½ curvature |u|² + waves Σ sin(1.5 u)), u = a - o; all but
    `linear` are zero at first.

    Its gradient, but not its value, is NaN where the first entry of the action is beyond `cutoff`.
    The numbers are arrays, so that critics which differ in them share one compilation.
    """

    linear: jax.Array
    scale: jax.Array
    offset: jax.Array
    curvature: jax.Array
    waves: jax.Array
    cutoff: jax.Array

    def __init__(
        self, linear, dtype, *, scale=1.0, offset=0.0, curvature=0.0, waves=0.0, cutoff=jnp.inf
    ):
        self.linear, self.scale, self.offset, self.curvature, self.waves, self.cutoff = (
            jnp.asarray(x, dtype) for x in (linear, scale, offset, curvature, waves, cutoff)
        )

    def __call__(self, observation, action):
        u = action - observation
        value = jnp.sum(self.linear * u) - 0.5 * self.curvature * jnp.sum(u**2)
        value = value + self.waves * jnp.sum(jnp.sin(1.5 * u))
        first: jax.Array = action.reshape(-1)[0]
        # The square root has no derivative at zero.
        root = jnp.sqrt(jnp.where(first > self.cutoff, 0 * first, jnp.ones_like(first)))
        return self.offset + self.scale * value + (root - jax.lax.stop_gradient(root))


def observed_order(errors):
    """The order of convergence from errors at step sizes that halve."""
    errors = np.asarray(errors)
    return np.log2(errors[:-1] / errors[1:])


def within(samples, expected, *, num_stderr=5.0):
    """Whether the mean of independent samples agrees with its expectation: 5 standard errors leave
    one chance in a million."""
    samples = np.asarray(samples)
    stderr = samples.std(axis=0, ddof=1) / np.sqrt(len(samples))
    assert np.all(stderr > 0), "there is nothing random here: compare exactly"
    return bool(np.all(np.abs(samples.mean(axis=0) - np.asarray(expected)) <= num_stderr * stderr))


def shifted_policy(mixture, **options):
    """A policy that draws from `mixture`, moved by the observation."""
    velocity = ShiftedVelocity(mixture.velocity())
    return ff.FlowPolicy(velocity, mixture.means.shape[1:], **options)


def natural_step(dtype, *, radius=0.1, damping=0.5, smoothing=0.1, num_witnesses=0, **options):
    """A `NaturalStep` whose numbers are arrays, so that all of them share one compilation.

    Its length is chosen from scores alone; `test_verdict.py` tests the witnesses.
    """
    radius, damping, smoothing = (jnp.asarray(x, dtype) for x in (radius, damping, smoothing))
    metric = ff.ObservedInformation(ff.PerturbedScore(time=0.95), smoothing)
    return ff.NaturalStep(metric, radius, damping=damping, num_witnesses=num_witnesses, **options)


# Each script in its folder, and what it printed with the traceback that ended it, a line of JSON a
# script. What one has set or imported from its folder is for this script alone.
_run_all = """
import contextlib, io, json, os, runpy, sys, traceback
import jax

before = dict(jax.config.values)
for path, outcomes in json.load(sys.stdin):
    folder, printed, error = os.path.dirname(path), io.StringIO(), ""
    imported = set(sys.modules)
    os.chdir(folder)
    sys.path.insert(0, folder)
    with contextlib.redirect_stdout(printed):
        try:
            runpy.run_path(path, run_name="__main__")
        except BaseException:
            error = traceback.format_exc()
    sys.path.remove(folder)
    for name in set(sys.modules) - imported:
        if (getattr(sys.modules[name], "__file__", None) or "").startswith(folder + os.sep):
            del sys.modules[name]
    for option, value in before.items():
        if jax.config.values[option] is not value:
            jax.config.update(option, value)
    with open(outcomes, "a", encoding="utf-8") as file:
        print(json.dumps([path, printed.getvalue(), error]), file=file)
"""


def run_scripts(paths, outcomes, optimise=False):
    """Runs files one after the other in one interpreter, in which the programs that they share are
    compiled once. For each file what it printed, and the traceback that ended it or nothing. The
    file `outcomes` is written on the way, so that a crash is blamed on the script that crashed."""
    result = subprocess.run(
        [sys.executable, "-c", _run_all],
        input=json.dumps([(str(path), str(outcomes)) for path in paths]),
        env=os.environ
        | {"JAX_ENABLE_X64": "0", "MPLBACKEND": "agg"}
        # Compiling takes most of the time of short scripts.
        | ({"XLA_FLAGS": ""} if optimise else {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    lines = outcomes.read_text(encoding="utf-8").splitlines() if outcomes.exists() else []
    found = {path: (printed, error) for path, printed, error in map(json.loads, lines)}
    return {path: found.get(str(path), ("", f"it did not end:\n{result.stdout}")) for path in paths}


def run_script(script, **values):
    """Runs a script, which may kill itself, in an interpreter of its own; the code that it returned
    and what it printed. `{tests}` in it is this folder, and other names are those of `values`."""
    code = script.format(tests=os.path.dirname(__file__), **values)
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        env=os.environ | {"JAX_ENABLE_X64": "0", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    return result.returncode, result.stdout
