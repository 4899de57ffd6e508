"""The Pareto front against its definition."""

from __future__ import annotations

import math
import random

import pytest

from compression.pareto import pareto_front


def test_a_point_worse_in_both_is_off_the_front() -> None:
    assert pareto_front([(1, 3), (2, 2), (3, 1), (3, 3)]) == [True, True, True, False]


def test_a_point_equal_in_one_and_worse_in_the_other_is_off_the_front() -> None:
    assert pareto_front([(1, 1), (1, 2)]) == [True, False]


def test_equal_points_share_their_fate() -> None:
    assert pareto_front([(1, 1), (1, 1), (2, 2), (2, 2)]) == [True, True, False, False]


def test_what_was_not_measured_is_off_the_front_and_beats_nobody() -> None:
    nan = math.nan
    assert pareto_front([(nan, 0), (1, 1), (0, nan), (nan, nan)]) == [False, True, False, False]


def test_no_points_have_no_front() -> None:
    assert pareto_front([]) == []


def test_points_of_different_lengths_are_refused() -> None:
    with pytest.raises(ValueError, match="same number of coordinates"):
        pareto_front([(1, 2), (1, 2, 3)])


@pytest.mark.parametrize("seed", range(20))
def test_the_front_beats_all_others_and_none_of_itself(seed: int) -> None:
    generator = random.Random(seed)
    # Few values, so that ties and equal points occur.
    points = [tuple(generator.randrange(5) for _ in range(3)) for _ in range(12)]

    def beats(a: tuple[int, ...], b: tuple[int, ...]) -> bool:
        return a != b and all(x <= y for x, y in zip(a, b, strict=True))

    front = pareto_front(points)
    chosen = [point for point, on in zip(points, front, strict=True) if on]
    assert chosen
    for point, on in zip(points, front, strict=True):
        assert any(beats(other, point) for other in chosen) is not on
