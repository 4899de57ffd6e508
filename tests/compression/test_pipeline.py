"""The whole of the method on a tiny model: from folders to a report and files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from compression.__main__ import main
from compression.batches import pad
from compression.encoder import build_encoder
from compression.errors import DeviceUnavailable, InvalidSpec
from compression.pipeline import compress
from compression.report import STAGES, CompressionReport, Progress
from compression.spec import Spec
from compression.teachers import read_checkpoint
from compression.tokenization import encode, load_tokenizer
from tests.builders import tiny_bert, tiny_dataset
from tests.encoders import as_tensors


def small_spec(**changes: Any) -> Spec:
    values = {
        "task": {"max_seq_len": 32},
        "teacher": {"epochs": 1, "learning_rate": 2e-3},
        "distillation": {"epochs": 1, "learning_rate": 1e-3},
        "supernet": {"width_mults": ["1", "1/2"]},
        "importance": {"rows": 64},
        "latency": {"rounds": 5},
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
    assert set(finished["report"].stage_seconds) == set(STAGES)


def test_the_report_is_the_one_on_disk(finished: dict[str, Any]) -> None:
    text = (finished["root"] / "run" / "report.json").read_text()
    assert CompressionReport.model_validate_json(text) == finished["report"]


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
    encoder = build_encoder(checkpoint.config, checkpoint.tensors)
    encoder.eval()
    rows = encode(load_tokenizer(finished["model"]), ["good film", "a bad one"], None, 32)
    onnx = pytest.importorskip("onnxruntime")
    session = onnx.InferenceSession(
        str(folder.parent / "onnx" / "model.onnx"), providers=["CPUExecutionProvider"]
    )
    from compression.batches import Encoded

    data = Encoded([r[0] for r in rows], [r[1] for r in rows], np.zeros(2, np.int64))
    arrays = pad(data, range(2), pad_id=0)
    np.testing.assert_allclose(
        session.run(None, arrays)[0], encoder(*as_tensors(arrays)).numpy(), atol=1e-4
    )


def test_exactly_one_subnetwork_is_selected_and_judged_on_test(finished: dict[str, Any]) -> None:
    report: CompressionReport = finished["report"]
    chosen = [network for network in report.subnetworks if network.selected]
    assert [network.name for network in chosen] == [report.selection.subnetwork]
    assert chosen[0].test_accuracy is not None
    assert all(n.test_accuracy is None for n in report.subnetworks if not n.selected)
    assert report.selection.reason


def test_constraints_that_nothing_meets_end_without_a_selection(tmp_path: Path) -> None:
    model = tiny_bert(tmp_path / "model", num_labels=2, seed=1)
    dataset = tiny_dataset(tmp_path / "dataset", rows={"train": 80, "dev": 40, "test": 20}, seed=1)
    spec = small_spec(
        constraints={"max_size_mb": 1e-6},
        supernet={"width_mults": ["1/2"]},
        export={"formats": ["onnx"]},
        task={"max_seq_len": 32, "labels": None},
    )
    report = compress(spec, model, dataset, tmp_path / "run")
    assert report.teacher.fine_tuned_steps == 0
    assert report.selection.subnetwork is None
    assert [c.subnetwork for c in report.selection.nearest] == ["w1_2"]
    assert report.selection.nearest[0].misses
    assert not any(network.selected for network in report.subnetworks)


def test_a_gpu_is_refused_clearly_where_there_is_none(tmp_path: Path) -> None:
    with pytest.raises(DeviceUnavailable, match="built for the CPU alone") as error:
        compress(small_spec(device="gpu"), tmp_path, tmp_path, tmp_path / "run")
    assert error.value.pointer == "/device"
    assert not (tmp_path / "run").exists()


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
    assert main([*arguments, "--out", str(tmp_path / "out")]) == 0
    shown = capsys.readouterr()
    assert "1/2" in shown.out
    assert "distil" in shown.err
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["distillation_steps"] == 2

    with pytest.raises(SystemExit):
        main([*arguments, "--out", str(tmp_path / "out")])
    assert "not an empty folder" in capsys.readouterr().err
    spec.write_text("{task: {max_seq_len: 32}, supernet: {width_mults: [1/3]}}\n")
    assert main([*arguments, "--out", str(tmp_path / "other")]) == 2
    assert "/supernet/width_mults/0" in capsys.readouterr().err
    spec.write_text("supernt: {}\n")
    with pytest.raises(SystemExit):
        main([*arguments, "--out", str(tmp_path / "third")])
    assert "supernt" in capsys.readouterr().err
