"""The download: the same bytes each time, complete, and able to run without the service."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import pickle
import shutil
import subprocess
import sys
import tarfile
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import paddle
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from compression.batches import Encoded, pad
from compression.bundle import (
    BundleFacts,
    build_manifest,
    input_digests,
    model_card,
    write_bundle,
)
from compression.device_profile import DeviceProfile, make_predictor
from compression.encoder import Encoder, build_encoder
from compression.export import Parity, export_formats, format_report
from compression.manifest import SCHEMA, Manifest, Provenance, code_digest, schema_bytes
from compression.regression import Flips, GroupFlips, RegressionReport, Regressions
from compression.report import (
    ComparisonOnTest,
    DatasetReport,
    FileReport,
    FormatReport,
    Interval,
    LatencyReport,
    SubnetworkReport,
    TeacherReport,
    TrainingReport,
)
from compression.spec import (
    CONFIDENCES,
    INT8_FORMATS,
    ROUNDED_FORMATS,
    ConstraintSpec,
    Format,
    LatencySetting,
    Spec,
)
from compression.teachers import read_checkpoint
from compression.tokenization import encode, load_tokenizer, save_tokenizer
from compression.verify import verify_bundle
from tests.builders import device_profile, tiny_bert
from tests.encoders import as_tensors

TEXTS = ["a good film", "the story was dull , slow and very very very long", "music"]
LABELS = ("rotten", "fresh")
MAX_SEQ_LEN = 8
FORMATS: tuple[Format, ...] = ("safetensors", "paddle", "onnx")
WRITE_AGAIN = """
import dataclasses, pickle, sys
from pathlib import Path
from compression.bundle import write_bundle

source, folder, tokenizer, out = map(Path, sys.argv[1:])
facts = pickle.loads(source.read_bytes())
environment = dict(reversed(facts.environment.items()))
write_bundle(
    out,
    dataclasses.replace(facts, environment=environment),
    subnetwork_dir=folder,
    tokenizer_files=sorted(tokenizer.iterdir(), reverse=True),
)
"""


@dataclass(frozen=True)
class Case:
    model: Path
    encoder: Encoder
    folder: Path  # the sub-network's artifact folder
    tokenizer_files: list[Path]
    facts: BundleFacts

    def write(
        self,
        out: Path,
        facts: BundleFacts | None = None,
        signing_key: Ed25519PrivateKey | None = None,
    ) -> FileReport:
        return write_bundle(
            out,
            facts or self.facts,
            subnetwork_dir=self.folder,
            tokenizer_files=self.tokenizer_files,
            signing_key=signing_key,
        )

    def unpack(self, root: Path, facts: BundleFacts | None = None) -> Path:
        self.write(root / "bundle.tar.gz", facts)
        with tarfile.open(root / "bundle.tar.gz") as archive:
            archive.extractall(root, filter="data")
        return root / self.facts.subnetwork.name


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    root = tmp_path_factory.mktemp("bundle")
    model = tiny_bert(root / "model", num_labels=2)
    checkpoint = read_checkpoint(model)
    encoder = build_encoder(checkpoint.config, checkpoint.tensors)
    folder = root / "w1_2"
    exported = export_formats(FORMATS, encoder, folder, labels=LABELS)
    reports = [
        format_report(item, Parity(3e-7, None), root=folder, rows=64, tolerance=1e-4)
        for item in exported.values()
    ]
    latency = LatencyReport(
        p50_ms=3.72, p95_ms=4.01, p99_ms=5.5, rounds=50, batch_size=1, seq_len=8, threads=1
    )
    served = [
        report.model_copy(update={"latency": latency, "speedup": 2.5})
        if report.format != "safetensors"
        else report
        for report in reports
    ]
    facts = BundleFacts(
        spec=Spec.model_validate({"task": {"max_seq_len": MAX_SEQ_LEN}, "seed": 7}),
        dataset=DatasetReport(
            rows={"train": 40, "dev": 10},
            labels=LABELS,
            label_names=LABELS,
            text="sentence",
            label="label",
        ),
        teacher=TeacherReport(family="bert", fine_tuned_steps=12, parameters=4321, accuracy=0.8555),
        subnetwork=SubnetworkReport(
            name="w1_2",
            width_mult=Fraction(1, 2),
            heads=(2, 2),
            ffn=(32, 32),
            parameters=1234,
            flops=99,
            accuracy=0.8515,
            accuracy_drop=0.4,
            formats=tuple(served),
        ),
        provenance=Provenance(
            model=input_digests(model), dataset={"train.csv": "ab" * 32}, code=code_digest()
        ),
        environment={"cpu": "a processor", "paddle": "3.3.1"},
        pad_token_id=checkpoint.config.pad_token_id,
    )
    return Case(model, encoder, folder, save_tokenizer(model, root / "tokenizer"), facts)


@pytest.fixture(scope="module")
def unpacked(case: Case, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return case.unpack(tmp_path_factory.mktemp("unpacked"))


def predict(
    folder: Path, *arguments: str, interpreter: tuple[str, ...] = ()
) -> subprocess.CompletedProcess[str]:
    """predict.py as a user runs it: from elsewhere, with nothing of this repository in reach."""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    return subprocess.run(
        [sys.executable, *interpreter, str(folder / "predict.py"), *arguments],
        cwd=folder.parent,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def expected(case: Case, texts: list[str], pairs: list[str] | None = None) -> np.ndarray:
    """Probabilities [rows, labels] of our own tokenizer and encoder."""
    rows = encode(load_tokenizer(case.model), texts, pairs, MAX_SEQ_LEN)
    data = Encoded([ids for ids, _ in rows], [types for _, types in rows], np.zeros(len(rows)))
    with paddle.no_grad():
        logits = case.encoder(*as_tensors(pad(data, range(len(rows)), pad_id=0))).numpy()
    exponents = np.exp(logits)
    return np.asarray(exponents / exponents.sum(axis=1, keepdims=True))


def probabilities(stdout: str) -> np.ndarray:
    answers = [json.loads(line) for line in stdout.splitlines()]
    for answer in answers:
        best = max(answer["probabilities"], key=answer["probabilities"].get)
        assert (answer["label"], answer["probability"]) == (best, answer["probabilities"][best])
    return np.array([[answer["probabilities"][label] for label in LABELS] for answer in answers])


def test_equal_inputs_give_equal_bytes(case: Case, tmp_path: Path) -> None:
    first = case.write(tmp_path / "a" / "bundle.tar.gz")
    for path in case.folder.rglob("*"):
        os.utime(path, (1, 1))
    second = case.write(tmp_path / "b" / "bundle.tar.gz")
    assert first == second
    assert (tmp_path / "a/bundle.tar.gz").read_bytes() == (
        tmp_path / "b/bundle.tar.gz"
    ).read_bytes()


def test_another_process_and_hour_give_equal_bytes(case: Case, tmp_path: Path) -> None:
    """From copies elsewhere, with facts that were read back from JSON in another order."""
    first = case.write(tmp_path / "bundle.tar.gz")
    (tmp_path / "facts.pickle").write_bytes(pickle.dumps(case.facts))
    folder = shutil.copytree(case.folder, tmp_path / "elsewhere" / "network")
    tokenizer = shutil.copytree(case.tokenizer_files[0].parent, tmp_path / "elsewhere/tokenizer")
    for path in (tmp_path / "elsewhere").rglob("*"):
        os.utime(path, (86400, 86400))
        path.chmod(0o700)
    out = tmp_path / "elsewhere" / "other name.gz"
    done = subprocess.run(
        [sys.executable, "-c", WRITE_AGAIN, tmp_path / "facts.pickle", folder, tokenizer, out],
        cwd=Path(__file__).resolve().parents[2],
        env={**os.environ, "TZ": "Asia/Tokyo", "PYTHONHASHSEED": "7"},
        umask=0o077,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert hashlib.sha256(out.read_bytes()).hexdigest() == first.sha256


def test_a_signature_is_all_that_a_key_adds(case: Case, tmp_path: Path) -> None:
    key = Ed25519PrivateKey.generate()
    case.write(tmp_path / "plain.tar.gz")
    for name in ("signed.tar.gz", "again.tar.gz"):
        case.write(tmp_path / name, signing_key=key)
    assert (tmp_path / "signed.tar.gz").read_bytes() == (tmp_path / "again.tar.gz").read_bytes()
    plain, signed = (contents(tmp_path / name) for name in ("plain.tar.gz", "signed.tar.gz"))
    assert signed.keys() - plain.keys() == {"w1_2/signature.json"}
    assert plain.items() <= signed.items()
    verdict = verify_bundle(tmp_path / "signed.tar.gz", key.public_key())
    assert verdict.faults == ()
    assert verify_bundle(tmp_path / "plain.tar.gz").faults == ()


def contents(archive: Path) -> dict[str, bytes]:
    with tarfile.open(archive) as opened:
        return {member.name: opened.extractfile(member).read() for member in opened}  # type: ignore[union-attr]


def test_the_archive_holds_what_it_should_in_one_folder(case: Case, tmp_path: Path) -> None:
    report = case.write(tmp_path / "bundle.tar.gz")
    data = (tmp_path / "bundle.tar.gz").read_bytes()
    assert report.sha256 == hashlib.sha256(data).hexdigest()
    assert report.size_bytes == len(data)
    with tarfile.open(tmp_path / "bundle.tar.gz") as archive:
        members = archive.getmembers()
    assert [member.name for member in members] == sorted(member.name for member in members)
    assert all(
        member.isreg() and member.mtime == member.uid == member.gid == 0 for member in members
    )
    assert {member.name for member in members} == {
        f"w1_2/{name}"
        for name in (
            "MODEL_CARD.md",
            "manifest.json",
            "manifest.schema.json",
            "onnx/model.onnx",
            "paddle/inference.json",
            "paddle/inference.pdiparams",
            "predict.py",
            "safetensors/config.json",
            "safetensors/model.safetensors",
            "tokenizer/tokenizer.json",
            "tokenizer/tokenizer_config.json",
            "tokenizer/vocab.txt",
        )
    }
    assert list(tmp_path.iterdir()) == [tmp_path / "bundle.tar.gz"]


def test_the_manifest_names_every_other_file_by_its_digest(unpacked: Path) -> None:
    manifest = json.loads((unpacked / "manifest.json").read_text())
    on_disk = {
        path.relative_to(unpacked).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in unpacked.rglob("*")
        if path.is_file() and path.name != "manifest.json"
    }
    assert {entry["path"]: entry["sha256"] for entry in manifest["files"]} == on_disk
    for entry in manifest["files"]:
        assert entry["size_bytes"] == (unpacked / entry["path"]).stat().st_size


def test_the_manifest_tells_where_it_came_from(case: Case, unpacked: Path) -> None:
    manifest = json.loads((unpacked / "manifest.json").read_text())
    assert Spec.model_validate(manifest["spec"]) == case.facts.spec
    weights = hashlib.sha256((case.model / "model.safetensors").read_bytes()).hexdigest()
    assert manifest["provenance"]["model"]["model.safetensors"] == weights
    assert manifest["provenance"]["dataset"] == {"train.csv": "ab" * 32}
    assert manifest["provenance"]["seed"] == 7
    assert manifest["provenance"]["environment"] == case.facts.environment
    assert manifest["task"]["labels"] == list(LABELS)
    assert manifest["provenance"]["code"] == code_digest()
    assert manifest["metrics"]["teacher"] == {"dev": 0.8555, "test": None}
    assert manifest["formats"]["onnx"]["parity_max_abs"] == 3e-7
    assert manifest["formats"]["onnx"]["latency"]["p50_ms"] == 3.72


def test_the_manifest_is_valid_by_the_schema_beside_it(unpacked: Path) -> None:
    """Checked by the jsonschema library, which knows nothing of our models."""
    schema = json.loads((unpacked / "manifest.schema.json").read_text())
    jsonschema.Draft202012Validator.check_schema(schema)
    validator = jsonschema.Draft202012Validator(schema)
    text = (unpacked / "manifest.json").read_text()
    manifest = json.loads(text)
    assert [error.message for error in validator.iter_errors(manifest)] == []
    assert Manifest.model_validate_json(text).name == "w1_2"
    manifest["formats"]["onnx"]["files"][0].pop("sha256")  # it is one that can refuse
    manifest["surprise"] = 1
    assert len(list(validator.iter_errors(manifest))) == 2


def test_the_schema_on_disk_is_the_models() -> None:
    """After a change: python -m compression schema > compression/manifest.schema.json"""
    assert SCHEMA.read_bytes() == schema_bytes()


def test_the_code_digest_changes_with_any_source_and_with_nothing_else(tmp_path: Path) -> None:
    package = tmp_path / "package"
    (package / "inner").mkdir(parents=True)
    (package / "inner" / "a.py").write_text("a = 1\n")
    (package / "notes.txt").write_text("one")
    before = code_digest(package)
    (package / "notes.txt").write_text("two")
    assert code_digest(package) == before
    (package / "inner" / "a.py").rename(package / "a.py")
    moved = code_digest(package)
    (package / "a.py").write_text("a = 2\n")
    assert len({before, moved, code_digest(package)}) == 3


@pytest.mark.parametrize("fmt", ["onnx", "paddle"])
def test_predict_answers_as_the_encoder_does(case: Case, unpacked: Path, fmt: str) -> None:
    done = predict(unpacked, "--json", "--format", fmt, *TEXTS)
    assert done.returncode == 0, done.stderr
    np.testing.assert_allclose(probabilities(done.stdout), expected(case, TEXTS), atol=1e-5)
    assert [json.loads(line)["text"] for line in done.stdout.splitlines()] == TEXTS


def test_predict_prints_label_probability_and_text(case: Case, unpacked: Path) -> None:
    done = predict(unpacked, *TEXTS)
    assert done.returncode == 0, done.stderr
    for line, text, row in zip(done.stdout.splitlines(), TEXTS, expected(case, TEXTS), strict=True):
        assert line == f"{LABELS[row.argmax()]}\t{row.max():.4f}\t{text}"


def test_predict_runs_onnx_without_paddle(unpacked: Path) -> None:
    code = (
        "import runpy, sys\n"
        "sys.argv = sys.argv[1:]\n"
        "runpy.run_path(sys.argv[0], run_name='__main__')\n"
        "wanted = {'paddle', 'compression', 'onnxruntime', 'numpy', 'tokenizers'}\n"
        "print(sorted(wanted & set(sys.modules)))\n"
    )
    done = subprocess.run(
        [sys.executable, "-I", "-c", code, str(unpacked / "predict.py"), "a good film"],
        cwd=unpacked,
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    assert done.stdout.splitlines()[-1] == "['numpy', 'onnxruntime', 'tokenizers']"


def test_predict_takes_pairs_two_at_a_time(case: Case, tmp_path: Path) -> None:
    dataset = case.facts.dataset.model_copy(update={"text_pair": "answer"})
    folder = case.unpack(tmp_path, replace(case.facts, dataset=dataset))
    firsts, seconds = ["a good film", "music"], ["the plot was dull and slow", "a song"]
    done = predict(folder, "--json", firsts[0], seconds[0], firsts[1], seconds[1])
    assert done.returncode == 0, done.stderr
    np.testing.assert_allclose(
        probabilities(done.stdout), expected(case, firsts, seconds), atol=1e-5
    )
    odd = predict(folder, "only one")
    assert odd.returncode == 2
    assert "give them in pairs" in odd.stderr


def test_predict_falls_back_to_paddle_where_there_is_no_onnx(case: Case, tmp_path: Path) -> None:
    folder = case.unpack(tmp_path, without(case.facts, "onnx", error="logits differ"))
    assert not (folder / "onnx").exists()
    done = predict(folder, "--json", *TEXTS)
    assert done.returncode == 0, done.stderr
    np.testing.assert_allclose(probabilities(done.stdout), expected(case, TEXTS), atol=1e-5)
    refused = predict(folder, "--format", "onnx", "music")
    assert refused.returncode == 1
    assert "this bundle has no onnx model; it has: paddle, safetensors" in refused.stderr


@pytest.mark.parametrize(
    ("missing", "said"),
    [
        ("manifest.json", "manifest.json is missing"),
        ("onnx/model.onnx", "onnx/model.onnx is missing"),
        ("tokenizer/tokenizer.json", "tokenizer/tokenizer.json is missing"),
    ],
)
def test_predict_refuses_clearly_what_is_incomplete(
    unpacked: Path, tmp_path: Path, missing: str, said: str
) -> None:
    folder = Path(shutil.copytree(unpacked, tmp_path / "copy"))
    (folder / missing).unlink()
    done = predict(folder, "music")
    assert done.returncode == 1
    assert done.stdout == ""
    assert len(done.stderr.splitlines()) == 1
    assert said in done.stderr


def test_predict_names_the_package_that_is_not_installed(unpacked: Path) -> None:
    done = predict(unpacked, "music", interpreter=("-I", "-S"))  # -S: no site-packages
    assert done.returncode == 1
    assert "pip install numpy" in done.stderr
    assert "Traceback" not in done.stderr


def test_predict_refuses_a_manifest_that_is_none(unpacked: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(unpacked, tmp_path / "copy"))
    for text in ("{", "{}", "[]", '{"task": {}, "formats": {"onnx": {}}}'):
        (folder / "manifest.json").write_text(text)
        done = predict(folder, "music")
        assert done.returncode == 1
        assert "manifest.json cannot be read" in done.stderr


def test_predict_checks_digests_when_asked(unpacked: Path, tmp_path: Path) -> None:
    assert "as published" in predict(unpacked, "--check").stdout
    folder = Path(shutil.copytree(unpacked, tmp_path / "copy"))
    with (folder / "onnx" / "model.onnx").open("r+b") as file:
        file.seek(1000)
        file.write(b"\0\1\2\3")
    done = predict(folder, "--check", "music")
    assert done.returncode == 1
    assert "onnx/model.onnx is damaged" in done.stderr


def test_predict_without_texts_says_what_it_wants(unpacked: Path) -> None:
    done = predict(unpacked)
    assert done.returncode == 2
    assert "at least one text" in done.stderr


def test_the_card_says_what_was_measured_and_what_was_not(case: Case) -> None:
    card = model_card(case.facts)
    for words in (
        "| accuracy on dev | 0.8515 | 0.8555 |",
        "| accuracy on test | not measured | not measured |",
        "its accuracy is 0.40 points below the teacher's",
        "| ONNX |",
        "3.72",
        "3.0e-07 over 64 rows",
        case.facts.provenance.model["model.safetensors"],
        "ab" * 32,
        "This sub-network was not chosen.",
        "measured on the CPU",
        '`python predict.py "a text"` needs numpy, tokenizers and onnxruntime.',
        "load `safetensors/`",
        "Seed: 7",
        "fine-tuned for 12 steps",
    ):
        assert words in card, words


def test_a_predicted_latency_is_told_as_one_with_its_device_and_error(
    case: Case, tmp_path: Path
) -> None:
    assert "predicted" not in model_card(case.facts)
    profile = DeviceProfile.model_validate(device_profile())
    asked = ConstraintSpec(latency_on="prf_|board")
    config = read_checkpoint(case.model).config
    predictor = make_predictor(profile, asked, config, LatencySetting(1, 10, 1))
    (told,) = predictor.all_told([case.facts.subnetwork])
    facts = replace(case.facts, subnetwork=told)
    card = model_card(facts)
    assert (
        "For another device its latency was predicted, not measured: in ONNX a p50 of 11.40 ms and "
        "a speed-up of 1.91 (batch 1, 10 tokens, 1 thread), predicted for Test Board rev 3 (4 "
        "cores, ONNX Runtime 1.32.0), where predictions were -2 to +5 % off on 2 whole networks."
    ) in card
    assert f"profile is `prf_\u00a6board`, SHA-256 {profile.sha256}" in card
    folder = case.unpack(tmp_path, facts)
    manifest = json.loads((folder / "manifest.json").read_text())
    jsonschema.validate(manifest, json.loads((folder / SCHEMA.name).read_text()))
    predicted = manifest["formats"]["onnx"]["predicted"]
    assert predicted["p50_ms"] == pytest.approx(11.4)
    assert predicted["on"]["device"]["cpu"] == "Test Board rev 3"
    assert predicted["on"]["errors"]["onnx"]["highest"] == pytest.approx(0.05)
    assert manifest["formats"]["paddle"]["predicted"] is None


def test_the_card_says_how_it_was_made(case: Case) -> None:
    training = TrainingReport(
        steps=90,
        planned_steps=100,
        best_step=80,
        ended="plateau",
        step_seconds=0.1,
        micro_batch=None,
    )
    spec = Spec.model_validate({"final": {"when": "always"}, "engine": "paddleslim"})
    facts = replace(case.facts, trainings={"distil": training}, reorder_max_abs=2e-7, spec=spec)
    card = model_card(facts)
    steps = card.split("## How it was made\n\n")[1].split("\n\n")[0].splitlines()
    assert [step[:3] for step in steps] == ["1. ", "2. ", "3. ", "4. ", "5. "]
    for words, step in zip(
        (
            "fine-tuned for 12 steps",
            "by more than 2.0e-07",
            "(1, 3/4, 1/2, 1/4) were distilled together by PaddleSlim's recipe for 90 of 100 "
            "steps, until nothing was gained",
            "fine-tuned together on the labels of train.",
            "2 heads and 32 neurons a layer",
        ),
        steps,
        strict=True,
    ):
        assert words in step
    short = model_card(case.facts).split("## How it was made\n\n")[1].split("\n\n")[0]
    assert "labels of train" not in short
    assert "at most four a step" not in short
    assert "distilled alone" not in card
    searched = Spec.model_validate({"supernet": {"per_layer": {}}})
    assert "were distilled together, at most four a step: batches" in model_card(
        replace(case.facts, spec=searched)
    )
    spec = Spec.model_validate(
        {"refinement": {"batch_size": 8, "learning_rate": 3e-4, "lambda_rep": 0.5}}
    )
    stage = f"refine {case.facts.subnetwork.name}"
    alone = model_card(replace(case.facts, trainings={stage: training}, spec=spec))
    assert (
        "It was then distilled alone for 90 of 100 steps, until nothing was gained: batches of 8 "
        "rows, learning rate 0.0003, weights 0.5 and 1."
    ) in alone


def test_a_shallow_networks_card_and_manifest_say_which_layers_it_keeps(case: Case) -> None:
    spec = Spec.model_validate({"supernet": {"depth_mults": [1, "2/3"]}})
    subnetwork = case.facts.subnetwork.model_copy(
        update={"name": "w1_2-d2_3", "depth_mult": Fraction(2, 3), "layers": (0, 1)}
    )
    facts = replace(case.facts, spec=spec, subnetwork=subnetwork)
    card = model_card(facts)
    assert "at width 1/2 and depth 2/3" in card
    assert "width and depth stages" in card
    assert "The teacher, of 3 layers, was" in card
    assert "All depths (1, 2/3) of all widths were then distilled from" in card
    assert "the layers 0, 1 (from 0), 2 heads and 32 neurons a layer" in card
    kept = build_manifest(facts, []).subnetwork
    assert (kept.width_mult, kept.depth_mult, kept.layers) == ("1/2", "2/3", (0, 1))
    plain = model_card(case.facts)
    assert "depth" not in plain and "The teacher, of 2 layers, was" in plain


def test_the_card_and_a_file_say_what_flipped(case: Case, tmp_path: Path) -> None:
    flips = Flips(units=10, agreement=0.8, teacher_right=9, right_to_wrong=1, wrong_to_right=1)
    named = [GroupFlips(name=f"value {i} | `x`", **flips.model_dump()) for i in range(12)]
    regression = RegressionReport(
        split="dev",
        unit="row",
        rule="right: as it should be",
        overall=flips,
        by_label=(),
        by_length=(),
        by_column={"so|urce": tuple(named)},
        worst_rows=(),
    )
    subnetwork = case.facts.subnetwork.model_copy(update={"regression": regression})
    folder = case.unpack(tmp_path, replace(case.facts, subnetwork=subnetwork))
    card = (folder / "MODEL_CARD.md").read_text()
    assert (
        "On dev it answers 80.0% of 10 rows as the teacher does; 1 went from right to wrong, "
        "1 from wrong to right." in card
    )
    rows = [line for line in card.splitlines() if line.startswith("| `so\u00a6urce`: ")]
    assert len(rows) == 10
    assert rows[0] == "| `so\u00a6urce`: `value 0 \u00a6 'x'` | 10 | 80.0% | 1 | 1 |"
    text = (folder / "regression.json").read_text()
    assert Regressions.model_validate_json(text) == Regressions(dev=regression)
    assert "regression.json" in (folder / "manifest.json").read_text()


def test_the_card_says_which_format_was_left_out(case: Case) -> None:
    card = model_card(without(case.facts, "onnx", error="logits differ by 0.2"))
    assert "ONNX was left out: logits differ by 0.2" in card


def test_the_card_promises_only_what_the_bundle_holds(case: Case) -> None:
    facts = without(without(case.facts, "onnx", error="drift"), "safetensors", error="drift")
    dataset = facts.dataset.model_copy(update={"text_pair": "answer"})
    subnetwork = facts.subnetwork.model_copy(update={"selected": True})
    card = model_card(replace(facts, dataset=dataset, subnetwork=subnetwork))
    assert "This sub-network was chosen." in card
    assert 'predict.py "a text" "its pair"` needs numpy, tokenizers and paddlepaddle.' in card
    assert "onnxruntime" not in card
    assert "safetensors/" not in card


def test_the_bundle_says_which_format_was_chosen(case: Case, tmp_path: Path) -> None:
    subnetwork = case.facts.subnetwork.model_copy(update={"selected": True})
    facts = replace(case.facts, subnetwork=subnetwork, selected_format="paddle")
    folder = case.unpack(tmp_path, facts)
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["selected_format"] == "paddle"
    card = (folder / "MODEL_CARD.md").read_text()
    assert "This sub-network was chosen, in Paddle Inference." in card
    assert 'predict.py "a text"` needs numpy, tokenizers and paddlepaddle.' in card
    # Of both files, the chosen one is run: without it the other is not fallen back to.
    (folder / "paddle" / "inference.json").unlink()
    refused = predict(folder, "music")
    assert refused.returncode == 1
    assert "inference.json is missing" in refused.stderr
    assert predict(folder, "--format", "onnx", "music").returncode == 0


def test_the_card_says_whose_answers_the_figures_of_test_are(case: Case) -> None:
    test = ComparisonOnTest(
        reference="teacher",
        reference_accuracy=0.9,
        accuracy=0.8,
        accuracy_drop=10,
        accuracy_drop_intervals=(),
    )
    assert "On test the" not in model_card(
        replace(case.facts, subnetwork=case.facts.subnetwork.model_copy(update={"test": test}))
    )
    rounded = test.model_copy(update={"format": "onnx-int8-static"})
    card = model_card(
        replace(case.facts, subnetwork=case.facts.subnetwork.model_copy(update={"test": rounded}))
    )
    assert "On test the ONNX (static INT8) file, which was chosen, was judged" in card


@pytest.mark.parametrize("fmt", ROUNDED_FORMATS)
def test_the_card_says_of_each_format_what_it_computes_in(case: Case, fmt: Format) -> None:
    rounded = FormatReport(format=fmt, published=True, accuracy=0.8, flipped=0.0, max_flipped=0.05)
    subnetwork = case.facts.subnetwork.model_copy(update={"formats": (rounded,)})
    card = model_card(replace(case.facts, subnetwork=subnetwork))
    assert ("are in int8 but the classifier" in card) == (fmt in INT8_FORMATS)
    assert ("It is meant for GPUs" in card) == (fmt == "onnx-fp16")
    assert ("oneDNN computes its products in bf16" in card) == (fmt == "paddle-bf16")


def test_card_and_manifest_have_the_intervals_and_what_was_lost_on_test(case: Case) -> None:
    """872 rows cannot tell half a point: no figure stands without what is known of its noise."""

    def within(low: float, high: float) -> tuple[Interval, ...]:
        spread = enumerate(CONFIDENCES)
        return tuple(Interval(confidence=c, low=low - i, high=high + i) for i, c in spread)

    test = ComparisonOnTest(
        reference="w1",
        reference_accuracy=0.9,
        accuracy=0.893,
        accuracy_drop=0.7,
        accuracy_drop_intervals=within(0.0, 1.4),
        format="onnx-int8-dynamic",
    )
    latency = LatencyReport(
        p50_ms=3.72,
        p95_ms=4.01,
        p99_ms=5.5,
        rounds=50,
        batch_size=1,
        seq_len=8,
        threads=1,
        p50_intervals=within(4.0, 3.5),
        speedup_intervals=within(3.0, 1.0),
    )
    rounded = FormatReport(
        format="onnx-int8-dynamic",
        published=True,
        accuracy=0.85,
        accuracy_drop=0.55,
        accuracy_drop_intervals=within(0.5, 0.6),
        flipped=0.02,
        max_flipped=0.05,
        latency=latency,
        speedup=2.0,
    )
    flips = Flips(units=10, agreement=0.8, teacher_right=9, right_to_wrong=1, wrong_to_right=1)
    regression = RegressionReport(
        split="dev",
        unit="row",
        rule="right: as it should be",
        overall=flips,
        by_label=(),
        by_length=(),
        by_column={},
        worst_rows=(),
    )
    subnetwork = case.facts.subnetwork.model_copy(
        update={
            "accuracy_drop_intervals": within(0.1, 0.7),
            "test": test,
            "formats": (rounded,),
            "regression": regression,
        }
    )
    facts = replace(case.facts, subnetwork=subnetwork)
    card = model_card(facts)
    for words in (
        "0.40 points below the teacher's (95 %: -0.90 to 1.70 points lost).",
        "Its accuracy on test is 0.70 points below that of `w1` (95 %: -1.00 to 2.40 points lost), "
        "which is better than the teacher on dev. On test the ONNX (dynamic INT8) file",
        "| 3.72 (3.00 to 4.50) | 4.01 | 5.50 | 2.00 (2.00 to 2.00) |",
        "In brackets: where a figure lies with 95 % confidence.",
        "on dev 0.8500, and 2.0% of the answers differ from those in fp32, of 5.0% allowed. This",
        "This accuracy is 0.55 points below the teacher's (95 %: -0.50 to 1.60 points lost).",
        "The answers on dev are the sub-network's in fp32; those on test are the ONNX (dynamic "
        "INT8) file's.",
    ):
        assert words in card, words
    metrics = build_manifest(facts, []).metrics
    assert metrics.accuracy_drop_intervals == subnetwork.accuracy_drop_intervals
    assert metrics.on_test == test
    scores = Spec.model_validate({"task": {"kind": "regression"}})
    numbers = model_card(replace(facts, spec=scores))
    assert "0.0200 of the Pearson correlation is lost against fp32, of 0.0500 allowed." in numbers
    plain = model_card(case.facts)
    assert "95 %" not in plain and "in fp32" not in plain
    assert build_manifest(case.facts, []).metrics.on_test is None


def test_weights_without_a_served_file_can_be_checked(case: Case, tmp_path: Path) -> None:
    facts = without(without(case.facts, "onnx", error="drift"), "paddle", error="drift")
    assert "needs numpy" not in model_card(facts)
    folder = case.unpack(tmp_path, facts)
    assert "as published" in predict(folder, "--check").stdout
    refused = predict(folder, "music")
    assert refused.returncode == 1
    assert "no model that can be served" in refused.stderr


def test_what_a_user_wrote_cannot_break_the_card(case: Case) -> None:
    dataset = case.facts.dataset.model_copy(
        update={"labels": ("a|b", "c`d\n# heading"), "notes": ("<script>\n| x |",)}
    )
    card = model_card(replace(case.facts, dataset=dataset))
    assert "# heading\n" not in card
    assert "<script>" not in card.replace("\\<", "")
    headings = [line for line in card.splitlines() if line.startswith("#")]
    assert headings == [
        line for line in model_card(case.facts).splitlines() if line.startswith("#")
    ]
    for table in (line for line in card.splitlines() if line.startswith("|")):
        assert table.endswith("|")


def test_a_file_that_is_gone_leaves_no_archive(case: Case, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError):
        write_bundle(
            tmp_path / "out" / "bundle.tar.gz",
            case.facts,
            subnetwork_dir=tmp_path / "empty",
            tokenizer_files=case.tokenizer_files,
        )
    assert list((tmp_path / "out").iterdir()) == []
    with pytest.raises(FileNotFoundError, match=r"tokenizer\.json"):
        write_bundle(
            tmp_path / "bundle.tar.gz",
            case.facts,
            subnetwork_dir=case.folder,
            tokenizer_files=[],
        )


def test_it_is_a_gzip_file_without_a_clock(case: Case, tmp_path: Path) -> None:
    case.write(tmp_path / "bundle.tar.gz")
    head = (tmp_path / "bundle.tar.gz").read_bytes()[:10]
    assert head[:2] == b"\x1f\x8b"
    assert head[4:8] == bytes(4)  # the time of making
    assert head[3] & 0x08 == 0  # no name of the file it was made from
    with gzip.open(tmp_path / "bundle.tar.gz") as file:
        assert file.read(257 + 5).endswith(b"ustar")


def without(facts: BundleFacts, fmt: str, *, error: str) -> BundleFacts:
    """The facts with one format refused at the gate."""
    refused: dict[str, Any] = {"published": False, "error": error, "files": (), "latency": None}
    formats: list[FormatReport] = [
        report.model_copy(update=refused) if report.format == fmt else report
        for report in facts.subnetwork.formats
    ]
    return replace(
        facts, subnetwork=facts.subnetwork.model_copy(update={"formats": tuple(formats)})
    )
