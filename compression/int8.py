"""The gate of files that round: what each answers on dev, and what stays in fp32 then.

int8 moves logits by tenths, so they are not compared one by one, as fp32's are: a file is
judged by its own accuracy and by the share of answers that it flips against the sub-network
that it was made from. Where it loses too much, the parts that int8 harms most go back to fp32.
Their order comes from rows of train; how many it takes is what dev says.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from compression.batches import Encoded, pad
from compression.constraints import TOLERANCE_DIGITS
from compression.errors import ExportFailed
from compression.evaluate import drop_intervals, resampled_metric
from compression.export import Exported, Int8Source, served_logits
from compression.export.base import Exporter
from compression.export.onnx_int8 import OnnxInt8Exporter
from compression.report import FormatReport, Intervals
from compression.spec import Format, Int8Spec
from compression.tasks import Predictions, Task


@dataclass(frozen=True)
class Judge:
    """What int8 files of one sub-network are held against.

    `expected` are the sub-network's own logits of `dev` in fp32. `max_drop` is in points of
    the main metric against the teacher; None where nothing bounds it, or where the sub-network
    itself loses more. `confidence` is the constraints'. `folder` takes rows and logits.
    """

    task: Task
    dev: Encoded
    expected: Predictions
    spec: Int8Spec
    max_drop: float | None
    teacher_accuracy: float
    teacher_resampled: np.ndarray  # as `resampled_metric` has it
    batch_size: int
    pad_token_id: int
    folder: Path
    confidence: float | None = None
    called: str = "int8"  # how the files round

    def __call__(self, files: Exported) -> Verdict:
        """Runs the file on dev in a fresh process. ExportFailed where it cannot be run."""
        found = served_predictions(
            files.format,
            files.folder,
            self.dev,
            batch_size=self.batch_size,
            pad_token_id=self.pad_token_id,
            work=self.folder,
        )
        outcomes = self.task.outcomes(found, self.dev)
        accuracy = self.task.metrics_of(outcomes)[self.task.main_metric]
        resampled = resampled_metric(self.task, outcomes)
        return Verdict(
            accuracy=accuracy,
            accuracy_drop=100 * (self.teacher_accuracy - accuracy),
            accuracy_drop_intervals=drop_intervals(reference=self.teacher_resampled, own=resampled),
            resampled=resampled,
            flipped=flipped_share(self.task, found, self.expected, self.dev),
        )

    def publishes(self, verdict: Verdict) -> bool:
        return verdict.flipped <= self.spec.max_flipped

    def is_content_with(self, verdict: Verdict) -> bool:
        """Not only good enough to be published, but within the constraint as well."""
        within = self.max_drop is None or loses_at_most(
            self.max_drop,
            verdict.accuracy_drop,
            verdict.accuracy_drop_intervals,
            confidence=self.confidence,
        )
        return within and self.publishes(verdict)


def loses_at_most(
    bound: float, drop: float, within: Intervals, *, confidence: float | None
) -> bool:
    """Whether a drop in points holds `max_accuracy_drop`, as the selection will ask it.

    With a confidence the high end of that interval must; one that is not known does not.
    """
    if confidence is not None:
        drop = next((each.high for each in within if each.confidence == confidence), math.nan)
    return round(drop - bound, TOLERANCE_DIGITS) <= 0


@dataclass(frozen=True)
class Verdict:
    """`accuracy` is the main metric on dev, `accuracy_drop` in points, `flipped` in 0..1.

    `resampled`: the metric on each resample of dev, as `resampled_metric` has it.
    """

    accuracy: float
    accuracy_drop: float
    accuracy_drop_intervals: Intervals
    flipped: float
    resampled: np.ndarray = field(compare=False, repr=False)

    def told(self, report: FormatReport) -> FormatReport:
        """The format's report with these figures."""
        figures = {name: value for name, value in vars(self).items() if name != "resampled"}
        return report.model_copy(update=figures)


@dataclass(frozen=True)
class Outcome:
    """`fp32_parts` are in fp32 in the file that is there now; `error`: why it is withheld."""

    verdict: Verdict | None
    fp32_parts: tuple[str, ...] = ()
    error: str | None = None

    def told(self, report: FormatReport, spec: Int8Spec) -> FormatReport:
        """The format's report with what int8 is judged by."""
        judged = report if self.verdict is None else self.verdict.told(report)
        return judged.model_copy(
            update={"max_flipped": spec.max_flipped, "fp32_parts": self.fp32_parts}
        )


def served_predictions(
    fmt: Format,
    folder: Path,
    data: Encoded,
    *,
    batch_size: int,
    pad_token_id: int,
    work: Path,
) -> Predictions:
    """A file's logits of a whole split, as it is served; `work` takes rows and logits."""
    rows, out = work / "rows.npz", work / "logits.npz"
    np.savez(rows, **pad(data, range(len(data)), pad_id=pad_token_id))
    logits = served_logits(fmt, folder, rows=rows, batch_size=batch_size, out=out)
    if logits.ndim == 3:
        return [own[:length] for own, length in zip(logits, data.lengths, strict=True)]
    return logits


def flipped_share(task: Task, found: Predictions, expected: Predictions, data: Encoded) -> float:
    """The share of decisions on which two predictions differ; of numbers, the metric's loss.

    A gain of the metric is a share of 0.
    """
    own, other = task.decisions(found, data), task.decisions(expected, data)
    if own is None or other is None:
        return max(0.0, task.score(expected, data) - task.score(found, data))
    return sum(one != another for one, another in zip(own, other, strict=True)) / max(len(own), 1)


def pass_gate(exporter: Exporter, files: Exported, judge: Judge, source: Int8Source) -> Outcome:
    """Judges the file; where the judge is not content, puts its worst parts back into fp32.

    Where that fails, the file with all parts in int8 stands for itself. Of fp16 and bf16 no parts
    are put back: they are as near as they can be.
    """
    try:
        verdict = judge(files)
    except ExportFailed as failure:
        return Outcome(None, error=failure.message)
    if judge.is_content_with(verdict):
        return Outcome(verdict)
    if not isinstance(exporter, OnnxInt8Exporter):
        return Outcome(verdict, error=_refusal(judge, [(verdict, ())], 0))
    try:
        return _with_worst_in_fp32(exporter, files, judge, source, verdict)
    except ExportFailed as failure:
        if not judge.publishes(verdict):
            refusal = _refusal(judge, [(verdict, ())], 0)
            return Outcome(
                verdict, error=f"{refusal}; its worst parts were not found: {failure.message}"
            )
        exporter.rewrite(source, files.folder, in_fp32=())
        return Outcome(verdict)


def _with_worst_in_fp32(
    exporter: OnnxInt8Exporter,
    files: Exported,
    judge: Judge,
    source: Int8Source,
    rounded: Verdict,
) -> Outcome:
    """Keeps the first number of parts that contents the judge.

    Where none does, the first that can be published: more in fp32 would cost time and size
    without holding what it is for. `rounded` is the verdict on the file with all parts in int8.
    """
    tried: list[tuple[Verdict, tuple[str, ...]]] = [(rounded, ())]
    order: list[str] = []
    if judge.spec.max_fp32_share > 0:
        order = exporter.worst_first(source)
    for parts in growing(order, share=judge.spec.max_fp32_share):
        exporter.rewrite(source, files.folder, in_fp32=parts)
        tried.append((judge(files), parts))
        if judge.is_content_with(tried[-1][0]):
            return Outcome(*tried[-1])
    for verdict, parts in tried:
        if judge.publishes(verdict):
            exporter.rewrite(source, files.folder, in_fp32=parts)
            return Outcome(verdict, parts)
    return Outcome(rounded, error=_refusal(judge, tried, len(order)))


def _refusal(
    judge: Judge, tried: Sequence[tuple[Verdict, tuple[str, ...]]], parts_in_all: int
) -> str:
    numbers = judge.task.decisions(judge.expected, judge.dev) is None
    what = "loses {:.1%} of the metric" if numbers else "flips {:.1%} of the answers on dev"
    (first, _), (last, parts) = tried[0], tried[-1]
    still = (
        f"; with the {len(parts)} worst of {parts_in_all} parts in fp32 still {last.flipped:.1%}"
        if parts
        else ""
    )
    allowed = f"{judge.spec.max_flipped:.1%}"
    return f"{judge.called} {what.format(first.flipped)}, more than {allowed}{still}"


def growing(order: Sequence[str], *, share: float) -> Iterator[tuple[str, ...]]:
    """The first 1, 2, 4 ... of `order`, at last the largest number within the share of it.

    Doubling bounds how often a file is judged: seven times beside the first for the 75 parts of
    BERT-base.
    """
    most = int(len(order) * share)
    count = 1
    while count < most:
        yield tuple(order[:count])
        count *= 2
    if most:
        yield tuple(order[:most])
