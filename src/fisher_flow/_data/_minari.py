from typing import Any, TYPE_CHECKING, Union

import jax
import numpy as np

from .._checks import check_instance
from ._columns import check_actions, single_precision
from ._transitions import Transitions


if TYPE_CHECKING:
    import minari


def load_minari(
    dataset: Union[str, "minari.MinariDataset"], *, bounds: tuple[float, float] = (-1.0, 1.0)
) -> Transitions:
    """The transitions of a Minari dataset that is on this machine. Nothing is ever downloaded.

    Observations that are dictionaries or tuples stay so. A mask is 0 where an episode terminated;
    the last row of an episode that was truncated instead is dropped, as in
    [`fisher_flow.Transitions.from_episodes`][].

    **Arguments:**

    - `dataset`: the id of a dataset, or a `minari.MinariDataset`, for example some of the episodes
        of one: `minari.load_dataset(id).filter_episodes(condition)`.

    **Other arguments:**

    - `bounds`: what the actions have to lie between. They are kept as they are: train the agent
        with the same bounds, in an environment that has them.

    **Returns:**

    The [`fisher_flow.Transitions`][], episode after episode.

    **Raises:**

    - `FileNotFoundError` if no dataset on this machine has that id.
    - `ValueError` if an episode goes on after it has terminated, or an action is out of bounds.
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

    episodes: dict[str, list[Any]] = {
        name: [] for name in ("observations", "actions", "rewards", "terminated")
    }
    for episode in dataset.iterate_episodes():
        terminations = np.asarray(episode.terminations)
        if terminations[:-1].any():
            raise ValueError(
                f"Episode {episode.id} of `{dataset.id}` goes on after it has terminated, at step "
                f"{terminations.argmax()} of {len(terminations)}. Leave such episodes out: "
                "`dataset.filter_episodes(lambda episode: not episode.terminations[:-1].any())`."
            )
        observations = jax.tree.map(np.asarray, episode.observations)
        episodes["observations"].append(single_precision(observations))
        episodes["actions"].append(single_precision(np.asarray(episode.actions)))
        episodes["rewards"].append(np.asarray(episode.rewards, np.float32))
        episodes["terminated"].append(bool(terminations[-1]))
    if not episodes["actions"]:
        raise ValueError(
            f"`{dataset.id}` has no episodes. Write `minari.load_dataset({dataset.id!r})` if a "
            "filter has left none."
        )
    all_actions = np.concatenate(episodes["actions"])
    least, most = float(all_actions.min()), float(all_actions.max())
    check_actions(
        f"`{dataset.id}`",
        all_actions,
        bounds,
        f"The bounds of its actions are {dataset.action_space}. Write, for example, "
        f"`bounds=({least:.4g}, {most:.4g})`, and the same for the agent.",
    )
    return Transitions.from_episodes(**episodes)
