from collections.abc import Callable
from typing import Any

import diffrax
import jax.numpy as jnp
from jaxtyping import Array, Float


class EvenSteps(diffrax.AbstractStepSizeController[Any, Any]):
    """Steps to the ends of equal intervals, as `diffrax.StepTo` does.

    `diffrax.StepTo` checks its times at run time by calling back into Python. The times here need
    no check. Without callbacks a sampler can be exported to a file and sharded over devices.
    """

    ts: Float[Array, " times"]

    def wrap(self, direction: Any) -> "EvenSteps":
        return EvenSteps(self.ts * direction)

    def init(
        self,
        terms: Any,
        t0: Any,
        t1: Any,
        y0: Any,
        dt0: Any,
        args: Any,
        func: Callable[..., Any],
        error_order: Any,
    ) -> tuple[Any, Any]:
        del terms, t0, t1, y0, dt0, args, func, error_order
        return self.ts[1], jnp.asarray(2)

    def adapt_step_size(
        self,
        t0: Any,
        t1: Any,
        y0: Any,
        y1_candidate: Any,
        args: Any,
        y_error: Any,
        error_order: Any,
        controller_state: Any,
    ) -> tuple[Any, Any, Any, Any, Any, diffrax.RESULTS]:
        del t0, y0, y1_candidate, args, y_error, error_order
        end = self.ts[controller_state]
        return True, t1, end, False, controller_state + 1, diffrax.RESULTS.successful
