import math
from collections.abc import Callable
from typing import Any, TYPE_CHECKING

import equinox as eqx
import jax
import jax.core
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray, PyTree, Scalar

from .._checks import check_batch_of_actions, check_equal_lengths, check_positive_integer
from .._custom_types import Action
from .._flows import (
    AbstractAffineGaussianPath,
    AbstractFlowPolicy,
    AbstractPolicy,
    as_flow_policy,
    FlowPolicy,
)
from .._linalg import (
    dense_limit,
    rademacher_probes,
    value_and_divergence,
    whiten_samples,
    Whitening,
)
from .._trees import as_inexact, constant, random_rows
from ._continuous_time import (
    continuous_flow,
    in_continuous_time,
    smallest_deviation,
    smallest_followed,
)
from ._score import AbstractScore, grouped_score, PerturbedScore


if TYPE_CHECKING:
    import matplotlib.figure


class CalibratedScore(AbstractScore):
    r"""A [`fisher_flow.PerturbedScore`][] of the best time and order; made by
    [`fisher_flow.calibrate_score`][].

    It is used as any other score is. What led to the choice is kept with it.

    The noise is measured by the actions themselves: it has the same share of their standard
    deviation in every direction. So entries of other units, or directions in which the actions vary
    little, are seen at other times: directions whose deviations are alike within a factor of three
    share a time.
    """

    time: Scalar
    """The time that was chosen; the latest, if entries of other units have times of their own."""

    order: int | Int[Array, ""]
    """The order that was chosen, 1 or 2."""

    relative_error: Scalar
    r"""The predicted error $\sqrt{\mathbb E \|\hat s - s\|^2 / \mathbb E \|s\|^2}$ of the choice,
    in coordinates in which the actions have covariance one. Expect its square to be off by 0.05 or
    so: with 8192 actions, chance accounts for that much. So below 0.2 it says no more than that the
    error is small. It is low for errors that all times have in common. At 1 a score of zero would
    be as good."""

    ratio: Scalar
    """The noise that was chosen, as a share of the standard deviation of the actions."""

    ratios: Float[Array, " times"]
    """The shares that were tried."""

    criterion: Float[Array, "2 times"]
    r"""The implicit score matching loss
    $\mathbb E[\tfrac12\|\hat s\|^2 + \nabla \cdot \hat s]$ of both orders at each of them."""

    relative_errors: Float[Array, "2 times"]
    """The predicted errors of both orders at each of them."""

    settled: Bool[Array, ""]
    """Whether the share that was chosen lies inside the range that was tried. If it is the smallest
    or the largest of them, a better one may lie beyond, and nothing is known about the error."""

    whitening: Whitening
    """The coordinates in which the actions have covariance one."""

    groups: Float[Array, "groups size"]
    """Which directions share a time: 1 for those that belong to a group."""

    times: Float[Array, " groups"]
    """The time of each group."""

    def from_velocity(
        self,
        path: AbstractAffineGaussianPath,
        velocity: Callable[[Scalar, Action], Action],
        action: Action,
    ) -> Action:
        times, groups, whitening = jax.tree.map(
            lambda leaf: leaf.astype(action.dtype), (self.times, self.groups, self.whitening)
        )

        def score_of_order(order):
            return grouped_score(path, velocity, action, times, order, groups, whitening)

        if isinstance(self.order, int):
            return score_of_order(self.order)
        return lax.cond(self.order == 1, lambda: score_of_order(1), lambda: score_of_order(2))

    def plot(self) -> "matplotlib.figure.Figure":
        """Draws the predicted error of each order over the share of noise, and the choice.

        **Returns:**

        A Matplotlib figure. Needs Matplotlib: `pip install matplotlib`.
        """
        from matplotlib.figure import Figure

        figure = Figure(figsize=(5, 3.4), layout="constrained")
        axes = figure.subplots()
        for order, errors in zip((1, 2), self.relative_errors, strict=True):
            axes.plot(self.ratios, errors, "o-", markersize=4, label=f"order {order}")
        label = f"chosen: {float(self.ratio):.3f}, order {int(self.order)}"
        axes.plot(self.ratio, self.relative_error, "k*", markersize=13, label=label)
        axes.axhline(1.0, color="0.5", linewidth=1, linestyle=":")
        axes.set(xscale="log", xlabel="noise, as a share of the deviation of the actions")
        axes.set(ylim=(0, 1.5), ylabel="predicted relative error of the score")
        axes.legend(frameon=False)
        return figure


def calibrate_score(
    policy: Any,
    observations: PyTree[Any],
    actions: Float[Array, "batch ..."],
    *,
    num_actions: int = 8192,
    num_probes: int | None = None,
    key: PRNGKeyArray,
) -> CalibratedScore:
    r"""Chooses the time and the order of a [`fisher_flow.PerturbedScore`][] by implicit score
    matching on actions.

    At early times the score belongs to a blurred density. At late times the errors of the velocity
    are amplified. Where the balance lies depends on the flow, the data and the training. The loss

    $$J(\hat s) = \mathbb E\bigl[\tfrac12\|\hat s\|^2 + \nabla \cdot \hat s\bigr]
        = \tfrac12 \mathbb E\|\hat s - s\|^2 - \tfrac12 \mathbb E\|s\|^2$$

    needs no true score, and is least where the error is. The norm is taken in coordinates in which
    the actions have covariance one, so that no unit of an entry matters. Noise is tried as a share
    of the deviation of the actions, the same share in every direction. Chance decides between
    shares that are nearly equal, so one with little bias is taken among all that may be the best.
    If it is the smallest or the largest that was tried, further ones beyond it are tried.

    The predicted errors also need $\mathbb E\|s\|^2$, the Fisher information of the actions. It is
    replaced by the part of it that a regression on all the estimates explains: on each by itself,
    and on each held back where the score is large. The prediction is low by the part that is not
    explained. It tells a good score from a bad one, and does not prove that a score is good.

    !!! tip

        Which actions? Actions of the data judge the score against the data; take ones that the flow
        was not trained on. Samples of the policy judge it against the policy, whose KL the
        library bounds: this is what [`fisher_flow.refine`][] does when it calibrates by itself.

    **Arguments:**

    - `policy`: a flow policy. If it is a refined policy, the flow underneath is calibrated.
    - `observations`: observations, any PyTree of arrays with a leading batch axis.
    - `actions`: one action at each of them, before any bounds.

    **Other arguments:**

    - `num_actions`: how many of the rows to use at most, chosen at random.
    - `num_probes`: `None` for the exact divergence of actions of up to 32 entries, and four probes
        of Hutchinson's estimate for larger ones; or the number of probes.
    - `key`: a `jax.random.key`; the same key gives the same score.

    **Returns:**

    A [`fisher_flow.CalibratedScore`][], a score with its predicted error.

    **Raises:**

    - `ValueError` if lengths or shapes do not match, or no estimate is finite.

    ??? cite "Reference"

        ```bibtex
        @article{hyvarinen2005estimation,
            title={Estimation of non-normalized statistical models by score matching},
            author={Hyv{\"a}rinen, Aapo},
            journal={Journal of Machine Learning Research},
            volume={6},
            year={2005},
        }
        ```
    """
    flow = as_flow_policy(policy).flow_policy
    length = check_equal_lengths(observations=observations, actions=actions)
    check_positive_integer("num_actions", num_actions, 8192)
    actions = as_inexact(actions)
    check_batch_of_actions(actions, flow.action_shape)
    size = actions[0].size
    if num_probes is not None:
        check_positive_integer("num_probes", num_probes, 4)
    elif size > dense_limit:
        num_probes = 4
    row_key, whitening_key, key = jr.split(key, 3)
    rows = jr.permutation(row_key, length)[:num_actions]
    observations, actions = jax.tree.map(
        lambda leaf: jnp.asarray(leaf)[rows], (observations, actions)
    )
    whitening = measure_whitening(flow, observations, key=whitening_key)
    groups = _groups(whitening)
    args = flow, observations, actions, whitening, groups, num_probes
    score = _calibrate(*args, jnp.asarray(_LARGEST_RATIO, actions.dtype), key)
    if isinstance(score.order, jax.core.Tracer):
        return score
    # A best share at the edge of those that were tried is followed.
    for _ in range(_MOST_MOVES):
        if score.settled or not jnp.isfinite(score.relative_error):
            break
        outward = score.ratio == score.ratios[0]
        start = score.ratios[0] * 2.0 ** (3 if outward else -4)
        score = _calibrate(*args, start.astype(actions.dtype), key)
    if not jnp.isfinite(score.relative_error):
        raise ValueError(
            "`actions` must be finite, and the velocity of the policy too, but no estimate of the "
            "score is finite at all of them. Drop the rows that are not: "
            "`actions=actions[jnp.isfinite(actions).all(-1)]`."
        )
    return eqx.tree_at(lambda score: score.order, score, int(score.order))


_NUM_RATIOS = 12
_LARGEST_RATIO = 0.8
_MOST_MOVES = 4
# By the order: with these shares of noise the bias for a Gaussian is below a third of a per cent.
_PREFERRED_RATIOS = (0.05, 0.2)


@eqx.filter_jit
def measure_whitening(
    flow: AbstractPolicy, observations: PyTree[Any], *, key: PRNGKeyArray
) -> Whitening:
    """The coordinates in which the actions of a policy have covariance one, at one observation.

    They come from two actions at each of some 2048 observations. The difference of the two does not
    depend on how the mean action changes from one observation to another.
    """
    length = jnp.shape(jax.tree.leaves(observations)[0])[0]
    num = 2048
    rows = jnp.arange(num) % length
    observations = jax.tree.map(lambda leaf: jnp.asarray(leaf)[rows], observations)

    adapts = isinstance(flow, FlowPolicy) and flow.step_times(None) is None

    def draw(o, key):
        a = flow.draw(o, key=key)
        if isinstance(flow, FlowPolicy) and adapts:
            # The tolerance of the policy may be larger than what an entry varies by.
            followed = continuous_flow(flow, a.dtype).draw(o, key=key)
            a = jnp.where(jnp.all(jnp.isfinite(followed)), followed, a)
        return a.reshape(-1)

    def pair(row):
        o, key = row
        one, other = jax.vmap(lambda key: draw(o, key))(jr.split(key))
        return one, other

    one, other = lax.map(pair, (constant(observations), jr.split(key, num)), batch_size=256)
    magnitude = jnp.max(jnp.abs(one), axis=0)
    smallest = (smallest_followed if adapts else smallest_deviation)(one.dtype)
    return whiten_samples((one - other) / 2**0.5, magnitude, smallest)


def _groups(whitening: Whitening) -> Float[Array, "groups size"]:
    """Directions whose deviations are alike within a factor of three; all of them in one group
    inside `jax.jit`, where the number of groups cannot depend on the deviations."""
    deviations = whitening.deviations
    if isinstance(deviations, jax.core.Tracer):
        return whitening.varies.astype(deviations.dtype)[None]
    octaves = np.log2(np.maximum(np.asarray(deviations, float), 1e-300))
    varies = np.asarray(whitening.varies)
    if not varies.any():
        return jnp.zeros((1, deviations.size), deviations.dtype)
    bins = np.where(varies, np.floor((octaves[varies].max() - octaves) / 1.5), -1)
    groups = [bins == bin for bin in np.unique(bins[varies])]
    return jnp.asarray(np.stack(groups), deviations.dtype)


def _times(
    path: AbstractAffineGaussianPath,
    whitening: Whitening,
    groups: Float[Array, "groups size"],
    ratio: Scalar,
) -> Float[Array, " groups"]:
    """The time of each group at which the noise has a given share of its deviation."""
    log_deviation = jnp.log(jnp.where(whitening.varies, whitening.deviations, 1))
    count = jnp.maximum(jnp.sum(groups, axis=1), 1)
    deviations = jnp.exp(groups @ log_deviation / count)
    return jax.vmap(path.time_at_noise_ratio)(ratio * deviations)


@eqx.filter_jit
def _calibrate(
    flow: Any,  # with a path: a flow, or a steered one
    observations: PyTree[Any],
    actions: Float[Array, "batch ..."],
    whitening: Whitening,
    groups: Float[Array, "groups size"],
    num_probes: int | None,
    largest_ratio: Scalar,
    key: PRNGKeyArray,
) -> CalibratedScore:
    flow, observations, actions = constant((flow, observations, actions))
    keys = jr.split(key, actions.shape[0])

    def over_rows(function, *columns):
        rows = (observations, actions, *columns)
        return lax.map(lambda row: function(*row), rows, batch_size=256)

    def whitened_score(o, a):
        """The score in the coordinates of the whitening, as a function of a ratio and of a
        displacement."""
        score_at = _score_at(flow, o)

        def score(ratio, z):
            times = _times(flow.path, whitening, groups, ratio)
            moved = a + whitening.colour(z).reshape(a.shape)
            estimator = lambda path, velocity, action: grouped_score(
                path, velocity, action, times, 1, groups, whitening
            )
            return whitening.whiten_gradient(score_at(estimator, moved).reshape(-1))

        return score, jnp.zeros(a.size, a.dtype)

    def scores_and_divergences(o, a, key):
        score, zero = whitened_score(o, a)
        probes = None if num_probes is None else rademacher_probes(num_probes, zero, key)
        at = lambda ratio: value_and_divergence(lambda z: score(ratio, z), zero, probes)
        return lax.map(at, ratios)

    def energy_and_slopes(ratio, scores):
        """½|ŝ|², and its derivatives along all the scores."""

        def of_one(o, a, directions):
            score, zero = whitened_score(o, a)
            s, push = jax.linearize(lambda z: score(ratio, z), zero)
            return 0.5 * jnp.sum(s**2), jax.vmap(lambda v: jnp.vdot(s, push(v)))(directions)

        return over_rows(of_one, jnp.moveaxis(scores, 0, 1))

    # Noise that halves in variance, so that the second order takes two neighbours.
    ratios = largest_ratio * 2.0 ** (-0.5 * jnp.arange(_NUM_RATIOS + 1, dtype=actions.dtype))
    by_row = over_rows(scores_and_divergences, keys)
    s, divergence = jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), by_row)
    scores = jnp.stack([s[:-1], 2 * s[1:] - s[:-1]])
    divergences = jnp.stack([divergence[:-1], 2 * divergence[1:] - divergence[:-1]])
    losses = 0.5 * jnp.sum(scores**2, axis=3) + divergences
    criterion = jnp.mean(losses, axis=2)
    order, index = _choice(losses, criterion, ratios[:-1])
    energies, slopes = energy_and_slopes(ratios[index], s)
    information = _explained_information(s, divergence, energies, slopes)
    relative_errors = jnp.sqrt(jnp.maximum(1 + 2 * criterion / information, 0))
    times = _times(flow.path, whitening, groups, ratios[index])
    return CalibratedScore(
        time=jnp.max(times),
        order=order + 1,
        relative_error=relative_errors[order, index],
        ratio=ratios[index],
        ratios=ratios[:-1],
        criterion=criterion,
        relative_errors=relative_errors,
        settled=(index > 0) & (index < _NUM_RATIOS - 1),
        whitening=whitening,
        groups=groups,
        times=times,
    )


def _score_at(flow: AbstractFlowPolicy, observation: Any) -> Callable[..., Action]:
    """The score at one observation, which is encoded here and not at every call."""
    if not isinstance(flow, FlowPolicy):
        return lambda estimator, action: flow.score(estimator, observation, action)
    velocity = flow.given(observation)
    return lambda estimator, action: estimator(flow.path, velocity, action)


def _choice(
    losses: Float[Array, "2 times batch"],
    criterion: Float[Array, "2 times"],
    ratios: Float[Array, " times"],
) -> tuple[Array, Array]:
    """The order, less one, and the number of the share of noise to use.

    Chance decides which of several nearly equal criteria is the least. If it favours more noise,
    the score shrinks. So the choice is among all that are worse by at most two standard errors of
    the paired difference. It is the second order if one of them has it, and the share that is
    nearest to one at which the bias is small.
    """
    known = jnp.where(jnp.isfinite(criterion), criterion, jnp.inf)
    best = jnp.unravel_index(jnp.argmin(known), known.shape)
    excess = losses - losses[best][None, None]
    stderr = jnp.std(excess, axis=2) / losses.shape[2] ** 0.5
    good = jnp.isfinite(known) & (jnp.mean(excess, axis=2) <= 2 * stderr)
    order = jnp.where(jnp.any(good[1]), 1, 0)
    preferred = jnp.asarray(_PREFERRED_RATIOS, ratios.dtype)[order]
    distance = jnp.abs(jnp.log(ratios / preferred))
    return order, jnp.argmin(jnp.where(good[order], distance, jnp.inf))


def unsettled_score(action: Action, dtype: Any) -> CalibratedScore:
    """A calibrated score before it is calibrated, in the shape that it has afterwards."""
    size, kind = math.prod(action.shape), jnp.dtype(dtype)
    one = jnp.ones(size, kind)
    dense = 1 < size <= dense_limit
    factor = jnp.eye(size, dtype=kind) if dense else one
    unknown = jnp.asarray(jnp.inf, kind)
    return CalibratedScore(
        time=jnp.asarray(0.9, kind),
        order=jnp.asarray(2),
        relative_error=unknown,
        ratio=unknown,
        ratios=jnp.zeros(_NUM_RATIOS, kind),
        criterion=jnp.zeros((2, _NUM_RATIOS), kind),
        relative_errors=jnp.zeros((2, _NUM_RATIOS), kind),
        settled=jnp.asarray(False),
        whitening=Whitening(factor, factor, one),
        groups=one[None],
        times=jnp.full(1, 0.9, kind),
    )


def _explained_information(
    scores: Float[Array, "times batch *action"],
    divergences: Float[Array, "times batch"],
    energies: Float[Array, " batch"],
    slopes: Float[Array, "batch times"],
) -> Scalar:
    r"""The Fisher information that a linear regression of the score on the estimates explains.

    By Stein's identity $\mathbb E[s \cdot f] = -\mathbb E[\nabla \cdot f]$ for any field $f$, so
    the unknown score can be regressed on fields: here on $\hat s$ and on $e^{-u/c} \hat s$, with
    $u = \frac12\|\hat s\|^2$ at the chosen time and several $c$. NaN if no field is finite.
    """
    num_times, num_actions = divergences.shape
    scores = scores.reshape(num_times, num_actions, -1)
    quantiles = jnp.asarray([0.25, 0.5, 0.75, 0.9], energies.dtype)
    levels = jnp.nanquantile(energies, quantiles)[:, None]
    # ∇·(e^{-u/c} ŝ) = e^{-u/c} (∇·ŝ - ŝ·∇u / c)
    gates = jnp.exp(-energies[None] / levels)
    gated = gates[:, None] * (divergences[None] - slopes.T[None] / levels[:, None])
    gates = jnp.concatenate([gates, jnp.ones_like(gates[:1])])  # the last holds nothing back
    target = -jnp.mean(jnp.concatenate([gated, divergences[None]]), axis=2).reshape(-1)
    # Level by level, as the fields themselves would take much memory.
    products = jnp.einsum("tni,uni->tun", scores, scores)
    gram = jnp.einsum("ln,mn,tun->ltmu", gates, gates, products) / num_actions
    gram = gram.reshape(len(target), len(target))

    # An estimate that is not finite accounts for nothing; the others are scaled to be alike.
    squares = jnp.diagonal(gram)
    known = jnp.isfinite(squares) & (squares > 0) & jnp.isfinite(target)
    scale: Array = jnp.where(known, jnp.sqrt(squares), 1)
    target = jnp.where(known, target / scale, 0)
    gram = jnp.where(known[:, None] & known[None], gram / jnp.outer(scale, scale), 0)
    ridge = 1e-4 * jnp.eye(len(gram), dtype=gram.dtype)  # neighbouring estimates are much alike
    weights = jnp.linalg.solve(gram + ridge, target)
    explained: Array = 2 * weights @ target - weights @ gram @ weights
    return explained + jnp.where(jnp.any(known), 0, jnp.nan)


def is_open(x: Any) -> bool:
    """Whether `x` is a score to which no time was given."""
    return isinstance(x, PerturbedScore) and x.time is None


def has_open_score(method: Any) -> bool:
    return any(is_open(x) for x in jax.tree.leaves(method, is_leaf=is_open))


def calibrate(
    method: Any,
    policy: AbstractFlowPolicy,
    observations: PyTree[Any],
    actions: Any,
    key: PRNGKeyArray,
) -> Any:
    """Replaces the scores to which no time was given in a method, or in a metric."""
    if not has_open_score(method):
        return method
    draw_key, key = jr.split(key)
    policy = in_continuous_time(policy, observations, key=draw_key)
    if actions is None:
        observations, actions = _draw(policy.flow_policy, observations, draw_key)
    score = calibrate_score(policy, observations, actions, key=key)
    return jax.tree.map(lambda x: score if is_open(x) else x, method, is_leaf=is_open)


_num_drawn = 8192  # as many as `calibrate_score` uses


@eqx.filter_jit
def _draw(policy, observations, key):
    row_key, action_key = jr.split(key)
    observations = random_rows(observations, _num_drawn, key=row_key)

    def draw(row):
        observation, key = row
        return policy.draw(observation, key=key)

    keys = jr.split(action_key, _num_drawn)
    return observations, lax.map(draw, (observations, keys), batch_size=256)
