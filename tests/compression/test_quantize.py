"""INT8: what the quantised files hold, and the gate that judges them."""

from __future__ import annotations

import dataclasses
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest

from compression.batches import Encoded, pad
from compression.encoder import Encoder, build_encoder
from compression.errors import ExportFailed
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
from compression.export.answers import logits_of
from compression.export.base import Arrays
from compression.export.fresh import run_fresh
from compression.export.onnx_int8 import OnnxInt8Exporter
from compression.int8 import (
    Judge,
    Verdict,
    flipped_share,
    growing,
    loses_at_most,
    pass_gate,
)
from compression.quantize import PREFIX, SUFFIX, batches, parts, with_float
from compression.report import Interval
from compression.spec import INT8_FORMATS, Format, Int8Spec, TaskSpec
from compression.tasks import make_task
from compression.teachers.config import EncoderConfig
from compression.teachers.parameters import parameter_shapes
from tests.encoders import CLASSIFICATION, random_rows, random_weights, tiny_config

FORMATS: tuple[Format, ...] = ("onnx", *INT8_FORMATS)
VOCABULARY = 4000  # large enough that the tables are most of the file
ROWS = 60


@dataclass(frozen=True)
class Case:
    """An encoder in fp32 and in int8, and rows with its logits."""

    encoder: Encoder
    rows: Encoded
    logits: np.ndarray
    exported: dict[Format, Exported]
    source: Int8Source
    files: Path

    def graph(self, name: str) -> onnx.ModelProto:
        return onnx.load(str(self.source.folder / name))


def calm_weights(config: EncoderConfig) -> dict[str, np.ndarray]:
    """Random ones, smaller in the layers: those of the other tests magnify what is rounded."""
    return {
        name: value * np.float32(0.4) if name.startswith("layers.") and value.ndim == 2 else value
        for name, value in random_weights(config).items()
    }


def make_case(root: Path, encoder: Encoder, formats: tuple[Format, ...]) -> Case:
    rows = random_rows(ROWS, vocabulary=VOCABULARY)
    calibration = random_rows(48, seed=1, vocabulary=VOCABULARY)
    np.savez(root / "calibration.npz", **pad(calibration, range(48), pad_id=0))
    np.savez(root / "rows.npz", **pad(rows, range(ROWS), pad_id=0))
    logits = predict(encoder, rows)
    np.savez(root / "logits.npz", logits=padded_logits(logits))
    source = Int8Source(root / "calibration.npz", root / "kept")
    exported = export_formats(formats, encoder, root / "w1", labels=None, int8=source)
    assert not [item.error for item in exported.values() if item.error]
    return Case(encoder, rows, np.asarray(logits), exported, source, root)


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    config = tiny_config(vocab_size=VOCABULARY)
    encoder = build_encoder(config, calm_weights(config))
    return make_case(tmp_path_factory.mktemp("int8"), encoder, FORMATS)


@pytest.fixture(scope="module")
def outlier(tmp_path_factory: pytest.TempPathFactory) -> Case:
    """One neuron of the last layer is a thousand times larger than the others, and weighs as
    much less: with one scale for all of them, int8 has none left for the others.
    """
    config = tiny_config(vocab_size=VOCABULARY, activation="relu", ffn=(64, 64))
    weights = calm_weights(config)
    weights["layers.1.ffn.intermediate.bias"][0] = 4.0
    for name in ("weight", "bias"):
        weights[f"layers.1.ffn.intermediate.{name}"][..., 0] *= 1000
    weights["layers.1.ffn.output.weight"][0] /= 1000
    encoder = build_encoder(config, weights)
    return make_case(tmp_path_factory.mktemp("outlier"), encoder, ("onnx-int8-dynamic",))


def logits_in(case: Case, fmt: Format, *, folder: Path | None = None) -> np.ndarray:
    """Of the exported file, or of the one in `folder`, one row a call."""
    with np.load(case.files / "rows.npz") as file:
        rows = dict(file)
    run = EXPORTERS[fmt].load(folder or case.exported[fmt].folder, threads=1)
    return logits_of(run, rows, batch_size=1)


def judge_of(case: Case, folder: Path, **changes: object) -> Judge:
    """Dev's labels are the encoder's own answers, so its accuracy is 1."""
    folder.mkdir()
    dev = dataclasses.replace(case.rows, labels=case.logits.argmax(axis=-1))
    judge = Judge(
        task=CLASSIFICATION,
        dev=dev,
        expected=case.logits,
        spec=Int8Spec(),
        max_drop=None,
        teacher_accuracy=1.0,
        teacher_resampled=resampled_metric(
            CLASSIFICATION, CLASSIFICATION.outcomes(case.logits, dev)
        ),
        batch_size=1,
        pad_token_id=0,
        folder=folder,
    )
    return dataclasses.replace(judge, **changes)  # type: ignore[arg-type]


def exporter_of(fmt: Format) -> OnnxInt8Exporter:
    exporter = EXPORTERS[fmt]
    assert isinstance(exporter, OnnxInt8Exporter)
    return exporter


@pytest.mark.parametrize("fmt", INT8_FORMATS)
def test_int8_is_near_and_rounds(case: Case, fmt: Format) -> None:
    """Near on a CPU without VNNI too, where products of eight bits overflow."""
    error = np.abs(logits_in(case, fmt) - case.logits)
    assert error.max() > 1e-4
    assert error.mean() < 0.05 * case.logits.std()


@pytest.mark.parametrize("fmt", INT8_FORMATS)
def test_a_fresh_process_answers_alone_and_padded(case: Case, fmt: Format) -> None:
    parity = verify(
        fmt,
        case.exported[fmt].folder,
        batch=case.files / "rows.npz",
        reference=case.files / "logits.npz",
        tolerance=np.inf,
    )
    assert parity.error is None
    assert parity.max_abs is not None
    assert 1e-4 < parity.max_abs < case.logits.std()


@pytest.mark.parametrize("fmt", INT8_FORMATS)
def test_every_weight_but_the_classifiers_is_in_int8(case: Case, fmt: Format) -> None:
    config = case.encoder.config
    shapes = parameter_shapes(config)
    wanted = {
        name.removesuffix(".weight")
        for name, shape in shapes.items()
        if len(shape) == 2 and name != "classifier.weight"
    }
    method = exporter_of(fmt).method
    assert set(parts(case.graph(f"{method}/prepared.onnx").graph)) == wanted
    graph = onnx.load(str(case.exported[fmt].files[0])).graph
    matrices = [value for value in graph.initializer if len(value.dims) == 2]
    floats = [v for v in matrices if v.data_type == onnx.TensorProto.FLOAT]
    assert [list(value.dims) for value in floats] == [[config.hidden, config.num_labels]]
    assert len(matrices) == len(wanted) + 1
    scales = {v.name: list(v.dims) for v in graph.initializer if v.name.endswith("_scale")}
    for part in wanted:  # of a product one scale for each output, of a table one
        outputs = [] if part.startswith("embeddings.") else [shapes[f"{part}.weight"][1]]
        assert scales[f"{PREFIX}{part}{SUFFIX}_scale"] == outputs
    assert served_bytes(fmt, case.exported[fmt].folder) < 0.4 * served_bytes(
        "onnx", case.exported["onnx"].folder
    )


@pytest.mark.parametrize("fmt", FORMATS)
def test_the_runtime_fuses_no_residual_into_its_norm(
    case: Case, fmt: Format, tmp_path: Path
) -> None:
    """The fused operator takes longer than the two."""
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    served = str(case.exported[fmt].files[0])
    onnxruntime.InferenceSession(served, options, providers=["CPUExecutionProvider"])
    run = [node.op_type for node in onnx.load(str(tmp_path / "optimized.onnx")).graph.node]
    assert run.count("LayerNormalization") == 2 * case.encoder.config.layers + 1
    assert "SkipLayerNormalization" not in run


@pytest.mark.parametrize("fmt", INT8_FORMATS)
def test_all_parts_in_fp32_give_the_encoders_logits(
    case: Case, fmt: Format, tmp_path: Path
) -> None:
    method = exporter_of(fmt).method
    original = case.graph(f"{method}/prepared.onnx")
    model = case.graph(f"{method}/quantised.onnx")
    names = parts(original.graph)
    restored = with_float(model, original, names)
    assert not {"MatMulInteger", "QuantizeLinear", "DynamicQuantizeLinear"} & {
        node.op_type for node in restored.graph.node
    }
    onnx.save(restored, str(tmp_path / "model.onnx"))
    with np.load(case.files / "rows.npz") as file:
        found = logits_of(EXPORTERS[fmt].load(tmp_path, threads=1), dict(file), batch_size=8)
    np.testing.assert_allclose(found, case.logits, atol=1e-4)
    one = with_float(model, original, names[-1:])
    assert model.ByteSize() < one.ByteSize() < restored.ByteSize()


def test_dev_is_answered_without_paddle(case: Case, tmp_path: Path) -> None:
    fmt = INT8_FORMATS[0]
    options = {
        "--format": fmt,
        "--folder": case.exported[fmt].folder,
        "--rows": case.files / "rows.npz",
        "--out": tmp_path / "logits.npz",
    }
    told = run_fresh(
        "compression.export.answers",
        [*(part for pair in options.items() for part in pair), "--batch-size", "1"],
        timeout_s=120,
    )
    assert told == {"rows": ROWS, "libraries": ["onnxruntime"]}
    with np.load(tmp_path / "logits.npz") as file:
        np.testing.assert_array_equal(file["logits"], logits_in(case, fmt))


def test_a_damaged_file_is_not_judged_but_withheld(case: Case, tmp_path: Path) -> None:
    fmt = INT8_FORMATS[0]
    folder = Path(shutil.copytree(case.exported[fmt].folder, tmp_path / "damaged"))
    (folder / "model.onnx").write_bytes((folder / "model.onnx").read_bytes()[:-200])
    with pytest.raises(ExportFailed, match=r"compression\.export\.answers ended with status 1"):
        served_logits(
            fmt,
            folder,
            rows=case.files / "rows.npz",
            batch_size=1,
            out=tmp_path / "logits.npz",
        )
    files = dataclasses.replace(case.exported[fmt], folder=folder)
    outcome = pass_gate(exporter_of(fmt), files, judge_of(case, tmp_path / "judge"), case.source)
    assert outcome.verdict is None
    assert outcome.error is not None
    assert "ended with status 1" in outcome.error


def test_what_flips_more_than_the_bound_is_withheld_and_says_so(case: Case, tmp_path: Path) -> None:
    fmt = INT8_FORMATS[0]
    judge = judge_of(
        case, tmp_path / "judge", expected=-case.logits, spec=Int8Spec(max_fp32_share=0)
    )
    outcome = pass_gate(exporter_of(fmt), case.exported[fmt], judge, case.source)
    assert outcome.verdict is not None
    assert outcome.verdict.flipped > 0.9  # of three labels, the likeliest became the least likely
    assert outcome.error == (
        f"int8 flips {outcome.verdict.flipped:.1%} of the answers on dev, more than 5.0%"
    )


def test_the_worst_part_goes_back_to_fp32_and_brings_the_answers_back(
    outlier: Case, tmp_path: Path
) -> None:
    fmt = INT8_FORMATS[0]
    folder = Path(shutil.copytree(outlier.exported[fmt].folder, tmp_path / "files"))
    files = dataclasses.replace(outlier.exported[fmt], folder=folder)
    before = np.abs(logits_in(outlier, fmt) - outlier.logits).mean()
    judge = judge_of(outlier, tmp_path / "judge", spec=Int8Spec(max_flipped=0.03), max_drop=3)
    assert not judge.publishes(judge(files))
    outcome = pass_gate(exporter_of(fmt), files, judge, outlier.source)
    assert outcome.error is None
    assert outcome.fp32_parts == ("layers.1.ffn.output",)
    assert outcome.verdict is not None
    assert outcome.verdict.flipped <= 0.03
    assert outcome.verdict.accuracy >= 0.97
    # The file that is there now is the one that was judged.
    found = logits_in(outlier, fmt, folder=folder)
    assert float((found.argmax(-1) != outlier.logits.argmax(-1)).mean()) == outcome.verdict.flipped
    assert np.abs(found - outlier.logits).mean() < before / 3


def test_a_constraint_that_fp32_parts_do_not_meet_leaves_the_file_as_it_was(
    outlier: Case, tmp_path: Path
) -> None:
    """It may be published, and is no candidate for that constraint."""
    fmt = INT8_FORMATS[0]
    folder = Path(shutil.copytree(outlier.exported[fmt].folder, tmp_path / "files"))
    files = dataclasses.replace(outlier.exported[fmt], folder=folder)
    one_part = Int8Spec(max_flipped=1, max_fp32_share=0.1)
    judge = judge_of(outlier, tmp_path / "judge", spec=one_part, max_drop=-1)
    outcome = pass_gate(exporter_of(fmt), files, judge, outlier.source)
    assert (outcome.fp32_parts, outcome.error) == ((), None)
    assert outcome.verdict is not None
    assert outcome.verdict.accuracy_drop > 3
    found = logits_in(outlier, fmt, folder=folder)
    np.testing.assert_array_equal(found, logits_in(outlier, fmt))


class NoOrder(OnnxInt8Exporter):
    """One whose process of ranking fails, after it left another file than the one judged."""

    def __init__(self, folder: Path) -> None:
        super().__init__("dynamic")
        self.folder = folder

    def worst_first(self, int8: Int8Source) -> list[str]:
        (self.folder / "model.onnx").write_bytes(b"another file")
        raise ExportFailed("compression.quantize took longer than 3600 seconds")


@pytest.mark.parametrize("most", [1.0, 0.0])
def test_a_search_that_fails_withholds_only_what_flips_too_much(
    outlier: Case, tmp_path: Path, most: float
) -> None:
    fmt = INT8_FORMATS[0]
    folder = Path(shutil.copytree(outlier.exported[fmt].folder, tmp_path / "files"))
    files = dataclasses.replace(outlier.exported[fmt], folder=folder)
    judge = judge_of(outlier, tmp_path / "judge", spec=Int8Spec(max_flipped=most), max_drop=-1)
    outcome = pass_gate(NoOrder(folder), files, judge, outlier.source)
    assert outcome.verdict is not None
    if most == 1:
        assert (outcome.error, outcome.fp32_parts) == (None, ())
        np.testing.assert_array_equal(
            logits_in(outlier, fmt, folder=folder), logits_in(outlier, fmt)
        )
    else:
        assert outcome.error is not None
        assert outcome.error.startswith("int8 flips ")
        assert outcome.error.endswith(
            "not found: compression.quantize took longer than 3600 seconds"
        )


def test_a_drop_is_held_against_the_bound_as_the_selection_does() -> None:
    within = (Interval(confidence=0.95, low=-1.0, high=2.0),)
    # 100 * (0.86 - 0.85) is a little more than 1.
    assert loses_at_most(1, 100 * (0.86 - 0.85), within, confidence=None)
    assert not loses_at_most(1, 0.5, within, confidence=0.95)
    assert loses_at_most(2, 0.5, within, confidence=0.95)
    assert not loses_at_most(2, 0.5, (), confidence=0.95)


def test_a_judge_with_a_confidence_is_not_content_with_the_point_alone(
    case: Case, tmp_path: Path
) -> None:
    verdict = Verdict(
        accuracy=1.0,
        accuracy_drop=0.0,
        accuracy_drop_intervals=(Interval(confidence=0.9, low=-1.0, high=1.5),),
        flipped=0.0,
        resampled=np.ones(3),
    )
    judge = judge_of(case, tmp_path / "judge", max_drop=1.0)
    assert judge.is_content_with(verdict)
    assert not dataclasses.replace(judge, confidence=0.9).is_content_with(verdict)


@pytest.mark.parametrize(
    ("count", "share", "expected"),
    [(10, 0.5, [1, 2, 4, 5]), (8, 0.5, [1, 2, 4]), (3, 0.5, [1]), (3, 0, []), (4, 1, [1, 2, 4])],
)
def test_more_and_more_parts_are_tried_up_to_the_share(
    count: int, share: float, expected: list[int]
) -> None:
    order = [str(i) for i in range(count)]
    tried = list(growing(order, share=share))
    assert [len(each) for each in tried] == expected
    assert all(each == tuple(order[: len(each)]) for each in tried)


def test_calibration_batches_hold_every_row_once_without_more_padding_than_needed() -> None:
    rows = pad(random_rows(40), range(40), pad_id=0)
    met = list(batches(rows))
    assert sum(int(batch["attention_mask"].sum()) for batch in met) == rows["attention_mask"].sum()
    assert all(batch["attention_mask"].any(axis=0).all() for batch in met)
    assert sum(len(batch["input_ids"]) for batch in met) == 40


def test_tokens_logits_come_back_at_their_rows_with_zeros_at_padding() -> None:
    rows = pad(random_rows(7), range(7), pad_id=0)
    seen: list[tuple[int, ...]] = []

    def run(batch: Arrays) -> np.ndarray:
        ids = batch["input_ids"]
        seen.append(ids.shape)
        return np.stack([ids + 1, -ids - 1], axis=-1).astype(np.float32)  # [B, T, 2]

    found = logits_of(run, rows, batch_size=3)
    ids, mask = rows["input_ids"], rows["attention_mask"]
    np.testing.assert_array_equal(found[..., 0], (ids + 1) * mask)
    np.testing.assert_array_equal(found[..., 1], -(ids + 1) * mask)
    lengths = mask.sum(axis=1)
    assert seen == [(3, lengths[:3].max()), (3, lengths[3:6].max()), (1, lengths[6])]


def test_of_scores_the_metrics_loss_stands_for_flipped_answers() -> None:
    labels = np.linspace(0, 1, 20, dtype=np.float32)
    data = Encoded([[1]] * 20, [[0]] * 20, labels)
    task = make_task(TaskSpec(kind="regression"), ("score",))
    exact, noisy = labels[:, None], labels[:, None] + np.tile([[0.5], [-0.5]], (10, 1))
    assert flipped_share(task, exact, noisy, data) == 0  # a gain
    assert flipped_share(task, noisy, exact, data) == pytest.approx(
        1 - np.corrcoef(noisy[:, 0], labels)[0, 1]
    )


def test_a_set_of_labels_is_one_answer() -> None:
    data = Encoded([[1]] * 2, [[0]] * 2, np.zeros((2, 2), np.float32))
    task = make_task(TaskSpec(kind="multi_label"), ("a", "b"))
    one = np.array([[1.0, -1.0], [1.0, 1.0]])
    other = np.array([[2.0, -3.0], [1.0, -1.0]])
    assert flipped_share(task, one, other, data) == 0.5
