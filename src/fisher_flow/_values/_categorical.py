from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Scalar

from .._custom_types import Action, Observation


def checked_support(support: Any) -> tuple[float, float]:
    """The least and the largest return, as floats."""
    if np.shape(support) != (2,) or support[0] == support[1]:
        example = "(-10.0, 0.0)"
    elif not support[0] < support[1]:
        example = f"({float(support[1])}, {float(support[0])})"
    else:
        return float(support[0]), float(support[1])
    raise ValueError(
        f"`support` must be an increasing pair of returns, but got `{support!r}`. Write "
        f"`support={example}`."
    )


class CategoricalCritic(eqx.Module):
    r"""The mean return of a distributional critic, $\sum_i z_i \operatorname{softmax}(\ell)_i$, for
    logits $\ell$ over fixed returns $z_i$: C51, HL-Gauss and two-hot heads.

    For a critic that predicts quantiles, take their mean:
    `critic = lambda observation, action: quantiles(observation, action).mean()`.

    !!! example

        ```python
        import fisher_flow
        import jax.numpy as jnp

        def logits(observation, action):
            return -((jnp.linspace(-10.0, 0.0, 51) + jnp.sum(action**2)) ** 2)

        critic = fisher_flow.CategoricalCritic(logits, support=(-10.0, 0.0), num_atoms=51)
        ```

    ??? cite "Reference"

        ```bibtex
        @inproceedings{bellemare2017distributional,
            title={A distributional perspective on reinforcement learning},
            author={Bellemare, Marc G. and Dabney, Will and Munos, R{\'e}mi},
            booktitle={International Conference on Machine Learning},
            year={2017},
        }
        ```
    """

    network: Callable[[Any, Any], Any]
    support: tuple[float, float] = eqx.field(converter=checked_support, static=True)
    num_atoms: int = eqx.field(static=True)

    def __call__(self, observation: Observation, action: Action) -> Scalar:
        """The mean return of an action, in the units of the support.

        **Raises:**

        - `ValueError` if the network does not return one logit for each return.
        """
        logits: Array = self.network(observation, action)
        if jnp.shape(logits) != (self.num_atoms,):
            raise ValueError(
                f"`network(observation, action)` must return `num_atoms={self.num_atoms}` logits, "
                f"but it returned shape {jnp.shape(logits)}. Write `num_atoms={jnp.size(logits)}`."
            )
        returns = jnp.linspace(*self.support, self.num_atoms, dtype=logits.dtype)
        return jnp.sum(jax.nn.softmax(logits) * returns)


CategoricalCritic.__init__.__doc__ = """**Arguments:**

- `network`: called as `network(observation, action)` for one sample; returns the logits.
- `support`: the least and the largest return, with the others evenly between them.
- `num_atoms`: the number of returns, and of logits.

**Raises:**

- `ValueError` if `support` is not an increasing pair.
"""
