from collections.abc import Callable

import jax.core
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Scalar, ScalarLike


def scaled(scale: Scalar, x: Array) -> Array:
    """The product; zero at a scale of zero, whatever `x`."""
    return jnp.where(scale > 0, scale * x, 0)


def is_zero(radius: ScalarLike) -> bool:
    """Whether nothing may be spent, as far as it is known before the program runs."""
    return not isinstance(radius, jax.core.Tracer) and bool(radius == 0)


def scale_to_radius(
    measure: Callable[[Scalar], tuple[Scalar, Scalar]],
    radius: ScalarLike,
    initial: Scalar,
    *,
    max_folded: ScalarLike,
    after_others: bool = False,
    max_growth: float = 1024.0,
    rtol: float = 0.01,
    max_steps: int = 30,
) -> tuple[Scalar, Scalar]:
    r"""The largest scale of a displacement at which the measured KL stays within the radius.

    Brackets the root of $\sqrt{\mathrm{KL}(c)} - \sqrt{\epsilon}$ and closes the bracket by false
    position, every third step by bisection. The root of the KL is nearly linear in the scale, so
    a few measurements are enough.

    **Arguments:**

    - `measure`: maps a scale to the measured KL and the share of actions that are folded.
    - `radius`: the KL in nats.
    - `initial`: the first scale to try.
    - `max_folded`: a scale at which more of the actions are folded is too large.
    - `after_others`: whether other maps come before this one. Then a scale of zero is measured
        first: the KL that they have spent counts. No scale can undo their folds, so this many folds
        are allowed.
    - `max_growth`: no scale beyond this multiple of `initial` is tried.

    **Returns:**

    - The scale. It is zero if no scale is allowed, as when the measured KL is not finite. It is
        also zero if the KL stays below the radius however far the actions move: then the score
        cannot be trusted.
    - The KL measured there.
    """
    radius = jnp.asarray(radius, initial.dtype)
    target = jnp.sqrt(radius)
    limit = max_growth * initial
    zero = jnp.zeros_like(initial)

    def unfinished(state: tuple[Array, ...]) -> Bool[Array, ""]:
        step, _, low, kl_low, high, _, _, _ = state
        met = (kl_low >= (1 - rtol) * radius) | (low >= limit)
        return (step < max_steps) & ~met & (high - low > 1e-3 * jnp.minimum(high, initial))

    def body(state: tuple[Array, ...]) -> tuple[Array, ...]:
        step, scale, low, kl_low, high, kl_high, bound, root_zero = state
        kl, folded = measure(scale)
        folded = folded.astype(initial.dtype)
        bound = jnp.where(scale > 0, bound, jnp.maximum(bound, folded))
        root_zero = jnp.where(scale > 0, root_zero, jnp.sqrt(jnp.maximum(kl, 0)))
        # A KL is not negative: where it is measured far below zero, or is not a number, the
        # estimate fails.
        allowed = (kl <= radius) & (kl >= -0.1 * radius) & (folded <= bound)
        # A scale that folds or fails is beyond the radius by an unknown amount.
        kl_beyond = jnp.where((kl > radius) & (folded <= bound), kl, jnp.inf)
        low, kl_low = jnp.where(allowed, scale, low), jnp.where(allowed, kl, kl_low)
        high, kl_high = jnp.where(allowed, high, scale), jnp.where(allowed, kl_high, kl_beyond)

        root_low = jnp.sqrt(jnp.maximum(kl_low, 0))
        # Without an upper end yet: extrapolate from zero. Aim a little below the radius.
        rise, to_go = root_low - root_zero, (1 - rtol / 4) * target - root_zero
        growth = jnp.clip(to_go / jnp.where(rise > 0, rise, 1), 1.05, 4)
        outward = low * jnp.where(rise > 0, growth, 4)
        slope = jnp.where(jnp.isfinite(kl_high), jnp.sqrt(kl_high) - root_low, 1)
        fraction = jnp.clip(((1 - rtol / 4) * target - root_low) / slope, 0.05, 0.95)
        bisect = ~jnp.isfinite(kl_high) | (step % 3 == 2)
        inward = low + jnp.where(bisect, 0.5, fraction) * (high - low)
        outward = jnp.where(low > 0, jnp.minimum(outward, limit), initial)
        scale = jnp.where(high < limit, inward, outward)
        return step + 1, scale, low, kl_low, high, kl_high, bound, root_zero

    # The bracket starts as (0, limit], with nothing measured at its upper end.
    infinity = jnp.full_like(initial, jnp.inf)
    first = zero if after_others else initial
    bound = jnp.asarray(max_folded, initial.dtype)
    state = (jnp.asarray(0), first, zero, zero, limit, infinity, bound, zero)
    possible = (radius > 0) & jnp.isfinite(initial) & (initial > 0)
    state = lax.while_loop(lambda state: possible & unfinished(state), body, state)
    _, _, scale, kl, *_ = state
    believable = scale < limit
    return jnp.where(believable, scale, 0), jnp.where(believable, kl, 0)
