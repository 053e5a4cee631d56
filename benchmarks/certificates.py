"""Whether certificates tell the truth: over hundreds of problems whose KL is known, and with what
coverage their confidence limits hold.

A problem is a flow with an exact or a learned velocity, a critic and a radius, or a pair of
policies. The true KL comes from exact densities: in closed form for pairs of Gaussians, from many
exact samples else, and for a learned velocity from its density in continuous time, in float64. The
sampler that acts is inverted as one map, by Newton's method on its noise. A run that was stopped
goes on: rows that are in the file are not made again.
"""

import argparse
import itertools
import json
import math
import time
import traceback
from collections import Counter
from pathlib import Path
from typing import Any

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import jax.scipy as jsp
import numpy as np
from jax import lax
from jaxtyping import Array

import fisher_flow as ff


jax.config.update("jax_enable_x64", True)

OBSERVATION_SIZE = 2
NUM_COMPONENTS = 3
NUM_OBSERVATIONS = 64
MOST_ERROR = 0.1
ADAPTIVE = diffrax.PIDController(rtol=1e-5, atol=1e-7)
RADII = (0.02, 0.1, 0.5, 1.0)


class MovingMixture(eqx.Module):
    """The exact velocity of a mixture whose means move with the observation."""

    mixture: ff.GaussianMixtureVelocity
    loading: Array

    def __call__(self, t, x, observation):
        shift = self.loading @ observation
        means = self.mixture.means + shift
        return eqx.tree_at(lambda m: m.means, self.mixture, means)(t, x, None)

    def log_prob(self, observation, action):
        """In closed form, by the eigenvectors of the velocity itself."""
        m = self.mixture
        x = action - m.means - self.loading @ observation
        residual = jnp.einsum("kji,kj->ki", m.directions, x)
        terms = residual**2 / m.variances + jnp.log(2 * jnp.pi * m.variances)
        return jsp.special.logsumexp(m.log_weights - 0.5 * jnp.sum(terms, axis=-1))

    def exact_sample(self, observation, key):
        m = self.mixture
        row_key, noise_key = jr.split(key)
        k = jr.categorical(row_key, m.log_weights)
        noise = jr.normal(noise_key, m.means.shape[1:], m.means.dtype)
        centre = m.means[k] + self.loading @ observation
        return centre + m.directions[k] @ (jnp.sqrt(m.variances[k]) * noise)


class Critic(eqx.Module):
    """Every critic of the study: one structure of arrays, so that one program serves them all."""

    coordinates: Array  # in which the actions have size one
    centre: Array
    loading: Array
    linear: Array
    square: Array
    waves: Array
    frequencies: Array
    phases: Array
    direction: Array
    kink: Array
    jump: Array
    swap: Array
    edge: Array  # beyond 1 / edge the critic is not a number
    beyond: Array  # the gradient along entries that never vary
    factor: Array

    def __call__(self, observation, action):
        x = action - self.centre - self.loading @ observation
        z = self.coordinates @ x
        along = self.direction @ z
        waves = self.waves @ jnp.sin(self.frequencies @ z + self.phases)
        swapped = jnp.where(jnp.sin(5 * along) > 0, z[0], -z[-1])
        smooth = self.linear @ z + 0.5 * z @ self.square @ z + waves
        rough = self.kink * jnp.abs(along) + self.jump * jnp.sign(along - 0.2) + self.swap * swapped
        return self.factor * (smooth + rough + jnp.sqrt(1 - self.edge * along) + self.beyond @ x)


CRITICS = (
    "linear", "quadratic", "sines", "linear", "sines", "rough", "kink", "jump", "swap", "nan",
    "flat", "beyond", "quadratic",
)  # fmt: skip


def cast(tree, dtype):
    return jax.tree.map(lambda x: x.astype(dtype) if eqx.is_inexact_array(x) else x, tree)


def random_rotation(random, size):
    return np.linalg.qr(random.normal(size=(size, size)))[0]


def random_flow(random, size, law, shape, double):
    """A mixture, its coordinates of size one, and which of its entries never vary."""
    d, K = size, NUM_COMPONENTS
    constant = np.zeros(d, bool)
    if shape == "padded" and d > 1:
        constant[random.permutation(d)[: max(1, d // 3)]] = True
    live = np.flatnonzero(~constant)
    n = len(live)
    covariances, means = np.zeros((K, d, d)), np.zeros((K, d))
    for k in range(K):
        basis = random_rotation(random, n)
        values = random.uniform(0.25, 1.5, n)
        covariances[np.ix_(np.asarray([k]), live, live)] = basis @ np.diag(values) @ basis.T
        means[k, live] = random.normal(size=n) * 1.5 / math.sqrt(n)
    if law == "gaussian":
        covariances[:], means[:] = covariances[0], means[0]
    loading = np.zeros((d, OBSERVATION_SIZE))
    loading[live] = 0.5 * random.normal(size=(n, OBSERVATION_SIZE))
    # Of rotated actions of very different sizes, single precision keeps no digits.
    spread = 3 if shape == "scales" else (2 if double else 1)
    L = np.eye(d)
    if shape in ("scales", "rotated", "mild"):
        spread = 0.3 if shape == "mild" else spread
        L = np.diag(10.0 ** random.uniform(-spread, spread, d))
    if shape in ("rotated", "mild"):
        Q = random_rotation(random, d)
        L = Q @ L @ Q.T
    covariances = L @ covariances @ L.T + np.diag(np.where(constant, 1e-20, 0))
    covariances = 0.5 * (covariances + np.swapaxes(covariances, 1, 2))
    means, loading = means @ L.T, L @ loading
    means[:, constant] = 0.5
    weights = np.asarray([0.2, 0.3, 0.5])
    velocity = ff.GaussianMixtureVelocity(*map(jnp.asarray, (means, covariances, weights)))
    # Rounding makes the least of the variances negative.
    variances = jnp.maximum(velocity.variances, 1e-20)
    velocity = eqx.tree_at(lambda v: v.variances, velocity, variances)
    coordinates = np.linalg.inv(L)
    coordinates[constant] = 0
    return MovingMixture(velocity, jnp.asarray(loading)), coordinates, constant


def random_critic(random, flow, coordinates, constant, kind):
    d = flow.loading.shape[0]
    unit = lambda: random.normal(size=d) / math.sqrt(d)
    zero, one = np.zeros(()), np.ones(())
    num_waves = 4
    linear, square = np.zeros(d), np.zeros((d, d))
    waves, frequencies = np.zeros(num_waves), random.normal(size=(num_waves, d))
    kink = jump = swap = edge = zero
    beyond = np.zeros(d)
    if kind in ("linear", "kink", "jump", "nan", "beyond"):
        linear = unit()
    if kind == "quadratic":
        A = random.normal(size=(d, d)) / d
        linear, square = 2 * unit(), -0.5 * (A + A.T) - 0.2 * np.eye(d)
    if kind in ("sines", "rough"):
        linear, waves = 0.3 * unit(), random.normal(size=num_waves)
        if kind == "rough":
            frequencies = 6 * frequencies
    if kind == "kink":
        kink = -2 * one
    if kind == "jump":
        jump = 2 * one
    if kind == "swap":
        swap = one
    if kind == "nan":
        edge = 0.7 * one
    if kind == "beyond":
        beyond = np.where(constant, 1.0, 0.0)
        if not constant.any():  # towards where no action is, ever more steeply
            square = 3 * np.eye(d)
    factor = one if kind == "flat" else 10.0 ** random.uniform(-3, 3) * one
    centre = np.asarray(flow.mixture.means[0])
    arrays = dict(
        coordinates=coordinates, centre=centre, loading=flow.loading, linear=linear, square=square,
        waves=waves, frequencies=frequencies, phases=random.uniform(0, 6, num_waves),
        direction=unit() * math.sqrt(d), kink=kink, jump=jump, swap=swap, edge=edge,
        beyond=beyond, factor=factor,
    )  # fmt: skip
    return Critic(**{name: jnp.asarray(value, float) for name, value in arrays.items()})


def moved(refined, observation, action):
    """Where the map of a refined policy carries an action, in the precision of the policy, and its
    log-determinant, NaN where it folds."""
    narrow = action.astype(_dtype(refined))
    observation = observation.astype(narrow.dtype)
    δ, finite = refined.checked_displacement(observation, narrow)
    J = jax.jacfwd(lambda a: refined.displacement(observation, a))(narrow)
    size = action.size
    sign, log_det = jnp.linalg.slogdet(jnp.eye(size) + J.reshape(size, size).astype(float))
    return narrow.astype(float) + δ, jnp.asarray(jnp.where(sign > 0, log_det, jnp.nan)), finite


def _dtype(policy):
    leaves = jax.tree.leaves(eqx.filter(policy.flow_policy.velocity_field, eqx.is_inexact_array))
    return leaves[0].dtype


def over(function, observations, num, key):
    """A function of an observation and a key, at many of them."""
    rows = jnp.arange(num) % observations.shape[0]
    return lax.map(lambda row: function(*row), (observations[rows], jr.split(key, num)),
                   batch_size=256)  # fmt: skip


@eqx.filter_jit
def true_log_ratios(refined, flow, critic, constant, observations, num, key):
    """log q - log p at the actions of a refined policy, by exact densities, on exact samples."""

    def one(o, key):
        a = flow.exact_sample(o, key)
        a = jnp.where(constant, flow.mixture.means[0], a).astype(_dtype(refined)).astype(float)
        y, log_det, finite = moved(refined, o, a)
        r = flow.log_prob(o, a) - log_det - flow.log_prob(o, y)
        leaves = jnp.any(constant & (jnp.abs(y - a) > 1e-6))
        gain = critic(o, y) - critic(o, a)
        return jnp.where(leaves, jnp.inf, r), jnp.isnan(log_det), gain, finite

    return over(one, observations, num, key)


@eqx.filter_jit
def learned_log_ratios(refined, fine, critic, observations, num, key):
    """The same for a learned velocity, by its density in continuous time."""

    def one(o, key):
        a, log_p = fine.draw_and_log_prob(o, key=key)
        y, log_det, finite = moved(refined, o, a)
        r = log_p - log_det - fine.log_prob(o, y)
        return r, jnp.isnan(log_det), critic(o, y) - critic(o, a), finite

    return over(one, observations, num, key)


@eqx.filter_jit
def sampler_log_ratios(refined, velocity, heun, num_steps, observations, num, key):
    """The same for the steps that act: their map from noise to action is inverted as a whole."""
    h = 1 / num_steps

    def sampler(o, x):
        def step(x, i):
            v = velocity(i * h, x, o)
            if heun:
                v = 0.5 * (v + velocity((i + 1) * h, x + h * v, o))
            return x + h * v, None

        return lax.scan(step, x, jnp.arange(num_steps, dtype=float))[0]

    def one(o, key):
        x = jr.normal(key, refined.action_shape, float)

        def jacobian(x):
            y, push = jax.linearize(lambda x: sampler(o, x), x)
            return y, jax.vmap(push)(jnp.eye(x.size)).T

        def log_density(x, J):
            sign, log_det = jnp.linalg.slogdet(J)
            return -0.5 * jnp.sum(x**2) - jnp.asarray(jnp.where(sign > 0, log_det, jnp.nan))

        b, J = jacobian(x)
        target, log_det, _ = moved(refined, o, b)
        log_q = log_density(x, J) - log_det
        scale = jnp.sqrt(jnp.sum(J**2, axis=1)) + 1e-12
        size = lambda y: jnp.max(jnp.abs(y - target) / scale)

        def newton(state, _):
            x, y, J, length = state
            step = jnp.linalg.solve(J, target - y)
            new = x + length * step
            new_y, new_J = jacobian(new)
            better = size(new_y) < size(y)
            keep = lambda one, other: jnp.where(better, one, other)
            length = jnp.where(better, jnp.minimum(1, 4 * length), 0.5 * length)
            return (keep(new, x), keep(new_y, y), keep(new_J, J), length), None

        (x, y, J, _), _ = lax.scan(newton, (x, b, J, jnp.ones(())), length=12)
        return jnp.where(size(y) < 1e-6, log_q - log_density(x, J), jnp.nan)

    return over(one, observations, num, key)


@eqx.filter_jit
def pair_log_ratios(policy, base, observations, num, key):
    """log q - log p of two policies with densities in continuous time."""

    def one(o, key):
        a, log_q = policy.draw_and_log_prob(o, key=key)
        return log_q - base.log_prob(o, a)

    return over(one, observations, num, key)


def mean_kl(log_ratios):
    """The mean of log-ratios and its error, with the control whose mean is known."""
    r = np.asarray(log_ratios, float)
    unknown = float(np.mean(np.isnan(r)))
    if np.isinf(r).any():
        return math.inf, math.inf, unknown
    r = r[np.isfinite(r)]
    if len(r) < 2:
        return math.nan, math.nan, unknown
    control = np.expm1(-r)
    heavy = np.abs(control) > 1e3
    slope = 0.0 if heavy.any() or control.std() == 0 else -np.cov(r, control)[0, 1] / control.var()
    values = r + np.clip(slope, 0, 1) * control
    return float(values.mean()), float(values.std() / math.sqrt(len(r))), unknown


def fine_policy(policy):
    """The policy in float64, with steps as short as it takes."""
    flow = cast(policy.flow_policy, float)
    return ff.FlowPolicy(
        flow.velocity_field, flow.action_shape, path=flow.path, solver=diffrax.Tsit5(),
        stepsize_controller=diffrax.PIDController(rtol=1e-7, atol=1e-7),
    )  # fmt: skip


def number(x):
    return float(np.asarray(x))


def sampler_options(problem):
    """Steps of equal length miss actions of a deviation shorter than a step: only a solver that
    chooses its steps follows entries of very different sizes."""
    if problem["solver"] == "adaptive":
        return dict(solver=diffrax.Tsit5(), stepsize_controller=ADAPTIVE, num_steps=20)
    solver = dict(euler=diffrax.Euler(), heun=diffrax.Heun())[problem["solver"]]
    return dict(solver=solver, num_steps=problem["num_steps"])


def entries(certificate):
    """What of a certificate goes into a row."""
    names = (
        "kl", "kl_stderr", "kl_by_score", "kl_upper", "radius", "folded", "folded_upper",
        "improvement", "improvement_stderr", "stein", "stein_stderr", "non_finite",
    )  # fmt: skip
    row: dict[str, Any] = {name: number(getattr(certificate, name)) for name in names}
    for name in ("by_density", "by_steps"):
        witness = getattr(certificate, name)
        for entry in ("kl", "kl_stderr", "difference", "difference_stderr", "unknown",
                      "normalisation", "normalisation_stderr"):  # fmt: skip
            row[f"{name}.{entry}"] = number(getattr(witness, entry))
    score = certificate.score
    row["score"] = type(score).__name__
    if isinstance(score, ff.CalibratedScore):
        row |= dict(
            score_error=number(score.relative_error), score_settled=bool(score.settled),
            score_order=int(score.order), score_ratio=number(score.ratio),
        )  # fmt: skip
    return row | dict(verdict=certificate.verdict.name)


def method_of(problem):
    if problem["method"] == "residual":
        return ff.Residual(
            radius=problem["radius"], num_updates=300, num_calibration=2048, width_size=64,
            depth=2, progress=False,
        )  # fmt: skip
    return ff.NaturalStep(radius=problem["radius"], num_calibration=2048)


def observations_of(problem, dtype, num=NUM_OBSERVATIONS):
    key = jr.key(problem["seed"])
    return tuple(jr.normal(k, (num, OBSERVATION_SIZE), float).astype(dtype) for k in jr.split(key))


def of_refined(problem, policy, critic, flow, constant):
    """Refines, certifies and finds the truth."""
    dtype = _dtype(policy)
    calibration, observations = observations_of(problem, dtype)
    key = jr.key(1000 + problem["seed"])
    start = time.perf_counter()
    refined = ff.refine(
        policy, cast(critic, dtype), method_of(problem), observations=calibration, key=key
    )
    middle = time.perf_counter()
    certificate = ff.certify(refined, cast(critic, dtype), observations, key=jr.fold_in(key, 1))
    row = entries(certificate) | dict(
        refine_seconds=middle - start, certify_seconds=time.perf_counter() - middle
    )
    wide, truth_key = observations.astype(float), jr.fold_in(key, 2)
    wide_critic = cast(critic, float)
    if flow is None:
        found = learned_log_ratios(refined, fine_policy(policy), wide_critic, wide, 8192, truth_key)
    else:
        # The samples at the very actions that single precision can hold.
        found = true_log_ratios(
            refined, flow, wide_critic, jnp.asarray(constant), wide, 8192, truth_key
        )
    r, folds, gains, finite = map(np.asarray, found)
    kl, error, unknown = mean_kl(np.where(folds, np.nan, r))
    gains = gains[np.isfinite(gains)]
    row |= dict(
        true_kl=kl, true_kl_error=error, true_unknown=unknown, true_folded=float(folds.mean()),
        true_gain=float(gains.mean()), true_gain_error=float(gains.std() / math.sqrt(len(gains))),
        true_non_finite=float(1 - finite.mean()),
    )  # fmt: skip
    if problem["solver"] != "adaptive":
        r = sampler_log_ratios(
            refined, cast(policy.velocity_field, float), problem["solver"] == "heun",
            policy.num_steps, wide, 1024, jr.fold_in(key, 3),
        )  # fmt: skip
        kl, error, unknown = mean_kl(r)
        row |= dict(true_sampler_kl=kl, true_sampler_error=error, true_sampler_unknown=unknown)
    return row


def exact_policy(problem):
    random = np.random.default_rng(problem["seed"])
    dtype = jnp.float64 if problem["double"] else jnp.float32
    flow, coordinates, constant = random_flow(
        random, problem["size"], problem["law"], problem["shape"], problem["double"]
    )
    critic = random_critic(random, flow, coordinates, constant, problem["critic"])
    sampler: Any = sampler_options(problem)
    policy = ff.FlowPolicy(cast(flow, dtype), (problem["size"],), **sampler)
    return policy, critic, flow, constant


def of_exact(problem, shared):
    del shared
    return of_refined(problem, *exact_policy(problem))


def learned_policy(problem, shared):
    """A flow trained on a mixture; problems share it."""
    name = "size", "law", "width", "num_updates", "num_steps"
    name = tuple(problem[entry] for entry in name)
    random = np.random.default_rng(17 * problem["size"])
    flow, coordinates, constant = random_flow(random, problem["size"], problem["law"], "plain", 0)
    if name not in shared:
        o_key, a_key, network_key, fit_key = jr.split(jr.key(problem["size"]), 4)
        observations = jr.normal(o_key, (20_000, OBSERVATION_SIZE), jnp.float32)
        actions = jax.jit(jax.vmap(flow.exact_sample))(observations, jr.split(a_key, 20_000))
        velocity = ff.VelocityMLP(
            OBSERVATION_SIZE, (problem["size"],), width_size=problem["width"], depth=3,
            key=network_key,
        )  # fmt: skip
        velocity = cast(velocity, jnp.float32)
        policy = ff.FlowPolicy(velocity, (problem["size"],), num_steps=problem["num_steps"])
        shared[name] = ff.fit_flow(
            policy, observations, actions.astype(jnp.float32), progress=False,
            num_updates=problem["num_updates"], key=fit_key,
        )  # fmt: skip
        tuned = ff.fit_flow(
            shared[name], observations, (actions + 0.4).astype(jnp.float32), progress=False,
            num_updates=300, learning_rate=3e-4, key=fit_key,
        )  # fmt: skip
        shared["tuned", *name] = tuned
    return shared[name], shared["tuned", *name], flow, coordinates, constant


def of_learned(problem, shared):
    policy, _, flow, coordinates, constant = learned_policy(problem, shared)
    random = np.random.default_rng(problem["seed"])
    critic = random_critic(random, flow, coordinates, constant, problem["critic"])
    return of_refined(problem, policy, critic, None, constant)


def of_pair(problem, shared):
    """Two policies that know nothing of each other."""
    random = np.random.default_rng(problem["seed"])
    dtype = jnp.float64 if problem["double"] else jnp.float32
    d = problem["size"]
    closed = None
    if problem["law"] == "tuned":
        base, policy, flow, coordinates, constant = learned_policy(
            problem | dict(law="mixture"), shared
        )
        dtype = jnp.float32
    else:
        flow, coordinates, constant = random_flow(
            random, d, problem["law"], problem["shape"], problem["double"]
        )
        L = np.linalg.inv(coordinates)
        b = L @ (0.8 * random.normal(size=d) / math.sqrt(d))
        A = L @ (np.eye(d) + 0.3 * random.normal(size=(d, d)) / math.sqrt(d)) @ coordinates
        m = flow.mixture
        covariances = jnp.einsum("kij,kj,klj->kil", m.directions, m.variances, m.directions)
        other = np.einsum("ij,kjl,ml->kim", A, covariances, A)
        other = 0.5 * (other + np.swapaxes(other, 1, 2))
        means = np.asarray(m.means) + b
        mixture = ff.GaussianMixtureVelocity(
            jnp.asarray(means), jnp.asarray(other), jnp.exp(m.log_weights)
        )
        other_flow = MovingMixture(mixture, flow.loading)
        sampler: Any = sampler_options(problem)
        base, policy = (ff.FlowPolicy(cast(f, dtype), (d,), **sampler) for f in (flow, other_flow))
        if problem["law"] == "gaussian":
            P = coordinates @ np.asarray(covariances[0]) @ coordinates.T
            Q = coordinates @ other[0] @ coordinates.T
            shift = coordinates @ b
            inverse = np.linalg.inv(P)
            log_dets = np.linalg.slogdet(P)[1] - np.linalg.slogdet(Q)[1]
            closed = 0.5 * (np.trace(inverse @ Q) + shift @ inverse @ shift - d + log_dets)
    critic = random_critic(random, flow, coordinates, constant, "linear")
    if problem["law"] == "tuned":
        critic = eqx.tree_at(lambda c: c.linear, critic, jnp.ones(d))
    else:
        critic = eqx.tree_at(lambda c: c.linear, critic, jnp.asarray(coordinates @ b))
    _, observations = observations_of(problem, dtype)
    key = jr.key(1000 + problem["seed"])
    certificate = ff.certify(policy, cast(critic, dtype), observations, base=base, key=key)
    row = entries(certificate)
    wide = observations.astype(float)
    if closed is not None:
        kl, error, unknown = float(closed), 0.0, 0.0
    elif problem["law"] == "tuned":
        r = pair_log_ratios(fine_policy(policy), fine_policy(base), wide, 8192, key)
        kl, error, unknown = mean_kl(r)
    else:
        kl, error, unknown = mean_kl(exact_pair_log_ratios(other_flow, flow, wide, 65536, key))
    return row | dict(true_kl=kl, true_kl_error=error, true_unknown=unknown, true_folded=0.0)


@eqx.filter_jit
def exact_pair_log_ratios(policy, base, observations, num, key):
    def one(o, key):
        a = policy.exact_sample(o, key)
        return policy.log_prob(o, a) - base.log_prob(o, a)

    return over(one, observations, num, key)


KINDS = {"exact": of_exact, "learned": of_learned, "pair": of_pair}

# The dimension, the solver, its steps, double precision, the number of problems.
GROUPS = (
    (2, "adaptive", 20, False, 45),
    (5, "adaptive", 20, True, 45),
    (2, "euler", 20, False, 30),
    (1, "euler", 50, False, 20),
    (8, "heun", 20, True, 30),
    (5, "euler", 100, False, 25),
    (16, "adaptive", 20, False, 25),
    (2, "euler", 10, False, 20),
    (32, "adaptive", 20, False, 6),
    (64, "adaptive", 20, False, 3),
)
SHAPES = {
    "fixed": ("plain", "mild", "padded", "plain", "scales"),
    "adaptive": ("scales", "rotated", "padded", "mild", "scales"),
}


def problems():
    """All of them, ten of a group in turn, so that few programs serve many of the first rows."""
    groups = []

    def add(count, **entries):
        group = []
        for j in range(count):
            chosen = {
                name: value(j) if callable(value) else value for name, value in entries.items()
            }
            group.append(chosen)
        groups.append(group)

    radius = lambda j: RADII[(j + j // 4) % 4]
    for i, (size, solver, num_steps, double, count) in enumerate(GROUPS):
        shapes = SHAPES["adaptive" if solver == "adaptive" else "fixed"]
        add(
            count,
            kind="exact",
            method="natural step",
            size=size,
            solver=solver,
            num_steps=num_steps,
            double=double,
            law=lambda j: ("gaussian", "mixture")[(j + j // 5) % 2],
            shape=lambda j, i=i, shapes=shapes: shapes[(j + i) % 5],
            critic=lambda j, i=i: CRITICS[(5 * j + 3 * i) % len(CRITICS)],
            radius=radius,
        )
    learned = dict(solver="euler", double=False, shape="plain")
    for size, num_steps, width, num_updates, count in (
        (2, 20, 64, 2000, 20),
        (5, 50, 128, 3000, 14),
        (1, 20, 64, 1000, 8),
    ):
        learned |= dict(size=size, num_steps=num_steps, width=width, num_updates=num_updates)
        add(
            count,
            kind="learned",
            method="natural step",
            law="mixture",
            critic=lambda j, size=size: CRITICS[(3 * j + size) % len(CRITICS)],
            radius=radius,
            **learned,
        )
        if size > 1:
            add(
                1,
                kind="pair",
                method="-",
                law="tuned",
                critic="linear",
                radius=math.nan,
                **learned,
            )
    add(
        6,
        kind="exact",
        method="residual",
        size=2,
        solver="adaptive",
        num_steps=20,
        double=True,
        law=lambda j: ("gaussian", "mixture")[j % 2],
        shape=lambda j: SHAPES["adaptive"][j % 4],
        critic=lambda j: ("linear", "sines", "quadratic")[j % 3],
        radius=lambda j: RADII[(j + 1) % 4],
    )
    for size, solver, num_steps, double, count in (
        (2, "euler", 50, False, 10),
        (5, "adaptive", 20, True, 10),
    ):
        shapes = ("plain", "mild") if solver == "euler" else ("plain", "scales", "rotated")
        add(
            count,
            kind="pair",
            method="-",
            size=size,
            solver=solver,
            num_steps=num_steps,
            double=double,
            law=lambda j: ("gaussian", "mixture")[j % 2],
            shape=lambda j, shapes=shapes: shapes[j % len(shapes)],
            critic="linear",
            radius=math.nan,
        )
    rounds = itertools.zip_longest(
        *([group[i : i + 10] for i in range(0, len(group), 10)] for group in groups)
    )
    chosen = [p for row in rounds for part in row if part is not None for p in part]
    return [p | dict(seed=i) for i, p in enumerate(chosen)]


def close(kl, truth, error):
    return abs(kl - truth) <= MOST_ERROR * abs(truth) + 2 * error + 1e-6


def is_right(row):
    """Whether the certified KL is within a tenth of the truth, and what it says of the steps."""
    if not close(row["kl"], row["true_kl"], row["true_kl_error"]):
        return False
    steps, truth = row["by_steps.kl"], row.get("true_sampler_kl", math.nan)
    known = not (math.isnan(steps) or math.isnan(truth)) and row["true_sampler_unknown"] < 0.01
    return not known or close(steps, truth, row["true_sampler_error"] + row["by_steps.kl_stderr"])


def something_is_wrong(row):
    """Whether the reason of a verdict is there in truth."""
    truth, verdict = row["true_kl"], row["verdict"]
    sampler = row.get("true_sampler_kl", math.nan)
    if verdict == "critic_not_finite":
        return row["critic"] == "nan" or row.get("true_non_finite", 0) > 0
    if verdict == "beyond_data":
        unknown = max(row["true_unknown"] - row["true_folded"], row.get("true_sampler_unknown", 0))
        return not math.isfinite(truth) or unknown > 0.01
    if verdict == "folds":
        return row["true_folded"] > 0.01
    if verdict == "sampler_differs":
        if math.isnan(sampler):  # too costly to invert
            sampler = row["by_steps.kl"]
        return abs(sampler - truth) > 0.06 * max(sampler, truth)
    if verdict == "radius_exceeded":
        return truth > 1.03 * row["radius"]
    if verdict == "no_gain":
        return not row.get("true_gain", 1) > 3 * row["improvement_stderr"]
    return False


def outcome(row):
    if "raised" in row:
        return "raised"
    if not math.isnan(row["true_kl_error"]) and row["true_kl_error"] > 0.05 * row["true_kl"]:
        return "truth unknown" if row["verdict"] == "holds" else "warned rightly"
    right = is_right(row)
    if row["verdict"] == "holds":
        beyond = row["true_kl"] > 1.1 * row["radius"] + 2 * row["true_kl_error"]
        return "silently wrong" if not right or beyond else "held"
    return "warned rightly" if not right or something_is_wrong(row) else "warned falsely"


def print_table(rows):
    names = "held", "warned rightly", "warned falsely", "silently wrong", "raised", "truth unknown"
    keys = {
        "all": lambda row: "all",
        "kind": lambda row: f"{row['kind']}, {row['method']}",
        "dimension": lambda row: f"{row['size']}",
        "shape": lambda row: row["shape"],
        "critic": lambda row: row["critic"],
        "verdict": lambda row: row.get("verdict", "-"),
    }
    print(f"\n| | problems | {' | '.join(names)} |\n|{' --- |' * (2 + len(names))}")
    for title, key in keys.items():
        for value in sorted({key(row) for row in rows}):
            some = [outcome(row) for row in rows if key(row) == value]
            counts = " | ".join(str(Counter(some)[name]) for name in names)
            print(f"| {title} {value} | {len(some)} | {counts} |")
    print()
    for row in rows:
        if outcome(row) in ("warned falsely", "silently wrong", "raised", "truth unknown"):
            print(outcome(row), describe(row))


def describe(row):
    what = " ".join(
        str(row[name])
        for name in ("seed", "kind", "method", "size", "solver", "num_steps", "double", "law",
                     "shape", "critic", "radius")
    )  # fmt: skip
    if "raised" in row:
        return f"{what}: {row['raised'].strip().splitlines()[-1]}"
    numbers = (
        f"certified {row['kl']:.4g} (scores {row['kl_by_score']:.4g}, densities "
        f"{row['by_density.kl']:.4g}, steps {row['by_steps.kl']:.4g}), true {row['true_kl']:.4g} ± "
        f"{row['true_kl_error']:.2g}, of the steps {row.get('true_sampler_kl', math.nan):.4g}"
    )
    return f"{what}: {row['verdict']}; {numbers}"


def run_problems(options):
    rows = read(options.out).get("rows", [])
    done = {row["seed"] for row in rows}
    shared = {}
    todo = [p for p in problems() if p["seed"] not in done]
    if options.only:
        todo = [p for p in problems() if p["seed"] in options.only]
        rows = [row for row in rows if row["seed"] not in options.only]
    for problem in todo[: options.limit]:
        start = time.perf_counter()
        try:
            row = KINDS[problem["kind"]](problem, shared)
        except Exception as error:  # the last line says what went wrong
            last = f"{type(error).__name__}: {error}".replace("\n", " ")
            row = dict(raised=f"{traceback.format_exc()}\n{last}")
        row = problem | row | dict(seconds=time.perf_counter() - start)
        rows.append(row)
        print(f"{outcome(row)}  [{row['seconds']:.0f} s]  {describe(row)}", flush=True)
        write(options.out, rows=rows)
        # Each program maps memory, and Linux gives a process 65,530 maps.
        maps = Path("/proc/self/maps")
        if maps.exists() and len(maps.read_bytes().splitlines()) > 40_000:
            jax.clear_caches()
    print_table(rows)


def run_coverage(options):
    """How often the upper confidence limits are above the truth, over resamples of a large pool.

    A resample is a certificate of 64 observations with 16 actions each; for the estimate by
    densities, 512 actions.
    """
    results = {}
    for law, kind in (("gaussian", "linear"), ("mixture", "sines"), ("mixture", "rough")):
        problem = dict(
            seed=1, size=2, law=law, shape="plain", double=False, critic=kind, solver="euler",
            num_steps=50, radius=0.5, method="natural step",
        )  # fmt: skip
        policy, critic, flow, constant = exact_policy(problem)
        calibration, _ = observations_of(problem, jnp.float32)
        # Folds as often as they come, so that there are some to count.
        method = ff.NaturalStep(
            radius=0.5, damping=0.02, max_folded=0.05, num_calibration=2048, num_witnesses=0
        )
        refined = ff.refine(policy, cast(critic, jnp.float32), method, observations=calibration)
        observations = jr.normal(jr.key(5), (4096, OBSERVATION_SIZE), jnp.float32)
        terms, folded = coverage_terms(refined, observations, jr.key(6))
        r, folds, _, _ = true_log_ratios(
            refined, flow, critic, jnp.asarray(constant), observations.astype(float), 65536,
            jr.key(7),
        )  # fmt: skip
        r = np.asarray(r)[~np.asarray(folds) & np.isfinite(np.asarray(r))]
        results[f"{law}, {kind}"] = row = coverage(np.asarray(terms), np.asarray(folded), r)
        print(law, kind, json.dumps(row), flush=True)
    write(options.out, coverage=results)


@eqx.filter_jit
def coverage_terms(refined, observations, key):
    measure, policy = refined.method.measure, refined.policy

    def one(o, key):
        a = policy.draw(o, key=key)
        δ, J = measure.linearise(policy, lambda a: refined.displacement(o, a), a)
        terms = measure.terms(policy, o, a, δ, J)
        return terms.kl, terms.folded

    def of_observation(row):
        o, key = row
        return jax.vmap(lambda key: one(o, key))(jr.split(key, 16))

    keys = jr.split(key, observations.shape[0])
    return lax.map(of_observation, (observations, keys), batch_size=16)


def coverage(terms, folded, log_ratios, level=0.95, num=1000):
    from fisher_flow._refinement._limits import binomial_limit, normal_quantile

    random = np.random.default_rng(0)
    z = normal_quantile(level)
    means, folds = terms.mean(axis=1), folded.mean()
    rows = random.integers(0, len(means), (num, NUM_OBSERVATIONS))
    drawn = means[rows]
    upper = drawn.mean(axis=1) + z * drawn.std(axis=1, ddof=1) / math.sqrt(NUM_OBSERVATIONS)
    alone = folded.reshape(-1)[random.integers(0, folded.size, (num, 1024))].sum(axis=1)
    together = folded[rows].sum(axis=(1, 2))
    limits = {int(k): binomial_limit(int(k), 1024, level) for k in np.unique([*alone, *together])}
    by_limit = lambda counts: float(np.mean([folds <= limits[int(k)] for k in counts]))
    truth, _, _ = mean_kl(log_ratios)
    resampled = jnp.asarray(log_ratios[random.integers(0, len(log_ratios), (num, 512))])
    kls, stderrs = jax.jit(jax.vmap(ff.mean_log_ratio))(resampled)
    return dict(
        kl=float(means.mean()),
        kl_upper=float(np.mean(means.mean() <= upper)),
        kl_by_density=truth,
        kl_upper_by_density=float(np.mean(truth <= np.asarray(kls + z * stderrs))),
        folded=float(folds),
        folded_upper=by_limit(alone),
        folded_upper_together=by_limit(together),
    )


def read(path):
    return json.loads(path.read_text()) if path.exists() else {}


def write(path, **entries):
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(read(path) | entries, indent=1) + "\n")
    partial.replace(path)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("certificates.json"))
    parser.add_argument("--parts", nargs="+", default=["problems", "coverage"],
                        choices=["problems", "coverage", "table"])  # fmt: skip
    parser.add_argument("--limit", type=int, default=None, help="at most so many new problems")
    parser.add_argument("--only", type=int, nargs="+", default=[], help="these problems, again")
    options = parser.parse_args()
    if "problems" in options.parts:
        run_problems(options)
    if "coverage" in options.parts:
        run_coverage(options)
    if options.parts == ["table"]:
        print_table(read(options.out).get("rows", []))


if __name__ == "__main__":
    main()
