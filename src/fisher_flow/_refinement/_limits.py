"""Standard errors and confidence limits."""

import math

import jax.numpy as jnp
import jax.scipy.special
from jax.scipy.stats import norm
from jaxtyping import Array, Float


def mean_and_stderr(values: Float[Array, "observations actions ..."]) -> tuple[Array, Array]:
    """The mean of values at several actions of several observations, and its standard error."""
    # Actions of one observation are correlated; observations are not.
    means = jnp.mean(values, axis=1) if values.shape[0] > 1 else values[0]
    return jnp.mean(means, axis=0), standard_error(means)


def error_at_these_observations(values: Float[Array, "observations actions"]) -> Array:
    """The standard error of the mean for more actions at the same observations. If there is one
    action at each, the error is over observations instead."""
    num_actions = values.shape[1]
    if num_actions < 2:
        return standard_error(values[:, 0])
    return jnp.sqrt(jnp.mean(jnp.var(values, axis=1, ddof=1)) / values.size)


def normal_quantile(level: float) -> float:
    """The one-sided quantile of the normal distribution."""
    return float(norm.ppf(level))


def standard_error(values: Float[Array, "num ..."]) -> Float[Array, "..."]:
    """The standard error of the mean of some independent values; infinite for a single one."""
    num = values.shape[0]
    if num < 2:
        return jnp.full(values.shape[1:], jnp.inf, values.dtype)
    return jnp.std(values, axis=0, ddof=1) / math.sqrt(num)


def binomial_limit(count: int, num: int, level: float) -> float:
    """The upper confidence limit of a share, after `count` in `num` draws; exact for independent
    draws.

    ??? cite "Reference"

        ```bibtex
        @article{clopper1934use,
            title={The use of confidence or fiducial limits illustrated in the case of the
                   binomial},
            author={Clopper, C. J. and Pearson, E. S.},
            journal={Biometrika},
            volume={26},
            year={1934},
        }
        ```
    """
    if count >= num:
        return 1.0
    low, high = count / num, 1.0
    for _ in range(40):
        middle = 0.5 * (low + high)
        # The chance of no more than `count`, I_{1-p}(n - k, k + 1).
        tail = jax.scipy.special.betainc(
            jnp.asarray(num - count, float), jnp.asarray(count + 1, float), 1 - middle
        )
        low, high = (middle, high) if float(tail) > 1 - level else (low, middle)
    return high
