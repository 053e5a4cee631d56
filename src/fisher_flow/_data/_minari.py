from typing import Any, TYPE_CHECKING, Union

import jax
import numpy as np

from .._checks import check_instance, short
from ._columns import as_column, as_columns, check_actions, single_precision
from ._transitions import Transitions


if TYPE_CHECKING:
    import minari


def load_minari(
    dataset: Union[str, "minari.MinariDataset"], *, bounds: Any = (-1.0, 1.0)
) -> Transitions:
    """The transitions of a Minari dataset that is on this machine. Nothing is ever downloaded.

    Observations that are dictionaries or tuples stay so, and numbers of the spaces `Discrete`,
    `MultiDiscrete` and `MultiBinary` stay integers. A mask is 0 where an episode terminated;
    the last row of an episode that was truncated instead is dropped, as in
    [`fisher_flow.Transitions.from_episodes`][].

    **Arguments:**

    - `dataset`: the id of a dataset, or a `minari.MinariDataset`, for example some of the episodes
        of one: `minari.load_dataset(id).filter_episodes(condition)`.

    **Other arguments:**

    - `bounds`: what the actions have to lie between: a pair `(low, high)` of numbers or arrays, a
        Gymnasium `Box` such as `dataset.action_space`, or `None` for actions without bounds. A
        bound may be infinite, and an entry is constant where `low` equals `high`. The actions are
        kept as they are: train the agent with the same bounds, in an environment that has them.

    **Returns:**

    The [`fisher_flow.Transitions`][], episode after episode.

    **Raises:**

    - `FileNotFoundError` if no dataset on this machine has that id.
    - `ValueError` if the actions are not those of one `Box` of floating point numbers,
        observations are texts, sequences or graphs, an episode goes on after it has terminated or
        lacks its last observation, or an action is out of bounds.
    - `ImportError` if Minari is not installed.

    ??? cite "Reference"

        ```bibtex
        @software{younis2024minari,
            title={Minari},
            author={Younis, Omar G. and Perez-Vicente, Rodrigo and Balis, John U. and
                Dudley, Will and Davey, Alex and Terry, Jordan K.},
            year={2024},
        }
        ```
    """
    try:
        import minari
        import minari.storage
    except ImportError as error:
        raise ImportError(
            f"`load_minari` needs Minari, which is not installed ({error}). Write "
            '`pip install "fisher_flow[data]"`.'
        ) from error
    if isinstance(dataset, str):
        local = list(minari.list_local_datasets())
        if dataset not in local:
            folder = minari.storage.get_dataset_path()
            raise FileNotFoundError(
                f"No Minari dataset in `{folder}` is called `{dataset}`; there are "
                f"{', '.join(local) or 'none'}. Set the variable MINARI_DATASETS_PATH to the "
                f"folder that holds it, or write `minari.download_dataset({dataset!r})`."
            )
        dataset = minari.load_dataset(dataset)
    check_instance("dataset", dataset, minari.MinariDataset, "minari.load_dataset(id)")

    _check_action_space(dataset)
    _check_observation_space(dataset, dataset.observation_space, "observations")
    episodes: dict[str, list[Any]] = {
        name: [] for name in ("observations", "actions", "rewards", "terminated")
    }
    for episode in dataset.iterate_episodes():
        terminations = np.asarray(episode.terminations, bool)
        if len(terminations) == 0:
            continue
        if terminations[:-1].any():
            raise ValueError(
                f"Episode {episode.id} of `{dataset.id}` goes on after it has terminated, at step "
                f"{terminations.argmax()} of {len(terminations)}. Leave such episodes out: "
                "`dataset.filter_episodes(lambda episode: not episode.terminations[:-1].any())`."
            )
        observations = jax.tree.map(np.asarray, as_columns("observations", episode.observations))
        _check_lengths(dataset, episode, observations)
        episodes["observations"].append(single_precision(observations))
        actions = np.asarray(as_column("actions", episode.actions))
        episodes["actions"].append(single_precision(actions))
        episodes["rewards"].append(np.asarray(as_column("rewards", episode.rewards), np.float32))
        episodes["terminated"].append(bool(terminations[-1]))
    if not episodes["actions"]:
        raise ValueError(
            f"`{dataset.id}` has no episodes. Write `minari.load_dataset({dataset.id!r})` if a "
            "filter has left none."
        )
    all_actions = np.concatenate(episodes["actions"])
    least, most = float(all_actions.min()), float(all_actions.max())
    low, high = _checked_bounds(bounds, all_actions.shape[1:])
    space = dataset.action_space
    if np.all(low == low.flat[0]) and np.all(high == high.flat[0]):
        fix = f"`bounds=({least:.4g}, {most:.4g})`, and the same for the agent"
    else:
        fix = "`bounds=dataset.action_space`, if the actions lie within that"
    check_actions(
        f"`{dataset.id}`",
        all_actions,
        (low, high),
        f"The bounds of its actions are {space}. Write, for example, {fix}.",
    )
    return Transitions.from_episodes(**episodes)


def _check_action_space(dataset: "minari.MinariDataset") -> None:
    import gymnasium

    space = dataset.action_space
    is_box = isinstance(space, gymnasium.spaces.Box)
    if is_box and np.issubdtype(space.dtype, np.floating) and np.prod(space.shape) > 0:
        return
    example = "episode.actions.astype(np.float32)"
    if isinstance(space, gymnasium.spaces.Dict):
        example = "np.concatenate([episode.actions[name] for name in names], axis=-1)"
    elif isinstance(space, gymnasium.spaces.Tuple):
        example = "np.concatenate(episode.actions, axis=-1)"
    why = "If the numbers are continuous in truth"
    if isinstance(space, gymnasium.spaces.Dict | gymnasium.spaces.Tuple):
        why = "If its parts are continuous, act in an environment that takes one array"
    raise ValueError(
        f"The `action_space` of `{dataset.id}` must be a `Box` of floating point numbers, since a "
        f"flow policy draws one array of numbers, but is `{short(space)}`. {why}: write "
        "`Transitions.from_episodes(observations, actions, rewards, terminated)` with "
        f"`actions=[{example} for episode in dataset]`."
    )


def _check_observation_space(dataset: "minari.MinariDataset", space: Any, name: str) -> None:
    """Refuses spaces whose observations are no arrays, or arrays of many shapes."""
    from gymnasium import spaces

    if isinstance(space, spaces.Dict):
        for key, part in space.spaces.items():
            _check_observation_space(dataset, part, f"{name}[{key!r}]")
    elif isinstance(space, spaces.Tuple):
        for i, part in enumerate(space.spaces):
            _check_observation_space(dataset, part, f"{name}[{i}]")
    elif not isinstance(
        space, spaces.Box | spaces.Discrete | spaces.MultiDiscrete | spaces.MultiBinary
    ):
        raise ValueError(
            f"`{name}` of `{dataset.id}` must be an array of numbers of one shape, but its space "
            f"is `{short(space)}`. Make numbers of it, or leave it out: write "
            "`Transitions.from_episodes(observations, actions, rewards, terminated)` with, for "
            f"example, `observations=[{_without(name)} for episode in dataset]`."
        )


def _without(name: str) -> str:
    if "[" not in name:
        return "np.stack([embed(x) for x in episode.observations])"
    keys = name.partition("[")[2][:-1].split("][")
    if len(keys) == 1 and keys[0].startswith(("'", '"')):
        return f"{{k: x for k, x in episode.observations.items() if k != {keys[0]}}}"
    return "numbers_of(episode.observations)"


def _check_lengths(dataset: "minari.MinariDataset", episode: Any, observations: Any) -> None:
    steps = len(episode.rewards)
    lengths = {len(leaf) if leaf.ndim else 0 for leaf in jax.tree.leaves(observations)}
    if lengths == {steps + 1} and len(episode.actions) == steps:
        return
    found = ", ".join(map(str, sorted(lengths)))
    raise ValueError(
        f"Episode {episode.id} of `{dataset.id}` has {found} `observations`, {len(episode.actions)}"
        f" `actions` and {steps} `rewards`, but an episode has one observation more than actions, "
        "which says where the last action led. Leave such episodes out, `dataset.filter_episodes("
        f"lambda episode: episode.id != {episode.id})`, or leave out the last action of each: "
        "write `Transitions.from_episodes(observations, actions, rewards, terminated)` with "
        "`actions=[episode.actions[:-1] for episode in dataset]`, `rewards` likewise and "
        "`terminated=[False] * len(dataset)`."
    )


def _checked_bounds(bounds: Any, shape: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """The lower and the upper bound of each entry of an action."""
    if bounds is None:
        bounds = (-np.inf, np.inf)
    pair = (bounds.low, bounds.high) if hasattr(bounds, "low") else bounds
    try:
        low, high = (np.broadcast_to(np.asarray(bound, float), shape) for bound in pair)
        valid = bool(np.all(low <= high))
    except (TypeError, ValueError):
        low = high = np.zeros(shape)
        valid = False
    if not valid:
        raise ValueError(
            "`bounds` must be a pair `(low, high)` of numbers or arrays of shape "
            f"{shape}, `low` nowhere above `high`, or a Gymnasium `Box`, or `None` for actions "
            f"without bounds, but got `{short(bounds)}`. Write `bounds=dataset.action_space`."
        )
    return low, high
