"""One compression job from folders to a report: DynaBERT's width method, a call a stage."""

from __future__ import annotations

import dataclasses
import platform
import shutil
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path

import numpy as np
import paddle

from compression import cost, latency, selection
from compression.batches import Encoded, pad, sorted_rows
from compression.bundle import BundleFacts, Provenance, input_digests, write_bundle
from compression.distillation import StepReport, distil
from compression.encoder import (
    Encoder,
    build_encoder,
    numpy_weights,
    set_weights,
    with_new_head,
)
from compression.errors import DeviceUnavailable
from compression.evaluate import predict
from compression.export import Exported, export_formats, format_report, verify
from compression.importance import measure_importance
from compression.plan import Examples, Plan, make_plan, model_info, resolve_rows
from compression.reference import run as reference
from compression.reference.exchange import Request
from compression.reorder import descending, reorder
from compression.report import (
    STAGES,
    CompressionReport,
    DatasetReport,
    FormatReport,
    LatencyReport,
    OnProgress,
    Progress,
    SubnetworkReport,
    TeacherReport,
)
from compression.runtime_env import cpu_name
from compression.spec import SERVED_FORMATS, DistillationSpec, Format, Spec
from compression.supernet import Subnetwork, extract_weights, subnetwork_of
from compression.tables import LABELLED_SPLITS, Columns, profile, read_splits, shared_rows
from compression.tasks import TASKS, Task
from compression.teachers import Checkpoint, read_checkpoint
from compression.teachers.config import EncoderConfig
from compression.tokenization import encode, load_tokenizer, save_tokenizer
from compression.training import fine_tune

PARITY_ROWS = 64
PARITY_TOLERANCE = 1e-4  # fp32
TEACHER = "teacher"
REFERENCE = "reference"
BUNDLE = "bundle.tar.gz"

Advance = Callable[..., None]


def compress(
    spec: Spec,
    model_dir: Path,
    dataset_dir: Path,
    run_dir: Path,
    on_progress: OnProgress = lambda progress: None,
) -> CompressionReport:
    """Runs one job and returns its report, which is also written to `run_dir/report.json`.

    Files to publish are under `run_dir/artifacts/<sub-network>/`. Raises
    CompressionError where the spec, the model or the dataset cannot be used, before
    anything is trained.
    """
    use_device(spec.device)
    artifacts = run_dir / "artifacts"
    artifacts.mkdir(parents=True, exist_ok=True)
    stages = Stages(on_progress)

    with stages("load") as advance:
        job = load(spec, model_dir, dataset_dir)
        advance(1, 1, rows={split: len(rows) for split, rows in job.splits.items()})
    with stages("teacher") as advance:
        teacher, fine_tuned_steps = make_teacher(job, advance)
        teacher_logits = predict(teacher, job.splits["dev"])
        teacher_accuracy = job.task.metric(teacher_logits, job.splits["dev"].labels)
        advance(1, 1, accuracy=teacher_accuracy)
    with stages("importance") as advance:
        head_orders, neuron_orders = rank_units(job, teacher, run_dir / "work", advance)
    with stages("reorder") as advance:
        weights = numpy_weights(teacher)
        supernet = build_encoder(
            learning_config(teacher.config, spec.distillation),
            reorder(teacher.config, weights, head_orders=head_orders, neuron_orders=neuron_orders),
        )
        reorder_max_abs = float(np.abs(predict(supernet, job.splits["dev"]) - teacher_logits).max())
        advance(1, 1, max_abs=reorder_max_abs)
    subnetworks = [subnetwork_of(supernet.config, each.width_mult) for each in job.plan.subnetworks]
    with stages("distil") as advance:
        distillation_steps, step_seconds = train_supernet(
            job, supernet, teacher, subnetworks, run_dir / "work", advance
        )
    with stages("evaluate") as advance:
        accuracies = []
        for i, subnetwork in enumerate(subnetworks, start=1):
            logits = predict(supernet, job.splits["dev"], subnetwork=subnetwork)
            accuracies.append(job.task.metric(logits, job.splits["dev"].labels))
            advance(i, len(subnetworks), subnetwork=subnetwork.name, accuracy=accuracies[-1])
    with stages("export") as advance:
        weights = numpy_weights(supernet)
        exported = {}
        for i, subnetwork in enumerate(subnetworks, start=1):
            small = extract(teacher.config, weights, subnetwork)
            exported[subnetwork.name] = export_formats(
                spec.export.formats,
                small,
                artifacts / subnetwork.name,
                labels=job.plan.label_names,
            )
            advance(i, len(subnetworks) + 1, subnetwork=subnetwork.name)
        served = [fmt for fmt in SERVED_FORMATS if fmt in spec.export.formats]
        teacher_dir = run_dir / "work" / TEACHER
        teacher_files = export_formats(served, teacher, teacher_dir, labels=job.plan.label_names)
        advance(len(subnetworks) + 1, len(subnetworks) + 1, subnetwork=TEACHER)
    with stages("verify") as advance:
        formats: dict[str, list[FormatReport]] = {}
        for i, subnetwork in enumerate(subnetworks, start=1):
            formats[subnetwork.name] = pass_parity_gate(
                job, supernet, subnetwork, exported[subnetwork.name], artifacts, run_dir / "work"
            )
            advance(i, len(subnetworks), subnetwork=subnetwork.name)
    with stages("measure") as advance:
        measured = measure_latency(job, formats, artifacts, teacher_files, advance)
    with stages("select") as advance:
        reports = [
            SubnetworkReport(
                name=subnetwork.name,
                width_mult=subnetwork.width_mult,
                heads=subnetwork.heads,
                ffn=subnetwork.ffn,
                parameters=cost.parameters(config),
                flops=cost.flops(config, job.seq_len),
                accuracy=accuracy,
                accuracy_drop=100 * (teacher_accuracy - accuracy),
                formats=with_latency(subnetwork.name, formats[subnetwork.name], measured),
            )
            for subnetwork, accuracy in zip(subnetworks, accuracies, strict=True)
            for config in [supernet.config.narrowed(subnetwork.width_mult)]
        ]
        chosen = selection.select(selection.candidates(reports), spec.constraints)
        reports = [
            with_test_accuracy(report, job, supernet)
            for report in selection.with_decisions(reports, chosen)
        ]
        advance(1, 1, chosen.reason, subnetwork=chosen.subnetwork, format=chosen.format)
        report = CompressionReport(
            spec=spec,
            dataset=DatasetReport(
                rows={split: len(rows) for split, rows in job.splits.items()},
                labels=job.plan.labels,
                label_names=job.plan.label_names,
                text=job.plan.text,
                text_pair=job.plan.text_pair,
                label=job.plan.label,
                shared_rows=job.shared_rows,
                notes=job.plan.warnings,
            ),
            teacher=TeacherReport(
                family=teacher.config.family,
                fine_tuned_steps=fine_tuned_steps,
                parameters=cost.parameters(teacher.config),
                accuracy=teacher_accuracy,
                test_accuracy=test_accuracy(job, teacher, None),
                formats=tuple(
                    FormatReport(
                        format=fmt,
                        published=False,
                        error=files.error,
                        latency=measured.get(f"{TEACHER}/{fmt}"),
                    )
                    for fmt, files in teacher_files.items()
                ),
            ),
            reorder_max_abs=reorder_max_abs,
            subnetworks=tuple(reports),
            selection=chosen,
            distillation_steps=distillation_steps,
            step_seconds=step_seconds,
            stage_seconds=stages.seconds,
            environment=environment(spec),
            warnings=export_warnings(reports, teacher_files),
        )
    with stages("bundle") as advance:
        tokenizer_files = save_tokenizer(model_dir, run_dir / "work" / "tokenizer")
        provenance = Provenance(model=input_digests(model_dir), dataset=input_digests(dataset_dir))
        for i, subnetwork_report in enumerate(reports, start=1):
            facts = BundleFacts(
                spec=spec,
                dataset=report.dataset,
                teacher=report.teacher,
                subnetwork=subnetwork_report,
                provenance=provenance,
                environment=report.environment,
                pad_token_id=supernet.config.pad_token_id,
            )
            if any(fmt.published for fmt in subnetwork_report.formats):
                folder = artifacts / subnetwork_report.name
                write_bundle(
                    folder / BUNDLE,
                    facts,
                    subnetwork_dir=folder,
                    tokenizer_files=tokenizer_files,
                )
            advance(i, len(reports), subnetwork=subnetwork_report.name)
    shutil.rmtree(run_dir / "work", ignore_errors=True)
    report = report.model_copy(update={"stage_seconds": stages.seconds})
    (run_dir / "report.json").write_text(report.model_dump_json(indent=2))
    return report


@dataclass(frozen=True)
class Job:
    """What every stage reads: the spec, its plan, and rows as token ids."""

    spec: Spec
    plan: Plan
    task: Task
    checkpoint: Checkpoint
    splits: Mapping[str, Encoded]
    shared_rows: Mapping[str, int]
    seq_len: int  # of the latency measurement, tokens


@dataclass
class Stages:
    """Times each stage and reports its first and last sign of life."""

    on_progress: OnProgress
    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def __call__(self, name: str) -> Iterator[Advance]:
        if name not in STAGES:
            raise ValueError(f"{name!r} is no stage of the report")
        started = time.perf_counter()
        last = [0, 1]

        def advance(step: int = 0, total: int = 1, message: str = "", **figures: object) -> None:
            last[:] = [step, total]
            self.on_progress(Progress(name, step, total, message, figures))

        self.on_progress(Progress(name))
        yield advance
        self.seconds[name] = time.perf_counter() - started
        if last[0] != last[1]:
            self.on_progress(Progress(name, last[1], last[1]))


def use_device(device: str) -> None:
    """Makes paddle run on "cpu" or the first GPU. DeviceUnavailable where there is none."""
    if device == "cpu":
        paddle.set_device("cpu")
        return
    if not paddle.device.is_compiled_with_cuda():
        raise DeviceUnavailable(
            "the spec asks for device gpu, but this worker's paddle is built for the CPU alone; "
            'use device "cpu", or a worker with a GPU build of paddle',
            pointer="/device",
        )
    if paddle.device.cuda.device_count() == 0:
        raise DeviceUnavailable(
            "the spec asks for device gpu, but this worker sees none", pointer="/device"
        )
    paddle.set_device("gpu:0")


def load(spec: Spec, model_dir: Path, dataset_dir: Path) -> Job:
    """Reads and cross-checks model, tokenizer and dataset, and tokenises every row."""
    checkpoint = read_checkpoint(model_dir)
    tokenizer = load_tokenizer(model_dir)
    tables = read_splits(dataset_dir)
    plan = make_plan(spec, model_info(checkpoint), profile(tables))

    def tokenised(rows: Examples) -> Encoded:
        encoded = encode(tokenizer, rows.texts, rows.pairs, spec.task.max_seq_len)
        return Encoded([ids for ids, _ in encoded], [types for _, types in encoded], rows.labels)

    examples = resolve_rows(spec, plan, tables, spec.seed)
    splits = {split: tokenised(examples[split]) for split in LABELLED_SPLITS if split in examples}
    dev_lengths = [len(ids) for ids in splits["dev"].input_ids]
    return Job(
        spec=spec,
        plan=plan,
        task=TASKS[spec.task.kind],
        checkpoint=checkpoint,
        splits=splits,
        shared_rows=shared_rows(tables, Columns(plan.text, plan.text_pair, plan.label)),
        seq_len=spec.latency.seq_len or latency.p95_length(dev_lengths),
    )


def make_teacher(job: Job, advance: Advance) -> tuple[Encoder, int]:
    """The uploaded model, or one fine-tuned on train's labels; and the steps that took."""
    config, tensors = job.checkpoint.config, job.checkpoint.tensors
    if not job.plan.fine_tune:
        teacher = build_encoder(config, tensors)
        teacher.eval()
        return teacher, 0
    config, tensors = with_new_head(
        config, tensors, num_labels=len(job.plan.labels), seed=job.spec.seed
    )
    teacher = build_encoder(config, tensors)
    steps = fine_tune(
        teacher,
        job.splits["train"],
        job.spec.teacher,
        job.task.label_loss,
        seed=job.spec.seed,
        on_step=lambda done, total, loss: advance(done, total, loss=loss),
    )
    return teacher, steps


def rank_units(
    job: Job, teacher: Encoder, work: Path, advance: Advance
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Each layer's heads and neurons, most important first, on a seeded sample of rows."""
    spec = job.spec.importance
    rows = job.splits[spec.split]
    sample = rows.take(
        np.random.default_rng([job.spec.seed, 2]).permutation(len(rows))[: spec.rows]
    )
    total = -(-len(sample) // spec.batch_size)
    if job.spec.engine == "paddleslim":
        importance = reference.measure_importance(
            work / REFERENCE,
            reference_request(job, teacher, sample),
            on_batch=lambda done: advance(done, total),
        )
    else:
        importance = measure_importance(
            teacher,
            sample,
            sorted_rows(sample, batch_size=spec.batch_size),
            job.task.label_loss,
            on_batch=lambda done: advance(done, total),
        )
    return (
        [descending(scores) for scores in importance.heads],
        [descending(scores) for scores in importance.neurons],
    )


def train_supernet(
    job: Job,
    supernet: Encoder,
    teacher: Encoder,
    subnetworks: Sequence[Subnetwork],
    work: Path,
    advance: Advance,
) -> tuple[int, float]:
    """Distils the supernet in place; returns its steps and a step's median seconds.

    The engine paddleslim reorders and trains its own, whose weights then replace the supernet's.
    """
    seconds: list[float] = []

    def on_step(step: StepReport) -> None:
        seconds.append(step.seconds)
        advance(step.done, step.total, losses=step.losses)

    if job.spec.engine == "paddleslim":
        learnt = reference.distil(
            work / REFERENCE, reference_request(job, teacher, job.splits["train"]), on_step=on_step
        )
        set_weights(supernet, learnt)
        return len(seconds), statistics.median(seconds)
    steps = distil(
        supernet,
        teacher,
        job.splits["train"],
        subnetworks,
        job.spec.distillation,
        job.task.logit_loss,
        seed=job.spec.seed,
        on_step=on_step,
    )
    return steps, statistics.median(seconds)


def reference_request(job: Job, teacher: Encoder, rows: Encoded) -> Request:
    return Request(job.spec, teacher.config, numpy_weights(teacher), rows)


def learning_config(config: EncoderConfig, spec: DistillationSpec) -> EncoderConfig:
    """The supernet's config: the teacher's, with the dropout that it is to learn with."""
    if spec.dropout is None:
        return config
    return dataclasses.replace(config, hidden_dropout=spec.dropout, attention_dropout=spec.dropout)


def extract(
    config: EncoderConfig, weights: Mapping[str, np.ndarray], subnetwork: Subnetwork
) -> Encoder:
    """The physically smaller network, in evaluation mode; its config keeps the model's dropout."""
    small = build_encoder(
        dataclasses.replace(config, heads=subnetwork.heads, ffn=subnetwork.ffn),
        extract_weights(config, weights, subnetwork),
    )
    small.eval()
    return small


def pass_parity_gate(
    job: Job,
    supernet: Encoder,
    subnetwork: Subnetwork,
    exported: Mapping[Format, Exported],
    artifacts: Path,
    work: Path,
) -> list[FormatReport]:
    """Compares each format, reloaded in a fresh process, with the supernet on dev rows."""
    rows = job.splits["dev"].take(range(min(PARITY_ROWS, len(job.splits["dev"]))))
    folder = work / "parity" / subnetwork.name
    folder.mkdir(parents=True)
    batch, reference = folder / "batch.npz", folder / "reference.npz"
    np.savez(batch, **pad(rows, range(len(rows)), pad_id=supernet.config.pad_token_id))
    np.savez(reference, logits=predict(supernet, rows, subnetwork=subnetwork))
    reports = []
    for fmt, files in exported.items():
        parity = None
        if files.error is None:
            parity = verify(
                fmt, files.folder, batch=batch, reference=reference, tolerance=PARITY_TOLERANCE
            )
        reports.append(
            format_report(
                files,
                parity,
                root=artifacts / subnetwork.name,
                rows=len(rows),
                tolerance=PARITY_TOLERANCE,
            )
        )
    return reports


def measure_latency(
    job: Job,
    formats: Mapping[str, Sequence[FormatReport]],
    artifacts: Path,
    teacher_files: Mapping[Format, Exported],
    advance: Advance,
) -> dict[str, LatencyReport]:
    """Latency of every published served file and of the teacher, by "sub-network/format"."""
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
        vocab_size=job.checkpoint.config.vocab_size,
        on_round=lambda done, total: advance(done, total),
    )


def with_latency(
    name: str, formats: Sequence[FormatReport], measured: Mapping[str, LatencyReport]
) -> tuple[FormatReport, ...]:
    """The formats' reports with latency, and speed-up against the teacher in the same runtime."""
    done = []
    for report in formats:
        own = measured.get(f"{name}/{report.format}")
        teacher = measured.get(f"{TEACHER}/{report.format}")
        speedup = teacher.p50_ms / own.p50_ms if own and teacher else None
        done.append(report.model_copy(update={"latency": own, "speedup": speedup}))
    return tuple(done)


def test_accuracy(job: Job, encoder: Encoder, subnetwork: Subnetwork | None) -> float | None:
    """The metric on test, which never chooses anything; None without a test split."""
    rows = job.splits.get("test")
    if rows is None:
        return None
    return job.task.metric(predict(encoder, rows, subnetwork=subnetwork), rows.labels)


def with_test_accuracy(report: SubnetworkReport, job: Job, supernet: Encoder) -> SubnetworkReport:
    """Only the selected sub-network is judged on test."""
    if not report.selected:
        return report
    subnetwork = subnetwork_of(supernet.config, report.width_mult)
    return report.model_copy(update={"test_accuracy": test_accuracy(job, supernet, subnetwork)})


def export_warnings(
    reports: Sequence[SubnetworkReport], teacher_files: Mapping[Format, Exported]
) -> tuple[str, ...]:
    unpublished = [
        f"{report.name} in {fmt.format} is not published: {fmt.error}"
        for report in reports
        for fmt in report.formats
        if not fmt.published
    ]
    unmeasured = [
        f"nothing can be chosen in {fmt}, for want of a speed-up: the teacher could not be "
        f"written in it: {files.error}"
        for fmt, files in teacher_files.items()
        if files.error is not None
    ]
    return (*unpublished, *unmeasured)


def environment(spec: Spec) -> dict[str, str]:
    """The device and the libraries that the figures were measured with."""
    names = ["paddlepaddle", "onnxruntime", "paddle2onnx", "numpy", "tokenizers", "safetensors"]
    if spec.engine == "paddleslim":
        names += ["paddleslim", "paddlenlp"]
    return {
        "device": spec.device,
        "cpu": cpu_name(),
        "platform": platform.platform(),
        "python": platform.python_version(),
        **{name: version(name) for name in names},
    }
