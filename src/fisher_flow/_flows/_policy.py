import abc
import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import diffrax
import equinox as eqx
import jax
import jax.core
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from equinox import AbstractVar
from jaxtyping import Array, Float, PRNGKeyArray, Scalar, ScalarLike

from .._checks import check_instance, check_positive_integer, checked_shape
from .._custom_types import Action, Observation
from .._linalg import rademacher_probes, value_and_divergence, value_and_jacobian
from .._trees import as_inexact, in_full_precision, is_half
from ._bounds import checked_bounds, clip, TanhBounds
from ._fixed_steps import (
    are_plain_steps,
    check_controller,
    fixed_times,
    FixedSteps,
    has_fixed_steps,
    take_steps,
)
from ._foreign import check_inference
from ._given import given
from ._path import AbstractAffineGaussianPath, LinearPath


class AbstractPolicy(eqx.Module):
    """Abstract base class for everything that draws actions.

    Policies are written for one observation; use `jax.vmap` to act on a batch.
    """

    action_shape: AbstractVar[tuple[int, ...]]
    bounds: AbstractVar[tuple[Any, Any] | TanhBounds | None]

    @abc.abstractmethod
    def draw(self, observation: Observation, *, key: PRNGKeyArray) -> Action:
        """Draws an action *before* it is held to the bounds.

        Densities, scores and KLs are those of this variable: clipping leaves atoms at the bounds,
        which no density describes. Clipping two policies alike never increases their KL. So a bound
        on the KL of these actions is a bound for the executed actions too.

        **Arguments:**

        - `observation`: one observation, any PyTree of arrays.
        - `key`: a `jax.random.key`.

        **Returns:**

        An action of shape `action_shape`.
        """

    @eqx.filter_jit
    def sample(self, observation: Observation, *, key: PRNGKeyArray) -> Action:
        """Samples an action inside the bounds.

        **Arguments:**

        - `observation`: one observation, any PyTree of arrays.
        - `key`: a `jax.random.key`.

        **Returns:**

        An action of shape `action_shape`.
        """
        return self.project(self.draw(observation, key=key))

    def project(self, action: Action) -> Action:
        """Holds `action` to the bounds: clips it, or squashes it by [`fisher_flow.TanhBounds`][].
        Without bounds it is returned untouched."""
        if self.bounds is None:
            return action
        if isinstance(self.bounds, TanhBounds):
            return self.bounds.project(action)
        return clip(self.bounds, action)


class AbstractFlowPolicy(AbstractPolicy):
    """Abstract base class for policies with a density, and so with a score.

    Such a policy is a flow, or a flow followed by transport maps, which move each action.
    """

    @property
    @abc.abstractmethod
    def flow_policy(self) -> "FlowPolicy":
        """The flow underneath all transport maps."""

    @abc.abstractmethod
    def from_flow(self, observation: Observation, action: Action) -> Action:
        """Carries an action of `flow_policy` through all transport maps.

        **Arguments:**

        - `observation`: one observation, any PyTree of arrays.
        - `action`: an action of the flow, before its bounds.

        **Returns:**

        The action of this policy, before its bounds.
        """

    @abc.abstractmethod
    def to_flow(self, observation: Observation, action: Action) -> Action:
        """Finds the action of `flow_policy` that `from_flow` carries to `action`.

        **Arguments:**

        - `observation`: one observation, any PyTree of arrays.
        - `action`: an action of this policy, before its bounds.

        **Returns:**

        The action of the flow, before its bounds; NaN where none is found.
        """

    @abc.abstractmethod
    def log_prob(self, observation: Observation, action: Action) -> Scalar:
        """The log-density at an action, in nats, of the policy before its bounds."""

    @eqx.filter_jit
    def draw_and_log_prob(
        self, observation: Observation, *, key: PRNGKeyArray, **options: Any
    ) -> tuple[Action, Scalar]:
        r"""Draws an action before its bounds, together with its log-density.

        The density needs no inverse, since the action $b$ of the flow is known. With $T$ for all
        transport maps together, $\log \pi(T(b)) = \log \pi_0(b) - \log |\det \nabla T(b)|$.

        **Arguments:**

        - `observation`: one observation, any PyTree of arrays.
        - `key`: a `jax.random.key`; the same gives the same action as in `draw`.
        - `**options`: passed on to the `log_prob` of the flow, for example `num_probes=4`.

        **Returns:**

        The action, and its log-density in nats. The density is NaN where a map folds: there two
        actions are moved to one. With [`fisher_flow.TanhBounds`][], subtract
        `bounds.log_det(action)` for the density of the executed action.

        **Raises:**

        - What `log_prob` raises.
        """
        flow = self.flow_policy
        b = flow.draw(observation, key=key)
        # A key of its own: the probes must not depend on the noise that made the action.
        log_p: Array = flow.log_prob(observation, b, key=jr.fold_in(key, 1), **options)
        if flow is self:
            return b, log_p
        action, jacobian = value_and_jacobian(lambda b: self.from_flow(observation, b), b)
        sign, log_det = jnp.linalg.slogdet(jacobian)
        return action, log_p - log_det + jnp.where(sign > 0, 0, jnp.nan)

    @abc.abstractmethod
    def score(
        self, estimator: Callable[..., Action], observation: Observation, action: Action
    ) -> Action:
        """The gradient of the log-density in the action. Called by `AbstractScore`.

        **Arguments:**

        - `estimator`: called as `estimator(path, velocity, action)` with the path of the flow and
            its velocity, a function of a time and a point.
        - `observation`: one observation, any PyTree of arrays.
        - `action`: where to evaluate the score.

        **Returns:**

        The score, with the shape and dtype of `action`.
        """


class FlowPolicy(AbstractFlowPolicy):
    r"""A policy that carries noise to actions along a velocity field,

    $$\frac{\mathrm dx}{\mathrm dt} = v(t, x, o), \qquad x(0) \sim \mathcal N(0, I),
        \qquad a = x(1).$$

    !!! example

        ```python
        import fisher_flow
        import jax.random as jr

        def velocity(t, x, observation):  # carries N(0, I) to N(observation, 0.25 I)
            return observation + x_scale(t) * (x - t * observation)

        def x_scale(t):
            return (0.25 * t - (1 - t)) / (0.25 * t**2 + (1 - t) ** 2)

        policy = fisher_flow.FlowPolicy(velocity, action_shape=(3,))
        ```

    ??? cite "Reference"

        Flow matching was brought to offline reinforcement learning in this form (noise at time 0,
        linear path, 10 Euler steps) by

        ```bibtex
        @inproceedings{park2025flow,
            title={Flow {Q}-learning},
            author={Park, Seohong and Li, Qiyang and Levine, Sergey},
            booktitle={International Conference on Machine Learning},
            year={2025},
        }
        ```
    """

    velocity_field: Callable[[Scalar, Any, Any], Any]
    action_shape: tuple[int, ...] = eqx.field(static=True)
    path: AbstractAffineGaussianPath
    solver: diffrax.AbstractSolver
    num_steps: int = eqx.field(static=True)
    stepsize_controller: diffrax.AbstractStepSizeController
    adjoint: diffrax.AbstractAdjoint
    max_steps: int = eqx.field(static=True)
    bounds: tuple[Any, Any] | TanhBounds | None = eqx.field(static=True)
    dtype: Any = eqx.field(static=True)
    throw: bool = eqx.field(static=True)

    def __init__(
        self,
        velocity: Callable[[Scalar, Any, Any], Any],
        action_shape: Sequence[int],
        *,
        path: AbstractAffineGaussianPath = LinearPath(),
        solver: diffrax.AbstractSolver = diffrax.Euler(),
        num_steps: int = 10,
        stepsize_controller: diffrax.AbstractStepSizeController = diffrax.ConstantStepSize(),
        adjoint: diffrax.AbstractAdjoint = diffrax.RecursiveCheckpointAdjoint(),
        max_steps: int = 4096,
        bounds: Any = None,
        dtype: Any = None,
        throw: bool = True,
    ):
        """**Arguments:**

        - `velocity`: called as `velocity(t, x, observation)` for one sample; returns an array like
            `x`. Any callable: an `equinox.Module`, or a plain function. It may have a method
            `given(observation)` that returns the velocity as a function of `t` and `x`. Each solve
            calls that once, so an image is encoded once for all steps.
        - `action_shape`: the shape of one action, for example `(5,)`, or `(16, 7)` for a chunk.

        **Other arguments:**

        - `path`: the path along which the velocity was trained.
        - `solver`: any Diffrax solver for ordinary differential equations.
        - `num_steps`: the number of steps of equal length; with an adaptive
            `stepsize_controller`, the first step tried is `1 / num_steps`.
        - `stepsize_controller`: any Diffrax step-size controller. With `diffrax.StepTo(ts=ts)` the
            steps lead to the times `ts`, from 0 to 1, and `num_steps` has no effect.
        - `adjoint`: how Diffrax differentiates through `sample`. The default supports reverse
            mode. With `diffrax.Euler()` and steps of equal length it supports forward mode too;
            otherwise pass `diffrax.ForwardMode()` for it.
        - `max_steps`: the number of steps after which an adaptive solve gives up with an error.
        - `bounds`: `None`, or `(low, high)`, each a number or an array of shape `action_shape`, or
            the `Box` of a Gymnasium environment: samples are clipped to it. Or a
            [`fisher_flow.TanhBounds`][]: the flow then makes unbounded variables.
        - `dtype`: the dtype of the actions. By default the dtype of the arrays in `velocity`, else
            of the observation but no less than float32, else the default of JAX. With
            `dtype=jnp.float32` around a network in bfloat16 or float16, points and times are in
            float32 and the parameters stay as they are. `refine` and `certify` take a policy of
            half precision in this way, since its own samples are too coarse for densities.
        - `throw`: whether an adaptive solve that does not finish raises an error at run time.
            Otherwise its result is NaN.

        **Raises:**

        - `ValueError` if an argument is not of its kind, `low` is not below `high`, or `solver` and
            `stepsize_controller` do not fit together.
        """
        if not callable(velocity) or isinstance(velocity, type):
            raise ValueError(
                "`velocity` must be a function `velocity(t, x, observation)`, but got "
                f"`{velocity!r}`. Write `FlowPolicy(lambda t, x, observation: ..., action_shape)`."
            )
        check_inference("velocity", velocity)
        _check_same_path(velocity, path)
        check_instance("path", path, AbstractAffineGaussianPath, "fisher_flow.LinearPath()")
        check_instance("solver", solver, diffrax.AbstractSolver, "diffrax.Euler()")
        check_instance(
            "stepsize_controller",
            stepsize_controller,
            diffrax.AbstractStepSizeController,
            "diffrax.ConstantStepSize()",
        )
        check_controller(solver, stepsize_controller)
        check_instance(
            "adjoint", adjoint, diffrax.AbstractAdjoint, "diffrax.RecursiveCheckpointAdjoint()"
        )
        check_positive_integer("num_steps", num_steps, 10)
        check_positive_integer("max_steps", max_steps, 4096)
        self.velocity_field = velocity
        self.action_shape = checked_shape(action_shape)
        self.path = path
        self.solver = solver
        self.num_steps = num_steps
        self.stepsize_controller = stepsize_controller
        self.adjoint = adjoint
        self.max_steps = max_steps
        self.bounds = checked_bounds(bounds, self.action_shape)
        self.dtype = None if dtype is None else jnp.dtype(dtype)
        self.throw = bool(throw)

    @property
    def flow_policy(self) -> "FlowPolicy":
        return self

    def from_flow(self, observation: Observation, action: Action) -> Action:
        del observation
        return action

    def to_flow(self, observation: Observation, action: Action) -> Action:
        del observation
        return action

    def velocity(self, t: ScalarLike, x: Action, observation: Observation) -> Action:
        r"""The velocity $v(t, x, o)$.

        **Arguments:**

        - `t`: the time; 0 is noise and 1 is an action.
        - `x`: the point, of shape `action_shape`.
        - `observation`: one observation, any PyTree of arrays.

        **Returns:**

        The velocity, with the shape of `x`.

        **Raises:**

        - `ValueError` if the velocity field returns anything but an array like `x`.
        """
        return self.given(observation)(t, x)

    def given(self, observation: Observation) -> Callable[[ScalarLike, Action], Action]:
        """The velocity at one observation, which is encoded here and not at every call."""
        field = given(self.velocity_field, observation)
        inputs = self.velocity_field, observation

        def velocity(t, x):
            t = jnp.asarray(t, x.dtype)
            try:
                v = field(t, x)
            except (TypeError, ValueError):
                leaves = [leaf for leaf in jax.tree.leaves(inputs) if eqx.is_inexact_array(leaf)]
                if is_half(x.dtype) or not any(is_half(leaf.dtype) for leaf in leaves):
                    raise
                # Parameters of half precision that do not mix with others, as in a convolution.
                network, o = in_full_precision(inputs)
                v = given(network, o)(t, x)
            return self._checked(v, x)

        return velocity

    def _checked(self, v: Any, x: Action) -> Action:
        if jnp.shape(v) != self.action_shape or jnp.shape(x) != self.action_shape:
            raise ValueError(
                "`velocity(t, x, observation)` must map an `x` of shape `action_shape` to an "
                f"array of the same shape, but with `action_shape={self.action_shape}` it got "
                f"`x` of shape {jnp.shape(x)} and returned shape {jnp.shape(v)}. Both are for one "
                "sample, without a batch axis. Write "
                f"`FlowPolicy(velocity, action_shape={jnp.shape(v) or jnp.shape(x)})` if that is "
                "the shape of an action, and `jax.vmap(policy.sample)` for a batch."
            )
        return jnp.asarray(v, x.dtype)  # as when the observation is of another precision

    def noise(self, observation: Observation, *, key: PRNGKeyArray) -> Action:
        """Draws $x(0)$, in the dtype of the policy."""
        return jr.normal(
            key, self.action_shape, sample_dtype(self.dtype, self.velocity_field, observation)
        )

    def flow(self, observation: Observation, noise: Action) -> Action:
        """Integrates the velocity from `noise` at time 0 to an action at time 1.

        **Arguments:**

        - `observation`: one observation, any PyTree of arrays.
        - `noise`: the point $x(0)$.

        **Returns:**

        The point $x(1)$, not yet held to the bounds.
        """
        velocity = self.given(observation)
        return self.integrate(
            lambda t, x, args: velocity(t, x),
            noise,
            direction=1,
            solver=self.solver,
            stepsize_controller=self.stepsize_controller,
        )

    def draw(self, observation: Observation, *, key: PRNGKeyArray) -> Action:
        return self.flow(observation, self.noise(observation, key=key))

    @eqx.filter_jit
    def log_prob(
        self,
        observation: Observation,
        action: Action,
        *,
        num_probes: int | None = None,
        solver: diffrax.AbstractSolver = diffrax.Tsit5(),
        stepsize_controller: diffrax.AbstractStepSizeController | None = None,
        key: PRNGKeyArray | None = None,
    ) -> Scalar:
        r"""The log-density of the flow at an action, by the instantaneous change of variables

        $$\log p_1(x(1)) = \log \mathcal N(x(0); 0, I) - \int_0^1 \nabla \cdot v(t, x(t))
            \,\mathrm dt.$$

        This is the density of the flow in continuous time, before the bounds. It has a solver of
        its own: ten Euler steps make good samples but a poor density.

        **Arguments:**

        - `observation`: one observation, any PyTree of arrays.
        - `action`: where to evaluate the density.

        **Other arguments:**

        - `num_probes`: `None` for the exact divergence, at a cost that grows with the size of the
            action; or the number of random probes of Hutchinson's estimate.
        - `solver`, `stepsize_controller`: how to integrate. By default Tsitouras' 5(4) method with
            tolerances of 1e-5 (float32) or 1e-7 (float64). The times of a `diffrax.StepTo` may
            rise from 0 to 1 or fall from 1 to 0.
        - `key`: a `jax.random.key` for the probes; needed only with `num_probes`.

        **Returns:**

        The log-density in nats, a scalar of the dtype of `action`, or float32 for an action of half
        precision.

        **Raises:**

        - `ValueError` if `num_probes` is given without `key`.
        - An error at run time if the solver does not finish within `max_steps`.

        ??? cite "Reference"

            ```bibtex
            @inproceedings{grathwohl2019ffjord,
                title={{FFJORD}: Free-form continuous dynamics for scalable reversible generative
                       models},
                author={Grathwohl, Will and Chen, Ricky T. Q. and Bettencourt, Jesse
                        and Sutskever, Ilya and Duvenaud, David},
                booktitle={International Conference on Learning Representations},
                year={2019},
            }
            ```
        """
        action = in_full_precision(as_inexact(action))
        if num_probes is None:
            probes = None
        else:
            check_positive_integer("num_probes", num_probes, 8)
            if key is None:
                raise ValueError(
                    f"`log_prob` with `num_probes={num_probes}` is random and needs a key. Write "
                    f"`policy.log_prob(observation, action, num_probes={num_probes}, "
                    "key=jax.random.key(0))`."
                )
            probes = rademacher_probes(num_probes, action, key)
        if stepsize_controller is None:
            tol = 1e-7 if action.dtype == jnp.float64 else 1e-5
            stepsize_controller = diffrax.PIDController(rtol=tol, atol=tol)

        velocity = self.given(observation)

        def vector_field(t, state, args):
            x, _ = state
            return value_and_divergence(lambda y: velocity(t, y), x, probes)

        x0, minus_integral = self.integrate(
            vector_field,
            (action, jnp.zeros((), action.dtype)),
            direction=-1,
            solver=solver,
            stepsize_controller=stepsize_controller,
        )
        log_normaliser = 0.5 * action.size * math.log(2 * math.pi)
        return minus_integral - 0.5 * jnp.sum(x0**2) - log_normaliser

    def score(
        self, estimator: Callable[..., Action], observation: Observation, action: Action
    ) -> Action:
        return estimator(self.path, self.given(observation), action)

    def integrate(
        self,
        vector_field: Callable[[Any, Any, Any], Any],
        y: Any,
        *,
        direction: int,
        solver: diffrax.AbstractSolver,
        stepsize_controller: diffrax.AbstractStepSizeController,
    ) -> Any:
        """Integrates `vector_field(t, y, args)` from time 0 to 1, or back if `direction` is -1: for
        quantities that evolve along with an action."""
        dtype = jnp.result_type(*jax.tree.leaves(y))
        # Times carry the dtype of the state: otherwise, with 64-bit floats enabled, Diffrax
        # promotes a float32 state to float64.
        t0, t1 = (0, 1) if direction > 0 else (1, 0)
        check_controller(solver, stepsize_controller)
        if has_fixed_steps(stepsize_controller):
            # Rounded steps may leave a sliver at the end; stepping to given times cannot.
            ts = fixed_times(stepsize_controller, self.num_steps, dtype)
            if are_plain_steps(solver, self.adjoint):
                return take_steps(vector_field, y, ts[::direction], solver)
            stepsize_controller, dt0 = FixedSteps(ts[::direction]), None
            steps_arrive = True
            max_steps = len(ts) - 1
            throw = isinstance(solver, diffrax.AbstractImplicitSolver)  # explicit steps arrive
        else:
            dt0 = jnp.asarray(direction / self.num_steps, dtype)
            # Times of its own, which Diffrax compares with those of the solve.
            stepsize_controller = jax.tree.map(
                lambda leaf: leaf.astype(dtype) if eqx.is_inexact_array(leaf) else leaf,
                stepsize_controller,
            )
            max_steps = self.max_steps
            steps_arrive = False
            throw = self.throw
        solution = diffrax.diffeqsolve(
            diffrax.ODETerm(vector_field),
            solver,
            jnp.asarray(t0, dtype),
            jnp.asarray(t1, dtype),
            dt0,
            y,
            stepsize_controller=stepsize_controller,
            adjoint=self.adjoint,
            max_steps=max_steps,
            throw=throw,
        )
        assert solution.ys is not None
        finished = solution.result == diffrax.RESULTS.successful
        nan_unless = lambda leaf: (
            leaf if throw or steps_arrive else jnp.where(finished, leaf, jnp.nan)
        )
        return jax.tree.map(lambda leaf: nan_unless(leaf[0]), solution.ys)

    def step_times(self, dtype: Any) -> Float[Array, " times"] | None:
        """The ends of the steps of a sample, from 0 to 1; `None` if they adapt."""
        if not has_fixed_steps(self.stepsize_controller):
            return None
        return fixed_times(self.stepsize_controller, self.num_steps, dtype)


def changed(flow: FlowPolicy, **settings: Any) -> FlowPolicy:
    """The flow with other settings, by their names in `FlowPolicy`."""
    names = [field.name for field in dataclasses.fields(flow) if field.name != "velocity_field"]
    own: dict[str, Any] = {name: getattr(flow, name) for name in names}
    own["velocity"] = flow.velocity_field
    return FlowPolicy(**(own | settings))


def sample_dtype(dtype: Any, network: Any, observation: Observation) -> Any:
    """The dtype of actions: the one that is given. Else it is the dtype of the network's arrays,
    else of the observation but no less than float32, else JAX's default."""
    if dtype is not None:
        return dtype
    for tree in (network, in_full_precision(observation)):
        leaves = [x for x in jax.tree.leaves(tree) if isinstance(x, jax.Array | np.ndarray)]
        dtypes = [x.dtype for x in leaves if jnp.issubdtype(x.dtype, jnp.inexact)]
        if len(dtypes) > 0:
            return jnp.result_type(*dtypes)
    return jnp.result_type(float)


def _check_same_path(velocity: Any, path: Any) -> None:
    """A prediction along one path is not a velocity along another."""
    own = getattr(velocity, "path", None)
    if not isinstance(own, AbstractAffineGaussianPath):
        return
    equal = eqx.tree_equal(own, path)
    if isinstance(equal, jax.core.Tracer) or equal:
        return
    raise ValueError(
        f"`path` must be the path of `velocity`, which is `{own}`, but got `{path}`. Write "
        f"`FlowPolicy(velocity, action_shape, path=velocity.path)`."
    )


def as_flow_policy(policy: Any) -> AbstractFlowPolicy:
    """Accepts anything with `velocity`, `action_shape` and (else linear) `path`. The actions of the
    result are of float32 at least."""
    if isinstance(policy, AbstractFlowPolicy):
        return _in_full_precision(policy)
    if isinstance(policy, type) or not (
        callable(getattr(policy, "velocity", None)) and hasattr(policy, "action_shape")
    ):
        arrived = "the class" if isinstance(policy, type) else "a"
        arrived = f"{arrived} `{getattr(policy, '__name__', type(policy).__name__)}`"
        if isinstance(policy, AbstractPolicy):
            reason = (
                ", which draws actions but has no density of its own. Refine first and choose "
                "last, `BestOf(refine(policy, critic), critic, n)`, or write "
                "`policy=absorb(policy, observations, key=key).policy`."
            )
        elif isinstance(getattr(policy, "policy", None), AbstractPolicy):
            reason = ". Write `policy=result.policy`."
        else:
            reason = ". Write `FlowPolicy(velocity, action_shape=(5,))` around its velocity field."
        raise ValueError(
            "`policy` must be a flow policy, or an object with `velocity(t, x, observation)` and "
            f"`action_shape`, but got {arrived}{reason}"
        )
    return _in_full_precision(
        FlowPolicy(
            policy.velocity,
            policy.action_shape,
            path=getattr(policy, "path", LinearPath()),
            bounds=getattr(policy, "bounds", None),
        )
    )


def _in_full_precision(policy: AbstractFlowPolicy) -> AbstractFlowPolicy:
    """The policy with a flow whose actions are of float32 at least, from the same parameters."""
    flow = policy.flow_policy
    if not isinstance(flow, FlowPolicy):  # a steered one, which was made of such a flow
        return policy
    if not is_half(sample_dtype(flow.dtype, flow.velocity_field, None)):
        return policy
    full = changed(flow, dtype=jnp.float32)
    return full if flow is policy else eqx.tree_at(lambda p: p.flow_policy, policy, full)
