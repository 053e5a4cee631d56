from collections.abc import Sequence
from typing import Any, TYPE_CHECKING

import equinox as eqx
import jax
import jax.core
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jax import lax
from jaxtyping import Array, Float, PRNGKeyArray, PyTree, Scalar

from .._custom_types import Action
from .._divergence import rademacher_probes, value_and_divergence
from .._misc import batch_length, check_equal_lengths, check_instance, check_positive_integer
from ..flows import AbstractAffineGaussianPath, AbstractFlowPolicy, as_flow_policy
from ._score import AbstractScore, PerturbedScore


if TYPE_CHECKING:
    import matplotlib.figure


class CalibratedScore(AbstractScore):
    r"""The best of several estimates of the score; made by [`fisher_flow.calibrate_score`][].

    It is used as any other score is. What led to the choice is kept with it.
    """

    score: AbstractScore
    """The estimate that was chosen."""

    relative_error: Scalar
    r"""Its predicted error $\sqrt{\mathbb E \|\hat s - s\|^2 / \mathbb E \|s\|^2}$. An error of 1 is
    that of no score at all."""

    candidates: tuple[AbstractScore, ...]
    """All the estimates that were tried."""

    criterion: Float[Array, " candidates"]
    r"""The implicit score matching loss of each, $\mathbb E[\tfrac12\|\hat s\|^2 + \nabla \cdot \hat s]$;
    less is better."""

    criterion_stderr: Float[Array, " candidates"]
    """Its standard error over the actions."""

    relative_errors: Float[Array, " candidates"]
    """The predicted error of each."""
