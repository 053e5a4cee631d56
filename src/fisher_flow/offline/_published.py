from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array

from ..values import TemporalDifference
from ._fisher_decorator import FisherDecorator
from ._flow_q_learning import FlowQLearning
from ._implicit_q_learning import ImplicitQLearning


class PublishedSettings(NamedTuple):
    """What published results were made with on a task; by [`fisher_flow.published_settings`][].

    The rest is the same on all tasks, and the default of the agents: four hidden layers of 512
    units, ten steps of the flow, batches of 256, Adam at 3e-4, targets that follow at 0.005.
    """

    discount: float
    """The discount."""

    aggregate: Callable[[Array], Array]
    """How the two values of the critic become one, here in the loss of a policy too."""

    radius: float
    """The radius of the Fisher Decorator paper, which is no KL, and the divergence of DeFlow."""

    num_updates: int
    """The number of updates."""

    coefficient: float
    """The coefficient of FQL, for values that are not normalised."""

    def critic(self, **options: Any) -> TemporalDifference:
        """A critic with these settings.

        **Arguments:**

        - `options`: other arguments of [`fisher_flow.TemporalDifference`][].
        """
        defaults: Any = dict(discount=self.discount, aggregate=self.aggregate)
        return TemporalDifference(**defaults | options)

    def fisher_decorator(self, **options: Any) -> FisherDecorator:
        """FiDec, as in its paper.

        **Arguments:**

        - `options`: other arguments of [`fisher_flow.FisherDecorator`][].
        """
        return FisherDecorator.paper(self.radius, **{"critic": self.critic(), **options})

    def deflow(self, action_size: int, **options: Any) -> FisherDecorator:
        """DeFlow.

        **Arguments:**

        - `action_size`: the number of entries of an action.
        - `options`: other arguments of [`fisher_flow.FisherDecorator`][].
        """
        options = {"critic": self.critic(), **options}
        return FisherDecorator.deflow(action_size, self.radius, **options)

    def flow_q_learning(self, **options: Any) -> FlowQLearning:
        """FQL.

        **Arguments:**

        - `options`: other arguments of [`fisher_flow.FlowQLearning`][].
        """
        defaults: Any = dict(critic=self.critic(), coefficient=self.coefficient, normalise_q=False)
        return FlowQLearning(**defaults | options)

    def implicit_q_learning(self, **options: Any) -> ImplicitQLearning:
        """IFQL: the best of 32 actions, by a critic of the expectile 0.9.

        **Arguments:**

        - `options`: other arguments of [`fisher_flow.ImplicitQLearning`][].
        """
        return ImplicitQLearning(**{"critic": self.critic(), **options})


_radii = {
    "humanoidmaze": 0.001,
    "cube": 0.001,
    "scene": 0.001,
    "puzzle": 0.005,
    "antmaze": 0.01,
    "antsoccer": 0.01,
}
_coefficients = {
    "humanoidmaze": 30.0,
    "cube": 300.0,
    "scene": 300.0,
    "puzzle": 1000.0,
    "antmaze": 10.0,
    "antmaze-large": 3.0,  # of D4RL
    "antsoccer": 10.0,
    "pen": 10_000.0,
    "pen-expert": 3000.0,
    "door": 30_000.0,
    "hammer": 30_000.0,
    "hammer-cloned": 10_000.0,
    "relocate": 30_000.0,
    "relocate-human": 10_000.0,
}
_adroit = ("pen", "door", "hammer", "relocate")


def published_settings(task: str) -> PublishedSettings:
    """The settings of published results on a task of OGBench or D4RL.

    !!! example

        ```python
        import fisher_flow

        settings = fisher_flow.published_settings("antmaze-large-navigate-singletask-v0")
        agent = settings.fisher_decorator()
        rival = settings.flow_q_learning()
        ```

    **Arguments:**

    - `task`: the name, such as `cube-single-play-singletask-v0` (OGBench) or
        `pen-human-v1` (D4RL).

    **Raises:**

    - `ValueError` if nothing was published for the task.

    ??? cite "Reference"

        The coefficients are those of FQL's code, the others those of the appendix of the second.

        ```bibtex
        @inproceedings{park2025flow,
            title={Flow {Q}-learning},
            author={Park, Seohong and Li, Qiyang and Levine, Sergey},
            booktitle={International Conference on Machine Learning},
            year={2025},
        }
        @article{cheng2026fisher,
            title={Fisher Decorator: Refining flow policy via a local transport map},
            author={Cheng and Wang and Yuan and Wang and Chen and Zeng and Sun},
            journal={arXiv:2604.17919},
            year={2026},
        }
        ```
    """
    family = task.removeprefix("visual-").split("-")[0]
    is_ogbench = "singletask" in task
    known = _radii if is_ogbench else ("antmaze", *_adroit)
    if family not in known or "navigate" in task and not is_ogbench:
        raise ValueError(
            "`task` must be of a family with published settings, "
            f"{', '.join([*_radii, *_adroit])}, but got `{task!r}`. Write the settings out: "
            "`FisherDecorator(radius=0.5, critic=TemporalDifference(discount=0.99))`."
        )
    long = "giant" in task or family in ("humanoidmaze", "antsoccer")
    cautious = family == "antmaze" or family in _adroit
    kind = "-".join(task.split("-")[:2])  # such as `pen-expert`
    by_kind = _coefficients.get(kind, _coefficients[family])
    return PublishedSettings(
        discount=0.995 if long else 0.99,
        aggregate=jnp.min if cautious else jnp.mean,
        radius=_radii[family] if is_ogbench else 0.001,
        num_updates=500_000 if "visual" in task or not is_ogbench else 1_000_000,
        coefficient=_coefficients[family] if is_ogbench else by_kind,
    )
