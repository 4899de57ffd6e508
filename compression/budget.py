"""What the search's candidates must hold: latency, as a model predicts it in one format, and size.

The model is one fitted to sub-networks that are exported and timed here, or, where the constraints
name another device, its profile. The format is the fastest of those that the export asks for, of
the whole network: under a budget, that is where most fits.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from compression import latency
from compression.constraints import in_mb, in_ms
from compression.device_profile import Predictor
from compression.encoder import build_encoder
from compression.errors import ExportFailed
from compression.export import Exported, Int8Source, export_formats
from compression.latency_model import HELD_OUT_SHARE, LatencyModel, fit, relative_errors
from compression.plan import file_bytes
from compression.report import LatencyModelReport, LatencyReport, ProfiledDevice
from compression.search_space import SearchSpace
from compression.spec import (
    SERVED_FORMATS,
    Format,
    LatencyAt,
    LatencySetting,
    Percentile,
    Spec,
    fp32_format,
)
from compression.supernet import FULL, Subnetwork, extract_weights
from compression.teachers.config import EncoderConfig
from compression.token_rows import WORD

TIMED_VOCABULARY = 512  # rows of the word embedding of what is timed: its size costs no time
TEACHER = "teacher"

Timed = Mapping[str, LatencyReport]


@dataclass(frozen=True)
class Limit:
    """At most `max_ms` at a percentile; `error` is the share of it that is left free."""

    percentile: Percentile
    max_ms: float
    milliseconds: Callable[[Subnetwork], float]
    error: float = 0.0

    def holds(self, subnetwork: Subnetwork, share: float = 1.0) -> bool:
        """Whether it takes that share of the limit at most."""
        return self.milliseconds(subnetwork) * (1 + self.error) <= share * self.max_ms


@dataclass(frozen=True)
class Budget:
    """Of candidates in one format; `models` tell of what `limits` predict with, if fitted here."""

    format: Format
    setting: LatencySetting
    config: EncoderConfig  # of the whole network as it is exported
    max_mb: float | None
    limits: tuple[Limit, ...] = ()
    models: tuple[LatencyModelReport, ...] = ()
    on: ProfiledDevice | None = None

    def holds(self, subnetwork: Subnetwork, share: float = 1.0) -> bool:
        """Whether that share of everything is enough."""
        small = self.max_mb is None or self.megabytes(subnetwork) <= share * self.max_mb
        return small and all(limit.holds(subnetwork, share) for limit in self.limits)

    def megabytes(self, subnetwork: Subnetwork) -> float:
        """Predicted, of the file in the budget's format."""
        return file_bytes(self.format, subnetwork.config(self.config)) / 1e6

    @property
    def words(self) -> tuple[str, ...]:
        latencies = (f"p{each.percentile} of {in_ms(each.max_ms)}" for each in self.limits)
        sizes = (in_mb(self.max_mb),) if self.max_mb is not None else ()
        return (*(f"{each} ({self.setting})" for each in latencies), *sizes)


def searched_formats(spec: Spec) -> list[Format]:
    """What the sub-networks are served in."""
    return [fmt for fmt in spec.export.formats if fmt in SERVED_FORMATS]


def searched_setting(spec: Spec, *, seq_len: int) -> LatencySetting:
    """The setting that the constraints mean by latency."""
    own = LatencySetting(spec.latency.batch_size, seq_len, spec.latency.threads)
    at = spec.constraints.latency_at or LatencyAt()
    return LatencySetting(*(getattr(at, name) or getattr(own, name) for name in own._fields))


def size_budget(spec: Spec, config: EncoderConfig, *, seq_len: int) -> Budget:
    """Where latency is not bounded: in the smallest of the formats."""
    fmt = min(searched_formats(spec), key=lambda each: file_bytes(each, config))
    setting = searched_setting(spec, seq_len=seq_len)
    return Budget(fmt, setting, config, spec.constraints.max_size_mb)


# --- of another device ------------------------------------------------------------------------


def predicted_budget(spec: Spec, config: EncoderConfig, predictor: Predictor) -> Budget:
    """As the selection will predict it from the device's profile: no room is left for an error."""
    whole = whole_network(config)
    fmt = min(
        (each for each in searched_formats(spec) if each in predictor.models),
        key=lambda each: predictor.latency(whole.heads, whole.ffn, each).p50_ms,
    )

    def milliseconds(subnetwork: Subnetwork) -> float:
        return predictor.latency(subnetwork.heads, subnetwork.ffn, fmt).p50_ms

    limits = [Limit(50, most, milliseconds) for _, most in bounds(spec, predictor.teacher_ms)]
    max_mb = spec.constraints.max_size_mb
    return Budget(fmt, predictor.setting, config, max_mb, tuple(limits), on=predictor.on)


# --- measured here ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Timings:
    """Latency of the samples in a format, and of the whole network (TEACHER) in its fp32."""

    format: Format
    timed: Timed


def samples(space: SearchSpace, count: int, *, seed: int) -> list[Subnetwork]:
    """Every width at full depth, so that each size of a layer is among them, and random ones."""
    generator = np.random.default_rng([seed, 8])
    genes = [space.uniform(width, FULL) for width in space.widths]
    genes += [space.random(generator) for _ in range(count - len(genes))]
    return [space.subnetwork(each, f"sample{number}") for number, each in enumerate(genes)]


def whole_network(config: EncoderConfig) -> Subnetwork:
    return Subnetwork(TEACHER, FULL, FULL, tuple(range(config.layers)), config.heads, config.ffn)


def time_subnetworks(
    subnetworks: Sequence[Subnetwork],
    config: EncoderConfig,
    weights: Mapping[str, np.ndarray],
    spec: Spec,
    *,
    seq_len: int,
    folder: Path,
    on_progress: Callable[[int, int, str], None],
) -> Timings:
    """Times the whole network in every format, and in the fastest one the sub-networks beside it.

    In the setting of the constraints. A format in which the whole network cannot be written is
    left out; ExportFailed where none is left, or a sub-network cannot be written or run.
    """
    setting, formats = searched_setting(spec, seq_len=seq_len), searched_formats(spec)
    vocabulary = min(TIMED_VOCABULARY, config.vocab_size)
    lean = dataclasses.replace(config, vocab_size=vocabulary)
    rows = {**weights, WORD: weights[WORD][:vocabulary]}
    folder.mkdir(parents=True, exist_ok=True)
    calibration = folder / "calibration.npz"  # scales cost no time, whatever they are
    tokens = latency.token_ids(
        batch_size=setting.batch_size, seq_len=setting.seq_len, vocab_size=vocabulary
    )
    np.savez(calibration, **tokens)

    def exported(subnetwork: Subnetwork, asked: Sequence[Format]) -> dict[Format, Exported]:
        out = folder / subnetwork.name
        small = build_encoder(subnetwork.config(lean), extract_weights(lean, rows, subnetwork))
        return export_formats(
            asked, small, out, labels=None, int8=Int8Source(calibration, out / "int8")
        )

    once = spec.latency.model_copy(
        update={
            "batch_size": setting.batch_size,
            "seq_len": setting.seq_len,
            "threads": setting.threads,
            **dict.fromkeys(("batch_sizes", "seq_lens", "thread_counts"), ()),
        }
    )

    def timed(what: Mapping[str, latency.Served]) -> dict[str, LatencyReport]:
        reports = latency.measure(
            what,
            once,
            seq_len=setting.seq_len,
            vocab_size=vocabulary,
            on_round=lambda done, total: on_progress(done, total, "latency"),
        )
        return {name: own[0] for name, own in reports.items()}

    asked = list(dict.fromkeys([*formats, *map(fp32_format, formats)]))
    done = exported(whole_network(config), asked)
    # A format that this host cannot write is withheld by the export too, which says why.
    whole = {fmt: latency.Served(fmt, each.folder) for fmt, each in done.items() if not each.error}
    formats = [fmt for fmt in formats if fmt in whole and fp32_format(fmt) in whole]
    if not formats:
        raise ExportFailed(next(each.error for each in done.values() if each.error))
    fmt = formats[0]
    if len(formats) > 1:
        by_format = timed({str(each): whole[each] for each in formats})
        fmt = min(formats, key=lambda each: by_format[each].p50_ms)
    written = {TEACHER: whole[fp32_format(fmt)]}
    for number, subnetwork in enumerate(subnetworks, start=1):
        files = exported(subnetwork, [fmt])[fmt]
        if files.error is not None:
            raise ExportFailed(files.error)
        written[subnetwork.name] = latency.Served(fmt, files.folder)
        on_progress(number, len(subnetworks), "samples")
    return Timings(fmt, timed(written))


def measured_budget(
    spec: Spec,
    config: EncoderConfig,
    subnetworks: Sequence[Subnetwork],
    timings: Timings,
    *,
    seq_len: int,
) -> Budget:
    """By models fitted to the timings, with their mean error left free: what is found will be
    measured, and may then miss."""
    asked = bounds(spec, timings.timed[TEACHER].p50_ms)
    by_percentile = {
        percentile: fitted(subnetworks, timings.timed, percentile) for percentile, _ in asked
    }
    limits = []
    for percentile, max_ms in asked:
        model, report = by_percentile[percentile]
        limits.append(Limit(percentile, max_ms, model.predict, report.mean_error))
    return Budget(
        timings.format,
        searched_setting(spec, seq_len=seq_len),
        config,
        spec.constraints.max_size_mb,
        tuple(limits),
        tuple(report for _, report in by_percentile.values()),
    )


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


def bounds(spec: Spec, teacher_ms: float) -> list[tuple[Percentile, float]]:
    """What the constraints say of latency: percentiles, and milliseconds at most.

    A speed-up is one of p50 against the whole network in fp32, which takes `teacher_ms`.
    """
    constraints, found = spec.constraints, list[tuple[Percentile, float]]()
    if constraints.max_latency_ms is not None:
        percentile = (constraints.latency_at or LatencyAt()).percentile
        found.append((percentile, constraints.max_latency_ms))
    if constraints.min_speedup is not None:
        found.append((50, teacher_ms / constraints.min_speedup))
    return found
