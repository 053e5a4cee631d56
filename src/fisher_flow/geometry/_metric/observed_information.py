from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import lineax as lx
from jaxtyping import PRNGKeyArray, Scalar, ScalarLike

from ..._custom_types import Action, Observation
from ..._divergence import value_and_jacobian
from ..._misc import check_at_least, check_instance
from .._score import AbstractScore, PerturbedScore
from .._spectral import smooth_positive_part
from .base import AbstractMetric, quadratic_form


class ObservedInformation(AbstractMetric):
    r"""The local curvature of the behaviour density, made positive,

    $$G(a) = \bigl(-\nabla_a^2 \log \pi(a \mid o)\bigr)_+ .$$

    Statisticians call $-\nabla^2 \log \pi$ the observed information; its mean over the actions is
    the Fisher information. It has full rank at every single action and adapts to it: steep
    directions are dear, flat ones cheap. A step $G^{-1} \nabla_a Q$ is Newton's step in action
    space.

    Between modes the density curves the other way. There the positive part prices the direction
    at nearly nothing, so a step must be damped, as [`fisher_flow.NaturalStep`][] does.
    """

    score: AbstractScore
    smoothing: ScalarLike

    def __init__(self, score: AbstractScore = PerturbedScore(), smoothing: ScalarLike = 0.1):
        r"""**Arguments:**

        - `score`: the estimate of the score; its Jacobian takes as many forward-mode products of
            the velocity as an action has entries.
        - `smoothing`: the width of the corner of the positive part
            $\tfrac12 (\lambda + \sqrt{\lambda^2 + \epsilon^2})$ of an eigenvalue, relative to the
            information at the action: $\epsilon$ is `smoothing` times the root of
            $\overline{\lambda^2} + (\|s\|^2 / d)^2$, which does not vanish where the curvature
            changes its sign. Without it the metric has kinks, at which a transport map folds.
        """
        check_instance("score", score, AbstractScore, "fisher_flow.PerturbedScore()")
        check_at_least("smoothing", smoothing, 0, 0.1)
        self.score = score
        self.smoothing = smoothing

    def operator(
        self, policy: Any, observation: Observation, action: Action, *, key: PRNGKeyArray
    ) -> lx.AbstractLinearOperator:
        del key
        s, J = value_and_jacobian(lambda a: self.score(policy, observation, a), action)
        # A learned velocity is not exactly a gradient field, so neither is its score.
        curvature = -0.5 * (J + J.T)
        information = jnp.sum(curvature**2) / s.size + (jnp.sum(s**2) / s.size) ** 2
        squared_width = jnp.asarray(self.smoothing, s.dtype) ** 2 * information
        G = smooth_positive_part(curvature, squared_width)
        return lx.MatrixLinearOperator(G, lx.positive_semidefinite_tag)

    def cost(
        self,
        policy: Any,
        observation: Observation,
        action: Action,
        displacement: Callable[[Action], Action],
        *,
        key: PRNGKeyArray,
    ) -> Scalar:
        operator = self.operator(policy, observation, action, key=key)
        return quadratic_form(operator, displacement(action))
