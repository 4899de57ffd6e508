"""The stage that looks for sub-networks with widths of their own in each layer, under a budget.

Some are exported and timed on this machine, a latency model is fitted to them, and an evolutionary
search looks for those that are most accurate on rows held out of train among those that the
models let through. What it finds is exported, measured and judged as any other sub-network.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from compression import cost, latency
from compression.batches import Encoded
from compression.constraints import DropBound, bounds_of, in_mb, in_ms
from compression.encoder import Encoder, build_encoder, numpy_weights
from compression.errors import ExportFailed
from compression.evaluate import predict
from compression.evolution import Scored, evolve
from compression.export import export_formats
from compression.intervals import intervals
from compression.latency_model import LatencyModel, fit, relative_errors
from compression.plan import file_bytes
from compression.report import (
    METRIC_NAMES,
    Candidate,
    Finalist,
    LatencyModelReport,
    LatencyReport,
    PerLayerGain,
    SearchReport,
    SubnetworkReport,
)
from compression.search_space import SearchSpace
from compression.selection import candidates
from compression.spec import (
    SERVED_FORMATS,
    Format,
    LatencyAt,
    LatencySetting,
    Percentile,
    PerLayerSpec,
    Spec,
    fp32_format,
)
from compression.supernet import FULL, Subnetwork, extract_weights
from compression.tasks.base import Task
from compression.teachers.config import EncoderConfig
from compression.token_rows import WORD

TIMED_VOCABULARY = 512  # rows of the word embedding of what is timed: its size costs no time
HELD_OUT_SHARE = 4  # of the measured sub-networks, one in so many is not fitted
TEACHER = "teacher"

Timed = Mapping[str, LatencyReport]


def space_of(spec: Spec, config: EncoderConfig) -> SearchSpace:
    """Of the spec's widths and depths."""
    return SearchSpace(
        config,
        tuple(sorted(spec.supernet.width_mults, reverse=True)),
        tuple(sorted(spec.supernet.depth_mults, reverse=True)),
    )


def searched_format(spec: Spec) -> Format:
    """The first served format of the export, in fp32: what the latency model is of."""
    return next(fp32_format(fmt) for fmt in spec.export.formats if fmt in SERVED_FORMATS)


def searched_setting(spec: Spec, *, seq_len: int) -> LatencySetting:
    """The setting that the constraints mean by latency."""
    own = LatencySetting(spec.latency.batch_size, seq_len, spec.latency.threads)
    at = spec.constraints.latency_at or LatencyAt()
    return LatencySetting(*(getattr(at, name) or getattr(own, name) for name in own._fields))


# --- the latency model ------------------------------------------------------------------------


@dataclass(frozen=True)
class Limit:
    """At most `max_ms` at a percentile, as a model predicts it."""

    percentile: Percentile
    model: LatencyModel
    report: LatencyModelReport
    max_ms: float

    def holds(self, subnetwork: Subnetwork) -> bool:
        """With room for the model's mean error: what is found is measured, and may then miss."""
        return self.model.predict(subnetwork) * (1 + self.report.mean_error) <= self.max_ms


def samples(space: SearchSpace, count: int, *, seed: int) -> list[Subnetwork]:
    """Every width at full depth, so that each size of a layer is among them, and random ones."""
    generator = np.random.default_rng([seed, 8])
    genes = [space.uniform(width, FULL) for width in space.widths]
    genes += [space.random(generator) for _ in range(count - len(genes))]
    return [space.subnetwork(each, f"sample{number}") for number, each in enumerate(genes)]


def time_subnetworks(
    subnetworks: Sequence[Subnetwork],
    config: EncoderConfig,
    weights: Mapping[str, np.ndarray],
    spec: Spec,
    *,
    seq_len: int,
    folder: Path,
    on_round: latency.OnRound,
) -> Timed:
    """Latency of each and of the whole network (TEACHER) in the setting of the constraints.

    ExportFailed where one cannot be written or run.
    """
    fmt, setting = searched_format(spec), searched_setting(spec, seq_len=seq_len)
    vocabulary = min(TIMED_VOCABULARY, config.vocab_size)
    lean = dataclasses.replace(config, vocab_size=vocabulary)
    rows = {**weights, WORD: weights[WORD][:vocabulary]}
    whole = Subnetwork(TEACHER, FULL, FULL, tuple(range(config.layers)), config.heads, config.ffn)
    served = {}
    for subnetwork in (*subnetworks, whole):
        small = build_encoder(subnetwork.config(lean), extract_weights(lean, rows, subnetwork))
        done = export_formats([fmt], small, folder / subnetwork.name, labels=None)[fmt]
        if done.error is not None:
            raise ExportFailed(done.error)
        served[subnetwork.name] = latency.Served(fmt, done.folder)
    once = spec.latency.model_copy(
        update={
            "batch_size": setting.batch_size,
            "seq_len": setting.seq_len,
            "threads": setting.threads,
            **dict.fromkeys(("batch_sizes", "seq_lens", "thread_counts"), ()),
        }
    )
    timed = latency.measure(
        served,
        once,
        seq_len=setting.seq_len,
        vocab_size=vocabulary,
        on_round=on_round,
    )
    return {name: reports[0] for name, reports in timed.items()}


def fitted(
    subnetworks: Sequence[Subnetwork], timed: Timed, percentile: Percentile
) -> tuple[LatencyModel, LatencyModelReport]:
    """The model of a percentile; the last quarter of the sub-networks says how wrong it is."""
    measured = [
        (each, float(getattr(timed[each.name], f"p{percentile}_ms"))) for each in subnetworks
    ]
    held_out = len(measured) // HELD_OUT_SHARE
    model = fit(measured[: len(measured) - held_out])
    wrong = np.abs(relative_errors(model, measured[len(measured) - held_out :]))
    return model, LatencyModelReport(
        percentile=percentile,
        call_ms=model.call_ms,
        heads_ms=model.heads_ms,
        ffn_ms=model.ffn_ms,
        fitted=len(measured) - held_out,
        held_out=held_out,
        mean_error=float(wrong.mean()),
        max_error=float(wrong.max()),
    )


def limits_of(spec: Spec, subnetworks: Sequence[Subnetwork], timed: Timed) -> list[Limit]:
    """What the constraints say of latency, as limits in milliseconds.

    A speed-up is one of p50 against the whole network, timed in the same rounds.
    """
    constraints, found = spec.constraints, []
    if constraints.max_latency_ms is not None:
        percentile = (constraints.latency_at or LatencyAt()).percentile
        found.append((percentile, constraints.max_latency_ms))
    if constraints.min_speedup is not None:
        found.append((50, timed[TEACHER].p50_ms / constraints.min_speedup))
    return [
        Limit(percentile, *fitted(subnetworks, timed, percentile), max_ms)
        for percentile, max_ms in found
    ]


# --- the search -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Found:
    """The finalists, the best on the hold-out first, and how they were found."""

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
    *,
    seq_len: int,
    threads: int,
    folder: Path,
    on_progress: Callable[[int, int, str], None],
) -> Found:
    """The sub-networks with a width for each layer that are most accurate under the budget.

    `config` is what is exported, `named` those that the job has anyway: none of them is found
    again. ExportFailed where what is to be timed cannot be written or run.
    """
    space = space_of(spec, config)
    drawn = samples(space, asked.latency_samples, seed=spec.seed)
    limits: list[Limit] = []
    if spec.constraints.max_latency_ms is not None or spec.constraints.min_speedup is not None:
        timed = time_subnetworks(
            drawn,
            config,
            numpy_weights(supernet),
            spec,
            seq_len=seq_len,
            folder=folder,
            on_round=lambda done, total: on_progress(done, total, "latency"),
        )
        limits = limits_of(spec, drawn, timed)
    fmt, max_mb = searched_format(spec), spec.constraints.max_size_mb

    def megabytes(subnetwork: Subnetwork) -> float:
        return file_bytes(fmt, subnetwork.config(config)) / 1e6

    def fits(subnetwork: Subnetwork) -> bool:
        small = max_mb is None or megabytes(subnetwork) <= max_mb
        return small and all(limit.holds(subnetwork) for limit in limits)

    def score(subnetwork: Subnetwork) -> float:
        logits = predict(supernet, holdout, subnetwork=subnetwork, threads=threads)
        return task.score(logits, holdout)

    def price(subnetwork: Subnetwork) -> float:
        if limits:
            return limits[0].model.predict(subnetwork)
        return float(cost.parameters(subnetwork.config(config)))

    at_most = asked.population * (asked.generations + 1)
    scored = evolve(
        space,
        first=[space.uniform(width, depth) for width in space.widths for depth in space.depths],
        fits=fits,
        score=score,
        cost=price,
        population=asked.population,
        generations=asked.generations,
        seed=spec.seed,
        on_scored=lambda count: on_progress(min(count, at_most), at_most, "candidates"),
    )
    best = finalists(scored, named, asked.finalists)
    setting = searched_setting(spec, seq_len=seq_len)
    report = SearchReport(
        format=fmt,
        setting=setting,
        budget=(
            *(f"p{each.percentile} of {in_ms(each.max_ms)} ({setting})" for each in limits),
            *((in_mb(max_mb),) if max_mb is not None else ()),
        ),
        holdout_rows=len(holdout),
        latency_models=tuple(limit.report for limit in limits),
        scored=len(scored),
        finalists=tuple(
            Finalist(
                subnetwork=each.subnetwork.name,
                holdout_accuracy=each.accuracy,
                predicted_ms={
                    limit.percentile: limit.model.predict(each.subnetwork) for limit in limits
                },
                predicted_mb=megabytes(each.subnetwork),
            )
            for each in best
        ),
        note="" if best else "no sub-network with a width for each layer is predicted to hold it",
    )
    return Found([each.subnetwork for each in best], report)


def finalists(scored: Sequence[Scored], named: Sequence[Subnetwork], count: int) -> list[Scored]:
    """The first `count` that are no other sub-network of the job, called p1, p2, ..."""
    taken = {(each.layers, each.heads, each.ffn) for each in named}
    new = [
        each
        for each in scored
        if (each.subnetwork.layers, each.subnetwork.heads, each.subnetwork.ffn) not in taken
    ]
    return [
        dataclasses.replace(
            each, subnetwork=dataclasses.replace(each.subnetwork, name=f"p{number}")
        )
        for number, each in enumerate(new[:count], start=1)
    ]


# --- what it was good for ---------------------------------------------------------------------


def with_gain(
    report: SearchReport,
    spec: Spec,
    subnetworks: Sequence[SubnetworkReport],
    resampled: Mapping[str, np.ndarray],
) -> SearchReport:
    """The report with the finalists' gain on dev over the sub-networks of one width.

    Only what holds the budget as measured counts, in the format that was searched for.
    `resampled`: each sub-network's main metric on the resamples of dev.
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
        if each.format == report.format and all(bound.holds(each) for bound in bounds)
    ]
    best = _most_accurate([each for each in choices if each.subnetwork in found])
    uniform = _most_accurate([each for each in choices if each.subnetwork not in found])
    if best is None or uniform is None:
        what = "finalist" if best is None else "sub-network of one width"
        note = report.note or f"no {what} holds the budget as measured"
        return report.model_copy(update={"note": note})
    gained = 100 * (resampled[best.subnetwork] - resampled[uniform.subnetwork])
    return report.model_copy(
        update={
            "gain": PerLayerGain(
                subnetwork=best.subnetwork,
                reference=uniform.subnetwork,
                points=uniform.accuracy_drop - best.accuracy_drop,
                intervals=intervals(gained),
            )
        }
    )


def _most_accurate(choices: Sequence[Candidate]) -> Candidate | None:
    return min(choices, key=lambda each: (each.accuracy_drop, each.latency_ms), default=None)
