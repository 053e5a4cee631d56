import abc
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import diffrax
import equinox as eqx
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, PRNGKeyArray, Scalar

from ..._checks import check_instance, check_positive_integer
from ..._custom_types import Action, Observation
from ..._flows import FlowPolicy
from ..._linalg import dense_limit, rademacher_probes
from ..._trees import as_inexact


# `steered(t, x)`: the velocity of a flow, and what is added to it.
SteeredPair = Callable[[Scalar, Action], tuple[Action, Action]]


class SteeredAction(NamedTuple):
    """An action of a steered flow, and how much more likely it is than under the flow itself."""

    action: Action
    """The action, before its bounds."""

    log_ratio: Scalar
    r"""$\log q(a) - \log p(a)$ in nats; NaN where it is not known."""


class AbstractLogRatio(eqx.Module):
    r"""Abstract base class for the ways to compute the log-ratio of a steered flow,

    $$r = \log \frac{q_1}{p_1}(x_1), \qquad x' = v(t, x) + \Delta(t, x), \quad
        x(0) \sim \mathcal N(0, I),$$

    along the trajectory that draws $x_1$. Here $p_t$ are the densities of the flow $v$, and $q_t$
    the densities of the steered flow $v + \Delta$. The mean of $r$ is
    $\operatorname{KL}(q_1 \,\|\, p_1)$; [`fisher_flow.mean_log_ratio`][] takes it with less noise.
    """

    @abc.abstractmethod
    def __call__(
        self,
        flow: FlowPolicy,
        steered: SteeredPair,
        observation: Observation,
        noise: Action,
        *,
        key: PRNGKeyArray | None = None,
    ) -> SteeredAction:
        r"""Carries a noise to an action along the steered flow, together with its log-ratio.

        **Arguments:**

        - `flow`: the flow policy that is steered.
        - `steered`: called as `steered(t, x)`; returns the velocity $v$ of `flow` there, and
            $\Delta$.
        - `observation`: one observation, any PyTree of arrays.
        - `noise`: the point $x(0)$ to start from.
        - `key`: a `jax.random.key` for probes, if there are any.

        **Returns:**

        A [`fisher_flow.SteeredAction`][].
        """


def mean_log_ratio(
    log_ratios: Float[Array, " actions"],
    controls: Float[Array, " actions"] | None = None,
    *,
    minus: Float[Array, " actions"] | None = None,
) -> tuple[Scalar, Scalar]:
    r"""The mean of log-ratios, which is a KL, with most of its noise taken away.

    Since $r = \log q - \log p$ at actions of $q$,

    $$\mathbb E[r] = \operatorname{KL}(q \,\|\, p), \qquad \mathbb E[e^{-r} - 1] = 0 .$$

    A single $r$ is of first order in the difference of the two policies, but its mean is of second
    order. So $e^{-r} - 1$ is added: its mean is zero, and to first order it is $-r$. Its
    coefficient is the one that leaves least variance. At 0.02 nats this saves 100 times as many
    actions.

    **Arguments:**

    - `log_ratios`: one number for each action of the steered policy. Numbers that are not finite
        are left out.
    - `controls`: further numbers whose mean is zero, to use instead of $e^{-r} - 1$;
        [`fisher_flow.PathLogRatio`][]`.control` makes such numbers.

    **Other arguments:**

    - `minus`: another estimate of the same KL, one number for each action. Then the mean of the
        difference is returned. An error that both estimates share is not in its standard error.

    **Returns:**

    - The mean in nats.
    - Its standard error.
    """
    r = as_inexact(log_ratios)
    known = jnp.isfinite(r)
    count = jnp.sum(known, dtype=r.dtype)
    r = jnp.where(known, r, 0)
    c = jnp.expm1(-r) if controls is None else jnp.where(known, controls, 0)
    # A ratio that overflows tells nothing about the mean.
    c: Array = jnp.where(jnp.isfinite(c), c, jnp.zeros_like(c))
    mean = lambda x: jnp.sum(x * known.astype(x.dtype)) / count
    centred = c - mean(c)
    variance = mean(centred**2)
    if minus is not None:
        r = r - jnp.where(known, jnp.asarray(minus, r.dtype), 0)
    slope = -mean(r * centred) / jnp.where(variance > 0, variance, 1)
    if controls is None and minus is None:
        # Between 0 and 1 a few heavy weights do no harm.
        slope = jnp.clip(slope, 0, 1)
    values = r + lax.stop_gradient(slope) * c
    result = mean(values)
    return result, jnp.sqrt(mean((values - result) ** 2) / (count - 1))


def check_solve(num_probes: Any, solver: Any, stepsize_controller: Any) -> None:
    if num_probes is not None:
        check_positive_integer("num_probes", num_probes, 1)
    if solver is not None:
        check_instance("solver", solver, diffrax.AbstractSolver, "diffrax.Tsit5()")
    if stepsize_controller is not None:
        check_instance(
            "stepsize_controller",
            stepsize_controller,
            diffrax.AbstractStepSizeController,
            "diffrax.PIDController(rtol=1e-5, atol=1e-5)",
        )


def probes_for(num_probes, like, key):
    if num_probes is None and like.size <= dense_limit:
        return None
    num_probes = 1 if num_probes is None else num_probes
    if key is None:
        raise ValueError(
            f"`key` must be given for an action of shape {like.shape}: its divergence is estimated "
            "by random probes. Write `key=jax.random.key(0)`."
        )
    return rademacher_probes(num_probes, like, key)


def log_normal(x) -> Scalar:
    return -0.5 * jnp.sum(x**2) - 0.5 * x.size * math.log(2 * math.pi)
