from collections.abc import Mapping
from typing import Any, NoReturn

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, PyTree, ScalarLike

from .._checks import (
    check_discount,
    check_equal_lengths,
    check_instance,
    check_positive_integer,
    short,
)
from .._custom_types import Data
from .._trees import plain
from ._columns import as_column, as_columns, check_finite


class TooShortError(ValueError):
    """No trajectory is long enough for a chunk, or for several steps."""


class Transitions(eqx.Module):
    r"""Logged transitions $(o, a, r, m, o', a')$, row by row in the order in which they happened.

    Every column has a leading axis of the same length, the rows. A column may lie in NumPy or on
    the device; [`fisher_flow.train`][] moves it there once. It may lie on disk, too, if it does not
    fit in memory: [`fisher_flow.open_transitions`][].

    !!! example

        ```python
        import fisher_flow
        import numpy as np

        rng = np.random.default_rng(0)
        transitions = fisher_flow.Transitions.from_episodes(
            observations=[rng.normal(size=(101, 3)), rng.normal(size=(51, 3))],
            actions=[rng.uniform(-1, 1, (100, 2)), rng.uniform(-1, 1, (50, 2))],
            rewards=[np.zeros(100), np.ones(50)],
            terminated=[False, True],
        )
        assert len(transitions) == 149  # the last action of the first episode has no successor
        ```
    """

    observations: PyTree[Data]
    actions: Float[Data, "rows ..."]
    rewards: Float[Data, " rows"]
    masks: Float[Data, " rows"]
    next_observations: PyTree[Data]
    next_actions: Any  # `Float[Data, "rows ..."]`, or `None`
    ends: Bool[Data, " rows"]
    action_masks: Any  # `Float[Data, "rows horizon"]`, or `None`

    def __init__(
        self,
        observations: PyTree[Any],
        actions: Any,
        rewards: Any,
        masks: Any,
        next_observations: PyTree[Any],
        next_actions: Any = None,
        ends: Any = None,
        action_masks: Any = None,
    ):
        r"""**Arguments:**

        - `observations`: any PyTree of arrays.
        - `actions`: the action taken at each of them.
        - `rewards`: what came of it.
        - `masks`: the factor $m$ of the value of what follows: 0 where the episode terminated, else
            1. An episode that was cut off by a time limit has not terminated.
        - `next_observations`: where the action led, of the structure of `observations`.
        - `next_actions`: the action that the data took there; `None` if it is not known.
        - `ends`: whether a row is the last of its trajectory. `None` if the rows are in no order,
            as in a replay buffer.
        - `action_masks`: 1 for each action of a chunk that was taken, 0 for each that only fills
            the chunk up, as [`fisher_flow.Transitions.chunks`][] says. `None` if all were taken.

        A column is anything that NumPy makes an array of numbers from: an array, a list of numbers,
        a tensor on the host, a series or a table of pandas, Polars or Arrow. Its rows go by
        position, whatever index it has. Mappings among the observations become dictionaries.

        Booleans and integers become floating point numbers in `rewards` and `masks`, and booleans
        in `ends`. In `observations` they stay as they are, and networks read them as numbers;
        `uint8` arrays with three or four axes a row but the first are images. Actions that are not
        floating point numbers are refused, since they may be names of choices.

        **Raises:**

        - `ValueError` if a column does not hold real numbers (objects, strings, dates, complex
            numbers), lengths, shapes or structures do not match, an entry is not finite, or a mask
            is not between 0 and 1.
        """
        rewards, masks = _floating("rewards", rewards), _floating("masks", masks)
        actions = as_column("actions", actions)
        if next_actions is not None:
            next_actions = as_column("next_actions", next_actions)
        if action_masks is not None:
            action_masks = _floating("action_masks", action_masks)
        rows = rewards.shape[0] if rewards.ndim else 0
        observations = _observations("observations", observations, rows)
        next_observations = _observations("next_observations", next_observations, rows)
        columns = dict(
            observations=observations,
            actions=actions,
            rewards=rewards,
            masks=masks,
            next_observations=next_observations,
        )
        if next_actions is not None:
            columns["next_actions"] = next_actions
        if action_masks is not None:
            columns["action_masks"] = action_masks
        ends = np.ones(np.shape(rewards)[:1], bool) if ends is None else _flags("ends", ends)
        check_equal_lengths(**columns, ends=ends)
        for name, column in (("rewards", rewards), ("masks", masks), ("ends", ends)):
            if np.ndim(column) != 1:
                raise ValueError(
                    f"`{name}` must have one entry a row, but got shape {np.shape(column)}. Write "
                    f"`{name}={name}.reshape(-1)`."
                )
        for name, later, earlier in (
            ("next_observations", next_observations, observations),
            ("next_actions", actions if next_actions is None else next_actions, actions),
        ):
            if _shapes(later) != _shapes(earlier):
                raise ValueError(
                    f"`{name}` must be like `{name[5:]}`, but got {eqx.tree_pformat(later)} for "
                    f"{eqx.tree_pformat(earlier)}. Write `{name}={name[5:]}_of_the_next_row`."
                )
        if not np.issubdtype(actions.dtype, np.floating):
            raise ValueError(
                f"`actions` must be of a floating point dtype, but got {actions.dtype}. Flow "
                "policies have no discrete actions; if these are meant to be continuous, write "
                "`actions=actions.astype(np.float32)`."
            )
        for name, column in columns.items():
            check_finite(name, column)
        _check_masks(masks, action_masks, actions)
        self.observations = observations
        self.actions = actions
        self.rewards = rewards
        self.masks = masks
        self.next_observations = next_observations
        self.next_actions = next_actions
        self.ends = ends
        self.action_masks = action_masks

    def __len__(self) -> int:
        """The number of rows."""
        return self.rewards.shape[0]

    def __getitem__(self, rows: Any) -> "Transitions":
        """Some of the rows, chosen by a slice, a mask or indices.

        A row whose successor is not the next of those chosen is the last of its trajectory.
        """
        if not isinstance(rows, slice | int | np.ndarray | jax.Array | type(None)):
            rows = np.asarray(rows, None if np.size(rows) else int)  # by position, of any index
        chosen = jax.tree.map(lambda column: column[rows], self)
        if isinstance(rows, slice):  # in time and memory that do not grow with what is left out
            ends = np.array(chosen.ends)
            ends[-1:] = True
            ends |= rows.step not in (None, 1)
            return eqx.tree_at(lambda t: t.ends, chosen, ends)
        index = np.arange(len(self))[rows]
        if index.ndim == 0:  # a single transition
            return chosen
        ends = np.asarray(chosen.ends) | np.append(np.diff(index) != 1, True)[: len(index)]
        return eqx.tree_at(lambda t: t.ends, chosen, ends)

    @staticmethod
    def from_episodes(
        observations: list[PyTree[Any]],
        actions: list[Any],
        rewards: list[Any],
        terminated: list[bool],
    ) -> "Transitions":
        """Transitions of whole episodes, each of which has one observation more than actions.

        The last row of an episode that has not terminated is dropped: the data do not say what
        was done next.

        **Arguments:**

        - `observations`: one entry an episode, with `steps + 1` rows.
        - `actions`, `rewards`: one entry an episode, with `steps` rows.
        - `terminated`: whether each episode ended in a state of no further reward, rather than by
            a time limit.

        **Raises:**

        - `ValueError` if the lengths do not match.
        """
        single = not isinstance(terminated, list | tuple) and np.ndim(terminated) == 0
        if single or any(np.ndim(end) > 0 for end in terminated):
            example = "[False]" if single else "[bool(end[-1]) for end in terminated]"
            raise ValueError(
                f"`terminated` must have one entry an episode, but got `{short(terminated)}`. "
                f"Write `terminated={example}`."
            )
        terminated = _flags("terminated", [*terminated]).tolist() if len(terminated) else []
        if not len(observations) == len(actions) == len(rewards) == len(terminated) > 0:
            raise ValueError(
                "`observations`, `actions`, `rewards` and `terminated` must have one entry an "
                f"episode, but got {len(observations)}, {len(actions)}, {len(rewards)} and "
                f"{len(terminated)} of them. For a single episode write "
                "`Transitions.from_episodes([observations], [actions], [rewards], [terminated])`."
            )
        episodes, first = [], {}
        for i, (o, a, r, end) in enumerate(
            zip(observations, actions, rewards, terminated, strict=True)
        ):
            o = jax.tree.map(np.asarray, as_columns(f"observations[{i}]", o))
            a = np.asarray(as_column(f"actions[{i}]", a))
            r = np.asarray(as_column(f"rewards[{i}]", r))
            if 0 in (r.ndim, a.ndim) or any(leaf.ndim == 0 for leaf in jax.tree.leaves(o)):
                raise ValueError(
                    "Each of `observations`, `actions` and `rewards` must have one entry an "
                    f"episode, with a row for each step, but got single numbers in episode {i}. "
                    "For a single episode write `Transitions.from_episodes([observations], "
                    "[actions], [rewards], [terminated])`."
                )
            steps = len(r)
            lengths = {len(leaf) for leaf in jax.tree.leaves(o)}
            if len(a) != steps or lengths != {steps + 1}:
                raise ValueError(
                    f"Episode {i} has {steps} rewards, {len(a)} actions and {sorted(lengths)} "
                    "observations, but an episode has as many actions as rewards and one "
                    f"observation more. Write `observations[{i}]=np.concatenate([observations[{i}],"
                    " last_observation[None]])`."
                )
            episode = {"observations": o, "actions": a, "rewards": r}
            first = first or episode
            for name, column in episode.items():
                if _shapes(column) != _shapes(first[name]):
                    raise ValueError(
                        f"`{name}[{i}]` must have rows like those of `{name}[0]`, but is "
                        f"{eqx.tree_pformat(column)} and that {eqx.tree_pformat(first[name])}. "
                        f"Write `{name}[{i}]={name}[{i}][:, columns]`, or leave the episode out."
                    )
            kept = steps if end else steps - 1
            next_a = np.concatenate([a[1:], np.zeros_like(a[:1])])  # nothing, after the end
            episodes.append(
                (
                    jax.tree.map(lambda leaf, kept=kept: leaf[:kept], o),
                    a[:kept],
                    r[:kept],
                    np.where(np.arange(kept) == steps - 1, 0, 1).astype(r.dtype),
                    jax.tree.map(lambda leaf, kept=kept: leaf[1 : kept + 1], o),
                    next_a[:kept],
                    np.arange(kept) == kept - 1,
                )
            )
        columns = jax.tree.map(lambda *leaves: np.concatenate(leaves), *episodes)
        if len(columns[1]) == 0:
            raise ValueError(
                "`actions` must have an episode that terminated or has two steps or more, since "
                "the last row of any other is dropped, but got episodes of "
                f"{[len(r) for r in rewards[:10]]} steps. Write `terminated=[True] * "
                f"{len(rewards)}` if they are over after that."
            )
        return Transitions(*columns)

    def n_step(self, num_steps: int, discount: ScalarLike) -> "Transitions":
        r"""Transitions over several steps, $\bigl(o_t, a_t, \sum_{i<n} \gamma^i r_{t+i},
        \gamma^{n-1} m, o_{t+n}, a_{t+n}\bigr)$, for targets that look further ahead.

        Where a trajectory ends or terminates earlier, $n$ is what is left until then. The powers of
        the discount are kept in the masks, so the target is $r + \gamma m Q$ as before.

        **Arguments:**

        - `num_steps`: the number of steps $n$.
        - `discount`: the discount $\gamma$ that the agent is trained with.

        **Raises:**

        - `ValueError` if the rows are in no order.
        """
        check_positive_integer("num_steps", num_steps, 3)
        check_discount(discount)
        if num_steps > 1:
            self._require_order("to look several steps ahead")
        # In goal-free play an episode terminates, by the masks of a task, amid a trajectory.
        last = _last_rows(np.asarray(self.ends) | (np.asarray(self.masks) == 0))
        stop = np.minimum(np.arange(len(self)) + num_steps - 1, last)
        rewards, masks = self._returns(stop, num_steps, discount)
        return Transitions(
            self.observations,
            self.actions,
            rewards,
            masks,
            jax.tree.map(lambda leaf: leaf[stop], self.next_observations),
            None if self.next_actions is None else self.next_actions[stop],
            self.ends,
            self.action_masks,
        )

    def _returns(
        self, stop: np.ndarray, num_steps: int, discount: ScalarLike
    ) -> tuple[np.ndarray, np.ndarray]:
        """The discounted sums of the rewards from each row to its `stop`, and the masks there,
        times the power of the discount that has been spent by then."""
        rows, rewards = np.arange(len(self)), np.asarray(self.rewards)
        total, factor = np.zeros_like(rewards), np.ones_like(rewards)
        for i in range(num_steps):
            inside = rows + i <= stop
            total += np.where(inside, discount**i * rewards[np.minimum(rows + i, stop)], 0)
            factor = np.where(inside, np.asarray(discount**i, rewards.dtype), factor)
        return total, factor * np.asarray(self.masks)[stop]

    def _require_order(self, purpose: str) -> None:
        # Where every row terminates, as in a bandit, there is nothing to look ahead to.
        if len(self) > 1 and np.all(self.ends) and np.any(self.masks):
            self._raise_no_order(purpose)

    def _raise_no_order(self, purpose: str) -> NoReturn:
        raise TooShortError(
            f"`ends` must say where trajectories end {purpose}, but every one of the {len(self)} "
            "rows is a trajectory of its own. Write `Transitions(..., ends=ends)`, or "
            "`Transitions.from_episodes(...)`."
        )

    def chunks(self, horizon: int, discount: ScalarLike) -> "Transitions":
        r"""Transitions of chunks of actions: from every row on, the next `horizon` actions, of
        shape `(horizon, *action)`, the discounted sum of their rewards and where they led.

        A chunk that reaches beyond the end of its trajectory is kept. Its last action is repeated
        to fill it up, and `action_masks`, of shape `(rows, horizon)`, are 1 for the actions that
        were taken and 0 for the repeated ones. Flow matching learns from the former only. The
        rewards, the mask and the next observation are those up to the end: after a termination
        nothing follows; where a trajectory was cut off, the value of what follows is asked for
        there, after fewer steps.

        `next_actions` is the chunk that follows, filled up in the same way. Where not even its
        first action is in the data, the sum of the rewards stops one row earlier, and a row that
        has no earlier one is left out.

        **Arguments:**

        - `horizon`: the number of actions of a chunk.
        - `discount`: the discount $\gamma$ of one step. The powers of it are kept in the masks.

        **Raises:**

        - `ValueError` if the rows are in no order, or no trajectory has as many rows as `horizon`.
        """
        check_positive_integer("horizon", horizon, 5)
        check_discount(discount)
        if horizon > 1:
            self._require_order("for chunks of several actions")
        ends, masks = np.asarray(self.ends), np.asarray(self.masks)
        last = _last_rows(ends)
        rows, steps = np.arange(len(self)), np.arange(horizon)
        longest = int(np.max(np.bincount(last))) if len(self) else 0
        if horizon > longest:  # the last actions of a chunk would have been taken nowhere
            raise TooShortError(
                "`horizon` must leave at least one chunk that lies within a trajectory, but got "
                f"`{horizon}` for trajectories of at most {longest} rows. Write "
                f"`horizon={max(1, longest // 2)}`."
            )
        actions = np.asarray(self.actions)
        # The last row of each trajectory of which it is known what was done next. Nothing is done
        # after a terminal row, whatever stands there.
        if self.next_actions is None:
            next_actions, reach = np.roll(actions, -1, axis=0), last - 1
        else:
            next_actions, reach = np.asarray(self.next_actions), last - (masks[last] == 0)
        # As in `n_step`, a mask of 0 stops the rewards, amid a trajectory too.
        stop = np.minimum(rows + horizon - 1, _last_rows(ends | (masks == 0)))
        stop = np.where(masks[stop] == 0, stop, np.minimum(stop, reach))
        keep = stop >= rows
        if not keep.any():
            raise TooShortError(
                "`ends` must leave a row with one after it in some trajectory, but each of the "
                f"{len(self)} rows is a trajectory of its own, and none has terminated. Write "
                "`Transitions(..., next_actions=next_actions)`, or `ends=ends`."
            )
        rewards, masks = self._returns(np.maximum(stop, rows), horizon, discount)
        rows, stop, last, reach = rows[keep], stop[keep], last[keep], reach[keep]
        within = rows[:, None] + steps <= last[:, None]
        taken = within.astype(np.float32)
        index = np.minimum(rows[:, None] + steps, last[:, None])
        if self.action_masks is not None:  # of chunks of chunks
            inner = np.asarray(self.action_masks)[index]
            taken = taken.reshape(taken.shape + (1,) * (inner.ndim - 2)) * inner
        # Of a chunk that terminates the next one is masked, but has to be finite.
        following = np.minimum(stop[:, None] + steps, np.maximum(reach, stop)[:, None])
        return Transitions(
            jax.tree.map(lambda leaf: leaf[rows], self.observations),
            actions[index],
            rewards[keep],
            masks[keep],
            jax.tree.map(lambda leaf: leaf[stop], self.next_observations),
            next_actions[following],
            np.append(np.diff(rows) != 1, True) | ends[rows],
            taken,
        )

    def stack_frames(self, num_frames: int) -> "Transitions":
        """Transitions whose observations are stacks of frames, for what a single image does not
        show, such as velocities.

        Every leaf gets a leading axis of the last `num_frames` observations of its trajectory, the
        oldest first, in which the first one stands for what was before it. That is what
        `gymnasium.wrappers.FrameStackObservation(env, num_frames)` yields, the wrapper to act with.

        The frames are copied, so observations take `num_frames` times their memory. Stack before
        `n_step`, `chunks` or any selection of rows, which may take away what came before.

        **Arguments:**

        - `num_frames`: the number of frames of a stack.

        **Raises:**

        - `ValueError` if the rows are in no order, or `next_observations` are not those of the next
            row.
        """
        check_positive_integer("num_frames", num_frames, 3)
        ends, rows = np.asarray(self.ends), np.arange(len(self))
        if ends.all() and len(self) > 1:
            self._raise_no_order("for frames to be stacked")
        # At most so many rows: images are large, and what goes wrong here does so everywhere.
        inside = np.flatnonzero(~ends[:-1])
        inside = inside[:: max(1, len(inside) // 1000)]
        for o, next_o in zip(
            jax.tree.leaves(self.observations), jax.tree.leaves(self.next_observations), strict=True
        ):
            if not np.array_equal(np.asarray(next_o[inside]), np.asarray(o[inside + 1])):
                raise ValueError(
                    "`next_observations` must be the observations of the next row for frames to be "
                    "stacked, but some are not, as after `n_step`. Write "
                    f"`transitions.stack_frames({num_frames})` first."
                )
        first = np.maximum.accumulate(np.where(np.append(True, ends[:-1]), rows, 0))
        ages = np.arange(num_frames)[::-1]
        o = jax.tree.map(
            lambda leaf: np.asarray(leaf)[np.maximum(rows[:, None] - ages, first[:, None])],
            self.observations,
        )
        next_o = jax.tree.map(
            lambda stack, leaf: np.concatenate([stack[:, 1:], np.asarray(leaf)[:, None]], axis=1),
            o,
            self.next_observations,
        )
        return eqx.tree_at(lambda t: (t.observations, t.next_observations), self, (o, next_o))

    def concatenate(self, *others: "Transitions") -> "Transitions":
        """These rows, followed by those of others.

        **Arguments:**

        - `others`: transitions with observations and actions like these.

        **Raises:**

        - `ValueError` if the columns do not match, or only some of them know their next actions.
        """
        for i, other in enumerate(others):
            check_instance(f"others[{i}]", other, Transitions, "Transitions.from_episodes(...)")
            if _shapes(other) != _shapes(self):
                raise ValueError(
                    f"`others[{i}]` must have the columns of these transitions, but got "
                    f"{eqx.tree_pformat(other)} for {eqx.tree_pformat(self)}. Where one of them "
                    "has no next actions, write `dataclasses.replace(t, next_actions=None)` for "
                    "the other; where one of them has chunks, make those of the other first: "
                    "`t.chunks(horizon, discount)`."
                )
        # A slice of a trajectory is cut off where it ends, and must not run on into the next part.
        parts = [part[:] for part in (self, *others)]
        return jax.tree.map(lambda *columns: np.concatenate(columns), *parts)


def _check_masks(masks: Data, action_masks: Data | None, actions: Data) -> None:
    for name, column, example, meaning in (
        ("masks", masks, "1 - terminated", "1 for `terminated` where an episode is over"),
        (
            "action_masks",
            action_masks,
            "(steps < length[:, None]).astype(np.float32)",
            "`steps = np.arange(horizon)`",
        ),
    ):
        if column is None:
            continue
        least, most = float(column.min()), float(column.max())
        if least < 0 or most > 1:
            raise ValueError(
                f"`{name}` must be between 0 and 1, but they range from {least:.4g} to "
                f"{most:.4g}. Write `{name}={example}`, with {meaning}."
            )
    if action_masks is not None:
        shape, size = action_masks.shape, action_masks.ndim
        if size < 2 or actions.shape[:size] != shape:
            raise ValueError(
                "`action_masks` must have one entry for each action of a chunk, of shape "
                f"(rows, horizon), but got shape {shape} for actions of shape {actions.shape}. "
                "Write `transitions.chunks(horizon, discount)`, which makes both, or "
                "`action_masks=None` if all of them were taken."
            )


def _floating(name: str, column: Any) -> Data:
    column = as_column(name, column)
    exact = not jnp.issubdtype(column.dtype, np.inexact)
    return _cast(column, np.float32) if exact else column  # such as rewards 0 and 1


def _flags(name: str, column: Any) -> Data:
    column = as_column(name, column)
    if column.dtype == bool or column.size == 0:
        return column
    least, most = float(column.min()), float(column.max())
    between = np.asarray(column)
    if least < 0 or most > 1 or not np.all((between == 0) | (between == 1)):
        raise ValueError(
            f"`{name}` must be True or False for each row, but the entries range from {least:.4g} "
            f"to {most:.4g}. For the numbers of the last rows write "
            f"`{name}=np.isin(np.arange(rows), {name})`."
        )
    return _cast(column, bool)


def _observations(name: str, tree: PyTree[Any], rows: int) -> PyTree[Any]:
    """The columns of observations. Refuses a list with an observation for each row, which would be
    taken for as many columns."""
    if type(tree) in (list, tuple) and len(tree) == rows:
        leaves = [leaf for leaf in jax.tree.leaves(plain(tree)) if hasattr(leaf, "shape")]
        by_row = any(np.shape(leaf)[:1] != (rows,) for leaf in leaves)
        if by_row and all(isinstance(row, Mapping) for row in tree):
            raise ValueError(
                f"`{name}` must be a PyTree of columns with {rows} rows each, but got a list of "
                f"{rows} dictionaries, one for each row. Write "
                f"`{name}=jax.tree.map(lambda *rows: np.stack(rows), *{name})`."
            )
        if by_row and all(hasattr(row, "shape") and np.ndim(row) > 0 for row in tree):
            raise ValueError(
                f"`{name}` must be a PyTree of columns with {rows} rows each, but got a list of "
                f"{rows} arrays, one for each row. Write `{name}=np.stack({name})`."
            )
    return as_columns(name, tree)


def _cast(column: Data, dtype: Any) -> Data:
    if column.dtype == dtype:
        return column
    if isinstance(column, np.memmap):  # what NumPy casts one to is called so too, but is in memory
        column = np.asarray(column)
    return column.astype(dtype)


def _shapes(tree: PyTree[Any]) -> tuple[Any, Any]:
    leaves, structure = jax.tree.flatten(tree)
    return [np.shape(leaf)[1:] for leaf in leaves], structure


def _last_rows(ends: np.ndarray) -> np.ndarray:
    """For each row, the last row of its trajectory."""
    ends = ends.copy()
    ends[-1] = True
    index = np.where(ends, np.arange(len(ends)), len(ends))
    return np.minimum.accumulate(index[::-1])[::-1]
