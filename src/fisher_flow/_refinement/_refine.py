from typing import Any

import jax
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, Float, PRNGKeyArray, PyTree

from .._checks import batch_length, check_equal_lengths, check_instance
from .._custom_types import Critic
from .._flows import as_flow_policy
from .._geometry import calibrate
from ._executed_critic import check_critic
from ._method import AbstractRefinement, method_example
from ._natural_step import NaturalStep


def refine(
    policy: Any,
    critic: Critic,
    method: AbstractRefinement = NaturalStep(),
    *,
    observations: PyTree[Any] | None = None,
    actions: Float[Array, "batch ..."] | None = None,
    key: PRNGKeyArray | None = None,
) -> Any:
    r"""Improves a flow policy by a critic, while staying within a KL of it.

    To first order this solves $\max_{\pi'} \mathbb E[Q]$ subject to
    $\operatorname{KL}(\pi' \,\|\, \pi) \le \epsilon$ over the policies that a local transport map
    $a \mapsto a + \delta(o, a)$ can reach.

    !!! example

        ```python
        import fisher_flow
        import jax

        # carries N(0, I) to N(observation, I)
        policy = fisher_flow.FlowPolicy(
            lambda t, x, o: o + (2 * t - 1) * (x - t * o) / (t**2 + (1 - t) ** 2),
            action_shape=(2,),
        )
        critic = lambda observation, action: action.sum()

        refined = fisher_flow.refine(policy, critic)
        action = refined.sample(jax.numpy.zeros(2), key=jax.random.key(0))
        ```

    **Arguments:**

    - `policy`: the flow policy: a [`fisher_flow.FlowPolicy`][], a refined policy, or anything with
        `velocity(t, x, observation)`, an `action_shape` and, if it is not linear, a `path`. It is
        not modified. The actions of a policy in bfloat16 or float16 are refined, and returned, in
        float32, from the same parameters.
    - `critic`: called as `critic(observation, action)` for one sample; returns a scalar;
        more is better. It may be any differentiable function.
    - `method`: how to refine: [`fisher_flow.NaturalStep`][] and [`fisher_flow.Steering`][], which
        need no training, or [`fisher_flow.Residual`][], which trains a network.

    **Other arguments:**

    - `observations`: observations to calibrate or train on, any PyTree of arrays with a leading
        batch axis. `NaturalStep` can do without; `Residual` cannot. With them, every
        `PerturbedScore()` of the method to which no time was given is replaced by what
        [`fisher_flow.calibrate_score`][] finds; see `refined.method.measure.score`.
    - `actions`: one action of the data at each of them, to calibrate the score on. By default
        actions are drawn from the policy.
    - `key`: a `jax.random.key`. The same key gives the same policy; so does none.

    **Returns:**

    A [`fisher_flow.RefinedPolicy`][], or by `Steering` a [`fisher_flow.SteeredPolicy`][]. Its
    actions with a radius of zero are the actions of the base policy, bit for bit. `refined.reached`
    tells the KL that was met, and whether something forbade more ([`fisher_flow.Reached`][]). It is
    `None` where the length is settled anew at every observation.

    **Raises:**

    - `ValueError` if an argument is not of its kind; the message ends with what to write instead.

    ??? cite "Reference"

        The transport map and its bound by the Fisher information are due to

        ```bibtex
        @article{cheng2026fisher,
            title={Fisher Decorator: Refining flow policy via a local transport map},
            author={Cheng and Wang and Yuan and Wang and Chen and Zeng and Sun},
            journal={arXiv:2604.17919},
            year={2026},
        }
        ```
    """
    policy = as_flow_policy(policy)
    check_critic(critic)
    check_instance("method", method, AbstractRefinement, method_example(method))
    if observations is None and actions is not None:
        raise ValueError(
            "`actions` must come with the observations at which they were taken, but "
            "`observations` is `None`. Write `refine(policy, critic, method, "
            "observations=observations, actions=actions)`."
        )
    calibration_key, fit_key = jr.split(jr.key(0) if key is None else key)
    # Arrays, so that another radius does not compile again.
    method = jax.tree.map(lambda x: jnp.asarray(x) if isinstance(x, float) else x, method)
    if actions is not None:
        check_equal_lengths(observations=observations, actions=actions)
    if observations is not None:
        batch_length("observations", observations)
        method = calibrate(method, policy, observations, actions, calibration_key)
    return method.fit(policy, critic, observations, key=fit_key)
