from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array

from .._checks import is_ogbench
from .._values import TemporalDifference
from ._fisher_decorator import FisherDecorator
from ._flow_q_learning import FlowQLearning
from ._implicit_q_learning import ImplicitQLearning


class PublishedSettings(NamedTuple):
    """What published results were made with on a task; by [`fisher_flow.published_settings`][].

    The rest is the same on all tasks, and the default of the agents: four hidden layers of 512
    units, ten steps of the flow, batches of 256, Adam at 3e-4, targets that follow at 0.005.
    """

    num_updates: int
    """The number of updates."""

    discount: float
    """The discount."""

    aggregate: Callable[[Array], Array]
    """How FiDec makes one of the two values of the critic; here in the loss of the policy too."""

    rival_aggregate: Callable[[Array], Array]
    """How FQL and DeFlow make one of the two values."""

    radius: float
    """The radius of FiDec, by the metric of its paper. It is not a KL."""

    divergence: float
    """The divergence of DeFlow."""

    coefficient: float
    """The coefficient of FQL, whose values are not normalised."""

    def fisher_decorator(self, **options: Any) -> FisherDecorator:
        """FiDec, as in its paper.

        **Arguments:**

        - `options`: other arguments of [`fisher_flow.FisherDecorator`][].
        """
        return FisherDecorator.paper(self.radius, **({"critic": self.critic()} | options))

    def deflow(self, action_size: int, **options: Any) -> FisherDecorator:
        """DeFlow.

        **Arguments:**

        - `action_size`: the number of entries of an action.
        - `options`: other arguments of [`fisher_flow.FisherDecorator`][].
        """
        defaults = {"critic": self.critic(aggregate=self.rival_aggregate)}
        return FisherDecorator.deflow(action_size, self.divergence, **(defaults | options))

    def flow_q_learning(self, **options: Any) -> FlowQLearning:
        """FQL.

        **Arguments:**

        - `options`: other arguments of [`fisher_flow.FlowQLearning`][].
        """
        defaults: dict[str, Any] = {
            "critic": self.critic(aggregate=self.rival_aggregate),
            "coefficient": self.coefficient,
            "normalise_q": False,
        }
        return FlowQLearning(**(defaults | options))

    def implicit_q_learning(self, **options: Any) -> ImplicitQLearning:
        """IFQL: the best of 32 actions, with the expectile 0.9 and the aggregate of FiDec.

        **Arguments:**

        - `options`: other arguments of [`fisher_flow.ImplicitQLearning`][].
        """
        defaults: dict[str, Any] = {"critic": self.critic()}
        return ImplicitQLearning(**(defaults | options))

    def critic(self, **options: Any) -> TemporalDifference:
        """The critic of FiDec.

        **Arguments:**

        - `options`: other arguments of [`fisher_flow.TemporalDifference`][].
        """
        defaults: dict[str, Any] = {"discount": self.discount, "aggregate": self.aggregate}
        return TemporalDifference(**(defaults | options))


# By what the name of the task begins with: the radius, the divergence and the coefficient.
_ogbench = {
    "humanoidmaze": (0.001, 0.001, 30.0),
    "antmaze": (0.01, 0.01, 10.0),
    "antsoccer": (0.01, 0.01, 10.0),
    "cube": (0.001, 0.001, 300.0),
    "scene": (0.001, 0.001, 300.0),
    "puzzle": (0.005, 0.005, 1000.0),
    "visual-cube-single": (0.001, 0.001, 300.0),
    "visual-cube-double": (0.001, 0.001, 100.0),
    "visual-scene": (0.001, 0.001, 100.0),
    "visual-puzzle": (0.005, 0.0005, 300.0),
}


_d4rl = {
    "antmaze": (0.001, 0.015, 10.0),
    "antmaze-large": (0.001, 0.015, 3.0),
    "pen": (0.001, 0.01, 10_000.0),
    "pen-expert": (0.001, 0.01, 3000.0),
    "door": (0.001, 0.001, 30_000.0),
    "hammer": (0.001, 0.001, 30_000.0),
    "hammer-cloned": (0.001, 0.001, 10_000.0),
    "relocate": (0.001, 0.001, 30_000.0),
    "relocate-human": (0.001, 0.001, 10_000.0),
}


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

        The coefficients, the divergences and both aggregates come from the authors' code. The rest
        comes from the appendix of the first paper. The radii for tasks with images are the radii
        of the same tasks without images.

        ```bibtex
        @article{cheng2026fisher,
            title={Fisher Decorator: Refining flow policy via a local transport map},
            author={Cheng and Wang and Yuan and Wang and Chen and Zeng and Sun},
            journal={arXiv:2604.17919},
            year={2026},
        }
        @inproceedings{park2025flow,
            title={Flow {Q}-learning},
            author={Park, Seohong and Li, Qiyang and Levine, Sergey},
            booktitle={International Conference on Machine Learning},
            year={2025},
        }
        @misc{deflow,
            title={{DeFlow}: Decoupling manifold modeling and value maximization for offline policy
                extraction},
        }
        ```
    """
    words = task.split("-")
    single_task = "singletask" in words
    table = _ogbench if single_task else {} if is_ogbench(task) else _d4rl
    names = [name for name in table if task.startswith(name)]
    if len(names) == 0:
        example = "FisherDecorator(radius=0.5, critic=TemporalDifference(discount=0.99))"
        if not single_task and any(task.startswith(name) for name in _ogbench):
            kept = [word for word in words[:-1] if word != "oraclerep"]
            example = f"published_settings({'-'.join([*kept, 'singletask', words[-1]])!r})"
        raise ValueError(
            "`task` must be a single task of OGBench or a task of D4RL with published settings, "
            f"from {', '.join(_ogbench)} or {', '.join(_d4rl)}, but got `{task!r}`. Write "
            f"`{example}`."
        )
    radius, divergence, coefficient = table[max(names, key=len)]
    is_long = "giant" in words or words[0] in ("humanoidmaze", "antsoccer")
    is_cautious = words[0] == "antmaze" or not single_task
    are_cautious = is_cautious and (single_task or words[0] != "antmaze")
    return PublishedSettings(
        num_updates=500_000 if "visual" in words or not single_task else 1_000_000,
        discount=0.995 if is_long else 0.99,
        aggregate=jnp.min if is_cautious else jnp.mean,
        rival_aggregate=jnp.min if are_cautious else jnp.mean,
        radius=radius,
        divergence=divergence,
        coefficient=coefficient,
    )
