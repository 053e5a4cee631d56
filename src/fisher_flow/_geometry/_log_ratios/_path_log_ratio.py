from dataclasses import KW_ONLY

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import PRNGKeyArray, Scalar, ScalarLike

from ..._checks import check_at_least
from ..._custom_types import Action, Observation
from ..._flows import FlowPolicy
from ..._linalg import value_and_jacobian
from ..._trees import as_inexact
from ._log_ratio import AbstractLogRatio, check_solve, probes_for, SteeredAction, SteeredPair


class PathLogRatio(AbstractLogRatio):
    r"""The log-ratio in the pass that draws the action, from the score along the path.

    Along a steered trajectory

    $$\frac{\mathrm d}{\mathrm dt} \log \frac{q_t}{p_t}(x_t) =
        -\bigl(\nabla \cdot \Delta + \Delta \cdot s_t\bigr)(x_t), \qquad s_t = \nabla \log p_t .$$

    Both logarithms are differentiated along $x' = v + \Delta$, and the divergences of $v$ cancel.
    The score $s_t$ is read off the velocity, and only the divergence of $\Delta$ is needed. So
    there is no density to compute, no inverse to find and no second solve. An action costs one
    Jacobian of $\Delta$ a step, or one product with it for each probe.

    !!! warning

        Two things are assumed. The velocity is the velocity of the path, as only the exact
        minimiser of flow matching is: on a flow that was learned for Pendulum this KL was 14% too
        small, however fine the steps. And the steps are fine: for ten Euler steps it gives half of
        their KL. `DensityLogRatio` does not assume the first, and `ExecutedLogRatio` assumes
        neither.
    """

    num_probes: int | None = eqx.field(static=True, default=None)
    _: KW_ONLY
    solver: diffrax.AbstractSolver | None = None
    stepsize_controller: diffrax.AbstractStepSizeController | None = None
    margin: ScalarLike = 1e-3

    def __check_init__(self):
        check_solve(self.num_probes, self.solver, self.stepsize_controller)
        check_at_least("margin", self.margin, 0, 1e-3)

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
        del observation
        x = as_inexact(noise)
        r = jnp.zeros((), x.dtype)
        return SteeredAction(*self._solve(flow, steered, (x, r), key, direction=1, moved=True))

    @eqx.filter_jit
    def backward(
        self,
        flow: FlowPolicy,
        steered: SteeredPair,
        action: Action,
        *,
        key: PRNGKeyArray | None = None,
    ) -> Scalar:
        r"""The log-ratio at a given action, by following the steered flow back to its noise.

        **Arguments:**

        - `flow`, `steered`, `key`: as for `__call__`.
        - `action`: where to evaluate it.

        **Returns:**

        The log-ratio in nats.
        """
        x = as_inexact(action)
        r = jnp.zeros((), x.dtype)
        return -self._solve(flow, steered, (x, r), key, direction=-1, moved=True)[1]

    @eqx.filter_jit
    def control(
        self,
        flow: FlowPolicy,
        steered: SteeredPair,
        observation: Observation,
        noise: Action,
        *,
        key: PRNGKeyArray | None = None,
    ) -> Scalar:
        r"""The same integral along the trajectory of the *unsteered* flow, from the same noise.

        Its mean is zero by Stein's identity, and it is close to the log-ratio while the steering is
        small: a control variate for [`fisher_flow.mean_log_ratio`][].

        **Arguments:**

        - `flow`, `steered`, `observation`, `noise`, `key`: as for `__call__`.

        **Returns:**

        The integral $-\int_0^1 (\nabla \cdot \Delta + \Delta \cdot s_t) \,\mathrm dt$.
        """
        del observation
        x = as_inexact(noise)
        r = jnp.zeros((), x.dtype)
        return self._solve(flow, steered, (x, r), key, direction=1, moved=False)[1]

    def _solve(self, flow, steered, state, key, *, direction, moved):
        probes = probes_for(self.num_probes, state[0], key)
        latest = jnp.asarray(1 - self.margin, state[0].dtype)

        def terms(t, x):
            def displacement(x):
                v, Δ = steered(t, x)
                return Δ, v

            if probes is None:
                Δ, J, v = value_and_jacobian(displacement, x, has_aux=True)
                divergence = jnp.trace(J)
            else:
                Δ, push, v = jax.linearize(displacement, x, has_aux=True)
                divergence = jnp.mean(jax.vmap(lambda z: jnp.vdot(z, push(z)))(probes))
            s = flow.path.score(t, x, v)
            return v, Δ, -(divergence + jnp.vdot(Δ, s))

        def vector_field(t, state, args):
            x, _ = state
            v, Δ, rate = terms(jnp.minimum(t, latest), x)
            # The trajectory is the one of the sampler, to the very end.
            v, Δ = lax.cond(t > latest, lambda x: steered(t, x), lambda x: (v, Δ), x)
            return (v + Δ if moved else v), rate

        return flow.integrate(
            vector_field,
            state,
            direction=direction,
            solver=flow.solver if self.solver is None else self.solver,
            stepsize_controller=(
                flow.stepsize_controller
                if self.stepsize_controller is None
                else self.stepsize_controller
            ),
        )


PathLogRatio.__init__.__doc__ = r"""**Arguments:**

- `num_probes`: the number of random probes for the divergence. By default it is exact for
    actions of up to 32 entries, and larger ones have one probe.

**Other arguments:**

- `solver`, `stepsize_controller`: how to integrate $x$ and $r$ together. The default is the
    solver of the flow with its steps.
- `margin`: the integrand is evaluated no closer than this to time 1, where the score is the
    quotient of two numbers that vanish.
"""
