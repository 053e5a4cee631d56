"""Checks of what a training is given, of what comes of it, and of what evaluates it."""

import operator
from typing import Any

import numpy as np

from .._agents import AbstractAgent, BehaviourFlow
from .._checks import short
from .._data import stored_record, Transitions


def checked_seeds(seeds: Any) -> tuple[int, ...]:
    try:
        checked = tuple(operator.index(seed) for seed in seeds)
        valid = 0 < len(checked) == len(set(checked)) and 0 <= min(checked) <= max(checked) < 2**31
    except TypeError:
        checked, valid = (), False
    if not valid:
        try:
            example = f"range({max(1, operator.index(seeds))})"
        except TypeError:
            example = "range(5)"
        raise ValueError(
            "`seeds` must be one or more integers from 0 to 2**31 - 1, all different, but got "
            f"`{short(seeds)}`. Write `seeds={example}`."
        )
    return checked


def finite_numbers(values: dict[str, Any], seed: int, updates: int) -> dict[str, float]:
    numbers = {key: float(value) for key, value in values.items()}
    broken = [key for key, value in numbers.items() if not np.isfinite(value)]
    if broken:
        raise FloatingPointError(
            f"The training with seed {seed} has diverged: {', '.join(broken)} not finite by update "
            f"{updates}. The usual causes are (a) rewards that are not of order one: divide them "
            "by their standard deviation; (b) observations that are not: use a "
            "`fisher_flow.Normaliser`; (c) too large a `learning_rate`."
        )
    return numbers


def check_augment(augment: Any) -> None:
    if augment is not None and (isinstance(augment, type) or not callable(augment)):
        raise ValueError(
            "`augment` must be a function `augment(batch, key=key)` that returns transitions, but "
            f"got `{augment!r}`. Write `augment=fisher_flow.RandomCrop()`."
        )


def check_bounds(agent: AbstractAgent, transitions: Transitions) -> None:
    flow = getattr(agent, "flow", None)
    if not isinstance(flow, BehaviourFlow):
        return
    low, high = flow.bounds
    record = stored_record(transitions)
    if record is not None:
        least, most = record["actions"]
    else:
        least, most = float(np.min(transitions.actions)), float(np.max(transitions.actions))
    if least < low - 1e-3 or most > high + 1e-3:
        raise ValueError(
            f"`transitions.actions` must lie within the agent's bounds {flow.bounds}, but they "
            f"range from {least:.4g} to {most:.4g}. Rescale them to the bounds, and the "
            "environment with `gymnasium.wrappers.RescaleAction(env, np.float32(-1), "
            f"np.float32(1))`, or write `flow=BehaviourFlow(bounds=({least:.4g}, {most:.4g}))`."
        )


def checked_scores(values: Any) -> dict[str, float]:
    """What `evaluate` returned, as numbers."""
    try:
        scores = {str(name): float(np.asarray(value)) for name, value in dict(values).items()}
    except (TypeError, ValueError):
        scores = None
    if scores is None or {"seed", "updates"} & set(scores):
        raise ValueError(
            "`evaluate` must return a dictionary of numbers, none of them `seed` or `updates`, but "
            f"returned `{short(values)}`. Write "
            '`return {"score": float(returns.mean())}`.'
        )
    return scores
