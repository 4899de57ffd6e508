"""A whole job with int8 formats: one is published with figures of its own, one is withheld."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest

from compression import judging
from compression.batches import Encoded, pad
from compression.export import EXPORTERS, Exported, Int8Source
from compression.export.onnx_int8 import OnnxInt8Exporter
from compression.int8 import Judge, Outcome, pass_gate
from compression.job import load
from compression.pipeline import compress
from compression.report import CompressionReport
from compression.selection import candidates
from compression.spec import CONFIDENCES, Format, Spec
from compression.tokenization import encode, load_tokenizer
from tests.builders import tiny_bert, tiny_dataset

DYNAMIC: Format = "onnx-int8-dynamic"
STATIC: Format = "onnx-int8-static"


def test_a_job_publishes_the_int8_file_that_holds_and_withholds_the_one_that_flips(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_bert(tmp_path / "model", num_labels=2, seed=1)
    dataset = tiny_dataset(tmp_path / "dataset", rows={"train": 80, "dev": 40, "test": 20}, seed=1)

    def gate(
        exporter: OnnxInt8Exporter, files: Exported, judge: Judge, source: Int8Source
    ) -> Outcome:
        if files.format == STATIC:  # held against the opposite of what the sub-network answers
            judge = dataclasses.replace(judge, expected=-np.asarray(judge.expected))
        return pass_gate(exporter, files, judge, source)

    monkeypatch.setattr(judging, "pass_gate", gate)
    spec = Spec.model_validate(
        {
            "task": {"max_seq_len": 32},
            "importance": {"rows": 32},
            "distillation": {"max_steps": 2},
            "supernet": {"width_mults": ["1/2"]},
            "latency": {"rounds": 5},
            "export": {
                "formats": ["onnx", DYNAMIC, STATIC],
                "int8": {"max_flipped": 0.4, "max_fp32_share": 0, "calibration_rows": 32},
            },
        }
    )
    report = compress(spec, model, dataset, tmp_path / "run")
    assert CompressionReport.model_validate_json(report.model_dump_json()) == report
    (half,) = report.subnetworks
    plain, dynamic, static = half.formats
    assert (plain.published, dynamic.published, static.published) == (True, True, False)
    assert (plain.accuracy, plain.flipped, plain.parity_tolerance) == (None, None, 1e-4)

    assert dynamic.accuracy is not None
    assert dynamic.flipped is not None
    assert dynamic.accuracy_drop == pytest.approx(
        100 * (report.teacher.accuracy - dynamic.accuracy)
    )
    # One flipped answer of 40 changes the accuracy by 1/40 at most.
    assert abs(dynamic.accuracy - half.accuracy) <= dynamic.flipped + 1e-9 <= 0.4 + 1e-9
    assert (dynamic.max_flipped, dynamic.parity_tolerance, dynamic.fp32_parts) == (0.4, None, ())
    assert dynamic.parity_max_abs is not None
    assert dynamic.size_bytes < plain.size_bytes

    assert report.warnings == (f"w1_2 in {STATIC} is not published: {static.error}",)
    assert static.error is not None
    assert static.error.startswith("int8 flips ")
    assert static.error.endswith(" of the answers on dev, more than 40.0%")
    assert static.latency is None
    artifacts = tmp_path / "run" / "artifacts" / "w1_2"
    assert not (artifacts / STATIC).exists()

    chosen_from = {each.format: each for each in candidates(report.subnetworks)}
    assert chosen_from.keys() == {"onnx", DYNAMIC}
    assert chosen_from[DYNAMIC].accuracy_drop == dynamic.accuracy_drop
    assert chosen_from["onnx"].accuracy_drop == half.accuracy_drop
    # The speed-up is against the teacher in fp32; in int8 it is what one would do instead.
    assert [each.format for each in report.teacher.formats] == ["onnx", DYNAMIC]
    teacher, baseline = report.teacher.formats
    assert teacher.latency is not None
    assert (teacher.accuracy, teacher.flipped) == (None, None)
    assert baseline.accuracy is not None and baseline.flipped is not None
    assert baseline.accuracy_drop == pytest.approx(
        100 * (report.teacher.accuracy - baseline.accuracy)
    )
    assert abs(baseline.accuracy - report.teacher.accuracy) <= baseline.flipped + 1e-9
    assert len(baseline.accuracy_drop_intervals) == len(CONFIDENCES)
    assert baseline.max_flipped is None  # it is not withheld, whatever it flips
    assert baseline.latency is not None
    assert baseline.speedup == pytest.approx(teacher.latency.p50_ms / baseline.latency.p50_ms)
    assert dynamic.latency is not None
    assert dynamic.speedup == pytest.approx(teacher.latency.p50_ms / dynamic.latency.p50_ms)

    with tarfile.open(artifacts / "bundle.tar.gz") as archive:
        archive.extractall(tmp_path, filter="data")
    bundle = tmp_path / "w1_2"
    manifest = json.loads((bundle / "manifest.json").read_text())
    assert manifest["formats"].keys() == {"onnx", DYNAMIC}
    assert manifest["formats"][DYNAMIC]["flipped"] == dynamic.flipped
    assert manifest["formats"][DYNAMIC]["run_with"]["precision"] == "int8"
    card = (bundle / "MODEL_CARD.md").read_text()
    assert f"in ONNX (dynamic INT8) (accuracy on dev {baseline.accuracy:.4f})." in card
    assert f"accuracy on dev {dynamic.accuracy:.4f}, and {dynamic.flipped:.1%}" in card
    done = subprocess.run(
        [sys.executable, str(bundle / "predict.py"), "--json", "--format", DYNAMIC, "a good film"],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    ((ids, types),) = encode(load_tokenizer(model), ["a good film"], None, 32)
    run = EXPORTERS["onnx-int8-dynamic"].load(artifacts / DYNAMIC, threads=1)
    exponents = np.exp(run(pad(Encoded([ids], [types], None), [0], pad_id=0))[0])
    assert list(json.loads(done.stdout)["probabilities"].values()) == pytest.approx(
        list(exponents / exponents.sum()), abs=1e-6
    )


def test_a_teacher_in_int8_that_cannot_be_run_is_told_and_holds_nothing_back(
    tmp_path: Path,
) -> None:
    model = tiny_bert(tmp_path / "model", num_labels=2, seed=1)
    dataset = tiny_dataset(tmp_path / "dataset", rows={"train": 40, "dev": 20}, seed=1)
    job = load(Spec.model_validate({"task": {"max_seq_len": 32}}), model, dataset, 1)
    formats: tuple[Format, ...] = ("onnx", DYNAMIC, STATIC)
    files = {fmt: Exported(fmt, tmp_path / fmt, (), 0.0) for fmt in formats}
    files[STATIC] = dataclasses.replace(files[STATIC], error="no operator")
    found, verdicts = judging.judge_baselines(
        job,
        files,
        Int8Source(tmp_path / "calibration.npz", tmp_path),
        expected=np.zeros((20, 2), np.float32),
        teacher_accuracy=0.9,
        teacher_resampled=np.full(1000, 0.9),
    )
    assert verdicts == {}
    assert found["onnx"] == files["onnx"] and found[STATIC] == files[STATIC]
    error = found[DYNAMIC].error
    assert error is not None and "model.onnx" in error
    (warning,) = judging.export_warnings([], ["onnx"], {DYNAMIC: found[DYNAMIC]})
    assert warning.startswith(f"the baseline in {DYNAMIC} could not be measured: ")
