"""Export of every format, and the parity gate in front of publication."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path

import numpy as np
import onnx
import paddle
import pytest

from compression.batches import pad
from compression.encoder import Encoder, build_encoder, numpy_weights
from compression.errors import ExportFailed
from compression.evaluate import padded_logits, predict
from compression.export import (
    EXPORTERS,
    INPUTS,
    OUTPUT,
    Exported,
    Parity,
    export,
    export_formats,
    format_report,
    served_bytes,
    sha256_of,
    verify,
)
from compression.export import onnx as onnx_format
from compression.export.base import ExportSource
from compression.export.fresh import IMPORT_ROOT, fresh_environment, run_fresh
from compression.export.parity import largest_difference
from compression.spec import Format
from compression.supernet import extract_weights, subnetwork_of
from compression.teachers import read_checkpoint
from tests.encoders import as_tensors, random_rows, tiny_encoder

FORMATS: tuple[Format, ...] = ("safetensors", "paddle", "onnx")
LABELS = ("bad", "good", "plain")
EXPORT_AGAIN = """
import sys
from pathlib import Path
from compression.encoder import build_encoder
from compression.export import export_formats
from compression.teachers import read_checkpoint

checkpoint = read_checkpoint(Path(sys.argv[1]))
encoder = build_encoder(checkpoint.config, checkpoint.tensors)
export_formats(sys.argv[3:], encoder, Path(sys.argv[2]), labels=checkpoint.labels)
"""
TOLERANCE = 1e-4


@dataclass(frozen=True)
class Case:
    """A width-1/2 sub-network, exported in all formats, and its supernet's logits."""

    root: Path
    small: Encoder
    exported: dict[Format, Exported]
    batch: Path
    reference: Path


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    root = tmp_path_factory.mktemp("export")
    supernet = tiny_encoder()
    subnetwork = subnetwork_of(supernet.config, Fraction(1, 2))
    small = build_encoder(
        supernet.config.narrowed(Fraction(1, 2)),
        extract_weights(supernet.config, numpy_weights(supernet), subnetwork),
    )
    rows = random_rows(20)
    arrays = pad(rows, range(len(rows)), pad_id=0)
    with paddle.no_grad():
        logits = supernet(*as_tensors(arrays), subnetwork=subnetwork).numpy()
    np.savez(root / "batch.npz", **arrays)
    np.savez(root / "reference.npz", logits=logits)
    exported = export_formats(FORMATS, small, root / "w1_2", labels=LABELS)
    return Case(root, small, exported, root / "batch.npz", root / "reference.npz")


def gate(case: Case, fmt: Format, folder: Path, **changes: Path) -> Parity:
    files = {"batch": case.batch, "reference": case.reference, **changes}
    return verify(fmt, folder, **files, tolerance=TOLERANCE)


@pytest.mark.parametrize("fmt", FORMATS)
def test_a_fresh_process_gets_the_supernets_logits(case: Case, fmt: Format) -> None:
    max_abs, error = gate(case, fmt, case.exported[fmt].folder)
    assert error is None
    assert max_abs is not None
    assert max_abs <= 1e-5


def test_onnx_is_checked_without_paddle_in_the_process(case: Case) -> None:
    files = {
        "--folder": case.exported["onnx"].folder,
        "--batch": case.batch,
        "--reference": case.reference,
    }
    answer = run_fresh(
        "compression.export.parity",
        ["--format", "onnx", *(part for pair in files.items() for part in pair)],
        timeout_s=120,
    )
    assert answer["libraries"] == ["onnxruntime"]
    assert answer["rows"] == 20


def test_the_files_are_those_promised(case: Case) -> None:
    names = {fmt: [path.name for path in item.files] for fmt, item in case.exported.items()}
    assert names == {
        "safetensors": ["config.json", "model.safetensors"],
        "paddle": ["inference.json", "inference.pdiparams"],
        "onnx": ["model.onnx"],
    }
    for fmt, item in case.exported.items():
        assert item.folder == case.root / "w1_2" / fmt
        assert sorted(item.folder.iterdir()) == sorted(item.files)
        assert served_bytes(fmt, item.folder) == sum(path.stat().st_size for path in item.files)


def test_onnx_names_its_ends_and_leaves_batch_and_length_open(case: Case) -> None:
    model = onnx.load(str(case.exported["onnx"].files[0]))

    def axes(value: onnx.ValueInfoProto) -> list[str | int]:
        return [d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim]

    assert {v.name: axes(v) for v in model.graph.input} == {
        name: ["batch", "length"] for name in INPUTS
    }
    assert {v.name: axes(v) for v in model.graph.output} == {OUTPUT: ["batch", 3]}


def test_onnx_holds_nothing_that_is_not_read(case: Case) -> None:
    graph = onnx.load(str(case.exported["onnx"].files[0])).graph
    read = {name for node in graph.node for name in node.input} | {OUTPUT}
    assert {value.name for value in graph.initializer} <= read
    assert all(read & set(node.output) for node in graph.node)


def test_safetensors_is_read_back_as_it_was(case: Case) -> None:
    checkpoint = read_checkpoint(case.exported["safetensors"].folder)
    assert checkpoint.config == case.small.config
    assert checkpoint.labels == LABELS
    weights = numpy_weights(case.small)
    assert checkpoint.tensors.keys() == weights.keys()
    for name, value in weights.items():
        np.testing.assert_array_equal(checkpoint.tensors[name], value)


def test_exporting_leaves_the_encoder_as_it_was(tmp_path: Path) -> None:
    encoder = tiny_encoder()
    before = numpy_weights(encoder)
    names = [parameter.name for parameter in encoder.parameters()]
    arrays = pad(random_rows(4), range(4), pad_id=0)
    with paddle.no_grad():
        logits = encoder(*as_tensors(arrays)).numpy()
    export("paddle", encoder, tmp_path, labels=None)
    assert "forward" not in vars(encoder)  # tracing replaces the forward of the layer it is given
    assert [parameter.name for parameter in encoder.parameters()] == names
    after = numpy_weights(encoder)
    assert before.keys() == after.keys()
    with paddle.no_grad():
        np.testing.assert_array_equal(encoder(*as_tensors(arrays)).numpy(), logits)


def test_another_process_writes_the_same_bytes(case: Case, tmp_path: Path) -> None:
    """This one has built and traced other networks before; that one has not."""
    written = case.root / "w1_2"
    done = subprocess.run(
        [sys.executable, "-c", EXPORT_AGAIN, written / "safetensors", tmp_path, *FORMATS],
        cwd=IMPORT_ROOT,
        env=fresh_environment(),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    for exported in case.exported.values():
        for path in exported.files:
            again = tmp_path / path.relative_to(written)
            assert again.read_bytes() == path.read_bytes(), path.name


def test_the_program_is_traced_once_and_removed(case: Case) -> None:
    with ExportSource(case.small, None) as source:
        program = source.program
        stamp = program.weights.stat().st_mtime_ns
        assert source.program == program
        assert program.weights.stat().st_mtime_ns == stamp
    assert not program.weights.parent.exists()


def test_drift_is_refused_with_its_size(case: Case, tmp_path: Path) -> None:
    drifted = build_encoder(case.small.config, numpy_weights(case.small))
    drifted.classifier.bias.set_value(drifted.classifier.bias.numpy() + np.float32(0.01))
    export("onnx", drifted, tmp_path / "onnx", labels=LABELS)
    max_abs, error = gate(case, "onnx", tmp_path / "onnx")
    assert max_abs == pytest.approx(0.01, abs=1e-4)
    assert error == "logits differ from the supernet's by 0.01, more than 0.0001"


@pytest.mark.parametrize("fmt", ["onnx", "safetensors"])
def test_a_damaged_file_is_refused_with_the_process_last_words(
    case: Case, fmt: Format, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(case.exported[fmt].folder, tmp_path / fmt))
    largest = max(folder.iterdir(), key=lambda path: path.stat().st_size)
    largest.write_bytes(largest.read_bytes()[:-200])
    max_abs, error = gate(case, fmt, folder)
    assert max_abs is None
    assert error is not None
    assert error.startswith("compression.export.parity ended with status 1: ")
    assert "Error" in error or "Invalid" in error


def test_a_gate_that_cannot_compare_stays_shut(case: Case) -> None:
    with np.load(case.batch) as file:
        batch = {name: file[name] for name in INPUTS}
    with np.load(case.reference) as file:
        reference = file["logits"]
    run = EXPORTERS["onnx"].load(case.exported["onnx"].folder, threads=1)

    def why(batch: dict[str, np.ndarray], reference: np.ndarray) -> str | None:
        max_abs, error = largest_difference(run, batch, reference)
        assert max_abs is None
        return error

    lost = reference.copy()
    lost[7, 1] = np.nan
    assert why(batch, lost) == "the supernet's own logits are not finite"
    assert why(batch, reference[:-1]) == "20 rows, but logits of 19 to compare with"
    none = {name: value[:0] for name, value in batch.items()}
    assert why(none, reference[:0]) == "0 rows, but logits of 0 to compare with"
    assert why(batch, reference[:, :2]) == "logits have shape [16, 3], not [16, 2]"
    broken = largest_difference(lambda b: run(b) * np.float32(np.nan), batch, reference)
    assert broken == (None, "logits of row 0 are not finite")


def test_a_verification_that_hangs_is_ended(case: Case) -> None:
    parity = verify(
        "safetensors",
        case.exported["safetensors"].folder,
        batch=case.batch,
        reference=case.reference,
        tolerance=TOLERANCE,
        timeout_s=0.05,
    )
    assert parity == (None, "compression.export.parity took longer than 0.05 seconds")


def test_a_format_that_fails_leaves_no_files_and_does_not_stop_the_others(
    case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(onnx_format, "CONVERT_TIMEOUT_S", 0.05)
    exported = export_formats(("onnx", "paddle"), case.small, tmp_path, labels=LABELS)
    assert exported["onnx"].error == "compression.export.onnx took longer than 0.05 seconds"
    assert exported["onnx"].files == ()
    assert exported["paddle"].error is None
    assert [path.name for path in tmp_path.iterdir()] == ["paddle"]
    report = format_report(exported["onnx"], None, root=tmp_path, rows=20, tolerance=TOLERANCE)
    assert not report.published
    assert report.error == exported["onnx"].error
    assert (report.parity_max_abs, report.parity_rows) == (None, 0)


def test_a_program_that_cannot_be_converted_says_why(tmp_path: Path) -> None:
    graph, weights, out = (
        tmp_path / name for name in ("inference.json", "inference.pdiparams", "model.onnx")
    )
    graph.write_text(json.dumps({"not": "a program"}))
    weights.write_bytes(b"")
    with pytest.raises(ExportFailed, match=r"compression\.export\.onnx ended with status"):
        run_fresh(
            "compression.export.onnx",
            ["--graph", graph, "--weights", weights, "--out", out],
            timeout_s=120,
        )
    assert not (tmp_path / "model.onnx").exists()


def test_what_passes_is_published_with_its_digests(case: Case) -> None:
    exported = case.exported["paddle"]
    report = format_report(
        exported, Parity(2e-7, None), root=case.root / "w1_2", rows=20, tolerance=TOLERANCE
    )
    assert report.published
    assert (report.parity_max_abs, report.parity_rows) == (2e-7, 20)
    assert [file.path for file in report.files] == [
        "paddle/inference.json",
        "paddle/inference.pdiparams",
    ]
    for file in report.files:
        path = case.root / "w1_2" / file.path
        assert (file.sha256, file.size_bytes) == (sha256_of(path), path.stat().st_size)
    assert report.size_bytes == sum(file.size_bytes for file in report.files)


@pytest.mark.parametrize("parity", [Parity(0.2, "logits differ"), None])
def test_what_does_not_pass_is_deleted(case: Case, tmp_path: Path, parity: Parity | None) -> None:
    folder = Path(shutil.copytree(case.exported["onnx"].folder, tmp_path / "onnx"))
    exported = replace(case.exported["onnx"], folder=folder, files=(folder / "model.onnx",))
    report = format_report(exported, parity, root=tmp_path, rows=20, tolerance=TOLERANCE)
    assert not report.published
    assert report.error
    assert report.files == ()
    assert not folder.exists()


def test_a_token_head_is_exported_with_its_length_open_and_compared_token_by_token(
    tmp_path: Path,
) -> None:
    encoder, rows = tiny_encoder(head="token"), random_rows(12)
    batch, reference = tmp_path / "batch.npz", tmp_path / "reference.npz"
    np.savez(batch, **pad(rows, range(12), pad_id=0))
    logits = padded_logits(predict(encoder, rows))
    np.savez(reference, logits=logits)
    exported = export_formats(FORMATS, encoder, tmp_path / "w1", labels=LABELS)
    for fmt, item in exported.items():
        max_abs, error = verify(
            fmt, item.folder, batch=batch, reference=reference, tolerance=TOLERANCE
        )
        assert error is None
        assert max_abs is not None
        assert max_abs <= 1e-5
    graph = onnx.load(str(exported["onnx"].files[0])).graph
    (dims,) = [v.type.tensor_type.shape.dim for v in graph.output]
    assert [d.dim_param or d.dim_value for d in dims] == ["batch", "length", 3]
    last = len(rows.input_ids[7]) - 1
    logits[7, last, 2] += 0.5  # one class of one token of one row
    np.savez(reference, logits=logits)
    parity = verify(
        "onnx", exported["onnx"].folder, batch=batch, reference=reference, tolerance=TOLERANCE
    )
    assert parity.max_abs == pytest.approx(0.5, abs=1e-4)
    assert parity.error is not None
