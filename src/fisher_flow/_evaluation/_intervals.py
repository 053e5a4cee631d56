import dataclasses
from collections.abc import Callable
from statistics import NormalDist
from typing import Any

import numpy as np
from jaxtyping import Float

from .._checks import check_positive_integer


# called as statistic(scores, axis), the last argument an axis or several
Statistic = Callable[[np.ndarray, Any], Any]


def interquartile_mean(
    scores: Any, axis: int | tuple[int, ...] | None = None
) -> np.ndarray | np.floating:
    r"""The mean of the middle half of the scores.

    It lies between two other statistics. A single run can move the mean as far as it likes, and the
    median ignores all runs but one or two. If a quarter of $n$ scores is not a whole number, the
    two scores at the edges count in part: the weights always add up to $n / 2$.

    !!! example

        ```python
        import fisher_flow
        import numpy as np

        scores = np.random.default_rng(0).normal(70.0, 5.0, size=(9, 8))  # 9 tasks, 8 seeds each
        fisher_flow.interquartile_mean(scores)
        low, high = fisher_flow.bootstrap_interval(scores, fisher_flow.interquartile_mean)
        ```

    **Arguments:**

    - `scores`: an array of any shape.
    - `axis`: the axis or axes to average over; by default all.

    **Returns:**

    The means over `axis`.

    ??? cite "Reference"

        This paper recommends it for the comparison of algorithms over tasks, together with the
        stratified bootstrap of [`fisher_flow.bootstrap_interval`][] and the
        [`fisher_flow.performance_profile`][].

        ```bibtex
        @inproceedings{agarwal2021deep,
            title={Deep Reinforcement Learning at the Edge of the Statistical Precipice},
            author={Agarwal, Rishabh and Schwarzer, Max and Castro, Pablo Samuel
                    and Courville, Aaron C. and Bellemare, Marc G.},
            booktitle={Advances in Neural Information Processing Systems},
            year={2021},
        }
        ```
    """
    scores = np.asarray(scores, float)
    axes = tuple(range(scores.ndim)) if axis is None else np.atleast_1d(axis)
    axes = [int(x) % scores.ndim for x in axes]
    scores = np.moveaxis(scores, axes, range(-len(axes), 0))
    scores = np.sort(scores.reshape(*scores.shape[: scores.ndim - len(axes)], -1))
    n = scores.shape[-1]
    edges = np.clip(np.arange(n + 1), n / 4, 3 * n / 4)  # score i covers the ranks i to i + 1
    return scores @ np.diff(edges) / (n / 2)


def bootstrap_interval(
    scores: Any,
    statistic: Statistic = np.mean,
    *,
    confidence: float = 0.95,
    num_resamples: int = 5000,
    seed: int = 0,
) -> np.ndarray:
    r"""A confidence interval of a statistic of scores, by the stratified percentile bootstrap.

    Seeds are drawn with replacement within each task, and tasks are never mixed: the interval says
    what other seeds would have given on these tasks, not what other tasks would have.

    Experiments have few seeds, and the plain bootstrap is then too short. With five seeds of one
    task, only 83% of its intervals hold the mean of a normal distribution, not 95%. Two corrections
    make that 91%. Both vanish for many seeds:

    - Only $n - 1$ of $n$ seeds are drawn. The variance of a mean is then $s^2 / n$ with the
        unbiased $s^2$ (McCarthy & Snowden 1985).
    - The percentiles are further out, by as much as Student's $t$ is wider than the normal
        distribution (Hesterberg 2015). Its degrees of freedom are those of all tasks together.

    No resample leaves the range of the scores. With three seeds of one task the interval ends at
    the lowest and the highest score, and holds the truth in 75% of cases. With two seeds it does so
    in half of the cases.

    **Arguments:**

    - `scores`: an array of shape `(tasks, seeds)`; of a single task, `scores[None]`.
    - `statistic`: called as `statistic(scores, axis)`. `axis` holds the axes of tasks and seeds;
        before them is an axis of resamples, which is kept. `np.mean`, `np.median` and
        [`fisher_flow.interquartile_mean`][] are such functions, and so is
        `lambda scores, axis: np.mean(scores > 50, axis)`.

    **Other arguments:**

    - `confidence`: the probability with which the interval should hold the truth.
    - `num_resamples`: the number of resamples.
    - `seed`: the seed of the resampling.

    **Returns:**

    The lower and the upper end, `low, high = bootstrap_interval(...)`, each in the shape of the
    statistic.

    **Raises:**

    - `ValueError` if `scores` has another shape, entries that are not finite, or one seed only.

    ??? cite "Reference"

        The two corrections for few seeds:

        ```bibtex
        @techreport{mccarthy1985bootstrap,
            title={The Bootstrap and Finite Population Sampling},
            author={McCarthy, Philip J. and Snowden, Cecelia B.},
            institution={National Center for Health Statistics},
            year={1985},
        }

        @article{hesterberg2015teachers,
            title={What Teachers Should Know About the Bootstrap: Resampling in the Undergraduate
                   Statistics Curriculum},
            author={Hesterberg, Tim C.},
            journal={The American Statistician},
            volume={69},
            number={4},
            year={2015},
        }
        ```
    """
    scores = _as_scores("scores", scores)
    check_positive_integer("num_resamples", num_resamples, 5000)
    if not 0 < confidence < 1:
        raise ValueError(
            f"`confidence` must lie between 0 and 1, but got `{confidence}`. Write "
            "`confidence=0.95`."
        )
    tasks, n = scores.shape
    if n == 1:
        raise ValueError(
            "`scores` must hold at least two seeds of each task, since one seed does not show how "
            f"much seeds differ, but got shape {scores.shape}. Run more seeds: `seeds=range(5)`."
        )
    drawn = np.random.default_rng(seed).integers(n, size=(num_resamples, tasks, n - 1))
    resamples = scores[np.arange(tasks)[:, None], drawn]
    values = np.asarray(statistic(resamples, (1, 2)), float)
    if values.shape[:1] != (num_resamples,):
        raise ValueError(
            "`statistic` must reduce the axes it is given and keep the others, but made shape "
            f"{values.shape} of {resamples.shape}. Write `statistic=np.mean`, or `lambda scores, "
            "axis: np.mean(scores > 50, axis)`."
        )
    tail = NormalDist().cdf(-_student_quantile((1 + confidence) / 2, tasks * (n - 1)))
    return np.quantile(values, [tail, 1 - tail], axis=0)


def _student_quantile(p: float, ν: int) -> float:
    """A quantile of Student's t: Abramowitz & Stegun 26.7.5, within 0.2% from ν = 4 on."""
    z = NormalDist().inv_cdf(p)
    return (
        z
        + (z**3 + z) / (4 * ν)
        + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * ν**2)
        + (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * ν**3)
    )


@dataclasses.dataclass(frozen=True, eq=False)
class PairedDifference:
    """How two methods compare, run by run; made by [`fisher_flow.paired_difference`][]."""

    difference: float
    """The mean of the first method minus the mean of the second."""

    interval: Float[np.ndarray, "2"]
    """The confidence interval of the difference. If it does not hold zero, chance alone is an
    unlikely reason for the difference."""

    share_won: float
    """The share of pairs in which the first method scored higher: the probability of improvement. A
    tie counts one half."""

    share_won_interval: Float[np.ndarray, "2"]
    """The confidence interval of that share. If every pair was won, the interval has no width, and
    claims too much."""

    num_pairs: int
    """The number of pairs."""

    def __str__(self) -> str:
        (low, high), (least, most) = self.interval, 100 * self.share_won_interval
        return (
            f"{self.difference:+.4g} [{low:.4g}, {high:.4g}], "
            f"won {100 * self.share_won:.0f}% [{least:.0f}, {most:.0f}] of {self.num_pairs} pairs"
        )


def paired_difference(
    first: Any,
    second: Any,
    *,
    confidence: float = 0.95,
    num_resamples: int = 5000,
    seed: int = 0,
) -> PairedDifference:
    """Compares two methods that ran on the same tasks with the same seeds.

    A pair shares its data, its pretrained flow and its start states. What it shares cancels in the
    difference, so the interval of the difference may be far narrower than the intervals of the
    methods. Two methods may differ clearly although their intervals overlap.

    !!! example

        ```python
        import fisher_flow
        import numpy as np

        rng = np.random.default_rng(0)
        shared = rng.normal(70.0, 10.0, size=(3, 8))  # how well the flow of each seed came out
        baseline = shared + rng.normal(0.0, 1.0, size=(3, 8))
        refined = shared + 2 + rng.normal(0.0, 1.0, size=(3, 8))
        print(fisher_flow.paired_difference(refined, baseline))
        ```

    **Arguments:**

    - `first`: scores of the first method, of shape `(tasks, seeds)`.
    - `second`: scores of the second, at the same place for the same task and seed.

    **Other arguments:**

    - `confidence`, `num_resamples`, `seed`: as for [`fisher_flow.bootstrap_interval`][].

    **Returns:**

    A [`fisher_flow.PairedDifference`][], which prints as a line.

    **Raises:**

    - `ValueError` if the shapes differ, or one of them has no interval.
    """
    first, second = _as_scores("first", first), _as_scores("second", second)
    if first.shape != second.shape:
        raise ValueError(
            f"`first` and `second` must hold the same tasks and seeds, but got shapes "
            f"{first.shape} and {second.shape}. Write `first[:, :n], second[:, :n]` if the first "
            "`n` seeds of both are the same."
        )
    options: Any = dict(confidence=confidence, num_resamples=num_resamples, seed=seed)
    difference = first - second
    won = (np.sign(difference) + 1) / 2
    return PairedDifference(
        float(np.mean(difference)),
        bootstrap_interval(difference, **options),
        float(np.mean(won)),
        bootstrap_interval(won, **options),
        difference.size,
    )


def performance_profile(
    scores: Any,
    thresholds: Any,
    *,
    confidence: float = 0.95,
    num_resamples: int = 5000,
    seed: int = 0,
) -> tuple[np.ndarray, np.ndarray]:
    r"""The share of runs that score above each of several thresholds.

    One curve holds the whole distribution of scores over tasks and seeds. Its height at 50 is the
    share of runs above 50. It falls to one half at the median, and the area under it is the mean.
    If the curve of a method lies above another curve everywhere, the method is better by any
    measure.

    **Arguments:**

    - `scores`: an array of shape `(tasks, seeds)`, on a scale that the tasks share.
    - `thresholds`: an array of thresholds.

    **Other arguments:**

    - `confidence`, `num_resamples`, `seed`: as for [`fisher_flow.bootstrap_interval`][].

    **Returns:**

    - The share at each threshold.
    - The interval of the share, of shape `(2, thresholds)`: the lower and the upper ends. It holds
        at each threshold, not at all thresholds at once.

    **Raises:**

    - `ValueError` if `scores` has no interval.
    """
    thresholds = np.atleast_1d(np.asarray(thresholds, float))

    def above(scores, axis):
        return np.stack([np.mean(scores > x, axis) for x in thresholds], axis=-1)

    scores = _as_scores("scores", scores)
    interval = bootstrap_interval(
        scores, above, confidence=confidence, num_resamples=num_resamples, seed=seed
    )
    return above(scores, (0, 1)), interval


def _as_scores(name: str, scores: Any) -> np.ndarray:
    scores = np.asarray(scores, float)
    if scores.ndim != 2 or scores.size == 0:
        raise ValueError(
            f"`{name}` must be an array of shape `(tasks, seeds)`, but got shape {scores.shape}. "
            f"Write `{name}=np.asarray({name})[None]` for several seeds of one task."
        )
    if not np.all(np.isfinite(scores)):
        raise ValueError(
            f"`{name}` must be finite, but {np.sum(~np.isfinite(scores))} of its {scores.size} "
            "entries are not. A run that failed is a result too: write "
            f"`{name}=np.nan_to_num({name}, nan=score_of_a_random_policy)`."
        )
    return scores
