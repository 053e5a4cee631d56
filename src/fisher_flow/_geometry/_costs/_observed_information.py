from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import lineax as lx
from jaxtyping import PRNGKeyArray, ScalarLike

from ..._checks import check_at_least, check_instance, check_positive_integer
from ..._custom_types import Action, Observation
from ..._linalg import (
    dense_limit,
    KrylovPositivePart,
    smooth_positive_part,
    value_and_jacobian,
    WhitenedOperator,
    Whitening,
)
from .._score import AbstractScore, PerturbedScore
from ._cost import AbstractMetric


class ObservedInformation(AbstractMetric):
    r"""The local curvature of the behaviour density, made positive,

    $$G(a) = \bigl(-\nabla_a^2 \log \pi(a \mid o)\bigr)_+ .$$

    Statisticians call $-\nabla^2 \log \pi$ the observed information; its mean over the actions is
    the Fisher information. It has full rank at every single action and adapts to it: steep
    directions cost much, flat directions little. A step $G^{-1} \nabla_a Q$ is Newton's step in
    action space.

    For large actions, such as chunks, the curvature is never formed: its positive part is found in
    a space of a few dimensions, spanned by the vector that it acts on and the images of this vector
    under the curvature, as in the method of conjugate gradients. Time and memory are then linear in
    the size.

    Between modes the density curves the other way. There the positive part prices the direction
    at nearly nothing, so a step must be damped, as [`fisher_flow.NaturalStep`][] does.

    The positive part is taken, and the damping added, in the coordinates of the score. In the
    coordinates of a [`fisher_flow.CalibratedScore`][] the actions have covariance one, so the units
    of the entries do not matter, and entries that never vary do not move.
    """

    score: AbstractScore = PerturbedScore()
    smoothing: ScalarLike = 0.1
    rank: int | None = eqx.field(static=True, default=None)

    def __check_init__(self):
        check_instance("score", self.score, AbstractScore, "fisher_flow.PerturbedScore()")
        check_at_least("smoothing", self.smoothing, 0, 0.1)
        if self.rank is not None:
            check_positive_integer("rank", self.rank, 4)

    def operator(
        self, policy: Any, observation: Observation, action: Action, *, key: PRNGKeyArray
    ) -> lx.AbstractLinearOperator:
        del key
        whitening = self.score.whitening
        if whitening is None:
            whitening = Whitening.identity(action)

        def score(z):
            moved = action + whitening.colour(z).reshape(action.shape)
            return whitening.whiten_gradient(self.score(policy, observation, moved).reshape(-1))

        def squared_width(s, mean_squared_curvature):
            information = mean_squared_curvature + (jnp.sum(s**2) / whitening.rank) ** 2
            return jnp.asarray(self.smoothing, s.dtype) ** 2 * information

        zero = jnp.zeros(action.size, action.dtype)
        if self.rank is None and action.size <= dense_limit:
            s, J = value_and_jacobian(score, zero)
            # A learned velocity is not exactly a gradient field, so neither is its score.
            curvature = -0.5 * (J + J.T)
            width = squared_width(s, jnp.sum(curvature**2) / whitening.rank)
            G = smooth_positive_part(curvature, width)
            operator = lx.MatrixLinearOperator(G, lx.positive_semidefinite_tag)
            return WhitenedOperator(operator, whitening)

        s, push = jax.linearize(score, zero)
        operator = KrylovPositivePart(
            lambda z: -push(z),
            lambda mean_squared_curvature: squared_width(s, mean_squared_curvature),
            4 if self.rank is None else min(self.rank, action.size),
            jax.ShapeDtypeStruct((action.size,), action.dtype),
        )
        return WhitenedOperator(operator, whitening)


ObservedInformation.__init__.__doc__ = r"""**Arguments:**

- `score`: the estimate of the score.
- `smoothing`: the width of the corner of the positive part
    $\tfrac12 (\lambda + \sqrt{\lambda^2 + \epsilon^2})$ of an eigenvalue, relative to the
    information at the action: $\epsilon$ is `smoothing` times the root of
    $\overline{\lambda^2} + (\|s\|^2 / d)^2$, which does not vanish where the curvature
    changes its sign. Without it the metric has kinks, at which a transport map folds.
"""
