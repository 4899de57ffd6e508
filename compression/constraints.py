"""One constraint of a selection: what it bounds, by how much a candidate misses it, in which words.

Pure functions of a `Candidate`. Each kind of bound is a class; `bounds_of` makes those of a spec.
"""

from __future__ import annotations

import dataclasses
import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from decimal import Decimal
from typing import ClassVar, Self

from compression.report import Candidate, Interval
from compression.spec import ConstraintSpec

TOLERANCE_DIGITS = 9  # 100 * (0.86 - 0.85) is a little more than 1, and must hold a bound of 1


@dataclass(frozen=True)
class Bound(ABC):
    """One constraint, named as in the spec.

    `confidence`: None to hold what was measured; else the worse end of the candidate's interval
    must hold, which has that confidence. `step`: the unit that it is relaxed by to see what that
    would buy.
    """

    name: ClassVar[str]
    step: ClassVar[float] = 1.0
    limit: float
    confidence: float | None = None

    @abstractmethod
    def value(self, candidate: Candidate) -> float:
        """What is held against the limit."""

    @abstractmethod
    def amount(self, value: float) -> str:
        """A value of this kind with its unit."""

    @abstractmethod
    def miss(self, candidate: Candidate) -> str:
        """How the candidate misses it: "takes 4.00 ms, at most 3.00 ms allowed"."""

    @abstractmethod
    def held(self, *, plural: bool) -> str:
        """What those do that hold it: "takes at most 3.00 ms"."""

    def over(self, candidate: Candidate) -> float:
        """By how much the limit is missed, in its own unit; at most 0 where it holds."""
        return round(self.value(candidate) - self.limit, TOLERANCE_DIGITS)

    def excess(self, candidate: Candidate) -> float:
        """The same in units of the limit, so that bounds can be added up."""
        return self.over(candidate) / self.limit

    def holds(self, candidate: Candidate) -> bool:
        return self.over(candidate) <= 0

    def relaxed(self) -> Self:
        """The same bound, `step` wider."""
        return dataclasses.replace(self, limit=self.limit + self.step)

    def widened(self) -> str:
        """What `relaxed` does, in words."""
        return f"with {self.amount(self.step)} more"

    def _worse_end(self, point: float, interval: Interval | None, *, low: bool = False) -> float:
        """The point itself where no confidence is asked; not a number where no end is known."""
        if self.confidence is None:
            return point
        if interval is None:
            return math.nan
        return interval.low if low else interval.high

    def _measured(self, point: float, worse: float, relation: str) -> str:
        """A figure in words, with the end that counted where that is another one."""
        if self.confidence is None:
            return self.amount(point)
        return (
            f"{self.amount(point)} ({relation} {self.amount(worse)} with "
            f"{100 * self.confidence:g} % confidence)"
        )


@dataclass(frozen=True)
class DropBound(Bound):
    """Points of the main metric; `metric` is what people call it."""

    name = "max_accuracy_drop"
    metric: str = "accuracy"

    def value(self, candidate: Candidate) -> float:
        return self._worse_end(candidate.accuracy_drop, candidate.accuracy_drop_interval)

    def amount(self, value: float) -> str:
        return f"{in_points(value)} of {self.metric}"

    def excess(self, candidate: Candidate) -> float:
        # Bounds near 0 are common here, so a point is the smallest unit.
        return self.over(candidate) / max(abs(self.limit), 1.0)

    def miss(self, candidate: Candidate) -> str:
        drop = self._measured(candidate.accuracy_drop, self.value(candidate), "up to")
        if self.limit < 0:
            return f"loses {drop}, a gain of at least {in_points(-self.limit)} asked"
        return f"loses {drop}, at most {in_points(self.limit)} allowed"

    def held(self, *, plural: bool) -> str:
        if self.limit >= 0:
            return f"{'lose' if plural else 'loses'} at most {self.amount(self.limit)}"
        return f"{'gain' if plural else 'gains'} at least {self.amount(-self.limit)}"


@dataclass(frozen=True)
class LatencyBound(Bound):
    name = "max_latency_ms"

    def value(self, candidate: Candidate) -> float:
        return self._worse_end(candidate.latency_ms, candidate.latency_interval)

    def amount(self, value: float) -> str:
        return in_ms(value)

    def miss(self, candidate: Candidate) -> str:
        taken = self._measured(candidate.latency_ms, self.value(candidate), "up to")
        return f"takes {taken}, at most {in_ms(self.limit)} allowed"

    def held(self, *, plural: bool) -> str:
        return f"{'take' if plural else 'takes'} at most {in_ms(self.limit)}"


@dataclass(frozen=True)
class SpeedupBound(Bound):
    """The only one that is held from above."""

    name = "min_speedup"
    step = 0.1

    def value(self, candidate: Candidate) -> float:
        return self._worse_end(candidate.speedup, candidate.speedup_interval, low=True)

    def amount(self, value: float) -> str:
        return f"{in_digits(value)} times"

    def over(self, candidate: Candidate) -> float:
        return round(self.limit - self.value(candidate), TOLERANCE_DIGITS)

    def excess(self, candidate: Candidate) -> float:
        value = self.value(candidate)
        return self.limit / value - 1.0 if value > 0 else math.inf

    def relaxed(self) -> Self:
        return dataclasses.replace(self, limit=self.limit - self.step)

    def widened(self) -> str:
        return f"with {in_digits(self.limit - self.step)} times asked"

    def miss(self, candidate: Candidate) -> str:
        fast = self._measured(candidate.speedup, self.value(candidate), "at least")
        return f"is {fast} as fast, at least {in_digits(self.limit)} asked"

    def held(self, *, plural: bool) -> str:
        return (
            f"{'are' if plural else 'is'} at least {self.amount(self.limit)} as fast as the teacher"
        )


@dataclass(frozen=True)
class SizeBound(Bound):
    """Of a file, which has no uncertainty."""

    name = "max_size_mb"

    def value(self, candidate: Candidate) -> float:
        return candidate.size_mb

    def amount(self, value: float) -> str:
        return in_mb(value)

    def miss(self, candidate: Candidate) -> str:
        return f"has {in_mb(candidate.size_mb)}, at most {in_mb(self.limit)} allowed"

    def held(self, *, plural: bool) -> str:
        return f"{'have' if plural else 'has'} at most {in_mb(self.limit)}"


def bounds_of(constraints: ConstraintSpec, *, metric: str) -> tuple[Bound, ...]:
    """Those that a spec sets; `metric` is what people call the main metric."""
    confidence = constraints.confidence
    found: list[Bound] = []
    if constraints.max_accuracy_drop is not None:
        found.append(DropBound(constraints.max_accuracy_drop, confidence, metric))
    if constraints.max_latency_ms is not None:
        found.append(LatencyBound(constraints.max_latency_ms, confidence))
    if constraints.min_speedup is not None:
        found.append(SpeedupBound(constraints.min_speedup, confidence))
    if constraints.max_size_mb is not None:
        found.append(SizeBound(constraints.max_size_mb, confidence))
    return tuple(found)


def in_points(value: float) -> str:
    # Two decimals only where the second says something: 0.4, 1.0, 0.25.
    text = f"{value:.2f}"
    return (text[:-1] if text.endswith("0") else text) + " points"


def in_ms(value: float) -> str:
    return f"{in_digits(value)} ms"


def in_mb(value: float) -> str:
    return f"{in_digits(value)} MB"


def in_digits(value: float) -> str:
    """Three digits, never an exponent: 3.72, 12.1, 131, 1204. Two of what is small: 0.0012."""
    if 0 < value < 0.01:
        return f"{Decimal(f'{value:.2g}'):f}"
    return f"{value:.2f}" if value < 10 else f"{value:.1f}" if value < 100 else f"{value:.0f}"
