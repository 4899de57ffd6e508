"""One compression job from folders to a report: DynaBERT's method, a call a stage."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import paddle
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from tokenizers import Tokenizer

from compression import cost, latency, selection
from compression.batches import Encoded, pad, sorted_rows
from compression.bundle import BundleFacts, input_digests, write_bundle
from compression.checkpoint import FOLDER as CHECKPOINTS
from compression.checkpoint import (
    Checkpoints,
    Saved,
    StageState,
    digest,
    host_facts,
    resumed_replicas,
)
from compression.device_profile import DeviceProfile, Predictor, job_predictor
from compression.distillation import distil, distil_alone, distil_depth
from compression.encoder import (
    Encoder,
    build_encoder,
    load_weights,
    numpy_weights,
    with_new_head,
)
from compression.errors import (
    DeviceUnavailable,
    ExportFailed,
    Interrupted,
    InvalidSpec,
    OutOfMemory,
)
from compression.evaluate import (
    drop_intervals,
    largest_difference,
    padded_logits,
    predict,
    resampled_metric,
)
from compression.export import (
    EXPORTERS,
    Exported,
    Int8Source,
    export_formats,
    format_report,
    graph_inputs,
    served_bytes,
    verify,
)
from compression.fingerprint import fingerprint
from compression.importance import measure_importance
from compression.int8 import (
    Judge,
    Outcome,
    Verdict,
    loses_at_most,
    pass_gate,
    served_predictions,
)
from compression.manifest import Provenance, code_digest
from compression.networks import Networks
from compression.plan import (
    AnyExamples,
    Plan,
    deadlines,
    held_out_rows,
    make_plan,
    model_info,
    resolve_rows,
)
from compression.ranks import ALONE, Group, join, started
from compression.reference import run as reference
from compression.reference.exchange import Orders, Request
from compression.regression import (
    Judged,
    RegressionReport,
    RowFacts,
    compare,
    in_common,
    row_facts,
)
from compression.reorder import descending, reorder
from compression.report import (
    STAGES,
    ComparisonOnTest,
    CompressionReport,
    DatasetReport,
    DeviceFingerprint,
    FormatReport,
    Intervals,
    LatencyReport,
    OnProgress,
    Progress,
    Selection,
    SubnetworkReport,
    TeacherReport,
    TrainingReport,
    VocabularyReport,
)
from compression.runtime_env import core_count, replica_count
from compression.sampling import Sandwich
from compression.search import Found, Memory, search, space_of, with_gain
from compression.search_space import SearchSpace
from compression.spec import (
    FP16_GATE,
    INT8_FORMATS,
    ROUNDED_FORMATS,
    SERVED_FORMATS,
    DistillationSpec,
    Format,
    Spec,
    fp32_format,
    gate_of,
)
from compression.supernet import FULL, Subnetwork, subnetwork_of
from compression.tables import Columns, profile, read_splits, shared_rows
from compression.tasks import Predictions, Task, make_task
from compression.teacher_states import KeptStates, states_bytes
from compression.teachers import Checkpoint, read_checkpoint
from compression.teachers.config import EncoderConfig
from compression.tokenization import load_tokenizer, save_tokenizer
from compression.training import Step, Surroundings, fine_tune
from compression.vocabulary import (
    Vocabulary,
    effect,
    save_smaller_tokenizer,
    smaller_vocabulary,
    texts_of,
    unknown_entries,
)

PARITY_ROWS = 64
PARITY_TOLERANCE = 1e-4  # fp32
SECTIONS = {  # of trainings
    "teacher": "teacher",
    "distil": "distillation",
    "depth": "depth",
    "final": "final",
    "finalists": "distillation",
}
UNITS = ("heads", "neurons")
TEACHER = "teacher"
REFERENCE = "reference"
INT8 = "int8"
RANKS = "ranks"
TEACHER_STATES = "teacher-states"
SEARCH = "search"
BUNDLE = "bundle.tar.gz"

Advance = Callable[..., None]


def compress(
    spec: Spec,
    model_dir: Path,
    dataset_dir: Path,
    run_dir: Path,
    on_progress: OnProgress = lambda progress: None,
    *,
    checkpoint_seconds: float = 300.0,
    on_checkpoint: Callable[[Saved], None] = lambda saved: None,
    stop: Callable[[], bool] = lambda: False,
    signing_key: Ed25519PrivateKey | None = None,
    profile: DeviceProfile | None = None,
) -> CompressionReport:
    """Runs one job and returns its report, which is also written to `run_dir/report.json`.

    Bundles are signed with `signing_key`, where there is one. `profile`: the device's that
    `constraints.latency_on` names.

    Files to publish are under `run_dir/artifacts/<sub-network>/`. Checkpoints are written to
    `run_dir/checkpoints` at the end of each stage that computes weights or scores and of a search,
    and in trainings every `checkpoint_seconds`; where that folder holds one, the job goes on from
    it. The stages after these write files and times of this host: they are done again.

    Raises CompressionError where the spec, the model or the dataset cannot be used, before
    anything is trained; Interrupted once `stop` answers true, after a checkpoint.
    """
    use_device(spec.device, processes=spec.processes)
    for stale in (run_dir / "artifacts", run_dir / "work"):  # of a run that was interrupted
        shutil.rmtree(stale, ignore_errors=True)
    artifacts = run_dir / "artifacts"
    artifacts.mkdir(parents=True)
    stages = Stages(on_progress, stop)

    with stages("load") as advance:
        job = load(spec, model_dir, dataset_dir, resumed_replicas(run_dir / CHECKPOINTS))
        predictor = predictor_of(job, profile)
        checkpoints = Checkpoints(
            run_dir / CHECKPOINTS,
            identity=identity(spec, model_dir, dataset_dir),
            host=host_facts(os.environ, replicas=job.replicas, device=device_model(spec.device)),
            every_seconds=checkpoint_seconds,
            on_saved=on_checkpoint,
        )
        advance(1, 1, resumption(checkpoints), rows=dict(job.rows), resumed=checkpoints.resumed)
    request = {
        "spec": spec.model_dump(mode="json"),
        "model_dir": str(model_dir.resolve()),
        "dataset_dir": str(dataset_dir.resolve()),
        "run_dir": str(run_dir.resolve()),
    }
    with started(request, spec.processes, run_dir / "work" / RANKS) as others:
        group = ALONE if others is None else join(0, others.endpoints, others.meet)
        learnt = learn(job, checkpoints, stages, group, run_dir / "work")
    teacher = learnt.teacher
    with stages("search") as advance:
        found, search_warnings = search_widths(
            job, learnt, predictor, checkpoints, run_dir / "work", advance
        )
    with stages("finalists") as advance:
        alone, finalists_trainings = distil_finalists(
            job, learnt, found, checkpoints, stages.stop, advance
        )
    subnetworks = [*learnt.subnetworks, *(found.subnetworks if found else ())]
    networks = Networks(
        job.with_own_vocabulary(learnt.supernet),
        {name: job.with_own_vocabulary(network) for name, network in alone.items()},
    )
    trainings = learnt.trainings | finalists_trainings
    teacher_accuracy = learnt.teacher_metrics[job.task.main_metric]
    with stages("evaluate") as advance:
        dev, teachers_dev = job.own["dev"], job.splits["dev"]
        judged = job.task.judged(learnt.teacher_dev, teachers_dev)
        teacher_resampled = resampled_metric(
            job.task, job.task.outcomes(learnt.teacher_dev, teachers_dev)
        )
        metrics, drops_within, regressions, dev_logits = [], [], [], {}
        resampled: dict[tuple[str, Format], np.ndarray] = {}
        for i, subnetwork in enumerate(subnetworks, start=1):
            predictions = networks.predict(subnetwork, dev, threads=job.replicas)
            dev_logits[subnetwork.name] = predictions
            outcomes = job.task.outcomes(predictions, dev)
            metrics.append(job.task.metrics_of(outcomes))
            own = resampled_metric(job.task, outcomes)
            resampled |= dict.fromkeys(((subnetwork.name, fmt) for fmt in spec.export.formats), own)
            drops_within.append(drop_intervals(reference=teacher_resampled, own=own))
            regressions.append(regression(job, "dev", judged, predictions))
            accuracy = metrics[-1][job.task.main_metric]
            advance(i, len(subnetworks), subnetwork=subnetwork.name, accuracy=accuracy)
    with stages("export") as advance:
        names = [subnetwork.name for subnetwork in subnetworks]
        int8 = int8_sources(job, [*names, TEACHER], run_dir / "work" / INT8)
        exported = {}
        for i, subnetwork in enumerate(subnetworks, start=1):
            small = networks.extracted(subnetwork, job.own_config(teacher.config))
            exported[subnetwork.name] = export_formats(
                spec.export.formats,
                small,
                artifacts / subnetwork.name,
                labels=job.plan.label_names,
                int8=int8.get(subnetwork.name),
            )
            advance(i, len(subnetworks) + 1, subnetwork=subnetwork.name)
        asked = {*map(fp32_format, spec.export.formats), *spec.baselines}
        served = [fmt for fmt in SERVED_FORMATS if fmt in asked]
        teacher_dir = run_dir / "work" / TEACHER
        teacher_files = export_formats(
            served,
            teacher,
            teacher_dir,
            labels=job.plan.label_names,
            int8=int8.get(TEACHER),
        )
        advance(len(subnetworks) + 1, len(subnetworks) + 1, subnetwork=TEACHER)
    with stages("verify") as advance:
        teacher_files, baselines = judge_baselines(
            job,
            teacher_files,
            int8.get(TEACHER),
            expected=learnt.teacher_dev,
            teacher_accuracy=teacher_accuracy,
            teacher_resampled=teacher_resampled,
        )
        formats: dict[str, list[FormatReport]] = {}
        for i, (subnetwork, own_drops) in enumerate(
            zip(subnetworks, drops_within, strict=True), start=1
        ):
            rounded = pass_rounding_gate(
                job,
                exported[subnetwork.name],
                int8.get(subnetwork.name),
                expected=dev_logits[subnetwork.name],
                own_drops=own_drops,
                teacher_accuracy=teacher_accuracy,
                teacher_resampled=teacher_resampled,
            )
            for fmt, outcome in rounded.items():
                if outcome.verdict is not None:
                    resampled[subnetwork.name, fmt] = outcome.verdict.resampled
            formats[subnetwork.name] = pass_parity_gate(
                job,
                networks,
                subnetwork,
                exported[subnetwork.name],
                rounded,
                artifacts,
                run_dir / "work",
            )
            advance(i, len(subnetworks), subnetwork=subnetwork.name)
    with stages("measure") as advance:
        device = fingerprint(libraries(spec))
        measured = measure_latency(job, formats, artifacts, teacher_files, advance)
    with stages("select") as advance:
        reports = [
            SubnetworkReport(
                name=subnetwork.name,
                width_mult=subnetwork.width_mult,
                depth_mult=subnetwork.depth_mult,
                layers=subnetwork.layers,
                heads=subnetwork.heads,
                ffn=subnetwork.ffn,
                parameters=cost.parameters(config),
                flops=cost.flops(config, job.seq_len),
                accuracy=own_metrics[job.task.main_metric],
                accuracy_drop=100 * (teacher_accuracy - own_metrics[job.task.main_metric]),
                accuracy_drop_intervals=own_drops,
                metrics=own_metrics,
                regression=flips,
                formats=with_latency(subnetwork.name, formats[subnetwork.name], measured),
            )
            for subnetwork, own_metrics, own_drops, flips in zip(
                subnetworks, metrics, drops_within, regressions, strict=True
            )
            for config in [subnetwork.config(networks.config)]
        ]
        if predictor is not None:
            reports = predictor.all_told(reports)
        chosen = selection.select(
            selection.candidates(reports, spec.constraints),
            spec.constraints,
            main_metric=job.task.main_metric,
            on=predictor.on if predictor is not None else None,
        )
        reports = list(selection.with_decisions(reports, chosen))
        test_accuracy: float | None = None
        test_warnings: tuple[str, ...] = ()
        if "test" in job.splits:
            teacher_on_test = predict(teacher, job.splits["test"], threads=job.replicas)
            test_accuracy = job.task.score(teacher_on_test, job.splits["test"])
            reports, test_warnings = judged_on_test(
                reports,
                job,
                networks,
                chosen,
                artifacts,
                run_dir / "work" / INT8,
                teacher_accuracy=teacher_accuracy,
                teacher_on_test=teacher_on_test,
            )
        advance(1, 1, chosen.reason, subnetwork=chosen.subnetwork, format=chosen.format)
        report = CompressionReport(
            spec=spec,
            main_metric=job.task.main_metric,
            dataset=DatasetReport(
                rows=job.rows,
                labels=job.plan.labels,
                label_names=job.plan.label_names,
                text=job.plan.text,
                text_pair=job.plan.text_pair,
                label=job.plan.label,
                cut_rows={split: rows.cut for split, rows in job.splits.items() if rows.cut},
                shared_rows=job.shared_rows,
                notes=(*job.plan.warnings, *row_notes(job), *vocabulary_notes(job)),
            ),
            teacher=TeacherReport(
                family=teacher.config.family,
                fine_tuned_steps=trainings["teacher"].steps if "teacher" in trainings else 0,
                parameters=cost.parameters(teacher.config),
                accuracy=teacher_accuracy,
                metrics=learnt.teacher_metrics,
                test_accuracy=test_accuracy,
                encoder=teacher.config.to_dict(),
                formats=with_latency(
                    TEACHER,
                    baseline_reports(teacher_files, baselines),
                    measured,
                ),
            ),
            vocabulary=job.vocabulary_effect,
            reorder_max_abs=learnt.reorder_max_abs,
            subnetworks=tuple(reports),
            selection=chosen,
            search=with_gain(found.report, spec, reports, resampled) if found else None,
            distillation_steps=trainings["distil"].steps,
            depth_steps=trainings["depth"].steps if "depth" in trainings else 0,
            final_steps=trainings["final"].steps if "final" in trainings else 0,
            step_seconds=trainings["distil"].step_seconds,
            stage_seconds=stages.seconds,
            trainings=trainings,
            environment=environment(spec, job.replicas, device),
            device=device,
            warnings=(
                *export_warnings(reports, spec.export.formats, teacher_files),
                *search_warnings,
                *test_warnings,
                *checkpoints.warnings,
                *training_warnings(spec, trainings),
            ),
        )
    with stages("bundle") as advance:
        tokenizer_files = job.save_own_tokenizer(model_dir, run_dir / "work" / "tokenizer")
        provenance = Provenance(
            model=input_digests(model_dir),
            dataset=input_digests(dataset_dir),
            code=code_digest(),
        )
        for i, subnetwork_report in enumerate(reports, start=1):
            facts = BundleFacts(
                spec=spec,
                dataset=report.dataset,
                teacher=report.teacher,
                subnetwork=subnetwork_report,
                provenance=provenance,
                environment=report.environment,
                pad_token_id=networks.config.pad_token_id,
                inputs=graph_inputs(networks.config),
                trainings=report.trainings,
                reorder_max_abs=report.reorder_max_abs,
                vocabulary=report.vocabulary,
                selected_format=chosen.format if subnetwork_report.selected else None,
            )
            if any(fmt.published for fmt in subnetwork_report.formats):
                folder = artifacts / subnetwork_report.name
                write_bundle(
                    folder / BUNDLE,
                    facts,
                    subnetwork_dir=folder,
                    tokenizer_files=tokenizer_files,
                    signing_key=signing_key,
                )
            advance(i, len(reports), subnetwork=subnetwork_report.name)
    report = report.model_copy(update={"stage_seconds": stages.seconds})
    conclude(report, run_dir)
    return report


def conclude(report: CompressionReport, run_dir: Path) -> None:
    """Writes the report (atomically), and then removes what a job needs to go on."""
    partial = run_dir / "report.json.partial"
    partial.write_text(report.model_dump_json(indent=2))
    partial.replace(run_dir / "report.json")
    for spent in (run_dir / "work", run_dir / CHECKPOINTS):
        shutil.rmtree(spent, ignore_errors=True)


@dataclass(frozen=True)
class Job:
    """What every stage reads: the spec, its plan, and rows as token ids."""

    spec: Spec
    plan: Plan
    task: Task
    checkpoint: Checkpoint
    rows: Mapping[str, int]  # of the dataset; long contexts are several rows of `splits`
    splits: Mapping[str, Encoded]
    facts: Mapping[str, RowFacts]  # of dev and test
    shared_rows: Mapping[str, int]
    seq_len: int  # of the latency measurement, tokens
    holdout: Encoded | None  # rows of train that only score the search's candidates
    held_out: int  # how many these are in the dataset
    replicas: int  # threads that share a batch in training, and the batches elsewhere
    # The splits as the finished sub-networks read them: `splits`, where no vocabulary is removed.
    own: Mapping[str, Encoded]
    vocabulary: Vocabulary | None
    vocabulary_effect: VocabularyReport | None

    def own_config(self, config: EncoderConfig) -> EncoderConfig:
        """A config of the model's vocabulary with that of the sub-networks."""
        return config if self.vocabulary is None else self.vocabulary.config(config)

    @property
    def own_pad_id(self) -> int:
        return self.own_config(self.checkpoint.config).pad_token_id

    def with_own_vocabulary(self, supernet: Encoder) -> Encoder:
        """The trained supernet without the rows of removed tokens."""
        if self.vocabulary is None:
            return supernet
        weights = self.vocabulary.weights(numpy_weights(supernet))
        return build_encoder(self.own_config(supernet.config), weights)

    def save_own_tokenizer(self, model_dir: Path, out_dir: Path) -> list[Path]:
        if self.vocabulary is None:
            return save_tokenizer(model_dir, out_dir)
        return save_smaller_tokenizer(self.vocabulary, model_dir, out_dir)


@dataclass
class Stages:
    """Times each stage, reports its first and last sign of life, and ends the job when told to."""

    on_progress: OnProgress
    stop: Callable[[], bool]
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
            if name not in SECTIONS:  # they write a checkpoint first
                self.end_if_told(name)

        self.end_if_told(name)
        self.on_progress(Progress(name))
        try:
            yield advance
        except MemoryError as error:
            raise OutOfMemory(
                f"the memory is too small in stage {name}: run the job where there is more, or "
                "lower the batch sizes and task.max_seq_len"
            ) from error
        self.seconds[name] = time.perf_counter() - started
        if last[0] != last[1]:
            self.on_progress(Progress(name, last[1], last[1]))

    def end_if_told(self, name: str) -> None:
        if self.stop():
            raise Interrupted(f"stopped in stage {name}")


def use_device(device: str, *, processes: int = 1, rank: int = 0) -> None:
    """Makes paddle run on "cpu", or on the spec's GPU or the `rank`-th after it.

    DeviceUnavailable where there are not enough for all processes.
    """
    if device == "cpu":
        paddle.set_device("cpu")
        return
    if not paddle.device.is_compiled_with_cuda():
        raise DeviceUnavailable(
            f"the spec asks for device {device}, but this worker's paddle is built for the CPU "
            'alone; use device "cpu", or a worker with a GPU build of paddle',
            pointer="/device",
        )
    first, present = int(device.partition(":")[2] or 0), paddle.device.cuda.device_count()
    if first + processes > present:
        raise DeviceUnavailable(
            f"the spec asks for device {device} and {processes} process(es), but this worker sees "
            f"{present} GPU(s), counted from 0",
            pointer="/device",
        )
    paddle.set_device(f"gpu:{first + rank}")


def device_model(device: str) -> str:
    """ "cpu", or what the GPU in use calls itself."""
    return "cpu" if device == "cpu" else str(paddle.device.cuda.get_device_name())


@dataclass(frozen=True)
class Learnt:
    """What the stages up to the last training leave."""

    teacher: Encoder
    teacher_metrics: dict[str, float]  # on dev
    teacher_dev: Predictions
    supernet: Encoder
    reorder_max_abs: float
    subnetworks: list[Subnetwork]
    trainings: dict[str, TrainingReport]


def learn(job: Job, checkpoints: Checkpoints, stages: Stages, group: Group, work: Path) -> Learnt:
    """Teacher, importance, reordering, distillation and the last fine-tuning."""
    spec, until = job.spec, deadlines(job.spec, job.plan)

    def around(stage: str) -> Surroundings:
        return surroundings_of(job, stage, checkpoints, group, until[stage], stages.stop)

    trainings: dict[str, TrainingReport] = {}
    with stages("teacher") as advance:
        teacher, trained = make_teacher(job, around("teacher"), advance)
        if trained is not None:
            trainings["teacher"] = trained
        teacher_logits = predict(teacher, job.splits["dev"], threads=job.replicas)
        teacher_metrics = job.task.metrics(teacher_logits, job.splits["dev"])
        advance(1, 1, accuracy=teacher_metrics[job.task.main_metric])
    with stages("importance") as advance:
        orders = Orders(*rank_units(job, teacher, checkpoints, work, advance))
    with stages("reorder") as advance:
        weights = numpy_weights(teacher)
        supernet = build_encoder(
            learning_config(teacher.config, spec.distillation),
            reorder(
                teacher.config, weights, head_orders=orders.heads, neuron_orders=orders.neurons
            ),
        )
        reordered = predict(supernet, job.splits["dev"], threads=job.replicas)
        reorder_max_abs = largest_difference(reordered, teacher_logits)
        advance(1, 1, max_abs=reorder_max_abs)
    subnetworks = planned_subnetworks(job, supernet)
    with stages("distil") as advance:
        trainings["distil"] = train_supernet(
            job, supernet, teacher, around("distil"), advance, orders, work
        )
    with stages("depth") as advance:
        deepened = train_depths(job, supernet, subnetworks, around("depth"), advance)
        if deepened is not None:
            trainings["depth"] = deepened
    with stages("final") as advance:
        tuned = fine_tune_subnetworks(job, supernet, subnetworks, around("final"), advance)
        if tuned is not None:
            trainings["final"] = tuned
    return Learnt(
        teacher,
        teacher_metrics,
        teacher_logits,
        supernet,
        reorder_max_abs,
        subnetworks,
        trainings,
    )


def follow(
    spec: Spec,
    model_dir: Path,
    dataset_dir: Path,
    run_dir: Path,
    *,
    rank: int,
    endpoints: Sequence[str],
    meet: Callable[[], None],
) -> None:
    """Another process's part of `learn`: its share of every training batch, and no file."""
    use_device(spec.device, processes=spec.processes, rank=rank)
    job = load(spec, model_dir, dataset_dir, resumed_replicas(run_dir / CHECKPOINTS))
    checkpoints = Checkpoints(
        run_dir / CHECKPOINTS,
        identity=identity(spec, model_dir, dataset_dir),
        host=host_facts(os.environ, replicas=job.replicas, device=device_model(spec.device)),
        every_seconds=math.inf,
    )
    group = join(rank, endpoints, meet)

    def silent(*told: Any, **figures: Any) -> None:
        pass

    def around(stage: str) -> Surroundings:
        return surroundings_of(job, stage, checkpoints, group)

    teacher, _ = make_teacher(job, around("teacher"), silent)
    # Scores and their order are the job's process's matter: the first step begins with its weights.
    supernet = build_encoder(
        learning_config(teacher.config, spec.distillation), numpy_weights(teacher)
    )
    subnetworks = planned_subnetworks(job, supernet)
    nothing = Orders([], [])
    train_supernet(job, supernet, teacher, around("distil"), silent, nothing, run_dir / "work")
    train_depths(job, supernet, subnetworks, around("depth"), silent)
    fine_tune_subnetworks(job, supernet, subnetworks, around("final"), silent)


def surroundings_of(
    job: Job,
    stage: str,
    checkpoints: Checkpoints,
    group: Group,
    deadline: float | None = None,
    stop: Callable[[], bool] = lambda: False,
) -> Surroundings:
    return Surroundings(
        stage, SECTIONS[stage], checkpoints, deadline, stop, group, job.spec.precision
    )


def planned_subnetworks(job: Job, supernet: Encoder) -> list[Subnetwork]:
    return [
        subnetwork_of(supernet.config, each.width_mult, each.depth_mult)
        for each in job.plan.subnetworks
    ]


def load(spec: Spec, model_dir: Path, dataset_dir: Path, replicas: int | None) -> Job:
    """Reads and cross-checks model, tokenizer and dataset, and tokenises every row.

    `replicas`: of the job's earlier run, None for as many as suit this host.
    """
    checkpoint = read_checkpoint(model_dir)
    tokenizer = load_tokenizer(model_dir)
    tables = read_splits(dataset_dir)
    plan = make_plan(spec, model_info(checkpoint, tokenizer), profile(tables))
    task = make_task(spec.task, plan.label_names)
    examples = resolve_rows(spec, plan, tables, spec.seed)
    rows = {split: len(examples[split]) for split in examples}
    train, held_out = without_held_out(spec, examples["train"])
    examples["train"] = train
    splits = {
        split: task.encode(tokenizer, examples[split], spec.task.max_seq_len) for split in examples
    }
    holdout = task.encode(tokenizer, held_out, spec.task.max_seq_len) if held_out else None
    own, vocabulary, vocabulary_effect = splits, None, None
    if spec.vocabulary.remove_unused:
        own, vocabulary, vocabulary_effect = smaller_splits(
            spec, task, checkpoint.config, tokenizer, examples, splits, holdout
        )
    dev_lengths = [len(ids) for ids in own["dev"].input_ids]
    return Job(
        spec=spec,
        plan=plan,
        task=task,
        checkpoint=checkpoint,
        rows=rows,
        splits=splits,
        facts={
            split: row_facts(
                # Where dev was taken from train, its lines are those of train.
                tables.get(split, tables["train"]),
                examples[split].lines,
                slices=spec.report.slices,
                text_columns=[name for name in (plan.text, plan.text_pair) if name is not None],
                excerpt_chars=spec.report.excerpt_chars,
            )
            for split in ("dev", "test")
            if split in examples
        },
        shared_rows=shared_rows(tables, Columns(plan.text, plan.text_pair, plan.label)),
        seq_len=spec.latency.seq_len or latency.p95_length(dev_lengths),
        holdout=holdout,
        held_out=len(held_out or ()),
        replicas=replicas or own_replicas(spec),
        own=own,
        vocabulary=vocabulary,
        vocabulary_effect=vocabulary_effect,
    )


def predictor_of(job: Job, profile: DeviceProfile | None) -> Predictor | None:
    """What predicts the latency that the constraints mean; None where they mean a measured one.

    InvalidSpec where the profile is missing or does not reach: before anything is trained.
    """
    if job.spec.constraints.latency_on is None:
        return None
    if profile is None:
        raise InvalidSpec(
            "latency is to be predicted for another device, and its profile was not given",
            pointer="/constraints/latency_on",
        )
    predictor = job_predictor(job.spec, profile, job.checkpoint.config, seq_len=job.seq_len)
    predictor.check(job.plan.subnetworks)
    return predictor


def without_held_out(spec: Spec, train: AnyExamples) -> tuple[AnyExamples, AnyExamples | None]:
    """Train without the rows that score the search's candidates, and these; equal texts together.

    None where there is no search.
    """
    count = held_out_rows(spec, len(train))
    if count == 0:
        return train, None
    groups: dict[Any, list[int]] = {}
    for row, group in enumerate(train.groups):
        groups.setdefault(group, []).append(row)
    texts, picked = list(groups.values()), []
    for number in np.random.default_rng([spec.seed, 6]).permutation(len(texts)):
        if len(picked) + len(texts[number]) <= count:
            picked += texts[number]
    if not picked:
        raise InvalidSpec(
            f"no {count} rows of train can be held out to score candidates: more than that stand "
            "together, with equal texts or one context; leave per_layer out",
            pointer="/supernet/per_layer/holdout_rows",
        )
    chosen = set(picked)
    return train.take([i for i in range(len(train)) if i not in chosen]), train.take(sorted(picked))


def smaller_splits(
    spec: Spec,
    task: Task,
    config: EncoderConfig,
    tokenizer: Tokenizer,
    examples: Mapping[str, AnyExamples],
    splits: Mapping[str, Encoded],
    holdout: Encoded | None,
) -> tuple[dict[str, Encoded], Vocabulary, VocabularyReport]:
    """The splits without the tokens that the spec has removed, what is left, and what that does.

    `holdout`: rows of train too, though nothing is trained on them.
    """
    read = [splits[split] for split in ("train", "unlabelled") if split in splits]
    read += [holdout] if holdout is not None else []
    used = (row for rows in read for row in rows.input_ids)
    vocabulary = smaller_vocabulary(tokenizer, config, used, spec.vocabulary.keep)
    own = {
        split: dataclasses.replace(rows, input_ids=vocabulary.renumbered(rows.input_ids))
        if split in ("train", "unlabelled")
        else task.encode(vocabulary.tokenizer, examples[split], spec.task.max_seq_len)
        for split, rows in splits.items()
    }
    split: Literal["dev", "test"] = "test" if "test" in splits else "dev"
    return own, vocabulary, effect(tokenizer, vocabulary, texts_of(examples[split]), split)


def own_replicas(spec: Spec) -> int:
    """As many as keep the CPU's cores busy, in all processes; a GPU is kept busy by one."""
    if spec.device != "cpu":
        return 1
    return max(1, replica_count(os.environ, cores=core_count()) // spec.processes)


def make_teacher(
    job: Job, surroundings: Surroundings, advance: Advance
) -> tuple[Encoder, TrainingReport | None]:
    """The uploaded model, or one fine-tuned on train's labels; and how that went."""
    config, tensors = job.checkpoint.config, job.checkpoint.tensors
    if not job.plan.fine_tune:
        teacher = build_encoder(config, tensors)
        return teacher, None
    config, tensors = with_new_head(
        config,
        tensors,
        num_labels=len(job.plan.label_names),
        head=job.spec.task.head,
        seed=job.spec.seed,
    )
    teacher = build_encoder(config, tensors)
    return teacher, finished(
        teacher,
        surroundings,
        lambda: fine_tune(
            teacher,
            job.splits["train"],
            job.spec.teacher,
            job.task,
            surroundings,
            seed=job.spec.seed,
            replicas=job.replicas,
            on_step=lambda step: advance(
                step.done, step.total, loss=sum(step.losses.values()), seconds=step.seconds
            ),
        ),
    )


def finished(
    model: Encoder,
    surroundings: Surroundings,
    training: Callable[[], TrainingReport],
    *,
    trained_further: bool = False,
) -> TrainingReport:
    """Trains the model in place and keeps it in a checkpoint, or takes it from one.

    `trained_further`: a later stage goes on with the same model, so later checkpoints need a
    copy of what it is now.
    """
    state = surroundings.state
    if state is not None and state.done:
        load_weights(model, state.tensors)
        return TrainingReport.model_validate(state.figures)
    report = training()
    if surroundings.checkpoints is not None and surroundings.group.leads:
        weights = numpy_weights(model) if trained_further else model.state_dict()
        surroundings.checkpoints.save(
            surroundings.stage, StageState(report.steps, True, report.model_dump(), weights)
        )
    return report


def rank_units(
    job: Job, teacher: Encoder, checkpoints: Checkpoints, work: Path, advance: Advance
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Each layer's heads and neurons, most important first, on a seeded sample of rows."""
    state = checkpoints["importance"]
    if state is not None:
        heads, neurons = (
            [state.tensors[f"{kind}.{i}"] for i in range(teacher.config.layers)] for kind in UNITS
        )
        return heads, neurons
    spec = job.spec.importance
    rows = job.splits[spec.split]
    sample = rows.take(
        np.random.default_rng([job.spec.seed, 2]).permutation(len(rows))[: spec.rows]
    )
    total = -(-len(sample) // spec.batch_size)
    if job.spec.engine == "paddleslim":
        importance = reference.measure_importance(
            work / REFERENCE,
            Request(job.spec, teacher.config, numpy_weights(teacher), sample),
            replicas=job.replicas,
            on_batch=lambda done: advance(done, total),
        )
    else:
        importance = measure_importance(
            teacher,
            sample,
            sorted_rows(sample, batch_size=spec.batch_size),
            job.task,
            replicas=job.replicas,
            on_batch=lambda done: advance(done, total),
        )
    heads = [descending(scores) for scores in importance.heads]
    neurons = [descending(scores) for scores in importance.neurons]
    orders = {
        f"{kind}.{i}": order
        for kind, layers in zip(UNITS, (heads, neurons), strict=True)
        for i, order in enumerate(layers)
    }
    checkpoints.save("importance", StageState(total, True, {}, orders))
    return heads, neurons


def train_supernet(
    job: Job,
    supernet: Encoder,
    teacher: Encoder,
    surroundings: Surroundings,
    advance: Advance,
    orders: Orders,
    work: Path,
) -> TrainingReport:
    """Distils the supernet in place: every width at full depth.

    The engine paddleslim reorders and trains a supernet of its own, whose weights come into ours.
    """
    rows = imitated_rows(job)
    widths = dict.fromkeys(each.width_mult for each in job.plan.subnetworks)
    subnetworks: Sequence[Subnetwork] | Sandwich = [
        subnetwork_of(supernet.config, width) for width in widths
    ]
    if (space := per_layer_space(job, supernet)) is not None:
        at_full_depth = dataclasses.replace(space, depths=(FULL,))
        subnetworks = Sandwich(subnetworks, job.spec.seed, at_full_depth)

    def on_step(step: Step) -> None:
        advance(step.done, step.total, losses=dict(step.losses), seconds=step.seconds)

    trained_further = job.spec.supernet.has_depth or job.spec.final.when != "never"
    if job.spec.engine == "paddleslim":
        request = Request(job.spec, teacher.config, numpy_weights(teacher), rows, orders)

        def learn() -> TrainingReport:
            learnt, report = reference.distil(
                work / REFERENCE, request, replicas=job.replicas, on_step=on_step
            )
            load_weights(supernet, learnt)
            return report

        return finished(supernet, surroundings, learn, trained_further=trained_further)

    def train() -> TrainingReport:
        folder = work / TEACHER_STATES
        kept, notes = kept_states(job, teacher, rows, folder)
        report = distil(
            supernet,
            teacher,
            rows,
            subnetworks,
            job.spec.distillation,
            job.task,
            surroundings,
            seed=job.spec.seed,
            replicas=job.replicas,
            kept=kept,
            on_step=on_step,
        )
        shutil.rmtree(folder, ignore_errors=True)  # exports may need the room
        return report.model_copy(update={"notes": notes})

    return finished(supernet, surroundings, train, trained_further=trained_further)


def per_layer_space(job: Job, supernet: Encoder) -> SearchSpace | None:
    """What random widths for each layer are drawn from, where the spec asks for such."""
    if job.spec.supernet.per_layer is None:
        return None
    return space_of(job.spec, supernet.config)


def imitated_rows(job: Job) -> Encoded:
    """The teacher's answers are all that is learnt of these, so rows without labels serve too."""
    rows = job.splits["train"]
    return rows.joined(job.splits["unlabelled"]) if "unlabelled" in job.splits else rows


def train_depths(
    job: Job,
    supernet: Encoder,
    subnetworks: Sequence[Subnetwork],
    surroundings: Surroundings,
    advance: Advance,
) -> TrainingReport | None:
    """DynaBERT's second stage, in place, where the spec asks for other depths than the full one.

    Full depth is trained along where it is among them, so that it is not forgotten.
    """
    if not job.spec.supernet.has_depth:
        return None

    def train() -> TrainingReport:
        frozen = build_encoder(supernet.config, numpy_weights(supernet))
        surroundings.group.take_from_the_first(frozen)
        return distil_depth(
            supernet,
            frozen,
            imitated_rows(job),
            Sandwich(subnetworks, job.spec.seed, per_layer_space(job, supernet)),
            job.spec.depth,
            job.task,
            surroundings,
            seed=job.spec.seed,
            replicas=job.replicas,
            on_step=lambda step: advance(
                step.done, step.total, losses=dict(step.losses), seconds=step.seconds
            ),
        )

    return finished(supernet, surroundings, train, trained_further=job.spec.final.when != "never")


def kept_states(
    job: Job, teacher: Encoder, rows: Encoded, folder: Path
) -> tuple[KeptStates | None, tuple[str, ...]]:
    """The teacher's answers where the spec has them kept, and why not where it cannot be done."""
    spec = job.spec.distillation
    if not spec.teacher_cache_mb:
        return None, ()
    needed = states_bytes(teacher.config, rows) / 1e6
    if needed > spec.teacher_cache_mb:
        why = f"they take {needed:,.0f} MB, more than teacher_cache_mb ({spec.teacher_cache_mb:,})"
    else:
        try:
            return KeptStates.compute(teacher, rows, folder, threads=job.replicas), ()
        except OSError as error:
            why = f"{needed:,.0f} MB could not be written: {error.strerror}"
    return None, (f"the teacher's answers were not kept but computed in each step: {why}",)


def fine_tune_subnetworks(
    job: Job,
    supernet: Encoder,
    subnetworks: Sequence[Subnetwork],
    surroundings: Surroundings,
    advance: Advance,
) -> TrainingReport | None:
    """The optional last training, on train's labels, of all sub-networks in place."""
    if job.spec.final.when == "never":
        return None
    space = per_layer_space(job, supernet)
    return finished(
        supernet,
        surroundings,
        lambda: fine_tune(
            supernet,
            job.splits["train"],
            job.spec.final,
            job.task,
            surroundings,
            subnetworks=Sandwich(subnetworks, job.spec.seed, space)
            if space is not None or job.spec.supernet.has_depth
            else subnetworks,
            seed=job.spec.seed,
            replicas=job.replicas,
            on_step=lambda step: advance(
                step.done, step.total, losses=dict(step.losses), seconds=step.seconds
            ),
        ),
    )


def search_widths(
    job: Job,
    learnt: Learnt,
    predictor: Predictor | None,
    checkpoints: Checkpoints,
    work: Path,
    advance: Advance,
) -> tuple[Found | None, tuple[str, ...]]:
    """Sub-networks with a width for each layer, where the spec asks for them; and why none.

    What was timed and scored is kept in checkpoints: as often as in trainings, and at the end.
    """
    asked = job.spec.supernet.per_layer
    if asked is None or job.holdout is None:
        return None, ()
    folder = work / SEARCH
    memory = Memory.restored(checkpoints[SEARCH], fingerprint(libraries(job.spec)))

    def keep(*, done: bool = False) -> None:
        checkpoints.save(SEARCH, memory.state(learnt.supernet.config.layers, done=done))

    def on_progress(step: int, total: int, what: str) -> None:
        try:
            advance(step, total, what)
        except Interrupted:
            keep()
            raise
        if checkpoints.is_due:
            keep()

    try:
        found = search(
            job.spec,
            asked,
            learnt.supernet,
            job.own_config(learnt.teacher.config),  # its megabytes are those that are exported
            job.task,
            job.holdout,
            learnt.subnetworks,
            memory,
            predictor=predictor,
            seq_len=job.seq_len,
            threads=job.replicas,
            folder=folder,
            on_progress=on_progress,
            on_timed=keep,
        )
    except ExportFailed as failure:
        return None, (f"widths for each layer were not searched for: {failure.message}",)
    finally:
        shutil.rmtree(folder, ignore_errors=True)  # exports may need the room
    keep(done=True)
    return found, ()


def distil_finalists(
    job: Job,
    learnt: Learnt,
    found: Found | None,
    checkpoints: Checkpoints,
    stop: Callable[[], bool],
    advance: Advance,
) -> tuple[dict[str, Encoder], dict[str, TrainingReport]]:
    """The finalists with weights of their own, where the spec gives them steps; and how it went.

    In this process alone: they are small, and their trainings short.
    """
    asked = job.spec.supernet.per_layer
    if found is None or asked is None or asked.finalist_steps == 0:
        return {}, {}
    spec = job.spec.distillation.model_copy(update={"max_steps": asked.finalist_steps})
    until = deadlines(job.spec, job.plan)["finalists"]
    networks: dict[str, Encoder] = {}
    trainings: dict[str, TrainingReport] = {}
    for i, subnetwork in enumerate(found.subnetworks):
        left = len(found.subnetworks) - i
        now, training = checkpoints.seconds, f"finalists {subnetwork.name}"
        around = Surroundings(
            # Checkpoints know it by its shape: on another machine p1 may be another one.
            f"{training} {digest(str(subnetwork.shape))[:8]}",
            SECTIONS["finalists"],
            checkpoints,
            None if until is None else now + max(0.0, until - now) / left,
            stop,
            precision=job.spec.precision,
        )

        def on_step(step: Step, before: int = i) -> None:
            total = len(found.subnetworks) * step.total
            advance(before * step.total + step.done, total, losses=dict(step.losses))

        network, trainings[training] = distil_finalist(
            job, learnt, subnetwork, spec, around, on_step
        )
        networks[subnetwork.name] = network
    return networks, trainings


def distil_finalist(
    job: Job,
    learnt: Learnt,
    subnetwork: Subnetwork,
    spec: DistillationSpec,
    surroundings: Surroundings,
    on_step: Callable[[Step], None],
) -> tuple[Encoder, TrainingReport]:
    """One of them, cut out of the supernet with the dropout that that learns with."""
    network = Networks(learnt.supernet).extracted(subnetwork, learnt.supernet.config)
    return network, finished(
        network,
        surroundings,
        lambda: distil_alone(
            network,
            learnt.teacher,
            subnetwork,
            imitated_rows(job),
            spec,
            job.task,
            surroundings,
            seed=job.spec.seed,
            replicas=job.replicas,
            on_step=on_step,
        ),
    )


def learning_config(config: EncoderConfig, spec: DistillationSpec) -> EncoderConfig:
    """The supernet's config: the teacher's, with the dropout that it is to learn with."""
    if spec.dropout is None:
        return config
    return dataclasses.replace(config, hidden_dropout=spec.dropout, attention_dropout=spec.dropout)


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


def int8_sources(job: Job, names: Sequence[str], folder: Path) -> dict[str, Int8Source]:
    """What int8 formats are made from, by sub-network; calibration is a seeded sample of train.

    Of fp16 the folder alone is used. Empty where the spec asks for neither.
    """
    asked = {*job.spec.export.formats, *job.spec.baselines}
    if asked.isdisjoint(ROUNDED_FORMATS):
        return {}
    sample = np.random.default_rng([job.spec.seed, 4]).permutation(len(job.splits["train"]))
    sample = sample[: job.spec.export.int8.calibration_rows]
    sources = {}
    for name in names:
        (folder / name).mkdir(parents=True)
        calibration = folder / name / "calibration.npz"
        rows, pad_id = job.own["train"], job.own_pad_id
        if name == TEACHER:
            rows, pad_id = job.splits["train"], job.checkpoint.config.pad_token_id
        np.savez(calibration, **pad(rows, sample, pad_id=pad_id))
        sources[name] = Int8Source(calibration, folder / name)
    return sources


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
    in_fp16 = dataclasses.replace(judge, spec=FP16_GATE, max_drop=None, called="fp16")
    for fmt, files in exported.items():
        if fmt in ROUNDED_FORMATS:
            own = judge if fmt in INT8_FORMATS else in_fp16
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
    full = next((r for r in largest if r is not selected), None)
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


def row_notes(job: Job) -> tuple[str, ...]:
    """Which rows were cut, and which were not trained on."""
    cut = tuple(
        f"{rows.cut} of {job.rows[split]} rows of {split} have {job.task.too_long} "
        f"{job.spec.task.max_seq_len} tokens and were cut"
        for split, rows in job.splits.items()
        if rows.cut
    )
    if job.holdout is None:
        return cut
    return (*cut, f"{job.held_out} rows of train score the search's candidates and teach nothing")


def vocabulary_notes(job: Job) -> Iterator[str]:
    """What the removal of tokens does beside what its figures say."""
    if job.vocabulary is None:
        return
    for split in ("dev", "test"):
        if split in job.own and job.own[split].cut > job.splits[split].cut:
            yield (
                f"without the removed tokens {job.own[split].cut} rows of {split} are longer than "
                f"{job.spec.task.max_seq_len} tokens, for the teacher {job.splits[split].cut}"
            )
    if unknown := unknown_entries(job.vocabulary.tokenizer, job.spec.vocabulary.keep):
        yield (
            f"the model's vocabulary lacks all or a part of {len(unknown)} entries of "
            f"vocabulary.keep, {unknown[0][:40]!r} for one: they are read as an unknown token"
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


def identity(spec: Spec, model_dir: Path, dataset_dir: Path) -> dict[str, str]:
    """What makes a checkpoint this job's: digests of all that goes into it.

    Not the spec's defaults: a version with one more field goes on with an older one's jobs.
    """
    return {
        "spec": digest(spec.model_dump_json(exclude_defaults=True)),
        "model": digest(json.dumps(input_digests(model_dir))),
        "dataset": digest(json.dumps(input_digests(dataset_dir))),
    }


def resumption(checkpoints: Checkpoints) -> str:
    """One sentence: where the job goes on, and what is not as it was; empty at its start."""
    found = [*checkpoints.warnings]
    if checkpoints.resumed is not None:
        state = checkpoints[checkpoints.resumed]
        assert state is not None
        where = (
            f"the end of {checkpoints.resumed}"
            if state.done
            else (f"step {state.step} of {checkpoints.resumed}")
        )
        found.insert(0, f"goes on from {where}")
    return "; ".join(found)


def training_warnings(spec: Spec, trainings: Mapping[str, TrainingReport]) -> Iterator[str]:
    for stage, training in trainings.items():
        if training.ended == "time":
            yield (
                f"the time budget of {spec.max_minutes:g} minutes ended {stage} after "
                f"{training.steps} of {training.planned_steps} steps; the weights are those after "
                f"step {training.best_step}"
            )
        yield from training.notes
        section = getattr(spec, SECTIONS[stage.split()[0]])
        if training.micro_batch is not None and section.micro_batch == "auto":
            yield (
                f"the memory was too small for a whole batch in {stage}: {training.micro_batch} "
                "rows were computed at once"
            )


def environment(spec: Spec, replicas: int, device: DeviceFingerprint) -> dict[str, str]:
    """The device, the libraries and the threads that the figures were measured with."""
    gpus = [f"{gpu.name} (driver {gpu.driver})" for gpu in device.gpus]
    return {
        "device": spec.device,
        "cpu": device.cpu,
        "cores": str(device.cores),
        "instruction_sets": " ".join(device.instruction_sets),
        **({"gpus": ", ".join(gpus)} if gpus else {}),
        "replicas": str(replicas),
        "processes": str(spec.processes),
        "precision": spec.precision,
        "kernel_threads": os.environ.get("OMP_NUM_THREADS", "1"),
        "platform": device.platform,
        "python": device.python,
        **device.libraries,
    }


def libraries(spec: Spec) -> list[str]:
    """Distributions whose version a figure may depend on, beside paddle."""
    names = ["onnxruntime", "paddle2onnx", "numpy", "tokenizers", "safetensors"]
    return names + (["paddleslim", "paddlenlp"] if spec.engine == "paddleslim" else [])
