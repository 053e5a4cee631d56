from dataclasses import KW_ONLY

import diffrax
import equinox as eqx
import jax.numpy as jnp
from jaxtyping import PRNGKeyArray

from ..._custom_types import Action, Observation
from ..._flows import FlowPolicy
from ..._linalg import value_and_divergence
from ..._trees import as_inexact
from ._log_ratio import (
    AbstractLogRatio,
    check_solve,
    log_normal,
    probes_for,
    SteeredAction,
    SteeredPair,
)


class DensityLogRatio(AbstractLogRatio):
    r"""The log-ratio of two flows in continuous time, from the density of each,

    $$r = \log \mathcal N(x(0)) - \int_0^1 \nabla \cdot (v + \Delta) \,\mathrm dt - \log p(x(1)).$$

    The first two terms come with the steered trajectory; the last is
    [`fisher_flow.FlowPolicy.log_prob`][], a solve back along the flow itself. No score is read off
    the velocity, so it is exact for learned flows too. Both solves have a solver of their own, so
    the action belongs to the flow in continuous time and not to the few steps that act.

    An action costs two solves with a Jacobian of the velocity a step, or one product with it for
    each probe. The probes of both solves are the same, so that most of their error cancels.
    """

    num_probes: int | None = eqx.field(static=True, default=None)
    _: KW_ONLY
    solver: diffrax.AbstractSolver = diffrax.Tsit5()
    stepsize_controller: diffrax.AbstractStepSizeController | None = None

    def __check_init__(self):
        check_solve(self.num_probes, self.solver, self.stepsize_controller)

    @eqx.filter_jit
    def __call__(
        self,
        flow: FlowPolicy,
        steered: SteeredPair,
        observation: Observation,
        noise: Action,
        *,
        key: PRNGKeyArray | None = None,
    ) -> SteeredAction:
        noise = as_inexact(noise)
        probes = probes_for(self.num_probes, noise, key)
        unsteered = flow.given(observation)
        controller = self.stepsize_controller
        if controller is None:
            tol = 1e-7 if noise.dtype == jnp.float64 else 1e-5
            controller = diffrax.PIDController(rtol=tol, atol=tol)

        def density(velocity, state, direction):
            return flow.integrate(
                lambda t, state, args: value_and_divergence(
                    lambda x: velocity(t, x), state[0], probes
                ),
                state,
                direction=direction,
                solver=self.solver,
                stepsize_controller=controller,
            )

        zero = jnp.zeros((), noise.dtype)
        action, volume = density(lambda t, x: sum(steered(t, x)), (noise, zero), 1)
        origin, minus_volume = density(unsteered, (action, zero), -1)
        log_ratio = log_normal(noise) - volume - (log_normal(origin) + minus_volume)
        return SteeredAction(action, log_ratio)


DensityLogRatio.__init__.__doc__ = """**Arguments:**

- `num_probes`: the number of random probes for the divergences. By default they are exact
    for actions of up to 32 entries, and larger ones have one probe.

**Other arguments:**

- `solver`, `stepsize_controller`: how to integrate, as for
    [`fisher_flow.FlowPolicy.log_prob`][].
"""
