"""Which sub-network, in which format, holds the constraints, and why that one.

Pure functions of the report: a finished job's stored measurements can be asked
again under other constraints.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from compression.pareto import pareto_front
from compression.report import Candidate, FormatReport, Selection, SubnetworkReport
from compression.spec import SERVED_FORMATS, ConstraintSpec, Format

PREFERRED_DROP = 1.0  # points; what "about as good as the teacher" means where nothing is said
NEAREST = 3
FORMAT_NAMES: dict[Format, str] = {
    "onnx": "ONNX",
    "onnx-int8-dynamic": "ONNX (dynamic INT8)",
    "onnx-int8-static": "ONNX (static INT8)",
    "paddle": "Paddle Inference",
    "safetensors": "safetensors",
}


@dataclass(frozen=True)
class _Bound:
    """One constraint. `excess` is its violation in units of the bound; at most 0 where it holds."""

    name: str
    limit: float

    def excess(self, candidate: Candidate) -> float:
        limit = self.limit
        match self.name:
            case "max_accuracy_drop":
                # 100 * (0.86 - 0.85) is a little more than 1, and must hold a bound of 1.
                over = round(candidate.accuracy_drop - limit, 9)
                # Bounds near 0 are common here, so a point is the smallest unit.
                return over / max(abs(limit), 1.0)
            case "max_latency_ms":
                return candidate.latency_ms / limit - 1.0
            case "min_speedup":
                return limit / candidate.speedup - 1.0 if candidate.speedup > 0 else math.inf
            case _:
                return candidate.size_mb / limit - 1.0

    def miss(self, candidate: Candidate) -> str:
        limit = self.limit
        match self.name:
            case "max_accuracy_drop":
                return f"loses {_points(candidate.accuracy_drop)}, at most {_points(limit)} allowed"
            case "max_latency_ms":
                return f"takes {_ms(candidate.latency_ms)}, at most {_ms(limit)} allowed"
            case "min_speedup":
                return (
                    f"is {_short(candidate.speedup)} times as fast, at least {_short(limit)} asked"
                )
            case _:
                return f"has {_mb(candidate.size_mb)}, at most {_mb(limit)} allowed"

    def held(self, *, plural: bool) -> str:
        limit = self.limit
        match self.name:
            case "max_accuracy_drop" if limit >= 0:
                return f"{'lose' if plural else 'loses'} at most {_points(limit)}"
            case "max_accuracy_drop":
                return f"{'gain' if plural else 'gains'} at least {_points(-limit)}"
            case "max_latency_ms":
                return f"{'take' if plural else 'takes'} at most {_ms(limit)}"
            case "min_speedup":
                verb = "are" if plural else "is"
                return f"{verb} at least {_short(limit)} times as fast as the teacher"
            case _:
                return f"{'have' if plural else 'has'} at most {_mb(limit)}"


def candidates(subnetworks: Iterable[SubnetworkReport]) -> tuple[Candidate, ...]:
    """Each published, measured pair of sub-network and served format, in the report's order."""
    return tuple(
        Candidate(
            subnetwork=subnetwork.name,
            format=report.format,
            accuracy_drop=(
                subnetwork.accuracy_drop if report.accuracy_drop is None else report.accuracy_drop
            ),
            latency_ms=report.latency.p50_ms,
            speedup=report.speedup if report.speedup is not None else math.nan,
            size_mb=report.size_bytes / 1e6,
            misses=(),
        )
        for subnetwork in subnetworks
        for report in subnetwork.formats
        if _is_measured(report) and report.latency is not None
    )


def select(choices: Sequence[Candidate], constraints: ConstraintSpec) -> Selection:
    """The candidate to deploy, or none and the nearest three.

    With a bound on the accuracy drop: the fastest of those that hold everything.
    Without one: the fastest of those that hold the rest and lose at most 1 point,
    and if all lose more, the most accurate. Ties go to the more accurate (faster)
    one, then to the smaller, then to the name, so an answer can be repeated.
    Candidates with a figure that is not finite are left out.
    """
    usable = [c for c in choices if _is_finite(c)]
    left_out = len(choices) - len(usable)
    if not usable:
        return Selection(
            subnetwork=None, format=None, reason=_nothing_to_choose(left_out), nearest=()
        )
    bounds = _bounds(constraints)
    holding = [c for c in usable if all(bound.excess(c) <= 0 for bound in bounds)]
    if not holding:
        return _nothing_holds(usable, bounds)
    if constraints.max_accuracy_drop is not None:
        return _chosen("fastest", holding, bounds, total=len(usable))
    preferred = _Bound("max_accuracy_drop", PREFERRED_DROP)
    close = [c for c in holding if preferred.excess(c) <= 0]
    if close:
        note = f"; {_points(PREFERRED_DROP)} because no bound on the accuracy was set"
        return _chosen("fastest", close, (*bounds, preferred), total=len(usable), note=note)
    note = f"; no bound on the accuracy was set, and all lose more than {_points(PREFERRED_DROP)}"
    return _chosen("most accurate", holding, bounds, total=len(usable), note=note)


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


def _is_measured(report: FormatReport) -> bool:
    return report.published and report.format in SERVED_FORMATS and report.latency is not None


def _is_finite(candidate: Candidate) -> bool:
    figures = (candidate.accuracy_drop, candidate.latency_ms, candidate.speedup, candidate.size_mb)
    return all(math.isfinite(figure) for figure in figures)


def _bounds(constraints: ConstraintSpec) -> tuple[_Bound, ...]:
    return tuple(
        _Bound(name, limit)
        for name in ("max_accuracy_drop", "max_latency_ms", "min_speedup", "max_size_mb")
        if (limit := getattr(constraints, name)) is not None
    )


def _by_latency(c: Candidate) -> tuple[float, float, float, str, str]:
    return c.latency_ms, c.accuracy_drop, c.size_mb, c.subnetwork, c.format


def _by_accuracy(c: Candidate) -> tuple[float, float, float, str, str]:
    return c.accuracy_drop, c.latency_ms, c.size_mb, c.subnetwork, c.format


def _chosen(
    superlative: Literal["fastest", "most accurate"],
    among: Sequence[Candidate],
    bounds: Sequence[_Bound],
    *,
    total: int,
    note: str = "",
) -> Selection:
    best = min(among, key=_by_latency if superlative == "fastest" else _by_accuracy)
    plural = len(among) > 1
    held = f" that {_join([bound.held(plural=plural) for bound in bounds])}" if bounds else ""
    if plural:
        why = f"the {superlative} of {len(among)} candidates{held}"
    elif total > 1:
        why = f"the only one of {total} candidates{held}"
    else:
        why = f"the only candidate{',' if held else ''}{held.replace(' that', ' and it', 1)}"
    return Selection(
        subnetwork=best.subnetwork,
        format=best.format,
        reason=f"{_label(best)} is {why}: {_figures(best)}{note}.",
        nearest=(),
    )


def _nothing_holds(usable: Sequence[Candidate], bounds: Sequence[_Bound]) -> Selection:
    def violation(c: Candidate) -> float:
        return sum(max(0.0, bound.excess(c)) for bound in bounds)

    nearest = sorted(usable, key=lambda c: (violation(c), *_by_latency(c)))[:NEAREST]
    cuts = []
    for bound in bounds:
        cut = sum(bound.excess(c) > 0 for c in usable)
        if cut:
            cuts.append(f"{bound.name} {bound.limit:g} rules out {cut}")
    marked = tuple(
        c.model_copy(update={"misses": tuple(b.miss(c) for b in bounds if b.excess(c) > 0)})
        for c in nearest
    )
    return Selection(
        subnetwork=None,
        format=None,
        reason=(
            f"None of {_number(len(usable))} holds every constraint: {_join(cuts)}; the nearest is "
            f"{_label(marked[0])}, which {_join(marked[0].misses)}."
        ),
        nearest=marked,
    )


def _nothing_to_choose(left_out: int) -> str:
    if left_out:
        return (
            f"Nothing was selected: of {_number(left_out)}, none has a finite accuracy, latency, "
            "speed-up and size."
        )
    return "Nothing was selected: no served format of any sub-network was published and measured."


def _number(count: int) -> str:
    return f"{count} candidate" + ("" if count == 1 else "s")


def _join(parts: Sequence[str]) -> str:
    return parts[0] if len(parts) == 1 else ", ".join(parts[:-1]) + " and " + parts[-1]


def _label(c: Candidate) -> str:
    return f"{c.subnetwork} in {FORMAT_NAMES[c.format]}"


def _figures(c: Candidate) -> str:
    if c.accuracy_drop > 0:
        against = f"{_points(c.accuracy_drop)} below the teacher"
    elif c.accuracy_drop < 0:
        against = f"{_points(-c.accuracy_drop)} above the teacher"
    else:
        against = "as accurate as the teacher"
    return f"{_ms(c.latency_ms)}, {against}, {_short(c.speedup)} times as fast, {_mb(c.size_mb)}"


def _points(value: float) -> str:
    # Two decimals only where the second says something: 0.4, 1.0, 0.25.
    text = f"{value:.2f}"
    return (text[:-1] if text.endswith("0") else text) + " points"


def _ms(value: float) -> str:
    return f"{_short(value)} ms"


def _mb(value: float) -> str:
    return f"{_short(value)} MB"


def _short(value: float) -> str:
    """Three digits, never an exponent: 3.72, 12.1, 131, 1204."""
    return f"{value:.2f}" if value < 10 else f"{value:.1f}" if value < 100 else f"{value:.0f}"
