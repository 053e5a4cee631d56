"""Several values of one action, made into one."""

from collections.abc import Callable, Sequence
from typing import Any

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Float, Scalar, ScalarLike

from .._checks import check_at_least
from .._custom_types import Action, Critic, Observation


class LowerConfidenceBound(eqx.Module):
    r"""The mean of several values less a multiple of their standard deviation,
    $\bar Q - c \operatorname{std}(Q)$: a pessimist where critics disagree.

    !!! example

        ```python
        import fisher_flow
        import jax

        critic = fisher_flow.QEnsemble(
            3, 1, num_members=5, aggregate=fisher_flow.LowerConfidenceBound(1.0),
            key=jax.random.key(0),
        )
        ```
    """

    scale: ScalarLike = 1.0

    def __check_init__(self):
        check_at_least("scale", self.scale, 0, 1.0)

    def __call__(self, values: Float[Array, " members"]) -> Scalar:
        """The bound, a scalar in the units of the values."""
        mean = jnp.mean(values)
        variance = jnp.mean((values - mean) ** 2)
        # The root has no derivative where all of them agree.
        safe = jnp.where(variance > 0, variance, 1)
        deviation = jnp.where(variance > 0, jnp.sqrt(safe), 0)
        return mean - jnp.asarray(self.scale, values.dtype) * deviation


LowerConfidenceBound.__init__.__doc__ = """**Arguments:**

- `scale`: the multiple $c$ of the standard deviation.
"""


class Ensemble(eqx.Module):
    """One critic made of several, of any kind.

    !!! example

        ```python
        import fisher_flow
        import jax.numpy as jnp

        value = lambda observation, action: -jnp.sum((action - 1) ** 2)
        reward_model = lambda observation, action: -jnp.sum(jnp.abs(action))
        critic = fisher_flow.Ensemble([value, reward_model], aggregate=jnp.min)
        ```
    """

    critics: tuple[Critic, ...]
    aggregate: Callable[[Array], Any]

    def __init__(self, critics: Any, aggregate: Callable[[Array], Any] = jnp.mean):
        """**Arguments:**

        - `critics`: a sequence of functions of one observation and one action to a scalar.
        - `aggregate`: how their values become one: `jax.numpy.mean`, `jax.numpy.min`, or
            [`fisher_flow.LowerConfidenceBound`][].

        **Raises:**

        - `ValueError` if `critics` is not a sequence of functions.
        """
        if not isinstance(critics, Sequence) or not critics or not all(map(callable, critics)):
            raise ValueError(
                "`critics` must be a sequence of functions `critic(observation, action)`, but got "
                f"`{critics!r}`. Write `Ensemble([critic, another])`."
            )
        self.critics = tuple(critics)
        self.aggregate = aggregate

    def __call__(self, observation: Observation, action: Action) -> Scalar:
        """The value of an action."""
        values = [jnp.asarray(critic(observation, action)) for critic in self.critics]
        shapes = [value.shape for value in values]
        if set(shapes) != {()}:
            raise ValueError(
                "`critics` must return scalars for one observation and one action, but they "
                f"returned shapes {shapes}. Write "
                "`lambda observation, action: critic(observation, action).mean()` for those that "
                "do not."
            )
        return self.aggregate(jnp.stack(values))
