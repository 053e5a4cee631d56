from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import PRNGKeyArray, PyTree, Scalar, ScalarLike

from .._checks import batch_length, check_at_least, check_instance, check_positive_integer
from .._custom_types import Action, Observation
from .._flows import as_flow_policy
from .._geometry import AbstractLogRatio
from ._steering import (
    FieldGuidance,
    flow_to_steer,
    log_ratio_of,
    steer,
    SteeredPolicy,
    SteeredVelocity,
)


class Guided(eqx.Module):
    """How a policy was guided: the `method` of the policy that [`fisher_flow.guide`][] returns."""

    radius: ScalarLike | None
    """The KL that was asked for, in nats; `None` if the weight was given."""

    log_ratio: AbstractLogRatio | None
    """How the KL is measured."""

    max_unknown: ScalarLike
    """The share of actions whose log-ratio may be unknown."""

    num_auxiliary: int = eqx.field(static=True)
    """Without observations, the number of actions drawn at a state."""

    num_calibration: int = eqx.field(static=True)
    """With observations, the number of actions that settle the weight."""


class ClassifierFree(eqx.Module):
    r"""The field of classifier-free guidance,
    $v(t, x \mid \text{condition}) - v(t, x \mid \text{none})$, for [`fisher_flow.guide`][].

    ??? cite "Reference"

        ```bibtex
        @inproceedings{ho2021classifier,
            title={Classifier-free diffusion guidance},
            author={Ho, Jonathan and Salimans, Tim},
            booktitle={NeurIPS 2021 Workshop on Deep Generative Models and Downstream Applications},
            year={2021},
        }
        ```
    """

    conditional: Callable[[Scalar, Any, Any], Any]
    unconditional: Callable[[Scalar, Any, Any], Any]

    def __check_init__(self):
        for name in ("conditional", "unconditional"):
            field = getattr(self, name)
            if not callable(field) or isinstance(field, type):
                raise ValueError(
                    f"`{name}` must be a function `{name}(t, x, observation)`, but got "
                    f"`{field!r}`. Write `{name}=policy.velocity`."
                )

    def __call__(self, t: Scalar, x: Action, observation: Observation) -> Action:
        """The difference of the two velocities, like `x`."""
        return self.conditional(t, x, observation) - self.unconditional(t, x, observation)


ClassifierFree.__init__.__doc__ = """**Arguments:**

- `conditional`: called as `conditional(t, x, observation)`; the velocity of a flow to the actions
    that are wanted, such as actions of a high return.
- `unconditional`: called in the same way; the velocity of the flow that is guided.
"""


def guide(
    policy: Any,
    field: Callable[[Scalar, Any, Any], Any],
    *,
    radius: ScalarLike | None = None,
    weight: ScalarLike | None = None,
    observations: PyTree[Any] | None = None,
    log_ratio: AbstractLogRatio | None = None,
    max_unknown: ScalarLike = 0.05,
    num_auxiliary: int = 32,
    num_calibration: int = 2048,
    key: PRNGKeyArray | None = None,
) -> SteeredPolicy:
    r"""Steers a flow by any field, with a weight that is given or one that spends a KL in nats.

    $$u(t, x) = v(t, x) + w\, \Delta(t, x, o).$$

    Classifier-free guidance, guidance by an advantage, and guidance by the gradient of a critic are
    all of this form, and their weight is usually tuned by hand. With a `radius` it is settled such
    that the measured KL of the sampler that acts equals the radius.

    !!! example

        ```python
        import fisher_flow
        import jax
        import jax.numpy as jnp

        policy = fisher_flow.FlowPolicy(  # carries N(0, I) to N(observation, I)
            lambda t, x, o: o + (2 * t - 1) * (x - t * o) / (t**2 + (1 - t) ** 2),
            action_shape=(2,),
        )
        field = lambda t, x, observation: (1 - t) * jnp.ones_like(x)
        guided = fisher_flow.guide(policy, field, weight=0.5)
        action, log_ratio = guided.draw_and_log_ratio(jnp.zeros(2), key=jax.random.key(0))
        ```

    **Arguments:**

    - `policy`: the flow policy.
    - `field`: called as `field(t, x, observation)`; returns an array like `x`. Where it is not
        finite, nothing is added. It is called at times between 0.02 and 0.999.
    - `radius`: the KL to spend, in nats; or
    - `weight`: the weight $w$. One of the two must be given.

    **Other arguments:**

    - `observations`: the observations over which the radius is a mean, any PyTree of arrays with a
        leading axis. Without them the weight is settled at every observation.
    - `log_ratio`, `max_unknown`, `num_auxiliary`, `num_calibration`: as for
        [`fisher_flow.Steering`][].
    - `key`: a `jax.random.key`. The same key gives the same policy; so does none.

    **Returns:**

    A [`fisher_flow.SteeredPolicy`][].

    **Raises:**

    - `ValueError` if an argument is not of its kind, or unless one of `radius` and `weight` is
        given.
    """
    policy = as_flow_policy(policy)
    if not callable(field) or isinstance(field, type):
        raise ValueError(
            f"`field` must be a function `field(t, x, observation)`, but got `{field!r}`. Write "
            "`field=lambda t, x, observation: ...`."
        )
    if (radius is None) == (weight is None):
        raise ValueError(
            "Either `radius` or `weight` must be given, but got "
            f"`radius={radius}` and `weight={weight}`. Write `radius=0.5`."
        )
    if log_ratio is not None:
        example = "fisher_flow.ExecutedLogRatio()"
        check_instance("log_ratio", log_ratio, AbstractLogRatio, example)
    check_at_least("max_unknown", max_unknown, 0, 0.05)
    check_positive_integer("num_auxiliary", num_auxiliary, 32)
    check_positive_integer("num_calibration", num_calibration, 2048)
    guidance = FieldGuidance(field)
    if radius is None:
        check_at_least("weight", weight, 0, 1.0)
        flow = flow_to_steer(policy)
        method = Guided(None, log_ratio, max_unknown, num_auxiliary, num_calibration)
        velocity = SteeredVelocity(flow, guidance, jnp.asarray(weight))
        return SteeredPolicy(policy, None, method, velocity, log_ratio_of(flow, log_ratio))
    check_at_least("radius", radius, 0, 0.5)
    if observations is not None:
        batch_length("observations", observations)
    # Arrays, so that another radius does not compile again.
    radius, max_unknown = jnp.asarray(radius), jnp.asarray(max_unknown)
    method = Guided(radius, log_ratio, max_unknown, num_auxiliary, num_calibration)
    key = jr.key(0) if key is None else key
    return steer(policy, None, guidance, method, observations, key)
