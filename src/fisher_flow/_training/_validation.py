"""Checks of the arguments of a training, of its numbers, and of what `evaluate` returns."""

import dataclasses
import numbers
import operator
from typing import Any

import equinox as eqx
import jax
import numpy as np
from jaxtyping import PyTree

from .._agents import AbstractAgent, BehaviourFlow
from .._checks import check_at_least, short
from .._data import Normaliser, stored_record, Transitions
from ._feed import check_num_rows


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


def checked_num_updates(updates_per_step: Any, num_steps: int) -> int:
    check_at_least("updates_per_step", updates_per_step, 0, 1.0)
    num_updates = round(updates_per_step * num_steps)
    if num_updates == 0:
        raise ValueError(
            f"`updates_per_step` must make at least one update of the {num_steps} steps, but got "
            f"`{updates_per_step}`. Write `updates_per_step=1.0`."
        )
    return num_updates


def check_prepare(prepare: Any) -> None:
    if prepare is not None and not callable(prepare):
        raise ValueError(
            "`prepare` must be a function of transitions that returns transitions, but got "
            f"`{short(prepare)}`. Write "
            "`prepare=lambda t: dataclasses.replace(t, rewards=t.rewards / scale)`."
        )


def check_online_share(online_share: float | None) -> None:
    is_number = isinstance(online_share, numbers.Real) and not isinstance(online_share, bool)
    if online_share is not None and not (is_number and 0 <= online_share <= 1):
        raise ValueError(
            "`online_share` must be a number from 0 to 1, or `None` for the union of both, but "
            f"got `{online_share!r}`. Write `online_share=0.5`."
        )


def check_observations(observations: Any, expected: Any, normaliser: Normaliser | None) -> None:
    means = None if normaliser is None else jax.tree.map(lambda x: x[None], normaliser.mean)
    if normaliser is not None and not _fits(means, expected):
        raise ValueError(
            "`normaliser` must be made of the observations of the training, but got one of "
            f"{eqx.tree_pformat(normaliser.mean)} for {eqx.tree_pformat(expected)}. Write "
            "`normaliser=Normaliser.of(transitions)`, of the transitions before they were "
            "normalised, or `normaliser=None`."
        )
    if not _fits(observations, expected):
        raise ValueError(
            f"`envs` must return observations like those of the training, but got "
            f"{eqx.tree_pformat(observations)} for {eqx.tree_pformat(expected)}. Write "
            "`envs=gymnasium.vector.SyncVectorEnv([make_env] * 10)`, with the wrappers in "
            "`make_env` that the data were recorded with."
        )


def checked_rows(rows: Any, agent: AbstractAgent, expected: Transitions) -> Transitions:
    """The transitions of a round, prepared as those of the training were."""
    if not isinstance(rows, Transitions):
        raise ValueError(
            f"`prepare` must return `Transitions`, but returned `{short(rows)}`. Write "
            "`prepare=lambda t: dataclasses.replace(t, rewards=t.rewards / scale)`."
        )
    if expected.next_actions is None:
        rows = dataclasses.replace(rows, next_actions=None)
    if not _fits(rows, expected):
        raise ValueError(
            "`envs` must give transitions with the columns of those of the training, but got "
            f"{eqx.tree_pformat(rows)} for {eqx.tree_pformat(expected)}. If these were changed "
            "before the training, the others must be too: for chunks of actions write "
            "`prepare=lambda t: t.chunks(5, 0.99)`."
        )
    check_num_rows(rows)
    check_bounds(agent, rows)
    return rows


def _fits(rows: PyTree[Any], expected: PyTree[Any]) -> bool:
    leaves, structure = jax.tree.flatten(rows)
    expected_leaves, expected_structure = jax.tree.flatten(expected)
    return structure == expected_structure and all(
        x.shape[1:] == y.shape[1:] and np.can_cast(x.dtype, y.dtype, "same_kind")
        for x, y in zip(leaves, expected_leaves, strict=True)
    )
