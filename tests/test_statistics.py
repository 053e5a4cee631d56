import dataclasses

import numpy as np
import pytest
import scipy.stats

import fisher_flow as ff


@pytest.fixture
def rng():
    return np.random.default_rng(0)


# The interquartile mean.


@pytest.mark.parametrize("shape", [(4,), (8,), (3, 4), (5, 8)])
def test_interquartile_mean_is_a_trimmed_mean(shape, rng):
    scores = rng.normal(size=shape)
    expected = scipy.stats.trim_mean(scores.ravel(), 0.25)
    assert np.allclose(ff.interquartile_mean(scores), expected)


@pytest.mark.parametrize(
    "scores, expected",
    [
        ([7.0], 7.0),
        ([1.0, 2.0], 1.5),
        ([0.0, 10.0, 1000.0], (0.25 * 0 + 10 + 0.25 * 1000) / 1.5),
        ([1000.0, 4.0, -50.0, 1.0, 2.0], (0.75 * 1 + 2 + 0.75 * 4) / 2.5),
        ([0.0, 1.0, 2.0, 3.0, 4.0, 100.0], (0.5 * 1 + 2 + 3 + 0.5 * 4 - 0) / 3),
    ],
)
def test_interquartile_mean_by_hand(scores, expected):
    assert np.allclose(ff.interquartile_mean(np.array(scores)), expected)


def test_interquartile_mean_over_axes(rng):
    scores = rng.normal(size=(3, 4, 5, 6))
    each = [[ff.interquartile_mean(scores[i, :, :, j]) for j in range(6)] for i in range(3)]
    assert np.allclose(ff.interquartile_mean(scores, (1, 2)), each)
    assert np.allclose(ff.interquartile_mean(scores, axis=-3), ff.interquartile_mean(scores, 1))


# Intervals.


def test_the_interval_of_a_mean_is_that_of_student(rng):
    scores = rng.normal(10.0, 3.0, size=(1, 12))
    n, mean, deviation = 12, np.mean(scores), np.std(scores, ddof=1)
    low, high = scipy.stats.t.interval(0.9, n - 1, mean, deviation / np.sqrt(n))
    interval = ff.bootstrap_interval(scores, confidence=0.9, num_resamples=50_000)
    # The bootstrap follows the skewness of the sample, and Student does not.
    assert np.allclose(interval, [low, high], atol=0.1 * (high - low))
    assert np.allclose(np.ptp(interval), high - low, rtol=0.03)


# The means of tasks may lie far apart, and then must not add to the width.
@pytest.mark.parametrize("statistic, gap", [(np.mean, 100.0), (ff.interquartile_mean, 0.0)])
@pytest.mark.parametrize("tasks, seeds", [(1, 8), (5, 5)])
def test_coverage_on_gaussian_scores(tasks, seeds, statistic, gap, rng):
    means = gap * np.arange(tasks)[:, None]
    covered = 0
    for repetition in range(300):
        scores = rng.normal(means, 1.0, size=(tasks, seeds))
        low, high = ff.bootstrap_interval(scores, statistic, num_resamples=1000, seed=repetition)
        covered += low <= np.mean(means) <= high
    # Of intervals by the plain percentile bootstrap, 89% would hold the truth.
    assert scipy.stats.binomtest(covered, 300, 0.95).pvalue > 1e-3


def test_tasks_are_not_mixed():
    scores = np.array([[0.0, 0.0, 0.0], [100.0, 100.0, 100.0]])
    assert np.array_equal(ff.bootstrap_interval(scores), [50.0, 50.0])
    # Seen through a statistic that keeps tasks apart: each is resampled from its own seeds.
    scores = np.arange(12.0).reshape(3, 4)
    inside = lambda x, axis: np.mean((x // 4 == np.arange(3)[:, None]), axis)
    assert np.array_equal(ff.bootstrap_interval(scores, inside), [1.0, 1.0])


def test_the_variance_of_the_resamples_is_unbiased(rng):
    scores = rng.normal(size=(3, 4))
    kept = []
    statistic = lambda x, axis: kept.append(np.mean(x, axis)) or kept[-1]
    ff.bootstrap_interval(scores, statistic, num_resamples=50_000)
    expected = np.sum(np.var(scores, axis=1, ddof=1) / 4) / 3**2
    assert np.allclose(np.var(kept[0]), expected, rtol=0.03)  # of 50 000 draws


def test_intervals_are_the_same_every_time_and_shift_and_scale(rng):
    scores = rng.normal(size=(3, 6))
    interval = ff.bootstrap_interval(scores)
    assert np.array_equal(ff.bootstrap_interval(scores), interval)
    assert not np.array_equal(ff.bootstrap_interval(scores, seed=1), interval)
    assert np.allclose(ff.bootstrap_interval(5 + 2 * scores), 5 + 2 * interval)
    assert np.ptp(ff.bootstrap_interval(scores, confidence=0.5)) < np.ptp(interval)


@pytest.mark.parametrize(
    "scores, options, message",
    [
        (np.zeros(5), {}, r"`\(tasks, seeds\)`.*\(5,\).*`scores=np.asarray\(scores\)\[None\]`"),
        (np.zeros((5, 1)), {}, r"at least two seeds.*\(5, 1\).*`seeds=range\(5\)`"),
        (np.array([[1.0, np.nan]]), {}, r"finite, but 1 of its 2 .*`scores=np.nan_to_num"),
        (np.zeros((2, 3)), {"confidence": 95}, r"got `95`. Write `confidence=0.95`"),
        (np.zeros((2, 3)), {"num_resamples": 0}, "`num_resamples=5000`"),
        (np.zeros((2, 3)), {"statistic": lambda x, axis: np.mean(x)}, "Write `statistic=np.mean`"),
    ],
)
def test_what_has_no_interval(scores, options, message):
    with pytest.raises(ValueError, match=message):
        ff.bootstrap_interval(scores, **options)


# Paired comparison.


def test_what_pairs_share_cancels(rng):
    shared = rng.normal(50.0, 20.0, size=(2, 10))
    first, second = (shared + x + rng.normal(size=(2, 10)) for x in (3.0, 0.0))
    paired = ff.paired_difference(first, second)
    assert np.allclose(paired.difference, np.mean(first) - np.mean(second))
    assert 0 < paired.interval[0] < 3 < paired.interval[1] < 6
    # Of the same scores without their pairing nothing can be said.
    shuffled = ff.paired_difference(first, np.roll(second, 5, axis=1))
    assert np.allclose(shuffled.difference, paired.difference)
    assert np.ptp(shuffled.interval) > 5 * np.ptp(paired.interval)
    assert shuffled.interval[0] < 0 < shuffled.interval[1]


def test_shares_of_pairs_won_by_hand():
    paired = ff.paired_difference([[1.0, 2.0, 3.0, 4.0]], [[0.0, 2.0, 4.0, 3.0]])
    assert paired.share_won == (1 + 0.5 + 0 + 1) / 4
    assert paired.num_pairs == 4 and paired.difference == 0.25
    assert 0 <= paired.share_won_interval[0] < 0.625 < paired.share_won_interval[1] <= 1
    assert str(paired).startswith("+0.25 [") and "won 62% [" in str(paired)


def test_swapping_the_methods_changes_the_sign(rng):
    first, second = rng.normal(size=(2, 4, 6))
    one, other = ff.paired_difference(first, second), ff.paired_difference(second, first)
    assert np.allclose(other.interval, -one.interval[::-1])
    assert np.allclose(other.share_won_interval, 1 - one.share_won_interval[::-1])


def test_what_cannot_be_paired():
    with pytest.raises(ValueError, match=r"got shapes \(2, 3\) and \(2, 4\). Write `first\[:, :n"):
        ff.paired_difference(np.zeros((2, 3)), np.zeros((2, 4)))


# Performance profiles.


def test_profiles_by_hand():
    scores = np.array([[1.0, 2.0], [3.0, 4.0]])
    share, interval = ff.performance_profile(scores, [0.0, 1.0, 2.5, 4.0])
    assert np.array_equal(share, [1.0, 0.75, 0.5, 0.0])
    assert interval.shape == (2, 4)
    assert np.array_equal(interval[:, 2], [0.5, 0.5])  # seeds stay in their task
    assert np.array_equal(interval[:, 1], [0.5, 1.0])


def test_the_area_under_a_profile_is_the_mean(rng):
    scores = rng.uniform(0.0, 1.0, size=(4, 5))
    thresholds = np.linspace(0.0, 1.0, 1001)
    share, (low, high) = ff.performance_profile(scores, thresholds)
    assert np.allclose(np.mean(share), np.mean(scores), atol=2e-3)
    assert np.all(low <= share) and np.all(share <= high)
    assert np.all(np.diff(share) <= 0)


# Normalised scores.


def test_the_ends_of_the_scale():
    ends = [-280.178953, 12135.0]
    assert np.allclose(ff.normalised_score("halfcheetah-medium-v2", ends), [0, 100])
    assert np.allclose(ff.normalised_score("antmaze-large-play-v2", np.array([0.0, 0.25])), [0, 25])
    assert np.allclose(ff.normalised_score("pen-human-v1", 3076.8331017826877), 100)
    assert np.allclose(ff.normalised_score((-1200, -150), -675.0), 50)
    assert ff.normalised_score("kitchen-mixed-v0", np.zeros((2, 3))).shape == (2, 3)


def test_scales_that_are_not_known():
    known = r"one of D4RL's `halfcheetah-...`, .*`relocate-...`"
    with pytest.raises(ValueError, match=known + r", but got `humanoid-medium-v2`.*`task=\("):
        ff.normalised_score("humanoid-medium-v2", 0.0)
    with pytest.raises(ValueError, match=r"got `\(1.0, 1.0\)`. Write `task=\(low, high\)`"):
        ff.normalised_score((1.0, 1.0), 0.0)


# Results.


by_hand = """\
task,method,seed,updates,score,machine
hopper,flow,0,100,1,a
hopper,flow,0,200,2,a
hopper,flow,0,300,6,a
hopper,flow,1,300,10,b
hopper,flow,1,200,9,b
hopper,flow,1,100,99,b
hopper,refined,0,100,20,a
hopper,refined,0,200,20,a
hopper,refined,0,300,20,a
hopper,refined,1,100,20,a
hopper,refined,1,200,20,a
hopper,refined,1,300,20,a
pen,flow,0,100,4,a
pen,flow,0,200,4,a
pen,flow,0,300,4,a
pen,flow,1,100,4,a
pen,flow,1,200,4,a
pen,flow,1,300,4,a
"""


@pytest.fixture
def results(tmp_path):
    (tmp_path / "results.csv").write_text(by_hand, encoding="utf-8")
    return ff.Results.read(tmp_path / "results.csv")


def only(results, column, value):
    return ff.Results(row for row in results.rows if row[column] == value)


def test_a_table_by_hand(results):
    assert results.table() == (
        "Mean [95% bootstrap interval] over 2 seeds; of each run the last evaluation, after 300 "
        "updates, never the best.\n"
        "\n"
        "| task | flow | refined |\n"
        "| --- | --- | --- |\n"
        "| hopper | 8.0 [6.0, 10.0] | 20.0 [20.0, 20.0] |\n"
        "| pen | 4.0 [4.0, 4.0] | — |\n"
        "| interquartile mean | 5.0 [5.0, 7.0] | — |"
    )


def test_the_mean_of_the_last_evaluations(results):
    # Seed 1 is written backwards, and had its best evaluation at the start.
    assert np.allclose(results.scores("flow", last=1), [[6.0, 10.0], [4.0, 4.0]])
    assert np.allclose(results.scores("flow", last=2), [[4.0, 9.5], [4.0, 4.0]])
    assert np.allclose(results.scores("flow", last=3), [[3.0, 118 / 3], [4.0, 4.0]])
    table = only(results, "task", "pen").table(last=3, decimals=2)
    assert "the mean of the last 3 evaluations, after 300 updates, never the best." in table
    assert table.endswith("| --- | --- |\n| pen | 4.00 [4.00, 4.00] |")


def test_one_seed_has_no_interval(results):
    table = only(only(results, "task", "hopper"), "seed", 0).table()
    assert table.startswith("Mean over 1 seed; of each run the last evaluation")
    assert table.endswith("| hopper | 6.0 | 20.0 |")
    rows = [row for row in results.rows if (row["method"], row["seed"]) != ("refined", 1)]
    table = ff.Results(rows).table()
    assert "over 1 to 2 seeds;" in table and "| hopper | 8.0 [6.0, 10.0] | 20.0 |" in table


def test_results_are_compared_by_task_and_seed(results):
    hopper = only(results, "task", "hopper")
    paired = hopper.compare("refined", "flow")
    expected = ff.paired_difference([[20.0, 20.0]], [[6.0, 10.0]])
    for field in dataclasses.fields(paired):
        assert np.array_equal(getattr(paired, field.name), getattr(expected, field.name))
    rows = [row | {"seed": row["seed"] + (row["method"] == "flow")} for row in hopper.rows]
    with pytest.raises(ValueError, match=r"same seeds, .*'flow': \[1, 2\].*`table\(\)`"):
        ff.Results(rows).compare("refined", "flow")


def test_results_are_kept_as_they_are(results, tmp_path):
    assert results.tasks == ("hopper", "pen") and results.methods == ("flow", "refined")
    assert results.rows[3] == dict(
        task="hopper", method="flow", seed=1, updates=300, score=10.0, machine="b"
    )
    results.write(tmp_path / "copy.csv")
    assert ff.Results.read(tmp_path / "copy.csv").rows == results.rows


def test_files_of_several_processes_that_lack_columns(tmp_path):
    for seed in (0, 1):
        text = f"seed,updates,score\n{seed},10,{seed}.5\n"
        (tmp_path / f"{seed}.csv").write_text(text, encoding="utf-8")
    paths = [tmp_path / "0.csv", tmp_path / "1.csv"]
    results = ff.Results.read(*paths, task="hopper", method="flow")
    assert np.array_equal(results.scores("flow"), [[0.5, 1.5]])
    with pytest.raises(ValueError, match=r"row 0 has seed, updates, score. Write `Results.read\("):
        ff.Results.read(*paths)
    with pytest.raises(ValueError, match="two evaluations of method `flow`.* with seed 0"):
        ff.Results.read(paths[0], paths[0], task="hopper", method="flow")
    with pytest.raises(ValueError, match=r"is a folder. Write .*evaluations.csv'"):
        ff.Results.read(tmp_path)
    paths[0].write_text("task,method,seed,updates,score\nhopper,flow,0", encoding="utf-8")
    with pytest.raises(ValueError, match=r"0.csv` is not: .* half a row: delete it"):
        ff.Results.read(paths[0])


row = dict(task="hopper", method="flow", seed=0, updates=10, score=1.0)


@pytest.mark.parametrize(
    "rows, message",
    [
        ([], "at least one evaluation, but is empty"),
        ([row | dict(score="nan")], "finite number for `score`, but row 0 is"),
        ([row | dict(updates=10.5)], "integers for `seed` and `updates` .* row 0 is"),
        ([row, row | dict(seed="first")], "integers for `seed` and `updates` .* row 1 is"),
        (
            [{"return" if name == "score" else name: value for name, value in row.items()}],
            r"a column `score`, but row 0 has .*dict\(row, score=row\[\"return\"\]\)",
        ),
    ],
)
def test_rows_that_are_no_results(rows, message):
    with pytest.raises(ValueError, match=message):
        ff.Results(rows)


def test_protocols_that_do_not_fit(results):
    with pytest.raises(ValueError, match=r"at most the 3 .*`last=3`"):
        results.table(last=4)
    with pytest.raises(ValueError, match=r"`last` must be an integer of at least 1"):
        results.table(last=0)
    with pytest.raises(ValueError, match=r"one of \('flow', 'refined'\), but got `fql`"):
        results.scores("fql")
    with pytest.raises(ValueError, match=r"with \{'hopper': \[0, 1\], 'pen': \[\]\}. Run what"):
        results.scores("refined")
    # A run that was cut short would be judged by an earlier policy.
    cut = ff.Results(row for row in results.rows if (row["seed"], row["updates"]) != (1, 300))
    with pytest.raises(ValueError, match=r"end alike, .*\{0: \[300\], 1: \[200\]\}. Finish"):
        cut.table()
    # Where all seeds of a method were, it shows.
    rows = [r for r in results.rows if (r["method"], r["updates"]) != ("refined", 300)]
    table = ff.Results(rows).table()
    assert "evaluation, after 300 updates (flow), 200 updates (refined), never" in table


def test_learning_curves(results):
    figure = results.plot_learning_curves()
    assert [axes.get_title() for axes in figure.axes] == ["hopper", "pen"]
    flow = figure.axes[0].lines[0]
    assert np.array_equal(flow.get_xdata(), [100, 200, 300])
    assert np.allclose(flow.get_ydata(), [50.0, 5.5, 8.0])
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["flow", "refined"]
    # A method that is evaluated once, runs that are under way, and a seed without company.
    rows = [row for row in results.rows if row["method"] == "flow" or row["updates"] == 300]
    rows = [row for row in rows if (row["seed"], row["updates"]) != (1, 100)]
    figure = ff.Results(rows).plot_learning_curves()
    assert np.allclose(figure.axes[0].lines[0].get_ydata(), [1.0, 5.5, 8.0])
    figure.canvas.draw()


def test_performance_profiles(results):
    flow = only(results, "method", "flow").plot_performance_profiles().axes[0].lines[0]
    # Runs end at 4, 4, 6 and 10; between two scores the share is that of the lower one.
    assert np.allclose(np.asarray(flow.get_xdata())[1:-1], [4.0, 6.0, 10.0])
    assert np.allclose(flow.get_ydata(), [1.0, 0.5, 0.25, 0.0, 0.0])
    with pytest.raises(ValueError, match="must have run on all tasks"):
        results.plot_performance_profiles()
