"""What exported files and sub-networks are put to, and what the report says of it.

Parity gate and rounding gate, which keep a file from being published; the teacher's files that
serve as baselines; latency; what changed against the teacher; the selected one on test. Nothing is
trained here, and nothing chosen.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

import numpy as np

from compression import latency
from compression.batches import pad
from compression.errors import ExportFailed
from compression.evaluate import drop_intervals, padded_logits, resampled_metric
from compression.export import EXPORTERS, Exported, Int8Source, format_report, served_bytes, verify
from compression.int8 import Judge, Outcome, Verdict, loses_at_most, pass_gate, served_predictions
from compression.job import Job
from compression.networks import Networks
from compression.regression import Judged, RegressionReport, compare, in_common
from compression.report import (
    ComparisonOnTest,
    FormatReport,
    Intervals,
    LatencyReport,
    Selection,
    SubnetworkReport,
)
from compression.spec import (
    HALF_FORMATS,
    HALF_GATE,
    ROUNDED_FORMATS,
    SERVED_FORMATS,
    Format,
    fp32_format,
    gate_of,
)
from compression.stages import Advance
from compression.supernet import Subnetwork
from compression.tasks import Predictions

PARITY_ROWS = 64
PARITY_TOLERANCE = 1e-4  # fp32
TEACHER = "teacher"


def pass_parity_gate(
    job: Job,
    networks: Networks,
    subnetwork: Subnetwork,
    exported: Mapping[Format, Exported],
    rounded: Mapping[Format, Outcome],
    artifacts: Path,
    work: Path,
) -> list[FormatReport]:
    """Compares each format, reloaded in a fresh process, with the sub-network on dev rows.

    Of formats that round, whose own gate `rounded` tells of, logits must only be finite and as
    many.
    """
    rows = job.own["dev"].take(range(min(PARITY_ROWS, len(job.own["dev"]))))
    folder = work / "parity" / subnetwork.name
    folder.mkdir(parents=True)
    batch, reference = folder / "batch.npz", folder / "reference.npz"
    np.savez(batch, **pad(rows, range(len(rows)), pad_id=networks.config.pad_token_id))
    np.savez(reference, logits=padded_logits(networks.predict(subnetwork, rows)))
    reports = []
    for fmt, files in exported.items():
        parity, outcome = None, rounded.get(fmt)
        tolerance = PARITY_TOLERANCE if outcome is None else None
        if outcome is not None and outcome.error is not None:
            files = dataclasses.replace(files, error=outcome.error)
        if files.error is None:
            parity = verify(
                fmt,
                files.folder,
                batch=batch,
                reference=reference,
                tolerance=math.inf if tolerance is None else tolerance,
            )
        report = format_report(
            files,
            parity,
            root=artifacts / subnetwork.name,
            rows=len(rows),
            tolerance=tolerance,
        )
        reports.append(
            report if outcome is None else outcome.told(report, gate_of(fmt, job.spec.export.int8))
        )
    return reports


def pass_rounding_gate(
    job: Job,
    exported: Mapping[Format, Exported],
    source: Int8Source | None,
    *,
    expected: Predictions,
    own_drops: Intervals,
    teacher_accuracy: float,
    teacher_resampled: np.ndarray,
) -> dict[Format, Outcome]:
    """What became of each format that rounds; one in int8 may hold parts in fp32 afterwards.

    `expected`: the sub-network's logits of dev, `own_drops`: the points that they lose.
    """
    if source is None:
        return {}
    dev, constraints = job.own["dev"], job.spec.constraints
    bound, confidence = constraints.max_accuracy_drop, constraints.confidence
    own_drop = 100 * (teacher_accuracy - job.task.score(expected, dev))
    judge = Judge(
        task=job.task,
        dev=dev,
        expected=expected,
        spec=job.spec.export.int8,
        max_drop=bound
        if bound is not None and loses_at_most(bound, own_drop, own_drops, confidence=confidence)
        else None,
        confidence=confidence,
        teacher_accuracy=teacher_accuracy,
        teacher_resampled=teacher_resampled,
        batch_size=job.spec.latency.batch_size,
        pad_token_id=job.own_pad_id,
        folder=source.folder,
    )
    outcomes = {}
    for fmt, files in exported.items():
        if fmt in ROUNDED_FORMATS:
            own = judge
            if half := HALF_FORMATS.get(fmt):
                own = dataclasses.replace(judge, spec=HALF_GATE, max_drop=None, called=half)
            outcomes[fmt] = (
                pass_gate(EXPORTERS[fmt], files, own, source)
                if files.error is None
                else Outcome(None, error=files.error)
            )
    return outcomes


def judge_baselines(
    job: Job,
    files: Mapping[Format, Exported],
    source: Int8Source | None,
    *,
    expected: Predictions,
    teacher_accuracy: float,
    teacher_resampled: np.ndarray,
) -> tuple[dict[Format, Exported], dict[Format, Verdict]]:
    """What the teacher's files that round answer on dev, against itself in fp32 (`expected`).

    Nothing is chosen of them, so nothing is withheld; one that cannot be run gets that error.
    """
    found, verdicts = dict(files), {}
    for fmt, own in files.items():
        if fmt not in ROUNDED_FORMATS or own.error is not None or source is None:
            continue
        judge = Judge(
            task=job.task,
            dev=job.splits["dev"],
            expected=expected,
            spec=job.spec.export.int8,
            max_drop=None,
            teacher_accuracy=teacher_accuracy,
            teacher_resampled=teacher_resampled,
            batch_size=job.spec.latency.batch_size,
            pad_token_id=job.checkpoint.config.pad_token_id,
            folder=source.folder,
        )
        try:
            verdicts[fmt] = judge(own)
        except ExportFailed as failure:
            found[fmt] = dataclasses.replace(own, error=failure.message)
    return found, verdicts


def baseline_reports(
    files: Mapping[Format, Exported], verdicts: Mapping[Format, Verdict]
) -> list[FormatReport]:
    """The teacher's formats: sizes, and where it rounds what that costs it on dev."""
    reports = [
        FormatReport(
            format=fmt,
            published=False,
            error=own.error,
            size_bytes=0 if own.error else served_bytes(fmt, own.folder),
        )
        for fmt, own in files.items()
    ]
    return [
        verdicts[report.format].told(report) if report.format in verdicts else report
        for report in reports
    ]


def measure_latency(
    job: Job,
    formats: Mapping[str, Sequence[FormatReport]],
    artifacts: Path,
    teacher_files: Mapping[Format, Exported],
    advance: Advance,
) -> dict[str, tuple[LatencyReport, ...]]:
    """Latency of every published served file and of the teacher, by "sub-network/format".

    In every setting of the spec; speed-ups are against the teacher in the same runtime, in fp32:
    what rounding gains is part of them, as it is all of a rounded teacher's own.
    """
    served = {
        f"{TEACHER}/{fmt}": latency.Served(fmt, files.folder)
        for fmt, files in teacher_files.items()
        if files.error is None
    }
    for name, reports in formats.items():
        for report in reports:
            if report.published and report.format in SERVED_FORMATS:
                folder = artifacts / name / report.format
                served[f"{name}/{report.format}"] = latency.Served(report.format, folder)
    return latency.measure(
        served,
        job.spec.latency,
        seq_len=job.seq_len,
        # The same tokens for all: those that every network has.
        vocab_size=job.own_config(job.checkpoint.config).vocab_size,
        references=references(served),
        on_round=lambda done, total: advance(done, total),
    )


def references(served: Mapping[str, latency.Served]) -> dict[str, str]:
    """What each speed-up is against, by name: the teacher in fp32, which has none itself."""
    return {
        name: reference
        for name, item in served.items()
        if (reference := f"{TEACHER}/{fp32_format(item.format)}") in served and reference != name
    }


def with_latency(
    name: str,
    formats: Sequence[FormatReport],
    measured: Mapping[str, tuple[LatencyReport, ...]],
) -> tuple[FormatReport, ...]:
    """The formats' reports with latency in every setting; the first is what they stand for."""
    return tuple(
        report.model_copy(update={"latency": own[0], "speedup": own[0].speedup, "latencies": own})
        if (own := measured.get(f"{name}/{report.format}"))
        else report
        for report in formats
    )


def regression(
    job: Job, split: Literal["dev", "test"], teacher: Judged, logits: Predictions
) -> RegressionReport:
    """A sub-network's answers to a split's rows against the teacher's."""
    own = job.task.judged(logits, job.own[split])
    if job.vocabulary is not None:
        teacher, own = in_common(teacher, own)
    return compare(
        teacher=teacher,
        subnetwork=own,
        split=split,
        facts=job.facts[split],
        lengths=job.task.row_lengths(job.own[split]),
    )


def judged_on_test(
    reports: Sequence[SubnetworkReport],
    job: Job,
    networks: Networks,
    chosen: Selection,
    artifacts: Path,
    work: Path,
    *,
    teacher_accuracy: float,
    teacher_on_test: Predictions,
) -> tuple[list[SubnetworkReport], tuple[str, ...]]:
    """The reports with the selected one's figures of test, and what kept it from having any."""
    try:
        rounded = rounded_on_test(job, chosen, artifacts, work)
    except ExportFailed as failure:  # test chooses nothing: the job stands without it
        where = f"{chosen.subnetwork} in {chosen.format}"
        return list(reports), (f"{where} was not judged on test: {failure.message}",)
    judged = with_test(
        reports,
        job,
        networks,
        teacher_accuracy=teacher_accuracy,
        teacher_on_test=teacher_on_test,
        rounded=rounded,
    )
    return judged, ()


def rounded_on_test(
    job: Job, chosen: Selection, artifacts: Path, work: Path
) -> tuple[Format, Predictions] | None:
    """The selected format and its file's answers on test, as served; None where it is in fp32.

    ExportFailed where the file cannot be run.
    """
    if chosen.subnetwork is None or chosen.format not in ROUNDED_FORMATS:
        return None
    return chosen.format, served_predictions(
        chosen.format,
        artifacts / chosen.subnetwork / chosen.format,
        job.own["test"],
        batch_size=job.spec.latency.batch_size,
        pad_token_id=job.own_pad_id,
        work=work,
    )


def with_test(
    reports: Sequence[SubnetworkReport],
    job: Job,
    networks: Networks,
    *,
    teacher_accuracy: float,
    teacher_on_test: Predictions,
    rounded: tuple[Format, Predictions] | None,
) -> list[SubnetworkReport]:
    """The selected sub-network is judged on test, as is what it is held against; no other is.

    `teacher_accuracy` is on dev, which says what to hold it against: test chooses nothing.
    `rounded`: the selected file's format and own answers on test, where it rounds; None: the
    sub-network's are judged.
    """
    selected = next((report for report in reports if report.selected), None)
    if selected is None:
        return list(reports)
    rows, task = job.own["test"], job.task

    def on_test(report: SubnetworkReport) -> Predictions:
        return networks.predict(subnetwork_in(report), rows, threads=job.replicas)

    name, other, other_rows = TEACHER, teacher_on_test, job.splits["test"]
    largest = (r for r in reports if r.width_mult == r.depth_mult == 1)
    # A file of width 1 that rounds is held against what it was before, too.
    full = next((r for r in largest if rounded is not None or r is not selected), None)
    if full is not None and full.accuracy > teacher_accuracy:
        name, other, other_rows = full.name, on_test(full), rows
    fmt, own = rounded if rounded is not None else (None, on_test(selected))
    reference_accuracy, accuracy = task.score(other, other_rows), task.score(own, rows)
    comparison = ComparisonOnTest(
        reference=name,
        reference_accuracy=reference_accuracy,
        accuracy=accuracy,
        accuracy_drop=100 * (reference_accuracy - accuracy),
        accuracy_drop_intervals=drop_intervals(
            reference=resampled_metric(task, task.outcomes(other, other_rows)),
            own=resampled_metric(task, task.outcomes(own, rows)),
        ),
        format=fmt,
    )
    judged = selected.model_copy(
        update={
            "test_accuracy": accuracy,
            "test": comparison,
            "test_regression": regression(
                job, "test", task.judged(teacher_on_test, job.splits["test"]), own
            ),
        }
    )
    return [judged if report is selected else report for report in reports]


def subnetwork_in(report: SubnetworkReport) -> Subnetwork:
    """The one that a report is of; those that predate depth say nothing of layers."""
    return Subnetwork(
        report.name,
        report.width_mult,
        report.depth_mult,
        report.layers or tuple(range(len(report.heads))),
        report.heads,
        report.ffn,
    )


def export_warnings(
    reports: Sequence[SubnetworkReport],
    exported: Sequence[Format],
    teacher_files: Mapping[Format, Exported],
) -> tuple[str, ...]:
    """What is not published, and what the teacher's missing files keep from being chosen.

    `exported`: formats of the sub-networks.
    """
    unpublished = [
        f"{report.name} in {fmt.format} is not published: {fmt.error}"
        for report in reports
        for fmt in report.formats
        if not fmt.published
    ]
    unmeasured = []
    for fmt, files in teacher_files.items():
        if files.error is None:
            continue
        held_back = [each for each in exported if fp32_format(each) == fmt]
        what = (
            f"nothing can be chosen in {' or '.join(held_back)}, for want of a speed-up"
            if held_back
            else f"the baseline in {fmt} could not be measured"
        )
        unmeasured.append(f"{what}: the teacher could not be written in {fmt}: {files.error}")
    return (*unpublished, *unmeasured)
