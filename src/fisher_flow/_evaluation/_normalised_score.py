from typing import Any

import numpy as np

from .._checks import is_ogbench


# The returns of a random and of an expert policy, from D4RL (Fu et al. 2020).
_references = {
    "halfcheetah": (-280.178953, 12135.0),
    "hopper": (-20.272305, 3234.3),
    "walker2d": (1.629008, 4592.3),
    "antmaze": (0.0, 1.0),
    "kitchen": (0.0, 4.0),
    "pen": (96.262799, 3076.8331017826877),
    "hammer": (-274.856578, 12794.134825156867),
    "door": (-56.512833, 2880.5693087298737),
    "relocate": (-6.425911, 4233.877797728884),
}


def normalised_score(task: str | tuple[float, float], returns: Any) -> np.ndarray:
    r"""Puts returns on a scale that tasks share: 0 is a random policy and 100 an expert.

    The score is $100\,(R - \text{low}) / (\text{high} - \text{low})$. D4RL measured the returns of
    both policies in its own environments. The newer versions of Gymnasium and of Minari pay
    differently.

    !!! example

        ```python
        import fisher_flow
        import numpy as np

        scores = fisher_flow.normalised_score("hopper-medium-v2", np.array([1500.0, 3234.3]))
        scores = fisher_flow.normalised_score((-1200.0, -150.0), np.array([-300.0]))
        ```

    **Arguments:**

    - `task`: the name of a task of D4RL, such as `"halfcheetah-medium-v2"`, of which the part
        before the first hyphen counts. Or the pair `(low, high)` of returns that score 0 and 100.
    - `returns`: returns, an array of any shape.

    **Returns:**

    The scores, in the shape of `returns`. The scale is linear: episodes may be averaged before or
    after.

    **Raises:**

    - `ValueError` if D4RL has no such task, or `low` is not below `high`.

    ??? cite "Reference"

        The scale and its ends come from D4RL:

        ```bibtex
        @article{fu2020d4rl,
            title={{D4RL}: Datasets for Deep Data-Driven Reinforcement Learning},
            author={Fu, Justin and Kumar, Aviral and Nachum, Ofir and Tucker, George
                    and Levine, Sergey},
            journal={arXiv:2004.07219},
            year={2020},
        }
        ```
    """
    if isinstance(task, str):
        name = task.split("-")[0]
        if name not in _references or is_ogbench(task):
            known = ", ".join(f"`{x}-...`" for x in _references)
            raise ValueError(
                f"`task` must be one of D4RL's {known}, but got `{task}`. For any other write "
                "`task=(low, high)`, the returns that score 0 and 100."
            )
        low, high = _references[name]
    else:
        low, high = task
        if not -np.inf < low < high < np.inf:
            raise ValueError(
                "`task` must be a name or a pair of finite numbers, the smaller first, but got "
                f"`{task}`. Write `task=(low, high)`, the returns that score 0 and 100."
            )
    return np.asarray(100 * (np.asarray(returns, float) - low) / (high - low))
