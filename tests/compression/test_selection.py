"""What is chosen under which constraints, and what the sentence says."""

from __future__ import annotations

import itertools
import math
from fractions import Fraction
from typing import Any

import pytest

from compression.device_profile import DeviceProfile, Predictor, make_predictor
from compression.errors import InvalidSpec
from compression.report import (
    Candidate,
    FormatReport,
    Interval,
    LatencyReport,
    Selection,
    SubnetworkReport,
)
from compression.selection import candidates, reselect, select, with_decisions
from compression.spec import CONFIDENCES, ConstraintSpec, Format, LatencyAt, LatencySetting
from tests.builders import device_profile
from tests.encoders import tiny_config


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
        "w1_2 in ONNX is the fastest of 3 candidates that lose at most 1.0 points of accuracy: "
        "4.00 ms, 0.4 points of accuracy below the teacher, 2.50 times as fast, 70.0 MB."
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
    assert "because no bound on accuracy was set" in selection.reason


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
        "None of 4 candidates holds every constraint, though each is held by some: "
        "max_accuracy_drop 0 rules out 3 and max_latency_ms 5 rules out 2; the nearest is w1_2 in "
        "ONNX, which loses 0.4 points of accuracy, at most 0.0 points allowed."
    )
    alone = select(FOUR[:1], ConstraintSpec(max_latency_ms=5.0))
    assert alone.reason == (
        "The only candidate does not hold every constraint: max_latency_ms 5 rules out 1; the "
        "nearest is w1 in ONNX, which takes 9.90 ms, at most 5.00 ms allowed."
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


def test_bounds_below_what_two_decimals_show_are_told_as_they_are() -> None:
    selection = select(
        FOUR, ConstraintSpec(max_accuracy_drop=-10.0, max_latency_ms=1e-4, max_size_mb=1.5e-6)
    )
    assert selection.subnetwork is None
    (misses, *_) = [c.misses for c in selection.nearest if c.subnetwork == "w1_4"]
    assert misses == (
        "loses 2.5 points of accuracy, a gain of at least 10.0 points asked",
        "takes 2.00 ms, at most 0.0001 ms allowed",
        "has 60.0 MB, at most 0.0000015 MB allowed",
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
        "w1 in ONNX is the only one of 4 candidates that loses at most 0.0 points of accuracy: "
        "9.90 ms, 0.2 points of accuracy above the teacher, 1.01 times as fast, 90.0 MB."
    )


def test_sentences_name_the_metric() -> None:
    selection = select(FOUR, ConstraintSpec(objective="accuracy"), main_metric="entity_f1")
    assert selection.reason == (
        "w1 in ONNX is the best in entity F1 of 4 candidates: 9.90 ms, 0.2 points of entity F1 "
        "above the teacher, 1.01 times as fast, 90.0 MB."
    )
    none = select(FOUR, ConstraintSpec(max_accuracy_drop=-1), main_metric="f1").nearest[0]
    assert none.misses == ("loses -0.2 points of F1, a gain of at least 1.0 points asked",)


@pytest.mark.parametrize(
    ("objective", "constraints", "name"),
    [
        ("latency", {}, "w1_4"),
        ("latency", {"max_size_mb": 75, "max_accuracy_drop": 1}, "w1_2"),
        ("size", {"max_accuracy_drop": 0.3}, "w3_4"),
        ("size", {}, "w1_4"),
        ("accuracy", {}, "w1"),
        ("accuracy", {"max_latency_ms": 5}, "w1_2"),
    ],
)
def test_the_objective_orders_those_that_hold_everything(
    objective: str, constraints: dict[str, float], name: str
) -> None:
    asked = ConstraintSpec.model_validate({"objective": objective, **constraints})
    assert select(FOUR, asked).subnetwork == name


def test_the_explanation_says_what_each_constraint_cut_and_what_more_would_buy() -> None:
    asked = ConstraintSpec(max_accuracy_drop=1.5, max_latency_ms=8.0, max_size_mb=100)
    explanation = select(FOUR, asked).explanation
    assert explanation is not None
    assert (explanation.candidates, explanation.holding) == (4, 2)
    drop, latency, size = explanation.effects
    assert (drop.constraint, drop.cut, drop.cut_alone) == ("max_accuracy_drop", 1, 1)
    assert drop.nearest_miss is not None
    assert (drop.nearest_miss.subnetwork, drop.nearest_miss.by) == ("w1_4", 1.0)
    assert drop.relaxed is not None and drop.relaxed.subnetwork == "w1_4"  # 2.5 points hold then
    assert drop.words == (
        "max_accuracy_drop 1.5 rules out 1 of 4 candidates; the nearest miss is w1_4 in ONNX, by "
        "1.0 points of accuracy; with 1.0 points of accuracy more w1_4 in ONNX would be chosen: "
        "2.00 ms, 2.5 points of accuracy below the teacher, 5.00 times as fast, 60.0 MB."
    )
    assert latency.nearest_miss is not None and latency.nearest_miss.by == pytest.approx(1.9)
    assert latency.relaxed is None
    assert latency.words.endswith("with 1.00 ms more nothing else would be chosen.")
    assert (size.cut, size.nearest_miss, size.relaxed) == (0, None, None)
    assert size.words == "max_size_mb 100 rules out none of 4 candidates."


def test_a_drop_that_is_only_preferred_says_what_a_point_more_would_buy() -> None:
    nearer = (*FOUR[:3], candidate("w1_4", drop=1.8, ms=2.0, mb=60))
    explanation = select(nearer, ConstraintSpec(max_latency_ms=8.0)).explanation
    assert explanation is not None and explanation.holding == 3
    latency, drop = explanation.effects
    assert (latency.constraint, latency.implied) == ("max_latency_ms", False)
    assert (drop.constraint, drop.limit, drop.implied) == ("max_accuracy_drop", 1.0, True)
    assert (drop.cut, drop.cut_alone) == (1, 1)
    assert drop.relaxed is not None and drop.relaxed.subnetwork == "w1_4"
    assert drop.words.startswith(
        "max_accuracy_drop 1, as none was set, rules out 1 of 4 candidates; the nearest miss is "
        "w1_4 in ONNX, by 0.8 points of accuracy; with 1.0 points of accuracy more w1_4 in ONNX"
    )
    # It decides nothing where an objective is named, or where all lose more.
    for literal in ({"objective": "latency"}, {"max_latency_ms": 3.0}):
        named = select(FOUR, ConstraintSpec.model_validate(literal)).explanation
        assert named is not None and not any(effect.implied for effect in named.effects)


def test_a_relaxed_bound_is_what_would_be_chosen_with_it() -> None:
    """Whatever the constraints: asking again with the wider bound gives the promised answer."""
    for drop, ms, speedup in itertools.product(
        (0.0, 1.6, None), (1.5, 3.5, 6.6), (None, 2.55, 5.05)
    ):
        asked = ConstraintSpec(max_accuracy_drop=drop, max_latency_ms=ms, min_speedup=speedup)
        selection = select(FOUR, asked)
        assert selection.explanation is not None
        for effect in selection.explanation.effects:
            sign = -1 if effect.constraint == "min_speedup" else 1
            limit = effect.limit + sign * effect.relaxed_by
            again = select(FOUR, asked.model_copy(update={effect.constraint: limit}))
            expected = effect.relaxed.subnetwork if effect.relaxed else selection.subnetwork
            assert again.subnetwork == expected


def test_where_nothing_holds_the_explanation_says_what_one_unit_more_would() -> None:
    selection = select(FOUR, ConstraintSpec(max_accuracy_drop=0.0, max_latency_ms=5.0))
    assert selection.explanation is not None and selection.explanation.holding == 0
    drop, latency = selection.explanation.effects
    assert (drop.cut, drop.cut_alone) == (3, 2)
    assert drop.relaxed is not None and drop.relaxed.subnetwork == "w1_2"
    assert (latency.cut, latency.cut_alone, latency.relaxed) == (2, 1, None)
    assert "(1 for this alone)" in latency.words


def spread(candidate: Candidate, points: float, ms: float) -> Candidate:
    """With intervals so far to both sides."""
    drop, taken = candidate.accuracy_drop, candidate.latency_ms
    return candidate.model_copy(
        update={
            "accuracy_drop_interval": Interval(
                confidence=0.95, low=drop - points, high=drop + points
            ),
            "latency_interval": Interval(confidence=0.95, low=taken - ms, high=taken + ms),
            "speedup_interval": Interval(
                confidence=0.95, low=10 / (taken + ms), high=10 / (taken - ms)
            ),
        }
    )


@pytest.mark.parametrize(
    ("constraints", "point", "sure"),
    [
        ({"max_accuracy_drop": 1.0}, "w1_2", "w3_4"),  # 0.4 + 0.7 points
        ({"max_accuracy_drop": 1.2}, "w1_2", "w1_2"),
        ({"max_accuracy_drop": 5.0, "max_latency_ms": 2.2}, "w1_4", None),  # 2.0 + 0.3 ms
        ({"max_accuracy_drop": 5.0, "min_speedup": 4.5}, "w1_4", None),  # 10 / 2.3 times
        ({"max_accuracy_drop": 5.0, "max_size_mb": 60}, "w1_4", "w1_4"),
    ],
)
def test_with_a_confidence_the_worse_end_of_the_interval_holds(
    constraints: dict[str, float], point: str, sure: str | None
) -> None:
    choices = [spread(c, points=0.7, ms=0.3) for c in FOUR]
    assert chosen(*choices, **constraints) == point
    assert chosen(*choices, **constraints, confidence=0.95) == sure


def test_a_miss_with_a_confidence_says_which_end_counted() -> None:
    asked = ConstraintSpec(max_accuracy_drop=0.1, confidence=0.95)
    selection = select([spread(FOUR[2], points=0.7, ms=0.3)], asked)
    assert selection.nearest[0].misses == (
        "loses 0.4 points of accuracy (up to 1.1 points of accuracy with 95 % confidence), at "
        "most 0.1 points allowed",
    )
    held = select([spread(FOUR[2], points=0.7, ms=0.3)], ConstraintSpec(confidence=0.95))
    assert held.reason.endswith("; bounds hold with 95 % confidence.")


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


def latency_report(batch_size: int, seq_len: int, *, p50: float, p95: float) -> LatencyReport:
    def within(value: float) -> tuple[Interval, ...]:
        return tuple(
            Interval(confidence=each, low=value * (1 - each / 10), high=value * (1 + each / 10))
            for each in CONFIDENCES
        )

    return LatencyReport(
        p50_ms=p50,
        p95_ms=p95,
        p99_ms=p95,
        rounds=5,
        batch_size=batch_size,
        seq_len=seq_len,
        threads=1,
        p50_intervals=within(p50),
        p95_intervals=within(p95),
        p99_intervals=within(p95),
        speedup=10 / p50,
        speedup_intervals=within(10 / p50),
    )


def measured_twice(name: str, *, drop: float, small: float, large: float) -> SubnetworkReport:
    """p50 at batch 1 and 16; p95 is twice as long."""
    latencies = (
        latency_report(1, 20, p50=small, p95=2 * small),
        latency_report(16, 20, p50=large, p95=2 * large),
    )
    report = format_report("onnx", p50=small).model_copy(
        update={"latency": latencies[0], "latencies": latencies, "speedup": 10 / small}
    )
    within = tuple(Interval(confidence=c, low=drop - c, high=drop + c) for c in CONFIDENCES)
    return subnetwork(name, drop, report).model_copy(update={"accuracy_drop_intervals": within})


TWICE = (
    measured_twice("w1", drop=0.0, small=8.0, large=60.0),
    measured_twice("w1_2", drop=0.5, small=4.0, large=50.0),
    measured_twice("w1_4", drop=0.9, small=2.0, large=40.0),
)


def asked_again(**constraints: Any) -> Selection:
    asked = ConstraintSpec.model_validate(constraints)
    return reselect(TWICE, asked, main_metric="accuracy")


def test_a_stored_report_is_asked_again_under_other_constraints() -> None:
    assert asked_again(max_latency_ms=5).subnetwork == "w1_4"
    assert asked_again(max_latency_ms=5, objective="accuracy").subnetwork == "w1_2"
    assert asked_again(max_accuracy_drop=1, confidence=0.95).subnetwork == "w1"
    assert asked_again(max_accuracy_drop=1.92, confidence=0.99).subnetwork == "w1_4"


def test_latency_is_that_of_the_percentile_and_setting_asked_for() -> None:
    batch = {"max_latency_ms": 55, "objective": "accuracy"}
    assert asked_again(**batch).subnetwork == "w1"  # batch 1, where nothing else is said
    at = asked_again(**batch, latency_at={"batch_size": 16})
    assert at.subnetwork == "w1_2"
    assert at.reason.endswith("; latency is p50 with batch_size 16.")
    assert asked_again(**batch, latency_at={"batch_size": 16, "percentile": 95}).subnetwork is None
    slow = asked_again(max_latency_ms=9, objective="accuracy", latency_at={"percentile": 95})
    assert slow.subnetwork == "w1_2"
    assert slow.explanation is not None and slow.explanation.latency == "p95"
    found = candidates(TWICE, ConstraintSpec(latency_at={"batch_size": 16}, confidence=0.9))
    assert [(c.latency_ms, c.speedup) for c in found] == [(60, 10 / 60), (50, 0.2), (40, 0.25)]
    assert found[0].latency_interval is not None
    assert found[0].latency_interval.high == pytest.approx(60 * 1.09)


@pytest.mark.parametrize(
    ("at", "message"),
    [
        ({"batch_size": 8}, "latency is measured with batch_size 1, 16, not 8"),
        ({"seq_len": 128}, "latency is measured with seq_len 20, not 128"),
        ({"threads": 2, "percentile": 99}, "latency is measured with threads 1, not 2"),
    ],
)
def test_a_latency_that_was_not_measured_is_refused(at: dict[str, int], message: str) -> None:
    with pytest.raises(InvalidSpec) as caught:
        asked_again(max_latency_ms=5, latency_at=at)
    assert caught.value.message == message
    assert caught.value.pointer == f"/constraints/latency_at/{next(iter(at))}"


def test_a_report_without_intervals_is_not_asked_for_confidence() -> None:
    old = (subnetwork("w1", 0.0, format_report("onnx", p50=5.0)),)
    with pytest.raises(InvalidSpec) as caught:
        reselect(old, ConstraintSpec(max_latency_ms=9, confidence=0.95), main_metric="accuracy")
    assert caught.value.pointer == "/constraints/confidence"
    assert reselect(old, ConstraintSpec(max_latency_ms=9), main_metric="f1").subnetwork == "w1"


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


def predictor(constraints: ConstraintSpec, **changes: Any) -> Predictor:
    """Of a device of `device_profile`, for a teacher of one layer with 4 heads and 64 neurons."""
    teacher = tiny_config(hidden=32, head_dim=8, layers=1, heads=(4,), ffn=(64,))
    profile = DeviceProfile.model_validate(device_profile(**changes))
    return make_predictor(profile, constraints, teacher, LatencySetting(1, 20, 1))


def layered(name: str, heads: int, ffn: int, *formats: FormatReport) -> SubnetworkReport:
    return subnetwork(name, 0.5, *formats).model_copy(update={"heads": (heads,), "ffn": (ffn,)})


def test_latency_on_another_device_is_what_is_predicted_there() -> None:
    """Measured here, heads are cheap and neurons dear; on the board it is the other way round."""
    reports = (
        layered("many_heads", 4, 16, format_report("onnx", p50=2.0)),
        layered(
            "many_neurons",
            1,
            32,
            format_report("onnx", p50=5.0),
            format_report("onnx-int8-dynamic", p50=1.0, accuracy_drop=0.6),
            format_report("paddle", p50=1.0),
        ),
        layered("unpublished", 1, 16, format_report("onnx", p50=1.0, published=False)),
    )
    assert reselect(reports, ConstraintSpec(), main_metric="accuracy").format == "paddle"
    asked = ConstraintSpec(latency_on="prf_1", max_latency_ms=12)
    on_board = reselect(reports, asked, main_metric="accuracy", predictor=predictor(asked))
    assert (on_board.subnetwork, on_board.format) == ("many_neurons", "onnx")
    # Ten tokens cost a head one millisecond and ten neurons another.
    assert on_board.reason == (
        "many_neurons in ONNX is the only one of 2 candidates that takes at most 12.0 ms and loses "
        "at most 1.0 points of accuracy: 9.40 ms, 0.5 points of accuracy below the teacher, 2.32 "
        "times as fast, 70.0 MB; 1.0 points because no bound on accuracy was set; latency is p50, "
        "predicted for Test Board rev 3 (4 cores, ONNX Runtime 1.32.0), where predictions were -2 "
        "to +5 % off on 2 whole networks."
    )
    assert on_board.explanation is not None
    assert on_board.explanation.latency.startswith("p50, predicted for Test Board rev 3")
    effect, preferred = on_board.explanation.effects
    assert preferred.implied and preferred.cut == 0
    assert effect.nearest_miss is not None and effect.nearest_miss.by == pytest.approx(0.2)
    assert on_board.latency_on is not None and on_board.latency_on.profile == "prf_1"

    none = ConstraintSpec(latency_on="prf_1", max_latency_ms=9, latency_at=LatencyAt(seq_len=30))
    nothing = reselect(reports, none, main_metric="accuracy", predictor=predictor(none))
    assert [each.latency_ms for each in nothing.nearest] == pytest.approx([13.6, 17.8])
    assert "latency is p50 with seq_len 30, predicted for Test Board" in nothing.reason
    assert nothing.latency_on is not None


def test_a_sub_network_beyond_the_profile_is_refused_by_its_name() -> None:
    reports = [layered("w1_8", 1, 8, format_report("onnx", p50=1.0))]
    asked = ConstraintSpec(latency_on="prf_1")
    with pytest.raises(InvalidSpec, match="w1_8 cannot be predicted: neurons 8 lies outside"):
        reselect(reports, asked, main_metric="accuracy", predictor=predictor(asked))


def test_a_file_that_was_not_published_is_never_chosen_for_its_prediction() -> None:
    reports = [layered("w1", 4, 64, format_report("onnx", p50=1.0, published=False))]
    asked = ConstraintSpec(latency_on="prf_1")
    none = reselect(reports, asked, main_metric="accuracy", predictor=predictor(asked))
    assert none.subnetwork is None
    assert none.reason.startswith(
        "Nothing was selected: no file was published whose latency can be predicted for Test Board"
    )
    assert none.latency_on is not None


def test_int8_is_predicted_where_it_was_profiled_and_is_int8_as_a_whole() -> None:
    dynamic = {"accuracy_drop": 0.6, "flipped": 0.01}
    reports = (
        layered("w1", 4, 64, format_report("onnx-int8-dynamic", p50=9.0, **dynamic)),
        layered(
            "w1_2",
            2,
            32,
            format_report("onnx", p50=5.0),
            format_report(
                "onnx-int8-dynamic", p50=4.0, fp32_parts=("layers.0.ffn.output",), **dynamic
            ),
        ),
    )
    asked = ConstraintSpec(latency_on="prf_1", objective="latency")
    both = predictor(asked, formats=("onnx", "onnx-int8-dynamic"))
    chosen = reselect(reports, asked, main_metric="accuracy", predictor=both)
    assert (chosen.subnetwork, chosen.format) == ("w1", "onnx-int8-dynamic")
    assert chosen.explanation is not None and chosen.explanation.candidates == 2
    assert "6.20 ms, 0.6 points" in chosen.reason
    in_fp32 = reselect(reports, asked, main_metric="accuracy", predictor=predictor(asked))
    assert (in_fp32.subnetwork, in_fp32.format) == ("w1_2", "onnx")
