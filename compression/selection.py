"""Which sub-network, in which format, holds the constraints, and why that one.

Pure functions of the report: a finished job's stored measurements can be asked
again under other constraints.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from compression.constraints import (
    Bound,
    DropBound,
    bounds_of,
    in_digits,
    in_mb,
    in_ms,
    in_points,
)
from compression.device_profile import Predictor, in_words
from compression.errors import InvalidSpec
from compression.pareto import pareto_front
from compression.report import (
    METRIC_NAMES,
    Candidate,
    ConstraintEffect,
    Explanation,
    FormatReport,
    Interval,
    Intervals,
    LatencyReport,
    NearestMiss,
    PredictedLatency,
    ProfiledDevice,
    Selection,
    SubnetworkReport,
)
from compression.spec import (
    SERVED_FORMATS,
    ConstraintSpec,
    Format,
    LatencyAt,
    LatencySetting,
)

PREFERRED_DROP = 1.0  # points; what "about as good as the teacher" means where nothing is said
NEAREST = 3
SHOWN_CONFIDENCE = 0.95  # of a candidate's intervals, where no other is asked for
FORMAT_NAMES: dict[Format, str] = {
    "onnx": "ONNX",
    "onnx-int8-dynamic": "ONNX (dynamic INT8)",
    "onnx-int8-static": "ONNX (static INT8)",
    "onnx-fp16": "ONNX (FP16)",
    "paddle": "Paddle Inference",
    "paddle-bf16": "Paddle Inference (BF16)",
    "safetensors": "safetensors",
}


def candidates(
    subnetworks: Iterable[SubnetworkReport], constraints: ConstraintSpec | None = None
) -> tuple[Candidate, ...]:
    """Each published pair of sub-network and served format that was measured (or is predicted)
    as `constraints` mean latency, in the report's order."""
    constraints = constraints or ConstraintSpec()
    at = constraints.latency_at or LatencyAt()
    confidence = constraints.confidence or SHOWN_CONFIDENCE
    return tuple(
        Candidate(
            subnetwork=subnetwork.name,
            format=report.format,
            accuracy_drop=_first_number(report.accuracy_drop, subnetwork.accuracy_drop),
            latency_ms=getattr(latency, f"p{at.percentile}_ms"),
            # Reports from before there were several settings keep it with the format alone.
            speedup=_first_number(latency.speedup, report.speedup),
            size_mb=report.size_bytes / 1e6,
            accuracy_drop_interval=_with(
                confidence, report.accuracy_drop_intervals or subnetwork.accuracy_drop_intervals
            ),
            latency_interval=_with(confidence, getattr(latency, f"p{at.percentile}_intervals")),
            speedup_interval=_with(confidence, latency.speedup_intervals),
        )
        for subnetwork in subnetworks
        for report in subnetwork.formats
        if (latency := _latency_of(report, at, predicted=constraints.latency_on is not None))
        is not None
    )


def select(
    choices: Sequence[Candidate],
    constraints: ConstraintSpec,
    *,
    main_metric: str = "accuracy",
    on: ProfiledDevice | None = None,
) -> Selection:
    """The candidate to deploy, or none and the nearest three, and what each constraint did.

    The best by `constraints.objective` of those that hold everything. Without an objective
    the fastest: but where the accuracy drop has no bound, of those that lose at most 1 point,
    and if all lose more, the most accurate. Ties go to the more accurate (faster) one, then
    to the smaller, then to the name, so an answer can be repeated.
    Candidates with a figure that is not finite are left out. `choices` are `candidates` of the
    same constraints; `on` is the device that their latency is predicted for.
    """
    metric = METRIC_NAMES.get(main_metric, main_metric)
    bounds = bounds_of(constraints, metric=metric)
    usable = [c for c in choices if _is_finite(c) and _has_intervals(c, bounds)]
    left_out = len(choices) - len(usable)
    if not usable:
        return Selection(
            subnetwork=None,
            format=None,
            reason=_nothing_to_choose(left_out, metric, on),
            nearest=(),
            latency_on=on,
        )
    found = _decide(usable, bounds, constraints, metric)
    effects = [_effect(i, usable, bounds, constraints, metric, found) for i in range(len(bounds))]
    if found is not None and len(found.bounds) > len(bounds):  # the preferred drop is the last
        literal = constraints.model_copy(update={"objective": "latency"})
        effects.append(
            _effect(len(bounds), usable, found.bounds, literal, metric, found, implied=True)
        )
    explanation = Explanation(
        candidates=len(usable),
        holding=sum(_holds_all(c, bounds) for c in usable),
        latency=_latency_words(constraints.latency_at, on),
        effects=tuple(effects),
    )
    if found is None:
        return _nothing_holds(usable, bounds, explanation, on)
    return Selection(
        subnetwork=found.best.subnetwork,
        format=found.best.format,
        reason=_reason(found, total=len(usable), metric=metric) + _meant(constraints, on) + ".",
        nearest=(),
        explanation=explanation,
        latency_on=on,
    )


def reselect(
    subnetworks: Sequence[SubnetworkReport],
    constraints: ConstraintSpec,
    *,
    main_metric: str,
    predictor: Predictor | None = None,
) -> Selection:
    """A finished job's measurements, asked again under other constraints.

    `predictor`: of the device that `constraints.latency_on` names. InvalidSpec where they mean a
    latency or a confidence that the job has not measured, and that is not predicted.
    """
    if predictor is not None:
        subnetworks = predictor.all_told(subnetworks)
    measured = [
        latency.setting
        for subnetwork in subnetworks
        for report in subnetwork.formats
        for latency in (report.latencies or filter(None, (report.latency,)))
    ]
    if constraints.latency_at is not None and measured and predictor is None:
        check_latency_at(
            constraints.latency_at,
            {
                name: sorted({getattr(setting, name) for setting in measured})
                for name in LatencySetting._fields
            },
        )
    choices = candidates(subnetworks, constraints)
    bounds = bounds_of(constraints, metric=main_metric)
    if choices and not any(_has_intervals(c, bounds) for c in choices):
        raise InvalidSpec(
            "this job kept no intervals: ask for constraints without a confidence",
            pointer="/constraints/confidence",
        )
    on = None if predictor is None else predictor.on
    return select(choices, constraints, main_metric=main_metric, on=on)


def check_latency_at(at: LatencyAt, measured: Mapping[str, Sequence[int]]) -> None:
    """InvalidSpec where latency is not measured as `at` says; `measured`: values by field."""
    for name, values in measured.items():
        asked = getattr(at, name)
        if asked is not None and asked not in values:
            known = ", ".join(map(str, values)) or "none named in the spec"
            raise InvalidSpec(
                f"latency is measured with {name} {known}, not {asked}",
                pointer=f"/constraints/latency_at/{name}",
            )


def with_decisions(
    subnetworks: Sequence[SubnetworkReport], selection: Selection
) -> tuple[SubnetworkReport, ...]:
    """The sub-networks with `pareto` and `selected` set.

    The front is that of the candidates, over accuracy drop and p50: a sub-network is on it with
    any of its formats, because one in int8 has an accuracy of its own.
    """
    choices = candidates(subnetworks)
    front = pareto_front([(each.accuracy_drop, each.latency_ms) for each in choices])
    best = {each.subnetwork for each, on_front in zip(choices, front, strict=True) if on_front}
    return tuple(
        subnetwork.model_copy(
            update={
                "pareto": subnetwork.name in best,
                "selected": subnetwork.name == selection.subnetwork,
            }
        )
        for subnetwork in subnetworks
    )


# --- what a candidate is ------------------------------------------------------------------------


def _is_measured(report: FormatReport) -> bool:
    return report.published and report.format in SERVED_FORMATS and report.latency is not None


def _latency_of(
    report: FormatReport, at: LatencyAt, *, predicted: bool
) -> LatencyReport | PredictedLatency | None:
    if predicted:
        return report.predicted if report.published else None
    return _latency_at(report, at)


def _latency_at(report: FormatReport, at: LatencyAt) -> LatencyReport | None:
    """What was measured in that setting; None where nothing was, or nothing is served."""
    if not _is_measured(report) or report.latency is None:
        return None
    own = report.latency.setting
    wanted = LatencySetting(*(getattr(at, name) or getattr(own, name) for name in own._fields))
    measured = report.latencies or (report.latency,)
    return next((latency for latency in measured if latency.setting == wanted), None)


def _with(confidence: float, intervals: Intervals) -> Interval | None:
    return next((each for each in intervals if each.confidence == confidence), None)


def _first_number(*values: float | None) -> float:
    return next((value for value in values if value is not None), math.nan)


def _is_finite(candidate: Candidate) -> bool:
    figures = (candidate.accuracy_drop, candidate.latency_ms, candidate.speedup, candidate.size_mb)
    return all(math.isfinite(figure) for figure in figures)


def _has_intervals(candidate: Candidate, bounds: Sequence[Bound]) -> bool:
    return all(math.isfinite(bound.value(candidate)) for bound in bounds)


def _holds_all(candidate: Candidate, bounds: Iterable[Bound]) -> bool:
    return all(bound.holds(candidate) for bound in bounds)


# --- the choice ---------------------------------------------------------------------------------

Key = tuple[float, float, float, str, str]


def _by_latency(c: Candidate) -> Key:
    return c.latency_ms, c.accuracy_drop, c.size_mb, c.subnetwork, c.format


def _by_accuracy(c: Candidate) -> Key:
    return c.accuracy_drop, c.latency_ms, c.size_mb, c.subnetwork, c.format


def _by_size(c: Candidate) -> Key:
    return c.size_mb, c.accuracy_drop, c.latency_ms, c.subnetwork, c.format


@dataclass(frozen=True)
class _Choice:
    """The best of those `among` which hold the `bounds`, and what it is called."""

    best: Candidate
    superlative: str
    among: Sequence[Candidate]
    bounds: Sequence[Bound]
    note: str = ""


def _decide(
    usable: Sequence[Candidate],
    bounds: Sequence[Bound],
    constraints: ConstraintSpec,
    metric: str,
) -> _Choice | None:
    """The choice among those that hold every bound; None where none does."""
    holding = [c for c in usable if _holds_all(c, bounds)]
    if not holding:
        return None
    most_accurate = "most accurate" if metric == "accuracy" else f"best in {metric}"
    orders: dict[str, tuple[str, Callable[[Candidate], Key]]] = {
        "latency": ("fastest", _by_latency),
        "size": ("smallest", _by_size),
        "accuracy": (most_accurate, _by_accuracy),
    }
    if constraints.objective is not None or constraints.max_accuracy_drop is not None:
        superlative, key = orders[constraints.objective or "latency"]
        return _Choice(min(holding, key=key), superlative, holding, bounds)
    preferred = DropBound(PREFERRED_DROP, metric=metric)
    close = [c for c in holding if preferred.holds(c)]
    points = in_points(PREFERRED_DROP)
    if close:
        note = f"; {points} because no bound on {metric} was set"
        best = min(close, key=_by_latency)
        return _Choice(best, "fastest", close, (*bounds, preferred), note)
    note = f"; no bound on {metric} was set, and all lose more than {points}"
    return _Choice(min(holding, key=_by_accuracy), most_accurate, holding, bounds, note)


def _effect(
    index: int,
    usable: Sequence[Candidate],
    bounds: Sequence[Bound],
    constraints: ConstraintSpec,
    metric: str,
    found: _Choice | None,
    *,
    implied: bool = False,
) -> ConstraintEffect:
    """What one of the bounds cut away, and what a wider one would change.

    `implied`: it was not set.
    """
    bound, others = bounds[index], [*bounds[:index], *bounds[index + 1 :]]
    cut = [c for c in usable if not bound.holds(c)]
    alone = [c for c in cut if _holds_all(c, others)]
    nearest = min(alone or cut, key=lambda c: (bound.over(c), *_by_latency(c)), default=None)
    wider = [*bounds[:index], bound.relaxed(), *bounds[index + 1 :]]
    then = _decide(usable, wider, constraints, metric)
    relaxed = None
    if then is not None and (found is None or then.best != found.best):
        relaxed = then.best
    miss = None
    if nearest is not None:
        miss = NearestMiss(
            subnetwork=nearest.subnetwork, format=nearest.format, by=bound.over(nearest)
        )
    return ConstraintEffect(
        constraint=bound.name,
        limit=bound.limit,
        cut=len(cut),
        cut_alone=len(alone),
        nearest_miss=miss,
        relaxed_by=bound.step,
        relaxed=relaxed,
        implied=implied,
        words=_effect_words(
            bound, len(usable), cut, alone, nearest, relaxed, metric, implied=implied
        ),
    )


# --- in words -----------------------------------------------------------------------------------


def _effect_words(
    bound: Bound,
    total: int,
    cut: Sequence[Candidate],
    alone: Sequence[Candidate],
    nearest: Candidate | None,
    relaxed: Candidate | None,
    metric: str,
    *,
    implied: bool,
) -> str:
    name = f"{bound.name} {bound.limit:g}" + (", as none was set," if implied else "")
    if nearest is None:
        return f"{name} rules out none of {_number(total)}."
    which = f" ({len(alone)} for this alone)" if len(alone) < len(cut) else ""
    if relaxed is None:
        change = "nothing else would be chosen"
    else:
        change = f"{_label(relaxed)} would be chosen: {_figures(relaxed, metric)}"
    return (
        f"{name} rules out {len(cut)} of {_number(total)}{which}; the nearest miss is "
        f"{_label(nearest)}, by {bound.amount(bound.over(nearest))}; {bound.widened()} {change}."
    )


def _reason(found: _Choice, *, total: int, metric: str) -> str:
    plural = len(found.among) > 1
    bounds, superlative = found.bounds, found.superlative
    held = f" that {_join([bound.held(plural=plural) for bound in bounds])}" if bounds else ""
    if plural:
        why = f"the {superlative} of {len(found.among)} candidates{held}"
    elif total > 1:
        why = f"the only one of {total} candidates{held}"
    else:
        why = f"the only candidate{',' if held else ''}{held.replace(' that', ' and it', 1)}"
    return f"{_label(found.best)} is {why}: {_figures(found.best, metric)}{found.note}"


def _meant(constraints: ConstraintSpec, on: ProfiledDevice | None) -> str:
    """What latency and bounds mean where that is not the usual."""
    parts = []
    if constraints.latency_at is not None or on is not None:
        parts.append(f"; latency is {_latency_words(constraints.latency_at, on)}")
    if constraints.confidence is not None:
        parts.append(f"; bounds hold with {100 * constraints.confidence:g} % confidence")
    return "".join(parts)


def _latency_words(at: LatencyAt | None, on: ProfiledDevice | None) -> str:
    """ "p95 with batch_size 16"; what is not named is as in the latency spec."""
    at = at or LatencyAt()
    asked = [f"{name} {value}" for name in LatencySetting._fields if (value := getattr(at, name))]
    where = f", {in_words(on)}" if on is not None else ""
    return f"p{at.percentile}" + (f" with {_join(asked)}" if asked else "") + where


def _nothing_holds(
    usable: Sequence[Candidate],
    bounds: Sequence[Bound],
    explanation: Explanation,
    on: ProfiledDevice | None,
) -> Selection:
    def violation(c: Candidate) -> float:
        return sum(max(0.0, bound.excess(c)) for bound in bounds)

    nearest = sorted(usable, key=lambda c: (violation(c), *_by_latency(c)))[:NEAREST]
    cuts = [
        f"{effect.constraint} {effect.limit:g} rules out {effect.cut}"
        for effect in explanation.effects
        if effect.cut
    ]
    marked = tuple(
        c.model_copy(update={"misses": tuple(b.miss(c) for b in bounds if not b.holds(c))})
        for c in nearest
    )
    none = f"None of {_number(len(usable))} holds every constraint"
    if len(usable) == 1:
        none = "The only candidate does not hold every constraint"
    elif all(effect.cut < len(usable) for effect in explanation.effects):
        none += ", though each is held by some"
    return Selection(
        subnetwork=None,
        format=None,
        reason=(
            f"{none}: {_join(cuts)}; the nearest is {_label(marked[0])}, which "
            f"{_join(marked[0].misses)}"
            + (f"; latency is {explanation.latency}." if on is not None else ".")
        ),
        nearest=marked,
        explanation=explanation,
        latency_on=on,
    )


def _nothing_to_choose(left_out: int, metric: str, on: ProfiledDevice | None) -> str:
    if left_out:
        return (
            f"Nothing was selected: of {_number(left_out)}, none has a finite {metric}, latency, "
            "speed-up and size."
        )
    if on is not None:
        return f"Nothing was selected: no file was published whose latency can be {in_words(on)}."
    return "Nothing was selected: no served format of any sub-network was published and measured."


def _number(count: int) -> str:
    return f"{count} candidate" + ("" if count == 1 else "s")


def _join(parts: Sequence[str]) -> str:
    return parts[0] if len(parts) == 1 else ", ".join(parts[:-1]) + " and " + parts[-1]


def _label(c: Candidate) -> str:
    return f"{c.subnetwork} in {FORMAT_NAMES[c.format]}"


def _figures(c: Candidate, metric: str) -> str:
    if c.accuracy_drop > 0:
        against = f"{in_points(c.accuracy_drop)} of {metric} below the teacher"
    elif c.accuracy_drop < 0:
        against = f"{in_points(-c.accuracy_drop)} of {metric} above the teacher"
    else:
        against = f"with the teacher's {metric}"
    return (
        f"{in_ms(c.latency_ms)}, {against}, {in_digits(c.speedup)} times as fast, "
        f"{in_mb(c.size_mb)}"
    )
