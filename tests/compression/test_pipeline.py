"""The whole of the method on a tiny model: from folders to a report and files."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from compression import batches, distillation, evaluate, judging, learning
from compression.__main__ import main
from compression.batches import Encoded, pad
from compression.checkpoint import newest_snapshot
from compression.encoder import Encoder, build_encoder
from compression.errors import CheckpointRefused, DeviceUnavailable, Interrupted, InvalidSpec
from compression.export import Exported, Parity, verify
from compression.job import Job, load
from compression.latency import Served
from compression.learning import learning_config
from compression.networks import Networks
from compression.pipeline import compress, conclude
from compression.report import STAGES, CompressionReport, Progress, Selection, SubnetworkReport
from compression.selection import reselect
from compression.spec import (
    CONFIDENCES,
    SERVED_FORMATS,
    ConstraintSpec,
    DistillationSpec,
    Format,
    Spec,
)
from compression.stages import NOTHING_TO_DO
from compression.teachers import read_checkpoint
from compression.tokenization import encode, load_tokenizer
from compression.verify import verify_bundle
from tests.builders import WORDS, device_profile, tiny_bert, tiny_dataset, tiny_family
from tests.encoders import as_tensors, random_weights, tiny_config
from tests.services import wait_until

REPOSITORY = Path(__file__).resolve().parents[2]


def small_spec(**changes: Any) -> Spec:
    values = {
        "task": {"max_seq_len": 32},
        "teacher": {"epochs": 1, "learning_rate": 2e-3},
        "distillation": {"epochs": 1, "learning_rate": 1e-3},
        "supernet": {"width_mults": ["1", "1/2"]},
        "importance": {"rows": 64},
        "latency": {"rounds": 5, "batch_sizes": [3], "baselines": []},
    }
    return Spec.model_validate({**values, **changes})


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """One job, run once for all tests of this file."""
    root = tmp_path_factory.mktemp("job")
    model = tiny_bert(root / "model", num_labels=None, seed=1)
    dataset = tiny_dataset(root / "dataset", rows={"train": 160, "dev": 80, "test": 40}, seed=1)
    seen: list[Progress] = []
    report = compress(small_spec(), model, dataset, root / "run", seen.append)
    return {"root": root, "model": model, "report": report, "seen": seen}


def test_every_stage_begins_and_ends_in_order(finished: dict[str, Any]) -> None:
    seen: list[Progress] = finished["seen"]
    assert list(dict.fromkeys(p.stage for p in seen)) == list(STAGES)
    for stage in STAGES:
        own = [p for p in seen if p.stage == stage]
        assert own[0].step == 0
        assert own[-1].step == own[-1].total
        idle = stage in ("depth", "final", "search", "refine")  # this spec asks for none of them
        assert (own[-1].message == NOTHING_TO_DO) == idle
    assert set(finished["report"].stage_seconds) == set(STAGES)


def test_the_report_is_the_one_on_disk(finished: dict[str, Any]) -> None:
    text = (finished["root"] / "run" / "report.json").read_text()
    assert CompressionReport.model_validate_json(text) == finished["report"]


def test_a_report_that_cannot_be_written_leaves_what_the_job_needs_to_go_on(
    finished: dict[str, Any], tmp_path: Path
) -> None:
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "report.json").mkdir()
    with pytest.raises(IsADirectoryError):
        conclude(finished["report"], tmp_path)
    assert (tmp_path / "checkpoints").is_dir()
    (tmp_path / "report.json").rmdir()
    conclude(finished["report"], tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["report.json"]


def test_every_format_passed_the_parity_gate(finished: dict[str, Any]) -> None:
    report: CompressionReport = finished["report"]
    assert report.reorder_max_abs < 1e-5
    assert [network.name for network in report.subnetworks] == ["w1", "w1_2"]
    for network in report.subnetworks:
        assert {fmt.format for fmt in network.formats} == {"safetensors", "paddle", "onnx"}
        for fmt in network.formats:
            assert fmt.published, fmt.error
            assert fmt.parity_rows == 64
            assert fmt.parity_max_abs is not None
            assert fmt.parity_max_abs < 1e-4
            for file in fmt.files:
                path = finished["root"] / "run" / "artifacts" / network.name / file.path
                assert path.stat().st_size == file.size_bytes


def test_the_narrow_network_is_smaller_and_reads_back(finished: dict[str, Any]) -> None:
    report: CompressionReport = finished["report"]
    full, half = report.subnetworks
    assert half.parameters < full.parameters
    assert half.flops < full.flops
    folder = finished["root"] / "run" / "artifacts" / "w1_2" / "safetensors"
    checkpoint = read_checkpoint(folder)
    assert checkpoint.config.heads == half.heads
    # The supernet learns without dropout; what is handed out keeps the model's own.
    assert checkpoint.config.hidden_dropout == 0.1
    encoder = build_encoder(checkpoint.config, checkpoint.tensors)
    rows = encode(load_tokenizer(finished["model"]), ["good film", "a bad one"], None, 32)
    onnx = pytest.importorskip("onnxruntime")
    session = onnx.InferenceSession(
        str(folder.parent / "onnx" / "model.onnx"), providers=["CPUExecutionProvider"]
    )
    data = Encoded([r[0] for r in rows], [r[1] for r in rows], np.zeros(2, np.int64))
    arrays = pad(data, range(2), pad_id=0)
    np.testing.assert_allclose(
        session.run(None, arrays)[0], encoder(*as_tensors(arrays)).numpy(), atol=1e-4
    )


def test_the_supernet_learns_with_the_specs_dropout() -> None:
    config = tiny_config()
    assert learning_config(config, DistillationSpec()).hidden_dropout == 0
    assert learning_config(config, DistillationSpec()).attention_dropout == 0
    assert learning_config(config, DistillationSpec(dropout=None)) == config
    learnt = build_encoder(
        learning_config(config, DistillationSpec(dropout=0.3)), random_weights(config)
    )
    assert learnt.layers[0].attention.attention_dropout == 0.3
    assert learnt.layers[1].ffn.dropout == 0.3


def test_exactly_one_subnetwork_is_selected_and_judged_on_test(finished: dict[str, Any]) -> None:
    report: CompressionReport = finished["report"]
    chosen = [network for network in report.subnetworks if network.selected]
    assert [network.name for network in chosen] == [report.selection.subnetwork]
    assert chosen[0].test_accuracy is not None
    assert all(n.test_accuracy is None for n in report.subnetworks if not n.selected)
    assert report.selection.reason


def test_what_was_measured_has_intervals_and_a_machine(finished: dict[str, Any]) -> None:
    report: CompressionReport = finished["report"]
    assert report.device is not None and report.device.cores >= 1
    for fmt in report.teacher.formats:
        assert fmt.size_bytes > 0
        assert [latency.batch_size for latency in fmt.latencies] == [1, 3]
        assert [latency.speedup for latency in fmt.latencies] == [None, None]
    for network in report.subnetworks:
        assert 0 < len(network.accuracy_drop_intervals) == len(CONFIDENCES)
        for within in network.accuracy_drop_intervals:
            assert within.low <= network.accuracy_drop <= within.high
        for fmt in network.formats:
            if fmt.format not in SERVED_FORMATS:
                assert fmt.latencies == ()
                continue
            assert fmt.latency == fmt.latencies[0]
            assert [latency.batch_size for latency in fmt.latencies] == [1, 3]
            for latency in fmt.latencies:
                assert latency.speedup is not None and len(latency.speedup_intervals) == 3
            assert fmt.speedup == fmt.latencies[0].speedup


def test_the_selected_one_is_held_on_test_against_the_better_of_teacher_and_width_1(
    finished: dict[str, Any],
) -> None:
    report: CompressionReport = finished["report"]
    (chosen,) = [network for network in report.subnetworks if network.selected]
    assert chosen.test is not None
    assert chosen.test.accuracy == chosen.test_accuracy
    full = report.subnetworks[0]
    better = full.name if full.accuracy > report.teacher.accuracy and full is not chosen else None
    assert chosen.test.reference == (better or "teacher")
    if better is None:
        assert chosen.test.reference_accuracy == report.teacher.test_accuracy
    assert chosen.test.accuracy_drop == pytest.approx(
        100 * (chosen.test.reference_accuracy - chosen.test.accuracy)
    )
    for within in chosen.test.accuracy_drop_intervals:
        assert within.low <= chosen.test.accuracy_drop <= within.high


@pytest.mark.parametrize(
    ("selected", "fmt", "teacher_accuracy", "reference"),
    [
        ("w1_2", None, 0.8, "w1"),
        ("w1_2", None, 0.9, "teacher"),
        ("w1", None, 0.8, "teacher"),
        ("w1", "onnx-int8-static", 0.8, "w1"),
    ],
)
def test_dev_says_what_the_selected_one_is_held_against_on_test(
    tmp_path: Path, selected: str, fmt: Format | None, teacher_accuracy: float, reference: str
) -> None:
    model = tiny_bert(tmp_path / "model", num_labels=2, seed=1)
    dataset = tiny_dataset(tmp_path / "dataset", rows={"train": 40, "dev": 20, "test": 30}, seed=1)
    job = load(small_spec(), model, dataset, 1)
    network = build_encoder(job.checkpoint.config, job.checkpoint.tensors)
    labels = job.splits["test"].labels
    assert labels is not None
    wrong = 1.0 - np.eye(2)[labels]  # logits of a teacher that gets no row right
    reports = [
        SubnetworkReport(
            name=planned.name,
            width_mult=planned.width_mult,
            heads=planned.heads,
            ffn=planned.ffn,
            parameters=planned.parameters,
            flops=planned.flops,
            accuracy=0.85,
            accuracy_drop=0,
            selected=planned.name == selected,
        )
        for planned in job.plan.subnetworks
    ]
    judged = judging.with_test(
        reports,
        job,
        Networks(network),
        teacher_accuracy=teacher_accuracy,
        teacher_on_test=wrong,
        rounded=None if fmt is None else (fmt, wrong),
    )
    found = {report.name: report.test for report in judged}
    comparison = found.pop(selected)
    assert list(found.values()) == [None]
    assert comparison is not None and comparison.reference == reference
    full = job.task.score(evaluate.predict(network, job.splits["test"]), job.splits["test"])
    assert comparison.reference_accuracy == (full if reference == "w1" else 0.0)
    if selected == "w1":
        assert comparison.accuracy == (full if fmt is None else 0.0)


def selected_narrowest(job: Job) -> SubnetworkReport:
    planned = job.plan.subnetworks[-1]
    return SubnetworkReport(
        name=planned.name,
        width_mult=planned.width_mult,
        heads=planned.heads,
        ffn=planned.ffn,
        parameters=planned.parameters,
        flops=planned.flops,
        accuracy=0.85,
        accuracy_drop=0,
        selected=True,
    )


@pytest.mark.parametrize("fmt", ["onnx-int8-static", None])
def test_figures_of_test_say_which_file_answered(tmp_path: Path, fmt: Format | None) -> None:
    model = tiny_bert(tmp_path / "model", num_labels=2, seed=1)
    dataset = tiny_dataset(tmp_path / "dataset", rows={"train": 40, "dev": 20, "test": 30}, seed=1)
    job = load(small_spec(), model, dataset, 1)
    network = build_encoder(job.checkpoint.config, job.checkpoint.tensors)
    rows = job.splits["test"]
    assert rows.labels is not None
    right = np.eye(2)[rows.labels]
    (judged,) = judging.with_test(
        [selected_narrowest(job)],
        job,
        Networks(network),
        teacher_accuracy=0.9,
        teacher_on_test=right,
        rounded=None if fmt is None else (fmt, right),
    )
    assert judged.test is not None
    assert judged.test.format == fmt
    if fmt is not None:
        assert judged.test_accuracy == judged.test.accuracy == 1.0


def test_a_job_stands_where_its_int8_file_cannot_be_run_on_test(tmp_path: Path) -> None:
    model = tiny_bert(tmp_path / "model", num_labels=2, seed=1)
    dataset = tiny_dataset(tmp_path / "dataset", rows={"train": 40, "dev": 20, "test": 30}, seed=1)
    job = load(small_spec(), model, dataset, 1)
    report = selected_narrowest(job)
    work = tmp_path / "work"
    work.mkdir()
    reports, warnings = judging.judged_on_test(
        [report],
        job,
        Networks(build_encoder(job.checkpoint.config, job.checkpoint.tensors)),
        Selection(subnetwork=report.name, format="onnx-int8-static", reason="the fastest"),
        tmp_path / "no-artifacts",
        work,
        teacher_accuracy=0.9,
        teacher_on_test=np.zeros((30, 2)),
    )
    assert reports == [report]
    (warning,) = warnings
    assert warning.startswith(f"{report.name} in onnx-int8-static was not judged on test: ")


def test_speed_ups_are_against_the_teacher_in_fp32_of_the_same_runtime() -> None:
    files: dict[str, Format] = {
        "teacher/onnx": "onnx",
        "teacher/onnx-int8-static": "onnx-int8-static",
        "w1_2/onnx-int8-static": "onnx-int8-static",
        "w1_2/paddle": "paddle",  # its teacher could not be written
    }
    served = {name: Served(fmt, Path(name)) for name, fmt in files.items()}
    assert judging.references(served) == {
        "teacher/onnx-int8-static": "teacher/onnx",
        "w1_2/onnx-int8-static": "teacher/onnx",
    }


def test_a_teacher_that_cannot_be_written_holds_back_what_is_timed_against_it() -> None:
    def failed(fmt: Format) -> Exported:
        return Exported(fmt, Path(fmt), (), 0.0, error="no operator")

    warnings = judging.export_warnings(
        [],
        ["onnx-int8-dynamic", "onnx-int8-static", "safetensors"],
        {fmt: failed(fmt) for fmt in ("onnx", "paddle", "onnx-int8-static")},
    )
    assert warnings == (
        "nothing can be chosen in onnx-int8-dynamic or onnx-int8-static, for want of a speed-up: "
        "the teacher could not be written in onnx: no operator",
        "the baseline in paddle could not be measured: the teacher could not be written in "
        "paddle: no operator",
        "the baseline in onnx-int8-static could not be measured: the teacher could not be "
        "written in onnx-int8-static: no operator",
    )


def test_a_finished_report_answers_other_constraints(finished: dict[str, Any]) -> None:
    text = (finished["root"] / "run" / "report.json").read_text()
    report = CompressionReport.model_validate_json(text)
    asked = ConstraintSpec.model_validate(
        {"objective": "size", "latency_at": {"batch_size": 3, "percentile": 95}}
    )
    selection = reselect(report.subnetworks, asked, main_metric=report.main_metric)
    assert selection.subnetwork == "w1_2"
    unmoved = reselect(report.subnetworks, ConstraintSpec(), main_metric=report.main_metric)
    assert unmoved == report.selection


def test_constraints_that_nothing_meets_end_without_a_selection(tmp_path: Path) -> None:
    model = tiny_bert(tmp_path / "model", num_labels=2, seed=1)
    dataset = tiny_dataset(tmp_path / "dataset", rows={"train": 80, "dev": 40, "test": 20}, seed=1)
    spec = small_spec(
        constraints={"max_size_mb": 1e-6},
        supernet={"width_mults": ["1/2"]},
        export={"formats": ["onnx"]},
        task={"max_seq_len": 32, "labels": None},
        max_minutes=0.01,
    )
    key = Ed25519PrivateKey.generate()
    report = compress(spec, model, dataset, tmp_path / "run", signing_key=key)
    bundle = tmp_path / "run" / "artifacts" / "w1_2" / "bundle.tar.gz"
    assert verify_bundle(bundle, key.public_key()).faults == ()
    # Its time budget is spent by what comes after training: one step, and all the rest.
    assert (report.distillation_steps, report.trainings["distil"].ended) == (1, "time")
    assert report.warnings == (
        "the time budget of 0.01 minutes ended distil after 1 of 3 steps; the weights are those "
        "after step 1",
    )
    assert report.teacher.fine_tuned_steps == 0
    assert report.selection.subnetwork is None
    assert [c.subnetwork for c in report.selection.nearest] == ["w1_2"]
    assert report.selection.nearest[0].misses
    assert not any(network.selected for network in report.subnetworks)


def test_pairs_without_dev_test_or_width_1_and_a_format_that_drifts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ('a "quoted" | `x`\\', "\u00fcn\u00ef\u2028<b>")
    model = tiny_bert(tmp_path / "model", num_labels=2, labels=names, seed=1)
    dataset = tiny_dataset(tmp_path / "dataset", rows={"train": 100}, labels=names, pair=True)
    ranked: list[Encoded] = []
    judged: list[Encoded] = []

    def sorted_rows(data: Encoded, **options: Any) -> Any:
        ranked.append(data)
        return batches.sorted_rows(data, **options)

    def logits_of(encoder: Encoder, data: Encoded, **options: Any) -> Any:
        judged.append(data)
        return evaluate.predict(encoder, data, **options)

    def gate(fmt: Format, folder: Path, **options: Any) -> Parity:
        if "w1_4" in folder.parts:
            return Parity(0.5, "logits differ from the supernet's by 0.5")
        return verify(fmt, folder, **options)

    monkeypatch.setattr(learning, "sorted_rows", sorted_rows)
    monkeypatch.setattr(learning, "predict", logits_of)
    monkeypatch.setattr(judging, "verify", gate)
    spec = small_spec(
        supernet={"width_mults": ["1/4", "1/2"]},
        distillation={"max_steps": 2},
        importance={"rows": 1000},
        export={"formats": ["onnx"]},
        task={"max_seq_len": 12},
        report={"slices": ["label"], "excerpt_chars": 8},
    )
    report = compress(spec, model, dataset, tmp_path / "run")

    assert report.dataset.rows == {"train": 90, "dev": 10}
    (sample,) = ranked
    assert len(sample) == 90
    texts = {tuple(ids) for ids in judged[0].input_ids}
    assert len(judged[0]) == 10
    assert texts.isdisjoint(tuple(ids) for ids in sample.input_ids)

    half, quarter = report.subnetworks
    assert (half.name, half.formats[0].parity_rows, half.test_accuracy) == ("w1_2", 10, None)
    assert (report.selection.subnetwork, report.selection.format) == ("w1_2", "onnx")
    assert not quarter.formats[0].published
    assert quarter.formats[0].latency is None
    regression = quarter.regression
    assert regression is not None
    assert sum(group.units for group in regression.by_column["label"]) == 10
    assert regression.overall.teacher_right == 10 * report.teacher.accuracy
    lines = (dataset / "train.tsv").read_text().split("\n")
    for row in regression.worst_rows:  # dev's rows are train's
        first, second, label = lines[row.line - 1].split("\t")
        assert (row.file, row.truth) == ("train.tsv", label)
        assert row.text == f"{first} | {second}"[:8]
    assert report.warnings == (
        "w1_4 in onnx is not published: logits differ from the supernet's by 0.5",
    )
    artifacts = tmp_path / "run" / "artifacts"
    assert [path.name for path in artifacts.rglob("*") if path.is_file()] == [
        "bundle.tar.gz",
        "model.onnx",
    ]

    with tarfile.open(artifacts / "w1_2" / "bundle.tar.gz") as archive:
        archive.extractall(tmp_path, filter="data")
    pair = ["a very good film", "the plot was dull and slow and cold"]
    done = subprocess.run(
        [sys.executable, str(tmp_path / "w1_2" / "predict.py"), "--json", *pair],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    ((ids, types),) = encode(load_tokenizer(model), pair[:1], pair[1:], 12)
    assert (len(ids), max(types)) == (12, 1)
    onnx = pytest.importorskip("onnxruntime")
    session = onnx.InferenceSession(str(artifacts / "w1_2" / "onnx" / "model.onnx"))
    row = Encoded([ids], [types], np.zeros(1, np.int64))
    exponents = np.exp(session.run(None, pad(row, [0], pad_id=0))[0][0])
    assert json.loads(done.stdout)["probabilities"] == pytest.approx(
        dict(zip(names, exponents / exponents.sum(), strict=True)), abs=1e-5
    )


def test_pairs_for_a_roberta_go_through_to_its_bundle(tmp_path: Path) -> None:
    """No token types, positions with an offset, a byte-level tokenizer: what BERT has not."""
    model = tiny_family(tmp_path / "model", "roberta", num_labels=None, max_tokens=32)
    dataset = tiny_dataset(tmp_path / "dataset", rows={"train": 40, "dev": 20}, pair=True)
    spec = small_spec(
        teacher={"max_steps": 2},
        supernet={"width_mults": ["1/2"]},
        distillation={"max_steps": 1},
        export={"formats": ["onnx"]},
    )
    report = compress(spec, model, dataset, tmp_path / "run")
    (half,) = report.subnetworks
    assert report.teacher.family == "roberta"
    assert report.reorder_max_abs < 1e-5
    assert half.heads == (2, 2)
    assert half.formats[0].published, half.formats[0].error

    artifacts = tmp_path / "run" / "artifacts" / "w1_2"
    pair = ["a very good film", " the plot was dull and slow"]
    (answer,) = ask(tmp_path, "w1_2", *pair)
    manifest = json.loads((tmp_path / "w1_2" / "manifest.json").read_text())
    assert [item["name"] for item in manifest["inputs"]] == ["input_ids", "attention_mask"]
    assert manifest["task"]["pad_token_id"] == 1
    ((ids, types),) = encode(load_tokenizer(model), pair[:1], pair[1:], 32)
    onnx = pytest.importorskip("onnxruntime")
    session = onnx.InferenceSession(str(artifacts / "onnx" / "model.onnx"))
    arrays = pad(Encoded([ids], [types], np.zeros(1, np.int64)), [0], pad_id=1)
    del arrays["token_type_ids"]
    exponents = np.exp(session.run(None, arrays)[0][0])
    assert answer["probabilities"] == pytest.approx(
        dict(zip(("0", "1"), exponents / exponents.sum(), strict=True)), abs=1e-5
    )


def test_chinese_rows_of_several_labels_with_unlabelled_ones_and_a_last_fine_tuning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    characters = "这部电影很好看但是有点长演员音乐不错差"
    model = tiny_bert(tmp_path / "model", num_labels=None, words=tuple(characters))
    (tmp_path / "dataset").mkdir()
    chooser = random.Random(0)

    def write(split: str, rows: int, *, labelled: bool = True, length: int = 12) -> None:
        lines = []
        for _ in range(rows):
            text = "".join(chooser.choices(characters, k=length))
            labels = [name for name, mark in (("好", "好"), ("音乐", "乐")) if mark in text]
            row = {"text": text, **({"labels": labels} if labelled else {})}
            lines.append(json.dumps(row, ensure_ascii=False))
        (tmp_path / "dataset" / f"{split}.jsonl").write_text("\n".join(lines), encoding="utf-8")

    write("train", 64)
    write("dev", 20)
    write("unlabelled", 40, labelled=False, length=40)
    learnt: list[Encoded] = []

    def distil_rows(
        supernet: Encoder, teacher: Encoder, data: Encoded, *args: Any, **kw: Any
    ) -> int:
        learnt.append(data)
        return distillation.distil(supernet, teacher, data, *args, **kw)

    monkeypatch.setattr(learning, "distil", distil_rows)
    seen: list[Progress] = []
    spec = small_spec(
        task={"kind": "multi_label", "max_seq_len": 32},
        teacher={"max_steps": 2},
        distillation={"max_steps": 2},
        final={"when": "always", "max_steps": 2, "learning_rate": 1e-3},
        export={"formats": ["onnx"]},
    )
    report = compress(spec, model, tmp_path / "dataset", tmp_path / "run", seen.append)
    assert CompressionReport.model_validate_json(report.model_dump_json()) == report

    assert report.dataset.rows == {"train": 64, "dev": 20, "unlabelled": 40}
    assert report.dataset.cut_rows == {"unlabelled": 40}
    assert "40 of 40 rows of unlabelled have more than 32 tokens" in report.dataset.notes[-1]
    ((rows, labels),) = [(len(data), data.labels) for data in learnt]
    assert (rows, labels) == (104, None)
    # Every character is a token of its own, none unknown.
    assert {len(ids) for ids in learnt[0].input_ids} == {14, 32}
    assert not any(1 in ids for ids in learnt[0].input_ids)
    assert (report.main_metric, report.final_steps) == ("micro_f1", 2)
    assert [p.step for p in seen if p.stage == "final"] == [0, 1, 2]
    for network in (report.teacher, *report.subnetworks):
        assert set(network.metrics) == {"micro_f1", "macro_f1", "exact_match"}
        assert network.accuracy == network.metrics["micro_f1"]
    for network in report.subnetworks:
        assert network.formats[0].published, network.formats[0].error

    shown = ask(tmp_path, "w1_2", "音乐很好", "差")
    assert [set(answer["probabilities"]) for answer in shown] == [{"好", "音乐"}] * 2
    for answer in shown:
        above = [name for name, p in answer["probabilities"].items() if p > 0.5]
        assert answer["labels"] == above
    card = (tmp_path / "w1_2" / "MODEL_CARD.md").read_text(encoding="utf-8")
    assert "multi-label classifier" in card
    assert "fine-tuned together on the labels of train" in card
    assert "| micro F1 on dev |" in card
    assert "| exact match on dev |" in card
    assert "ccuracy" not in card


def test_a_regression_of_pairs_with_the_models_own_head(tmp_path: Path) -> None:
    model = tiny_bert(tmp_path / "model", num_labels=1)
    dataset = tmp_path / "dataset"
    dataset.mkdir()
    chooser = random.Random(0)
    for split, count in {"train": 48, "dev": 20, "test": 10}.items():
        lines = ["sentence1\tsentence2\tscore"]
        for _ in range(count):
            one, two = chooser.choices(WORDS[:20], k=5), chooser.choices(WORDS[:20], k=5)
            lines.append(f"{' '.join(one)}\t{' '.join(two)}\t{5 * chooser.random():.3f}")
        (dataset / f"{split}.tsv").write_text("\n".join(lines) + "\n")
    spec = small_spec(
        task={"kind": "regression", "metric": "spearman", "max_seq_len": 32},
        distillation={"max_steps": 2, "teacher_cache_mb": 1},
        supernet={"width_mults": ["1/2"]},
        export={"formats": ["safetensors", "onnx"]},
    )
    report = compress(spec, model, dataset, tmp_path / "run")
    assert report.teacher.fine_tuned_steps == 0
    assert report.main_metric == "spearman"
    (half,) = report.subnetworks
    drop = 100 * (report.teacher.metrics["spearman"] - half.metrics["spearman"])
    assert half.accuracy_drop == pytest.approx(drop)
    assert [fmt.published for fmt in half.formats] == [True, True]
    assert report.dataset.labels == ()
    assert report.dataset.label_names == ("score",)
    # What is exported can be uploaded again, and is known for what it is.
    again = read_checkpoint(tmp_path / "run" / "artifacts" / "w1_2" / "safetensors")
    assert (again.head_task, again.labels) == ("regression", ("score",))
    (answer,) = ask(tmp_path, "w1_2", "a good film", "the plot")
    ((ids, types),) = encode(load_tokenizer(model), ["a good film"], ["the plot"], 32)
    small = build_encoder(again.config, again.tensors)
    row = Encoded([ids], [types], None)
    expected = evaluate.predict(small, row)[0][0]
    assert answer["score"] == pytest.approx(float(expected), abs=1e-4)
    card = (tmp_path / "w1_2" / "MODEL_CARD.md").read_text(encoding="utf-8")
    assert "| Spearman correlation on dev |" in card
    assert "| Pearson correlation on dev |" in card
    assert "ccuracy" not in card


def ask(root: Path, name: str, *texts: str) -> list[dict[str, Any]]:
    """What the bundle's predict.py answers, run as its reader runs it."""
    with tarfile.open(root / "run" / "artifacts" / name / "bundle.tar.gz") as archive:
        archive.extractall(root, filter="data")
    done = subprocess.run(
        [sys.executable, str(root / name / "predict.py"), "--json", *texts],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_a_gpu_is_refused_clearly_where_there_is_none(tmp_path: Path) -> None:
    with pytest.raises(DeviceUnavailable, match="built for the CPU alone") as error:
        compress(small_spec(device="gpu"), tmp_path, tmp_path, tmp_path / "run")
    assert error.value.pointer == "/device"
    assert not (tmp_path / "run").exists()


def test_a_device_without_its_profile_ends_before_anything_is_trained(tmp_path: Path) -> None:
    model = tiny_bert(tmp_path / "model", num_labels=2, seed=1)
    dataset = tiny_dataset(tmp_path / "dataset", rows={"train": 80, "dev": 40, "test": 20}, seed=1)
    with pytest.raises(InvalidSpec, match="its profile was not given") as error:
        compress(small_spec(constraints={"latency_on": "prf_1"}), model, dataset, tmp_path / "run")
    assert error.value.pointer == "/constraints/latency_on"


def test_an_illegal_width_ends_before_anything_is_trained(tmp_path: Path) -> None:
    model = tiny_bert(tmp_path / "model", num_labels=None, seed=1)
    dataset = tiny_dataset(tmp_path / "dataset", rows={"train": 80, "dev": 40, "test": 20}, seed=1)
    seen: list[Progress] = []
    with pytest.raises(InvalidSpec) as error:
        compress(
            small_spec(supernet={"width_mults": ["1", "1/3"]}),
            model,
            dataset,
            tmp_path / "run",
            seen.append,
        )
    assert error.value.pointer == "/supernet/width_mults/1"
    assert {p.stage for p in seen} == {"load"}
    assert not (tmp_path / "run").exists()  # or the mended spec could not go to the same folder


def test_an_illegal_depth_ends_before_anything_is_trained(tmp_path: Path) -> None:
    model = tiny_bert(tmp_path / "model", num_labels=None, seed=1)
    dataset = tiny_dataset(tmp_path / "dataset", rows={"train": 80, "dev": 40}, seed=1)
    seen: list[Progress] = []
    spec = small_spec(supernet={"depth_mults": ["1", "2/3"]})
    with pytest.raises(InvalidSpec, match="can have the depths 1, 1/2") as error:
        compress(spec, model, dataset, tmp_path / "run", seen.append)
    assert error.value.pointer == "/supernet/depth_mults/1"
    assert {p.stage for p in seen} == {"load"}


def test_a_shallow_network_goes_through_to_its_bundle(tmp_path: Path) -> None:
    model = tiny_bert(tmp_path / "model", num_labels=2, layers=4, seed=1)
    dataset = tiny_dataset(tmp_path / "dataset", rows={"train": 80, "dev": 40, "test": 20}, seed=1)
    seen: list[Progress] = []
    spec = small_spec(
        supernet={"width_mults": ["1", "1/2"], "depth_mults": ["1/2"]},
        distillation={"max_steps": 2},
        depth={"max_steps": 3, "learning_rate": 1e-3},
        constraints={"objective": "size"},
        export={"formats": ["safetensors", "onnx"]},
    )
    report = compress(spec, model, dataset, tmp_path / "run", seen.append)
    assert CompressionReport.model_validate_json(report.model_dump_json()) == report
    assert (report.depth_steps, report.trainings["depth"].ended) == (3, "complete")
    steps = [p for p in seen if p.stage == "depth" and "losses" in p.figures]
    assert [set(p.figures["losses"]) for p in steps] == [{"w1-d1_2", "w1_2-d1_2"}] * 3
    widths = [p for p in seen if p.stage == "distil" and "losses" in p.figures]
    assert [set(p.figures["losses"]) for p in widths] == [{"w1", "w1_2"}] * 2
    wide, half = report.subnetworks
    assert (wide.name, half.name) == ("w1-d1_2", "w1_2-d1_2")
    assert (half.layers, half.heads, half.ffn) == ((0, 2), (2, 2), (32, 32))
    assert half.regression is not None
    assert half.parameters < wide.parameters < report.teacher.parameters
    for fmt in (*wide.formats, *half.formats):
        assert fmt.published, fmt.error
    assert report.selection.subnetwork == "w1_2-d1_2"
    assert half.test is not None and half.test.reference == "teacher"  # full depth is not there
    checkpoint = read_checkpoint(tmp_path / "run" / "artifacts" / "w1_2-d1_2" / "safetensors")
    assert checkpoint.config.layers == 2
    texts = ["a very good film", "the plot was dull and slow"]
    rows = Encoded(
        *map(list, zip(*encode(load_tokenizer(model), texts, None, 32), strict=True)), None
    )
    logits = evaluate.predict(build_encoder(checkpoint.config, checkpoint.tensors), rows)
    exponents = np.exp(logits)
    for answer, own in zip(ask(tmp_path, "w1_2-d1_2", *texts), exponents, strict=True):
        assert list(answer["probabilities"].values()) == pytest.approx(own / own.sum(), abs=1e-4)


class Stopping:
    """Stops a job at the `step`th sign of life of a stage."""

    def __init__(self, stage: str, step: int) -> None:
        self.at, self.now = (stage, step), False
        self.seen: list[Progress] = []

    def __call__(self, progress: Progress) -> None:
        self.seen.append(progress)
        if (progress.stage, progress.step) == self.at:
            self.now = True


def test_a_job_goes_on_from_any_stage_and_ends_with_the_same_weights(tmp_path: Path) -> None:
    model = tiny_bert(tmp_path / "model", num_labels=None, seed=1)
    dataset = tiny_dataset(tmp_path / "dataset", rows={"train": 80, "dev": 40, "test": 20}, seed=1)
    spec = small_spec(
        distillation={"epochs": 2, "learning_rate": 1e-3, "dropout": None},
        supernet={
            "width_mults": ["1", "3/4", "1/2"],
            "depth_mults": ["1", "1/2"],
            "per_layer": {"holdout_rows": 8, "population": 4, "generations": 1},
        },
        constraints={"max_size_mb": 10},
        depth={"epochs": 1, "learning_rate": 1e-3},
        final={"when": "always", "epochs": 1},
    )

    def run_until(stage: str, step: int, out: Path) -> list[Progress]:
        stopping = Stopping(stage, step)
        with pytest.raises(Interrupted):
            compress(spec, model, dataset, out, stopping, stop=lambda: stopping.now)
        return stopping.seen

    run_until("export", 0, tmp_path / "whole")
    _, whole, _ = newest_snapshot(tmp_path / "whole" / "checkpoints")
    assert whole is not None
    assert list(whole.stages) == ["teacher", "importance", "distil", "depth", "final", "search"]

    out = tmp_path / "parts"
    went_on = []
    for stage, step in (
        ("load", 1), ("teacher", 2), ("importance", 0), ("reorder", 0), ("distil", 3), ("depth", 2),
        ("final", 2), ("search", 1), ("export", 0), ("evaluate", 0),
    ):  # fmt: skip
        seen = run_until(stage, step, out)
        went_on.append(next(p.message for p in seen if p.stage == "load" and p.step == 1))
    assert went_on == [
        "",
        "",
        "goes on from step 2 of teacher",
        "goes on from the end of teacher",
        "goes on from the end of importance",
        "goes on from step 3 of distil",
        "goes on from step 2 of depth",
        "goes on from step 2 of final",
        "goes on from step 1 of search",
        "goes on from the end of search",
    ]
    _, parts, _ = newest_snapshot(out / "checkpoints")
    assert parts is not None
    for stage, state in whole.stages.items():
        found = parts.stages[stage]
        assert (found.step, found.done) == (state.step, True)
        assert stage != "search" or found.figures == state.figures
        assert found.tensors.keys() == state.tensors.keys()
        for name, array in state.tensors.items():
            np.testing.assert_array_equal(found.tensors[name], array, err_msg=f"{stage}/{name}")

    with pytest.raises(CheckpointRefused, match=r"not the same: spec\)"):
        compress(small_spec(seed=1), model, dataset, out)
    tiny_dataset(dataset, rows={"train": 90, "dev": 40, "test": 20}, seed=1)
    with pytest.raises(CheckpointRefused, match=r"not the same: dataset\)"):
        compress(spec, model, dataset, out)


@pytest.fixture
def restored_environment() -> Iterator[None]:
    """The command line chooses variables for its own process; here that is everybody's."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


@pytest.mark.usefixtures("restored_environment")
def test_the_command_line_does_the_same_job(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tiny_bert(tmp_path / "model", num_labels=2, seed=1)
    dataset = tiny_dataset(tmp_path / "dataset", rows={"train": 80, "dev": 40, "test": 20}, seed=1)
    spec = tmp_path / "spec.yaml"
    spec.write_text(
        "task: {max_seq_len: 32}\n"
        "supernet: {width_mults: [1/2]}\n"
        "distillation: {max_steps: 2}\n"
        "importance: {rows: 32}\n"
        "latency: {rounds: 5}\n"
        "export: {formats: [onnx]}\n"
    )
    arguments = ["--model", str(model), "--dataset", str(dataset), "--spec", str(spec)]
    board = tmp_path / "board.json"
    board.write_text(json.dumps(device_profile()))
    assert main([*arguments, "--profile", str(board), "--out", str(tmp_path / "out")]) == 0
    shown = capsys.readouterr()
    assert "1/2" in shown.out
    assert "distil" in shown.err
    assert "w1_2 in onnx: " in shown.out and "ms predicted for Test Board rev 3" in shown.out
    written = tmp_path / "out" / "report.json"
    report = json.loads(written.read_text())
    assert report["distillation_steps"] == 2
    check_predicted(report, tmp_path / "out" / "artifacts" / "w1_2" / "bundle.tar.gz")
    check_select_command(written, board, capsys)

    for bad, told in ((tmp_path / "absent", "No such file"), (spec, "is no device profile")):
        with pytest.raises(SystemExit):
            main([*arguments, "--profile", str(bad), "--out", str(tmp_path / "other")])
        assert told in capsys.readouterr().err
    board.write_text(json.dumps(device_profile(seq_len=(2, 3))))
    assert main([*arguments, "--profile", str(board), "--out", str(tmp_path / "short")]) == 2
    assert "(/constraints/latency_at/seq_len)" in capsys.readouterr().err

    for options in ([], ["--resume"]):
        with pytest.raises(SystemExit):
            main([*arguments, "--out", str(tmp_path / "out"), *options])
    errors = capsys.readouterr().err
    assert "not an empty folder" in errors and "holds no interrupted job" in errors
    spec.write_text("{task: {max_seq_len: 32}, supernet: {width_mults: [1/3]}}\n")
    assert main([*arguments, "--out", str(tmp_path / "other")]) == 2
    assert "/supernet/width_mults/0" in capsys.readouterr().err
    spec.write_text("supernt: {}\n")
    with pytest.raises(SystemExit):
        main([*arguments, "--out", str(tmp_path / "third")])
    assert "supernt" in capsys.readouterr().err


def check_predicted(report: dict[str, Any], bundle: Path) -> None:
    """A report for another device says so everywhere."""
    (network,) = report["subnetworks"]
    (fmt,) = network["formats"]
    tokens, predicted = fmt["latency"]["seq_len"], fmt["predicted"]
    assert predicted["p50_ms"] == pytest.approx(1 + 2 * (2 + 3.2) * tokens / 10)
    assert predicted["on"]["profile"] == report["spec"]["constraints"]["latency_on"] == "board.json"
    selection = report["selection"]
    assert selection["latency_on"] == predicted["on"]
    assert "predicted for Test Board rev 3" in selection["reason"]
    with tarfile.open(bundle) as archive:
        card = archive.extractfile("w1_2/MODEL_CARD.md")
        assert card is not None
        assert "its latency was predicted, not measured" in card.read().decode()


def check_select_command(finished: Path, board: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of a job that measured half a millisecond, whatever this machine is busy with."""
    told = json.loads(finished.read_text())
    for latency in [(fmt := told["subnetworks"][0]["formats"][0])["latency"], *fmt["latencies"]]:
        latency["p50_ms"] = 0.5
    report = board.with_name("measured.json")
    report.write_text(json.dumps(told))
    before = report.read_bytes()
    spec = board.with_name("constraints.yaml")
    spec.write_text("constraints: {max_latency_ms: 2, objective: latency}\n")
    ask = ["select", str(report), "--spec", str(spec)]
    assert main(ask) == 0
    assert "predicted" not in capsys.readouterr().out
    assert main([*ask, "--profile", str(board)]) == 1
    assert "predicted for Test Board rev 3" in capsys.readouterr().out
    spec.write_text("constraints: {latency_at: {threads: 9}}\n")
    with pytest.raises(SystemExit):
        main([*ask, "--profile", str(board)])
    assert "threads 9 lies outside" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["select", str(board)])
    assert "board.json is no report.json of a job" in capsys.readouterr().err
    assert report.read_bytes() == before


@pytest.mark.usefixtures("restored_environment")
def test_a_job_of_the_command_line_is_stopped_and_resumed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tiny_bert(tmp_path / "model", num_labels=2, seed=1)
    dataset = tiny_dataset(tmp_path / "dataset", rows={"train": 80, "dev": 40}, seed=1)
    spec = tmp_path / "spec.json"
    spec.write_text(
        small_spec(
            supernet={"width_mults": ["1/2"]},
            distillation={"max_steps": 200, "epochs": 100},
            export={"formats": ["onnx"]},
        ).model_dump_json()
    )
    out = tmp_path / "out"
    arguments = ["--model", str(model), "--dataset", str(dataset), "--spec", str(spec)]
    arguments += ["--out", str(out)]
    process = subprocess.Popen(
        [sys.executable, "-m", "compression", *arguments],
        cwd=REPOSITORY,
        stderr=subprocess.PIPE,
        text=True,
    )
    wait_until(lambda: list(out.glob("checkpoints/*.safetensors")), "a checkpoint", seconds=120)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 3, errors
    assert "the same command with --resume goes on" in errors
    assert not (out / "report.json").exists()
    assert main([*arguments, "--resume"]) == 0
    assert json.loads((out / "report.json").read_text())["distillation_steps"] == 200
    assert sorted(path.name for path in out.iterdir()) == ["artifacts", "report.json"]
