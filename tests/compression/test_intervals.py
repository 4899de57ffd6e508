"""Bootstrap intervals: paired, seeded, and about as often right as they say."""

from __future__ import annotations

import numpy as np
import pytest

from compression.evaluate import drop_intervals, resampled_metric
from compression.intervals import RESAMPLES, fewest_rounds, intervals, row_resamples
from compression.report import Intervals
from compression.spec import CONFIDENCES, TaskSpec
from compression.tasks import Task, make_task

TASK = make_task(TaskSpec(), ("0", "1"))


def answers(right: np.ndarray) -> np.ndarray:
    """Outcomes [rows, 2] of a classification whose every label is 1."""
    return np.stack([right.astype(np.int64), np.ones(len(right), np.int64)], axis=1)


def drop_within(reference: np.ndarray, own: np.ndarray, task: Task = TASK) -> Intervals:
    return drop_intervals(
        reference=resampled_metric(task, reference), own=resampled_metric(task, own)
    )


def width(found: Intervals, confidence: float = 0.95) -> float:
    (own,) = [each for each in found if each.confidence == confidence]
    return own.high - own.low


def test_the_ends_are_quantiles_of_the_resamples() -> None:
    found = intervals(np.arange(1001) / 10)
    assert [each.confidence for each in found] == list(CONFIDENCES)
    assert [(each.low, each.high) for each in found] == [
        pytest.approx(ends) for ends in ((5, 95), (2.5, 97.5), (0.5, 99.5))
    ]
    assert intervals([1.0, float("nan")]) == ()


def test_resamples_are_the_same_each_time_and_draw_every_row_about_once() -> None:
    first, second = (np.array(list(row_resamples(40))) for _ in range(2))
    np.testing.assert_array_equal(first, second)
    assert first.shape == (RESAMPLES, 40)
    counts = np.bincount(first.ravel(), minlength=40) / RESAMPLES
    assert counts.min() > 0.85 and counts.max() < 1.15


def test_rows_that_both_get_alike_do_not_widen_the_interval() -> None:
    """872 rows at 85 %: alone each is uncertain by points, their difference is not."""
    generator = np.random.default_rng(0)
    teacher = generator.random(872) < 0.85
    own = teacher.copy()
    own[np.flatnonzero(teacher)[:4]] = False
    paired = drop_within(answers(teacher), answers(own))
    other = answers(generator.permutation(own))  # as many right, on other rows
    unpaired = drop_within(answers(teacher), other)
    assert width(paired) < 1.0 < 4.0 < width(unpaired)
    same = drop_within(answers(teacher), answers(teacher))
    assert {(each.low, each.high) for each in same} == {(0.0, 0.0)}


def test_an_interval_of_90_percent_holds_the_truth_about_as_often() -> None:
    generator = np.random.default_rng(1)
    held = 0
    for _ in range(60):
        lost = (generator.random(150) < 0.8) * 1.0 - (generator.random(150) < 0.7)  # 0.1 on average
        found = intervals([lost[rows].mean() for rows in row_resamples(150)])[0]
        held += found.low <= 0.1 <= found.high
    assert 0.78 <= held / 60 <= 0.99


def test_a_metric_that_is_no_mean_is_computed_on_each_resample() -> None:
    task = make_task(TaskSpec(kind="regression", metric="spearman"), ("score",))
    generator = np.random.default_rng(2)
    labels = generator.random(80)
    teacher = np.stack([labels + 0.1 * generator.normal(size=80), labels], axis=1)
    own = np.stack([labels + 0.3 * generator.normal(size=80), labels], axis=1)
    drop = 100 * (task.metrics_of(teacher)["spearman"] - task.metrics_of(own)["spearman"])
    for each in drop_within(teacher, own, task):
        assert 0 < each.low < drop < each.high
    rows = next(iter(row_resamples(80)))
    assert task.metrics_of(own[rows])["spearman"] != task.metrics_of(own)["spearman"]


@pytest.mark.parametrize(("percentile", "confidence"), [(50, 0.9), (95, 0.95), (99, 0.95)])
def test_so_many_calls_and_no_fewer_show_one_beyond_a_percentile(
    percentile: int, confidence: float
) -> None:
    fewest = fewest_rounds(percentile, confidence)
    none_beyond = percentile / 100
    assert none_beyond**fewest <= 1 - confidence < none_beyond ** (fewest - 1)
