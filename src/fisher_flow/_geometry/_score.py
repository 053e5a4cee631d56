import abc
import math
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.core
import jax.numpy as jnp
import numpy as np
from equinox import AbstractVar
from jaxtyping import Array, Float, Scalar, ScalarLike

from .._custom_types import Action, Observation
from .._flows import AbstractAffineGaussianPath, as_flow_policy
from .._linalg import Whitening
from .._trees import as_inexact


class AbstractScore(eqx.Module):
    r"""Abstract base class for estimates of the score $\nabla_a \log \pi(a \mid o)$ of a policy.

    The score is not learned: it is read off the velocity of the flow shortly before time 1, where
    the density belongs to the actions smoothed by a little noise. How little is the choice to
    make: with more noise the score belongs to a blurred density, with less it amplifies the
    errors of the velocity.
    """

    whitening: AbstractVar[Whitening | None]

    @abc.abstractmethod
    def from_velocity(
        self,
        path: AbstractAffineGaussianPath,
        velocity: Callable[[Scalar, Action], Action],
        action: Action,
    ) -> Action:
        """The score at an action, from a velocity field.

        **Arguments:**

        - `path`: the path along which the velocity was trained.
        - `velocity`: a function of a time and a point.
        - `action`: where to evaluate the score.

        **Returns:**

        The score, with the shape and dtype of `action`.
        """

    @eqx.filter_jit
    def __call__(self, policy: Any, observation: Observation, action: Action) -> Action:
        r"""The score of a policy at an action.

        **Arguments:**

        - `policy`: a flow policy, or a refined policy. The score of a refined policy follows from
            the score of its flow by the change of variables.
        - `observation`: one observation, any PyTree of arrays.
        - `action`: where to evaluate the score.

        **Returns:**

        The score, with the shape and dtype of `action`.
        """
        action = as_inexact(action)
        return as_flow_policy(policy).score(self.from_velocity, observation, action)


class PaperScore(AbstractScore):
    r"""The score of the Fisher Decorator paper: the score of the path at a perturbed time,

    $$\hat s(a) = \nabla \log p_t(a) = \frac{t\, v(t, a) - a}{1 - t}$$

    on the linear path. Here $p_t$ is the density of $t a + (1 - t) x_0$, which lies closer to the
    origin than the actions do, so its bias is $O(r)$ in the noise ratio
    $r = \sigma(t) / \alpha(t)$. [`fisher_flow.PerturbedScore`][] does better at the same cost.

    ??? cite "Reference"

        Section 4 of

        ```bibtex
        @article{cheng2026fisher,
            title={Fisher Decorator: Refining flow policy via a local transport map},
            author={Cheng and Wang and Yuan and Wang and Chen and Zeng and Sun},
            journal={arXiv:2604.17919},
            year={2026},
        }
        ```
    """

    time: ScalarLike
    whitening: None = eqx.field(default=None, init=False)  # all directions are alike

    def __init__(self, time: ScalarLike = 0.8):
        """**Arguments:**

        - `time`: the perturbed time, in (0, 1). The paper uses 0.8.

        **Raises:**

        - `ValueError` if `time` is outside (0, 1).
        """
        self.time = _checked_time(time)

    def from_velocity(
        self,
        path: AbstractAffineGaussianPath,
        velocity: Callable[[Scalar, Action], Action],
        action: Action,
    ) -> Action:
        t = jnp.asarray(self.time, action.dtype)
        return path.score(t, action, velocity(t, action))


class PerturbedScore(AbstractScore):
    r"""The score of the actions smoothed by a little Gaussian noise, extrapolated to none.

    At time $t$ the flow knows the density of $\alpha a + \sigma x_0$, that is of the actions
    smoothed with standard deviation $r = \sigma / \alpha$ and then rescaled by $\alpha$. Undoing
    the scale gives the score of the smoothed density exactly,

    $$s_r(a) = \nabla \log \bigl(\pi * \mathcal N(0, r^2 I)\bigr)(a)
        = \alpha \nabla \log p_t(\alpha a),$$

    whose bias is $O(r^2)$. Since only even powers of $r$ appear, Richardson's extrapolation
    $2 s_{r/\sqrt 2}(a) - s_r(a)$ has bias $O(r^4)$.

    !!! tip

        Later times amplify the errors of a learned velocity, and the second order does so more than
        the first. The best time depends on the scale of the actions and on the training, and it is
        another for an entry of another scale: [`fisher_flow.calibrate_score`][] finds it.
    """

    time: ScalarLike | None
    order: int = eqx.field(static=True)
    whitening: None = eqx.field(default=None, init=False)  # all directions are alike

    def __init__(self, time: ScalarLike | None = None, order: int = 2):
        """**Arguments:**

        - `time`: the time in (0, 1) at which the flow is evaluated. Without one, `refine` replaces
            this score and its order by a calibrated score if it is given observations; otherwise
            the time is 0.95.
        - `order`: 1 for the score of the smoothed density, at one evaluation of the velocity; 2 to
            extrapolate with a second evaluation, at the later time at which the variance of the
            noise is half as large.

        **Raises:**

        - `ValueError` if `time` is outside (0, 1) or `order` is not 1 or 2.
        """
        if order not in (1, 2):
            raise ValueError(
                f"`order` must be 1 (rescaled) or 2 (Richardson), but got `{order!r}`. Write "
                "`PerturbedScore(order=2)`."
            )
        self.time = None if time is None else _checked_time(time)
        self.order = int(order)

    def from_velocity(
        self,
        path: AbstractAffineGaussianPath,
        velocity: Callable[[Scalar, Action], Action],
        action: Action,
    ) -> Action:
        t = jnp.asarray(0.95 if self.time is None else self.time, action.dtype)
        if self.order == 1:
            return _smoothed_score(path, velocity, t, action)
        later = path.time_at_noise_ratio(path.noise_ratio(t) / math.sqrt(2))
        # One call of the network on two rows, rather than two calls on one.
        coarse, fine = jax.vmap(lambda t: _smoothed_score(path, velocity, t, action))(
            jnp.stack([t, later])
        )
        return 2 * fine - coarse


def grouped_score(
    path: AbstractAffineGaussianPath,
    velocity: Callable[[Scalar, Action], Action],
    action: Action,
    times: Float[Array, " groups"],
    order: int,
    groups: Float[Array, "groups size"],
    whitening: Whitening,
) -> Action:
    """The smoothed score, with one time for each group of directions of a whitening.

    It is zero in directions in which the actions do not vary.
    """
    later = jax.vmap(lambda t: path.time_at_noise_ratio(path.noise_ratio(t) / math.sqrt(2)))(times)
    every = times if order == 1 else jnp.concatenate([times, later])
    # One call of the network on all times.
    s = jax.vmap(lambda t: _smoothed_score(path, velocity, t, action))(every)
    s = s if order == 1 else 2 * s[len(times) :] - s[: len(times)]
    whitened = jax.vmap(whitening.whiten_gradient)(s.reshape(len(times), -1))
    return whitening.colour_gradient(jnp.sum(groups * whitened, axis=0)).reshape(action.shape)


def _smoothed_score(path, velocity, t, action) -> Float[Array, "..."]:
    α = path.alpha(t)
    return α * path.score(t, α * action, velocity(t, α * action))


def _checked_time(time: ScalarLike) -> ScalarLike:
    if not isinstance(time, jax.core.Tracer) and not 0 < np.asarray(time) < 1:
        raise ValueError(
            f"`time` must lie strictly between 0 (noise) and 1 (action), but got `{time!r}`. Write "
            "`time=0.95`."
        )
    return time
