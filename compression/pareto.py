"""Pareto fronts, pure Python."""

from __future__ import annotations

import math
from collections.abc import Sequence


def pareto_front(points: Sequence[Sequence[float]]) -> list[bool]:
    """For each point, whether no other beats it; every coordinate is better when smaller.

    A point beats another when it is no worse in each coordinate and better in one.
    Equal points do not beat each other: both are on the front or neither. A point
    with a coordinate that is NaN was not measured; it is never on the front and
    beats nobody.
    """
    measured = [not any(math.isnan(value) for value in point) for point in points]
    if len({len(point) for point in points}) > 1:
        raise ValueError("points must have the same number of coordinates")

    def beats(a: Sequence[float], b: Sequence[float]) -> bool:
        return all(x <= y for x, y in zip(a, b, strict=True)) and any(
            x < y for x, y in zip(a, b, strict=True)
        )

    return [
        measured[i]
        and not any(measured[j] and beats(other, point) for j, other in enumerate(points))
        for i, point in enumerate(points)
    ]
