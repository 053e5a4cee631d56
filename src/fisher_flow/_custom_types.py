"""Aliases that annotations share."""

from collections.abc import Callable
from typing import Any, TypeAlias

import numpy as np
from jaxtyping import Array, Float, PyTree


# One observation: any PyTree of arrays. A batch of them has a leading axis on every leaf.
Observation: TypeAlias = PyTree[Any]

# One action, of the policy's `action_shape`, which may be `()`, `(5,)` or `(16, 7)`.
Action: TypeAlias = Float[Array, "..."]

# A column of logged data, on the device or not.
Data: TypeAlias = Array | np.ndarray

# `critic(observation, action) -> scalar`: how good an action is; more is better.
Critic: TypeAlias = Callable[[Any, Any], Any]
