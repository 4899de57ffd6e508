"""What is chosen under which constraints, and what the sentence says."""

from __future__ import annotations

import itertools
import math
from fractions import Fraction
from typing import Any

import pytest

from compression.report import Candidate, FormatReport, LatencyReport, SubnetworkReport
from compression.selection import candidates, select, with_decisions
from compression.spec import ConstraintSpec, Format


def candidate(
    name: str, *, drop: float, ms: float, fmt: Format = "onnx", mb: float = 50.0
) -> Candidate:
    """`ms` against a teacher that takes 10 ms."""
    return Candidate(
        subnetwork=name,
        format=fmt,
        accuracy_drop=drop,
        latency_ms=ms,
        speedup=10.0 / ms,
        size_mb=mb,
    )


FOUR = (
    candidate("w1", drop=-0.2, ms=9.9, mb=90),
    candidate("w3_4", drop=0.1, ms=7.5, mb=80),
    candidate("w1_2", drop=0.4, ms=4.0, mb=70),
    candidate("w1_4", drop=2.5, ms=2.0, mb=60),
)


def chosen(*choices: Candidate, **constraints: float) -> str | None:
    return select(choices, ConstraintSpec(**constraints)).subnetwork


def test_the_fastest_within_the_accuracy_bound_and_why() -> None:
    selection = select(FOUR, ConstraintSpec(max_accuracy_drop=1.0))
    assert (selection.subnetwork, selection.format) == ("w1_2", "onnx")
    assert selection.reason == (
        "w1_2 in ONNX is the fastest of 3 candidates that lose at most 1.0 points: 4.00 ms, "
        "0.4 points below the teacher, 2.50 times as fast, 70.0 MB."
    )
    assert selection.nearest == ()


@pytest.mark.parametrize(
    ("constraints", "name"),
    [
        ({"max_accuracy_drop": 0.0}, "w1"),
        ({"max_accuracy_drop": 0.3}, "w3_4"),
        ({"max_accuracy_drop": 5.0}, "w1_4"),
        ({"max_accuracy_drop": 5.0, "max_latency_ms": 4.0}, "w1_4"),
        ({"max_accuracy_drop": 1.0, "min_speedup": 2.5}, "w1_2"),  # a bound may be met exactly
        ({"max_accuracy_drop": 1.0, "max_size_mb": 80}, "w1_2"),
        ({"max_accuracy_drop": -0.1}, "w1"),
    ],
)
def test_every_constraint_is_held(constraints: dict[str, float], name: str) -> None:
    assert chosen(*FOUR, **constraints) == name


@pytest.mark.parametrize("right", range(2, 201))
def test_a_drop_of_exactly_the_bound_holds_it(right: int) -> None:
    drop = 100 * (right / 200 - (right - 2) / 200)  # a point, give or take a rounding error
    assert chosen(candidate("w1", drop=drop, ms=5.0), max_accuracy_drop=1.0) == "w1"
    assert chosen(candidate("w1", drop=drop, ms=5.0), max_accuracy_drop=0.99) is None


def test_without_constraints_the_fastest_that_loses_at_most_a_point() -> None:
    selection = select(FOUR, ConstraintSpec())
    assert selection.subnetwork == "w1_2"
    assert "because no bound on the accuracy was set" in selection.reason


def test_without_a_bound_on_accuracy_it_is_not_thrown_away_for_speed() -> None:
    assert chosen(*FOUR, max_latency_ms=8.0) == "w1_2"
    selection = select(FOUR, ConstraintSpec(max_latency_ms=3.0))
    assert selection.subnetwork == "w1_4"
    assert "all lose more than 1.0 points" in selection.reason


def test_the_most_accurate_where_all_lose_more_than_a_point() -> None:
    worse = (candidate("w1", drop=3.0, ms=9.0), candidate("w1_2", drop=2.0, ms=5.0))
    selection = select(worse, ConstraintSpec())
    assert selection.subnetwork == "w1_2"
    assert "the most accurate of 2 candidates" in selection.reason


def test_nothing_holds_names_what_ruled_out_how_many_and_the_nearest_three() -> None:
    selection = select(FOUR, ConstraintSpec(max_accuracy_drop=0.0, max_latency_ms=5.0))
    assert (selection.subnetwork, selection.format) == (None, None)
    assert selection.reason == (
        "None of 4 candidates holds every constraint: max_accuracy_drop 0 rules out 3 and "
        "max_latency_ms 5 rules out 2; the nearest is w1_2 in ONNX, which loses 0.4 points, "
        "at most 0.0 points allowed."
    )
    # Violations: w1_2 0.4 points; w3_4 0.1 + 0.5 of the latency; w1 0.98; w1_4 2.5.
    assert [c.subnetwork for c in selection.nearest] == ["w1_2", "w3_4", "w1"]
    assert [len(c.misses) for c in selection.nearest] == [1, 2, 1]


def test_nearness_is_relative_to_each_bound() -> None:
    selection = select(FOUR, ConstraintSpec(min_speedup=20.0, max_size_mb=59.0))
    # 20 asked, 5 / 2.5 / 1.33 / 1.01 given: the violation is 3, 7, 14 and 19 times the bound.
    assert [c.subnetwork for c in selection.nearest] == ["w1_4", "w1_2", "w3_4"]
    assert selection.nearest[0].misses == (
        "is 5.00 times as fast, at least 20.0 asked",
        "has 60.0 MB, at most 59.0 MB allowed",
    )


def test_a_tie_in_speed_goes_to_the_more_accurate_in_any_order() -> None:
    tied = (
        candidate("b", drop=0.5, ms=4.0),
        candidate("a", drop=0.2, ms=4.0),
        candidate("c", drop=0.2, ms=4.0),
        candidate("a", drop=0.2, ms=4.0, fmt="paddle"),
    )
    answers = {
        (select(order, ConstraintSpec()).subnetwork, select(order, ConstraintSpec()).format)
        for order in itertools.permutations(tied)
    }
    assert answers == {("a", "onnx")}


@pytest.mark.parametrize("constraints", [{}, {"max_accuracy_drop": 5.0}, {"max_latency_ms": 9.0}])
def test_what_was_not_measured_is_never_chosen(constraints: dict[str, float]) -> None:
    broken = candidate("w1_8", drop=math.nan, ms=1.0)
    unmeasured = candidate("w1_16", drop=0.0, ms=math.nan)
    assert chosen(broken, unmeasured, *FOUR, **constraints) == chosen(*FOUR, **constraints)
    alone = select((broken, unmeasured), ConstraintSpec(**constraints))
    assert alone.subnetwork is None
    assert "of 2 candidates, none has a finite accuracy" in alone.reason
    assert alone.nearest == ()


def test_no_candidates_are_said_to_be_none() -> None:
    assert "no served format" in select((), ConstraintSpec()).reason


def test_one_of_many_is_called_the_only_one() -> None:
    reason = select(FOUR, ConstraintSpec(max_accuracy_drop=0.0)).reason
    assert reason == (
        "w1 in ONNX is the only one of 4 candidates that loses at most 0.0 points: 9.90 ms, "
        "0.2 points above the teacher, 1.01 times as fast, 90.0 MB."
    )


def format_report(
    fmt: Format, *, p50: float | None, published: bool = True, **changes: Any
) -> FormatReport:
    latency = None
    if p50 is not None:
        latency = LatencyReport(
            p50_ms=p50, p95_ms=p50, p99_ms=p50, rounds=5, batch_size=1, seq_len=8, threads=1
        )
    values = {"speedup": 10.0 / p50 if p50 else None, "size_bytes": 70_000_000, **changes}
    return FormatReport(format=fmt, published=published, latency=latency, **values)


def subnetwork(name: str, drop: float, *formats: FormatReport) -> SubnetworkReport:
    return SubnetworkReport(
        name=name,
        width_mult=Fraction(1, 2),
        heads=(2,),
        ffn=(4,),
        parameters=10,
        flops=20,
        accuracy=0.9,
        accuracy_drop=drop,
        formats=formats,
    )


def test_candidates_are_the_published_measured_served_formats() -> None:
    reports = (
        subnetwork(
            "w1",
            0.0,
            format_report("safetensors", p50=None),
            format_report("paddle", p50=8.0),
            format_report("onnx", p50=5.0),
        ),
        subnetwork("w1_2", 1.0, format_report("onnx", p50=2.0, published=False)),
        subnetwork("w1_4", 1.0, format_report("onnx", p50=None)),
    )
    found = candidates(reports)
    assert [(c.subnetwork, c.format) for c in found] == [("w1", "paddle"), ("w1", "onnx")]
    assert (found[1].speedup, found[1].size_mb) == (2.0, 70.0)


def test_the_front_and_the_choice_are_marked() -> None:
    reports = (
        subnetwork("w1", 0.0, format_report("paddle", p50=8.0), format_report("onnx", p50=5.0)),
        subnetwork("w3_4", 0.5, format_report("paddle", p50=6.0)),  # beaten by w1 in ONNX
        subnetwork("w1_2", 0.7, format_report("onnx", p50=2.0)),
        subnetwork("w1_4", -9.0, format_report("onnx", p50=1.0, published=False)),
    )
    selection = select(candidates(reports), ConstraintSpec())
    marked = with_decisions(reports, selection)
    assert [report.pareto for report in marked] == [True, False, True, False]
    assert [report.selected for report in marked] == [False, False, True, False]
    assert [report.name for report in marked] == [report.name for report in reports]


def test_int8_is_a_candidate_with_the_accuracy_that_is_its_own() -> None:
    reports = (
        subnetwork("w1", 0.0, format_report("onnx", p50=5.0)),
        # As fast as it is in int8 and as accurate as it is in fp32, w3_4 would beat w1_2.
        subnetwork(
            "w3_4",
            0.5,
            format_report("onnx", p50=4.5),
            format_report("onnx-int8-dynamic", p50=2.0, accuracy_drop=6.0, flipped=0.08),
        ),
        subnetwork("w1_2", 0.7, format_report("onnx", p50=2.5)),
        # In fp32 it is beaten by w1_2, in int8 by none.
        subnetwork(
            "w1_4",
            0.9,
            format_report("onnx", p50=2.6),
            format_report("onnx-int8-static", p50=1.5, accuracy_drop=0.95, flipped=0.02),
        ),
    )
    choices = candidates(reports)
    assert [c.accuracy_drop for c in choices] == [0.0, 0.5, 6.0, 0.7, 0.9, 0.95]
    selection = select(choices, ConstraintSpec(max_accuracy_drop=1.0))
    assert (selection.subnetwork, selection.format) == ("w1_4", "onnx-int8-static")
    assert selection.reason.startswith("w1_4 in ONNX (static INT8) is the fastest of 5 candidates")
    selection = select(choices, ConstraintSpec(max_accuracy_drop=0.8))
    assert (selection.subnetwork, selection.format) == ("w1_2", "onnx")
    marked = with_decisions(reports, selection)
    assert [report.pareto for report in marked] == [True, True, True, True]
    slower = (*reports[:3], subnetwork("w1_4", 0.9, format_report("onnx", p50=2.6)))
    assert [report.pareto for report in with_decisions(slower, selection)] == [True] * 3 + [False]
