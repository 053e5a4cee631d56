from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array

from ..values import TemporalDifference


class PublishedSettings(NamedTuple):
    """What published results were made with on a task; by [`fisher_flow.published_settings`][].

    The rest is the same on all tasks, and the default of the agents: four hidden layers of 512
    units, ten steps of the flow, batches of 256, Adam at 3e-4, targets that follow at 0.005.
    """

    discount: float
    """The discount."""

    aggregate: Callable[[Array], Array]
    """How the two values of the critic become one."""

    radius: float
    """The radius of the Fisher Decorator paper; it is no KL."""

    num_updates: int
    """The number of updates."""

    def critic(self, **options: Any) -> TemporalDifference:
        """A critic with these settings.

        **Arguments:**

        - `options`: other arguments of [`fisher_flow.TemporalDifference`][].
        """
        return TemporalDifference(discount=self.discount, aggregate=self.aggregate, **options)


_radii = {
    "humanoidmaze": 0.001,
    "cube": 0.001,
    "scene": 0.001,
    "puzzle": 0.005,
    "antmaze": 0.01,
    "antsoccer": 0.01,
}
_adroit = ("pen", "door", "hammer", "relocate")


def published_settings(task: str) -> PublishedSettings:
    """The settings of published results on a task of OGBench or D4RL.

    !!! example

        ```python
        import fisher_flow

        settings = fisher_flow.published_settings("antmaze-large-navigate-singletask-v0")
        agent = fisher_flow.FisherDecorator.paper(settings.radius, critic=settings.critic())
        ```

    **Arguments:**

    - `task`: the name, such as `cube-single-play-singletask-v0` (OGBench) or
        `pen-human-v1` (D4RL).

    **Raises:**

    - `ValueError` if nothing was published for the task.

    ??? cite "Reference"

        Appendix of

        ```bibtex
        @article{cheng2026fisher,
            title={Fisher Decorator: Refining flow policy via a local transport map},
            author={Cheng and Wang and Yuan and Wang and Chen and Zeng and Sun},
            journal={arXiv:2604.17919},
            year={2026},
        }
        ```
    """
    family = task.split("-")[0]
    is_ogbench = "singletask" in task
    if (is_ogbench and family not in _radii) or family not in (*_radii, *_adroit):
        raise ValueError(
            "`task` must be of a family with published settings, "
            f"{', '.join([*_radii, *_adroit])}, but got `{task!r}`. Write the settings out: "
            "`FisherDecorator(radius=0.5, critic=TemporalDifference(discount=0.99))`."
        )
    long = "giant" in task or family in ("humanoidmaze", "antsoccer")
    cautious = family == "antmaze" or family in _adroit
    return PublishedSettings(
        discount=0.995 if long else 0.99,
        aggregate=jnp.min if cautious else jnp.mean,
        radius=_radii[family] if is_ogbench else 0.001,
        num_updates=500_000 if "visual" in task or not is_ogbench else 1_000_000,
    )
