"""The boxes that actions are held to."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Scalar, ScalarLike

from .._custom_types import Action
from .._trees import as_inexact


class TanhBounds(eqx.Module):
    r"""A box of actions, each of which is a function of an unbounded variable $u$,

    $$a = \tfrac12 (\text{low} + \text{high}) + \tfrac12 (\text{high} - \text{low}) \tanh u .$$

    Clipping leaves atoms at the bounds, which no density describes. Here the flow makes $u$, and
    every action lies inside the box. So densities, scores and KLs hold up to the bounds. A KL is
    the same for $u$ as for $a$.

    !!! example

        Train the flow on `unproject(actions)`; the critic still sees actions.

        ```python
        import fisher_flow
        import jax
        import jax.numpy as jnp

        bounds = fisher_flow.TanhBounds(low=-1.0, high=1.0)
        observations = jnp.zeros((512, 2))
        actions = jax.random.uniform(jax.random.key(0), (512, 3), minval=-1.0)
        velocity = fisher_flow.VelocityMLP(2, (3,), width_size=32, key=jax.random.key(1))
        policy = fisher_flow.FlowPolicy(velocity, action_shape=(3,), bounds=bounds)
        policy = fisher_flow.fit_flow(
            policy, observations, bounds.unproject(actions), num_updates=200,
            progress=False, key=jax.random.key(2),
        )
        refined = fisher_flow.refine(policy, lambda observation, action: action.sum())
        action = refined.sample(observations[0], key=jax.random.key(3))

        u = bounds.unproject(action)
        log_prob = policy.log_prob(observations[0], u) - bounds.log_det(u)  # of the action itself
        ```
    """

    low: Any = eqx.field(static=True)
    high: Any = eqx.field(static=True)
    margin: float = eqx.field(static=True)

    def __init__(self, low: Any, high: Any, margin: float = 1e-4):
        r"""**Arguments:**

        - `low`, `high`: numbers or arrays of the shape of an action.
        - `margin`: an action at a bound has no finite $u$. `unproject` first moves it inside, by
            this share of half the box.

        **Raises:**

        - `ValueError` if they are not finite, or `low` is not below `high`.
        """
        if not np.all(np.isfinite(low)) or not np.all(np.isfinite(high)):
            raise ValueError(
                f"`TanhBounds` must be finite, but got `low={low}` and `high={high}`. Write "
                "`TanhBounds(-1.0, 1.0)`, or `bounds=None` for actions without bounds."
            )
        if np.all(np.asarray(low) <= np.asarray(high)) and np.any(
            np.asarray(low) == np.asarray(high)
        ):
            raise ValueError(
                f"`low` must be below `high` everywhere, but got `low={low}` and `high={high}`, "
                "where some entries are equal: such an entry is a constant, for which no unbounded "
                "variable can stand. Write `bounds=(low, high)`, which clips and allows constants."
            )
        if not np.all(np.asarray(low) < np.asarray(high)):
            raise ValueError(
                f"`low` must be below `high` everywhere, but got `low={low}` and `high={high}`. "
                "Write `TanhBounds(low, high)`, the lower bound first."
            )
        if not 0 < margin < 1:
            raise ValueError(
                f"`margin` must lie strictly between 0 and 1, but got `{margin!r}`. Write "
                "`margin=1e-4`."
            )
        self.low, self.high = as_tuples(low), as_tuples(high)
        self.margin = float(margin)

    def _centre_and_half(self, dtype) -> tuple[Array, Array]:
        low, high = (jnp.asarray(bound, dtype) for bound in (self.low, self.high))
        return 0.5 * (low + high), 0.5 * (high - low)

    def project(self, u: Action) -> Action:
        """The action of a variable `u`. It lies inside the box, up to rounding."""
        centre, half = self._centre_and_half(u.dtype)
        return centre + half * jnp.tanh(u)

    def unproject(self, action: Float[Array, "*batch"]) -> Float[Array, "*batch"]:
        """The variable `u` of an action, or of each action of a batch."""
        action = as_inexact(action)
        centre, half = (
            jnp.broadcast_to(x, action.shape) for x in self._centre_and_half(action.dtype)
        )
        limit = jnp.asarray(1 - self.margin, action.dtype)
        return jnp.arctanh(jnp.clip((action - centre) / half, -limit, limit))

    def log_det(self, u: Action) -> Scalar:
        r"""$\log \det \nabla_u a$: the log-density of $u$ minus the log-density of the action."""
        _, half = self._centre_and_half(u.dtype)
        # log(1 - tanh²) without the cancellation
        slope = 2 * (jnp.log(jnp.asarray(2, u.dtype)) - u - jax.nn.softplus(-2 * u))
        return jnp.sum(jnp.broadcast_to(jnp.log(half), u.shape) + slope)


def clip(bounds: tuple[Any, Any], action: Action) -> Action:
    low, high = (jnp.asarray(bound, action.dtype) for bound in bounds)
    return jnp.clip(action, low, high)


def checked_bounds(bounds: Any, action_shape: tuple[int, ...]) -> Any:
    """Bounds as nested tuples: constants, which an optimiser does not take for parameters.

    Where `low` equals `high`, clipping makes that entry of every action the constant they share.
    """
    if bounds is None:
        return None
    is_box = isinstance(bounds, TanhBounds) or (hasattr(bounds, "low") and hasattr(bounds, "high"))
    pair: Any = (bounds.low, bounds.high) if is_box else bounds
    try:
        low, high = (np.broadcast_to(np.asarray(bound, float), action_shape) for bound in pair)
    except (TypeError, ValueError):
        raise ValueError(
            "`bounds` must be `None`, a `TanhBounds`, a Gymnasium `Box`, or a pair `(low, high)`, "
            f"of numbers or arrays of shape {action_shape}, but got `{bounds!r}`. Write "
            "`bounds=(-1.0, 1.0)`."
        ) from None
    if not np.all(low <= high):
        raise ValueError(
            f"`bounds` must not have `low` above `high` anywhere, but got `low={low.tolist()}` and "
            f"`high={high.tolist()}`. Write `bounds=(low, high)`, the lower bound first: for "
            f"example `bounds=({float(np.min([low, high]))}, {float(np.max([low, high]))})`."
        )
    return bounds if isinstance(bounds, TanhBounds) else (as_tuples(pair[0]), as_tuples(pair[1]))


def as_tuples(bound: Any) -> ScalarLike | tuple:
    def convert(values):
        return tuple(map(convert, values)) if isinstance(values, list) else values

    return convert(np.asarray(bound, float).tolist())
