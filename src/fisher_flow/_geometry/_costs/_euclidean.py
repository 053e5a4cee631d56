from typing import Any

import equinox as eqx
import jax.numpy as jnp
import lineax as lx
from jaxtyping import PRNGKeyArray

from ..._custom_types import Action, Observation
from ._cost import AbstractMetric


class Euclidean(AbstractMetric):
    r"""The isotropic metric $G = I$, whose cost is $\tfrac12 \|\delta\|^2$.

    The penalty of FQL and DeFlow. It knows nothing of the data, so its cost is not a KL: the same
    displacement may be free in one direction and fatal in another.

    ??? cite "Reference"

        ```bibtex
        @inproceedings{park2025flow,
            title={Flow {Q}-learning},
            author={Park, Seohong and Li, Qiyang and Levine, Sergey},
            booktitle={International Conference on Machine Learning},
            year={2025},
        }
        ```
    """

    score: None = eqx.field(default=None, init=False)  # it needs no score

    def operator(
        self, policy: Any, observation: Observation, action: Action, *, key: PRNGKeyArray
    ) -> lx.AbstractLinearOperator:
        del policy, observation, key
        return lx.DiagonalLinearOperator(jnp.ones(action.size, action.dtype))


Euclidean.__init__.__doc__ = """Takes no arguments."""
