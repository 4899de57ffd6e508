"""FP16 for ONNX Runtime: half the bytes, hardly another answer, withheld where there are more."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import pytest

from compression.batches import Encoded, pad
from compression.encoder import Encoder, build_encoder
from compression.evaluate import padded_logits, predict, resampled_metric
from compression.export import (
    EXPORTERS,
    Exported,
    Int8Source,
    export_formats,
    served_bytes,
    served_logits,
    verify,
)
from compression.int8 import Judge, pass_gate
from compression.spec import HALF_GATE, Format, Int8Spec, gate_of
from tests.encoders import CLASSIFICATION, random_rows, random_weights, tiny_config

FP16: Format = "onnx-fp16"
VOCABULARY = 4000  # large enough that the weights are most of the file
ROWS = 200


@dataclass(frozen=True)
class Case:
    encoder: Encoder
    rows: Encoded
    logits: np.ndarray
    exported: dict[Format, Exported]
    files: Path

    def judge(self, folder: Path, *, expected: np.ndarray | None = None) -> Judge:
        folder.mkdir()
        dev = dataclasses.replace(self.rows, labels=self.logits.argmax(axis=-1))
        outcomes = CLASSIFICATION.outcomes(self.logits, dev)
        return Judge(
            task=CLASSIFICATION,
            dev=dev,
            expected=self.logits if expected is None else expected,
            spec=HALF_GATE,
            max_drop=None,
            teacher_accuracy=1.0,
            teacher_resampled=resampled_metric(CLASSIFICATION, outcomes),
            batch_size=16,
            pad_token_id=0,
            folder=folder,
            called="fp16",
        )


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    root = tmp_path_factory.mktemp("fp16")
    config = tiny_config(vocab_size=VOCABULARY)
    encoder = build_encoder(config, random_weights(config))
    rows = random_rows(ROWS, vocabulary=VOCABULARY)
    logits = np.asarray(predict(encoder, rows))
    np.savez(root / "rows.npz", **pad(rows, range(ROWS), pad_id=0))
    np.savez(root / "logits.npz", logits=padded_logits(logits))
    exported = export_formats(("onnx", FP16), encoder, root / "w1", labels=None)
    assert not [item.error for item in exported.values() if item.error]
    return Case(encoder, rows, logits, exported, root)


def test_weights_are_half_as_large_and_the_ends_are_as_of_every_format(case: Case) -> None:
    plain, half = (case.exported[fmt].folder for fmt in ("onnx", FP16))
    assert served_bytes(FP16, half) < 0.55 * served_bytes("onnx", plain)
    graphs = [onnx.load(str(folder / "model.onnx")).graph for folder in (plain, half)]
    before, after = ([*graph.input, *graph.output] for graph in graphs)
    assert [each.SerializeToString() for each in after] == [
        each.SerializeToString() for each in before
    ]
    floats = [v for v in graphs[1].initializer if v.data_type == onnx.TensorProto.FLOAT]
    assert sum(np.prod(value.dims) for value in floats) < 100


def test_it_rounds_and_answers_alone_and_padded(case: Case) -> None:
    parity = verify(
        FP16,
        case.exported[FP16].folder,
        batch=case.files / "rows.npz",
        reference=case.files / "logits.npz",
        tolerance=np.inf,
    )
    assert parity.error is None
    assert parity.max_abs is not None
    assert 1e-4 < parity.max_abs < 0.05 * case.logits.std()


def test_padding_changes_nothing_but_rounding(case: Case) -> None:
    """The mask's large number is clipped to what fp16 holds, and padding still has no weight."""
    folder = case.exported[FP16].folder
    alone, together = (
        served_logits(
            FP16, folder, rows=case.files / "rows.npz", batch_size=size, out=case.files / "out.npz"
        )
        for size in (1, 64)
    )
    assert np.abs(alone - together).max() < 0.02 * case.logits.std()


def test_the_same_weights_give_the_same_bytes(case: Case, tmp_path: Path) -> None:
    again = export_formats((FP16,), case.encoder, tmp_path, labels=None)[FP16]
    assert again.error is None
    one, other = (each.folder / "model.onnx" for each in (case.exported[FP16], again))
    assert one.read_bytes() == other.read_bytes()


def test_it_is_published_where_hardly_an_answer_flips(case: Case, tmp_path: Path) -> None:
    source = Int8Source(tmp_path / "no-calibration", tmp_path)
    outcome = pass_gate(EXPORTERS[FP16], case.exported[FP16], case.judge(tmp_path / "w"), source)
    assert outcome.error is None
    assert outcome.verdict is not None
    assert outcome.verdict.flipped <= HALF_GATE.max_flipped == 0.005


def test_it_is_withheld_where_more_flip_and_no_parts_are_looked_for(
    case: Case, tmp_path: Path
) -> None:
    expected = case.logits.copy()
    expected[:2] *= -1  # two answers of two hundred: one percent
    source = Int8Source(tmp_path / "no-calibration", tmp_path)
    judge = case.judge(tmp_path / "w", expected=expected)
    outcome = pass_gate(EXPORTERS[FP16], case.exported[FP16], judge, source)
    assert outcome.error == "fp16 flips 1.0% of the answers on dev, more than 0.5%"


def test_each_kind_of_rounding_has_a_gate_of_its_own() -> None:
    asked = Int8Spec(max_flipped=0.2)
    assert gate_of("onnx-int8-static", asked) == asked
    assert gate_of(FP16, asked) == HALF_GATE
