"""One compression job from folders to a report: DynaBERT's method, a call a stage.

What the calls do: `job` reads, `learning` and `refinement` train, `judging` judges; the order of
the stages and the report that they end in are here.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from compression import cost, selection
from compression.batches import pad
from compression.bundle import BundleFacts, input_digests, write_bundle
from compression.checkpoint import FOLDER as CHECKPOINTS
from compression.checkpoint import Checkpoints, Saved, host_facts, resumed_replicas, resumption
from compression.device import device_model, use_device
from compression.device_profile import DeviceProfile
from compression.evaluate import drop_intervals, predict, resampled_metric
from compression.export import Int8Source, export_formats, graph_inputs
from compression.fingerprint import environment, fingerprint, libraries
from compression.job import Job, identity, load, predictor_of, row_notes, vocabulary_notes
from compression.judging import (
    TEACHER,
    baseline_reports,
    export_warnings,
    judge_baselines,
    judged_on_test,
    measure_latency,
    pass_parity_gate,
    pass_rounding_gate,
    regression,
    with_latency,
)
from compression.learning import learn, training_warnings
from compression.manifest import Provenance, code_digest
from compression.networks import Networks
from compression.ranks import ALONE, join, started
from compression.refinement import refine
from compression.report import (
    CompressionReport,
    DatasetReport,
    FormatReport,
    OnProgress,
    SubnetworkReport,
    TeacherReport,
)
from compression.search import with_gain
from compression.search_stage import search_widths
from compression.spec import ROUNDED_FORMATS, SERVED_FORMATS, Format, Spec, fp32_format
from compression.stages import Stages

INT8 = "int8"
RANKS = "ranks"
BUNDLE = "bundle.tar.gz"


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
    stages = Stages(on_progress, stop)

    with stages("load") as advance:
        job = load(spec, model_dir, dataset_dir, resumed_replicas(run_dir / CHECKPOINTS))
        predictor = predictor_of(job, profile)
        artifacts.mkdir(parents=True)  # not before: what is refused leaves nothing behind
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
    with stages("refine") as advance:
        alone, refinements = refine(
            job, learnt, found, checkpoints, run_dir / "work", stages.stop, advance
        )
    subnetworks = [*learnt.subnetworks, *(found.subnetworks if found else ())]
    networks = Networks(
        job.with_own_vocabulary(learnt.supernet),
        {name: job.with_own_vocabulary(network) for name, network in alone.items()},
    )
    trainings = learnt.trainings | refinements
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


def int8_sources(job: Job, names: Sequence[str], folder: Path) -> dict[str, Int8Source]:
    """What int8 formats are made from, by sub-network; calibration is a seeded sample of train.

    Of fp16 and bf16 the folder alone is used. Empty where the spec asks for neither.
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


def conclude(report: CompressionReport, run_dir: Path) -> None:
    """Writes the report (atomically), and then removes what a job needs to go on."""
    partial = run_dir / "report.json.partial"
    partial.write_text(report.model_dump_json(indent=2))
    partial.replace(run_dir / "report.json")
    for spent in (run_dir / "work", run_dir / CHECKPOINTS):
        shutil.rmtree(spent, ignore_errors=True)
