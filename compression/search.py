"""The stage that looks for sub-networks with widths of their own in each layer, under a budget.

An evolutionary search looks for those that are most accurate on rows held out of train among those
that the budget lets through. What it finds is exported, measured and judged as any other
sub-network. All that takes long is remembered, so that a job that goes on does not do it again.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from compression import cost
from compression.batches import Encoded
from compression.budget import (
    Budget,
    Timings,
    measured_budget,
    predicted_budget,
    samples,
    size_budget,
    time_subnetworks,
)
from compression.checkpoint import StageState
from compression.constraints import DropBound, bounds_of
from compression.device_profile import Predictor
from compression.encoder import Encoder, numpy_weights
from compression.evaluate import predict
from compression.evolution import Scored, evolve
from compression.intervals import intervals
from compression.report import (
    METRIC_NAMES,
    Candidate,
    DeviceFingerprint,
    Finalist,
    LatencyReport,
    PerLayerGain,
    SearchReport,
    SubnetworkReport,
)
from compression.search_space import SearchSpace
from compression.selection import candidates
from compression.spec import Format, PerLayerSpec, Spec
from compression.supernet import Subnetwork
from compression.tasks.base import Task
from compression.teachers.config import EncoderConfig

Shape = tuple[tuple[int, ...], ...]  # Subnetwork.shape


def space_of(spec: Spec, config: EncoderConfig) -> SearchSpace:
    """Of the spec's widths and depths."""
    return SearchSpace(
        config,
        tuple(sorted(spec.supernet.width_mults, reverse=True)),
        tuple(sorted(spec.supernet.depth_mults, reverse=True)),
    )


# --- what a search remembers ------------------------------------------------------------------


@dataclass
class Memory:
    """What was timed on `device`, and the accuracy on the hold-out of each shape so far."""

    device: DeviceFingerprint
    timings: Timings | None = None
    accuracies: dict[Shape, float] = field(default_factory=dict)

    @classmethod
    def restored(cls, state: StageState | None, device: DeviceFingerprint) -> Memory:
        """Without the times where they are another device's."""
        memory = cls(device)
        if state is None:
            return memory
        for (heads, ffn), accuracy in zip(
            state.tensors["shapes"], state.tensors["accuracies"], strict=True
        ):
            kept = np.flatnonzero(heads)
            shape = tuple(tuple(each.tolist()) for each in (kept, heads[kept], ffn[kept]))
            memory.accuracies[shape] = float(accuracy)
        figures = state.figures
        if figures["format"] is not None and figures["device"] == device.model_dump(mode="json"):
            timed = {
                name: LatencyReport.model_validate(each) for name, each in figures["timed"].items()
            }
            memory.timings = Timings(figures["format"], timed)
        return memory

    def state(self, layers: int, *, done: bool) -> StageState:
        """For a checkpoint; `layers`: the supernet's."""
        shapes = np.zeros((len(self.accuracies), 2, layers), np.int64)
        for row, (kept, heads, ffn) in zip(shapes, self.accuracies, strict=True):
            row[:, list(kept)] = heads, ffn
        timed = self.timings.timed if self.timings is not None else {}
        figures: dict[str, Any] = {
            "device": self.device.model_dump(mode="json"),
            "format": self.timings.format if self.timings is not None else None,
            "timed": {name: each.model_dump(mode="json") for name, each in timed.items()},
        }
        accuracies = np.array(list(self.accuracies.values()), np.float64)
        tensors = {"shapes": shapes, "accuracies": accuracies}
        return StageState(len(self.accuracies), done, figures, tensors)


# --- the search -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Found:
    """The finalists, of each budget the best on the hold-out first, and how they were found."""

    subnetworks: list[Subnetwork]
    report: SearchReport


def search(
    spec: Spec,
    asked: PerLayerSpec,
    supernet: Encoder,
    config: EncoderConfig,
    task: Task,
    holdout: Encoded,
    named: Sequence[Subnetwork],
    memory: Memory,
    *,
    predictor: Predictor | None,
    seq_len: int,
    threads: int,
    folder: Path,
    on_progress: Callable[[int, int, str], None],
    on_timed: Callable[[], None] = lambda: None,
) -> Found:
    """The sub-networks with a width for each layer that are most accurate under the budget.

    `config` is what is exported, `named` those that the job has anyway: none of them is found
    again. What `memory` knows is not done again, and it learns the rest; `on_timed` is called
    when it has learnt all times. `predictor`: where the constraints mean another device's latency.
    ExportFailed where what is to be timed cannot be written or run.
    """
    space = space_of(spec, config)
    if not spec.constraints.bounds_latency:
        budget = size_budget(spec, config, seq_len=seq_len)
    elif predictor is not None:
        budget = predicted_budget(spec, config, predictor)
    else:
        drawn = samples(space, asked.latency_samples, seed=spec.seed)
        if memory.timings is None:
            memory.timings = time_subnetworks(
                drawn,
                config,
                numpy_weights(supernet),
                spec,
                seq_len=seq_len,
                folder=folder,
                on_progress=on_progress,
            )
            on_timed()
        budget = measured_budget(spec, config, drawn, memory.timings, seq_len=seq_len)

    def score(subnetwork: Subnetwork) -> float:
        known = memory.accuracies
        if subnetwork.shape not in known:
            logits = predict(supernet, holdout, subnetwork=subnetwork, threads=threads)
            known[subnetwork.shape] = task.score(logits, holdout)
        return known[subnetwork.shape]

    def price(subnetwork: Subnetwork) -> float:
        if budget.limits:
            return budget.limits[0].milliseconds(subnetwork)
        return float(cost.parameters(subnetwork.config(config)))

    shares = sorted(asked.budget_shares, reverse=True)
    at_most = asked.population * (asked.generations + 1)
    best: list[tuple[Scored, float]] = []
    scored: set[Shape] = set()
    for i, share in enumerate(shares):
        ranked = evolve(
            space,
            first=[space.uniform(width, depth) for width in space.widths for depth in space.depths],
            fits=lambda subnetwork, share=share: budget.holds(subnetwork, share),
            score=score,
            cost=price,
            population=asked.population,
            generations=asked.generations,
            seed=spec.seed,
            on_scored=lambda count, i=i: on_progress(
                i * at_most + min(count, at_most), len(shares) * at_most, "candidates"
            ),
        )
        scored |= {each.subnetwork.shape for each in ranked}
        taken = [*named, *(each.subnetwork for each, _ in best)]
        new = finalists(ranked, taken, asked.finalists, first=len(best) + 1)
        best += [(each, share) for each in new]
    return Found(
        [each.subnetwork for each, _ in best],
        report_of(budget, best, holdout_rows=len(task.row_lengths(holdout)), scored=len(scored)),
    )


def report_of(
    budget: Budget, best: Sequence[tuple[Scored, float]], *, holdout_rows: int, scored: int
) -> SearchReport:
    """`best`: the finalists, each with the share of the budget that it was found under."""
    return SearchReport(
        format=budget.format,
        setting=budget.setting,
        budget=budget.words,
        latency_on=budget.on,
        holdout_rows=holdout_rows,
        latency_models=budget.models,
        scored=scored,
        finalists=tuple(
            Finalist(
                subnetwork=each.subnetwork.name,
                holdout_accuracy=each.accuracy,
                predicted_ms={
                    limit.percentile: limit.milliseconds(each.subnetwork) for limit in budget.limits
                },
                predicted_mb=budget.megabytes(each.subnetwork),
                budget_share=share,
            )
            for each, share in best
        ),
        note="" if best else "no sub-network with a width for each layer is predicted to hold it",
    )


def finalists(
    scored: Sequence[Scored], taken: Sequence[Subnetwork], count: int, *, first: int = 1
) -> list[Scored]:
    """The first `count` that are none of those taken, called p1, p2, ... or from `first` on."""
    shapes = {each.shape for each in taken}
    new = [each for each in scored if each.subnetwork.shape not in shapes]
    return [
        dataclasses.replace(
            each, subnetwork=dataclasses.replace(each.subnetwork, name=f"p{number}")
        )
        for number, each in enumerate(new[:count], start=first)
    ]


# --- what it was good for ---------------------------------------------------------------------


def with_gain(
    report: SearchReport,
    spec: Spec,
    subnetworks: Sequence[SubnetworkReport],
    resampled: Mapping[tuple[str, Format], np.ndarray],
) -> SearchReport:
    """The report with the finalists' gain on dev over the sub-networks of one width.

    Only what holds the budget, as measured (or predicted for the device that the constraints
    name), counts: on both sides the best pair of sub-network and format. `resampled`: each pair's
    main metric on the resamples of dev.
    """
    metric = METRIC_NAMES[spec.task.main_metric]
    bounds = [
        bound
        for bound in bounds_of(spec.constraints, metric=metric)
        if not isinstance(bound, DropBound)
    ]
    found = {finalist.subnetwork for finalist in report.finalists}
    choices = [
        each
        for each in candidates(subnetworks, spec.constraints)
        if all(bound.holds(each) for bound in bounds)
    ]
    best = _most_accurate([each for each in choices if each.subnetwork in found])
    uniform = _most_accurate([each for each in choices if each.subnetwork not in found])
    if best is None or uniform is None:
        what = "finalist" if best is None else "sub-network of one width"
        held = (
            "is predicted to hold the budget"
            if report.latency_on
            else "holds the budget as measured"
        )
        return report.model_copy(update={"note": report.note or f"no {what} {held}"})
    own, other = ((each.subnetwork, each.format) for each in (best, uniform))
    return report.model_copy(
        update={
            "gain": PerLayerGain(
                subnetwork=best.subnetwork,
                format=best.format,
                reference=uniform.subnetwork,
                reference_format=uniform.format,
                points=uniform.accuracy_drop - best.accuracy_drop,
                intervals=intervals(100 * (resampled[own] - resampled[other])),
            )
        }
    )


def _most_accurate(choices: Sequence[Candidate]) -> Candidate | None:
    return min(choices, key=lambda each: (each.accuracy_drop, each.latency_ms), default=None)
