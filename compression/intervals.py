"""Confidence intervals by the bootstrap (Efron 1979): a figure recomputed on resamples.

Percentile intervals of RESAMPLES resamples that a fixed seed draws: figures that are resampled
alike are paired, so a difference or a ratio of two of them loses the noise that they share.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt

from compression.report import Interval, Intervals
from compression.spec import CONFIDENCES

RESAMPLES = 1000  # the ends of a 95 % interval then rest on 25 of them each
SEED = 0

Rows = npt.NDArray[np.int64]


def intervals(samples: Sequence[float] | npt.NDArray[np.float64]) -> Intervals:
    """The central interval of each confidence, from a figure's value on every resample.

    None at all where a value is not finite: there is nothing to be confident of.
    """
    values = np.asarray(samples, np.float64)
    if not np.isfinite(values).all():
        return ()
    found = []
    for confidence in CONFIDENCES:
        low, high = np.quantile(values, [(1 - confidence) / 2, (1 + confidence) / 2])
        found.append(Interval(confidence=confidence, low=float(low), high=float(high)))
    return tuple(found)


def row_resamples(rows: int) -> Iterator[Rows]:
    """Row numbers of each resample, `rows` of them drawn with replacement."""
    generator = np.random.default_rng(SEED)
    for _ in range(RESAMPLES):
        yield generator.integers(rows, size=rows)


def round_resamples(rounds: int) -> Iterator[Rows]:
    """Numbers of each resample's rounds, in blocks of neighbours (circular block bootstrap).

    A slow moment of the machine lasts for several rounds: drawn one by one they would look
    like more evidence than they are.
    """
    generator = np.random.default_rng(SEED)
    length = math.ceil(rounds ** (1 / 3))
    blocks = math.ceil(rounds / length)
    for _ in range(RESAMPLES):
        starts = generator.integers(rounds, size=(blocks, 1))
        yield ((starts + np.arange(length)) % rounds).ravel()[:rounds]


def fewest_rounds(percentile: int, confidence: float) -> int:
    """Timed calls of which one lies beyond the percentile with that confidence.

    Of fewer the true percentile may well be above all that was measured, and then no resample of
    them knows of it: their interval ends at the slowest call.
    """
    return math.ceil(math.log(1 - confidence) / math.log(percentile / 100))
