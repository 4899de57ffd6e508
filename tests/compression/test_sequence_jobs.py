"""Whole jobs of the tasks that label tokens, on tiny models, Chinese among the words."""

from __future__ import annotations

import json
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from compression.bundle_predict import WORD, in_words
from compression.pipeline import compress
from compression.report import CompressionReport
from compression.spec import Spec
from tests.builders import CHINESE, WORDS, tiny_bert, tiny_questions, tiny_tags, with_token_head

ROWS = {"train": 48, "dev": 24, "test": 12, "unlabelled": 8}


def spec(**task: Any) -> Spec:
    return Spec.model_validate(
        {
            "task": task,
            "teacher": {"epochs": 10, "batch_size": 8, "learning_rate": 5e-3},
            "distillation": {"max_steps": 2},
            "supernet": {"width_mults": ["1/2"]},
            "importance": {"rows": 16},
            "latency": {"rounds": 5, "baselines": []},
            "export": {"formats": ["onnx"]},
        }
    )


def predict(run_dir: Path, *texts: str) -> list[dict[str, Any]]:
    """What the downloaded bundle's predict.py answers, in a process of its own."""
    with tarfile.open(run_dir / "artifacts" / "w1_2" / "bundle.tar.gz") as archive:
        archive.extractall(run_dir, filter="data")
    done = subprocess.run(
        [sys.executable, str(run_dir / "w1_2" / "predict.py"), "--json", *texts],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    return [json.loads(line) for line in done.stdout.splitlines()]


def dev_rows(dataset: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (dataset / "dev.jsonl").read_text().splitlines()]


def common(report: CompressionReport, run_dir: Path, *, unit: str) -> None:
    assert report.dataset.rows == ROWS
    assert report.reorder_max_abs < 1e-5
    (network,) = report.subnetworks
    (fmt,) = network.formats
    assert fmt.published, fmt.error
    assert fmt.parity_max_abs is not None and fmt.parity_max_abs < 1e-4
    assert network.selected
    assert network.test_accuracy is not None
    for regression, split in ((network.regression, "dev"), (network.test_regression, "test")):
        assert regression is not None
        assert (regression.split, regression.unit) == (split, unit)
        assert all(row.text is None for row in regression.worst_rows)
    assert network.accuracy == network.metrics[report.main_metric]
    assert network.accuracy_drop == pytest.approx(
        100 * (report.teacher.accuracy - network.accuracy)
    )


def test_words_are_tagged_from_upload_to_bundle(tmp_path: Path) -> None:
    model = tiny_bert(tmp_path / "model", num_labels=None, words=(*WORDS, *CHINESE), seed=1)
    dataset = tiny_tags(tmp_path / "dataset", rows=ROWS, seed=1)
    report = compress(spec(kind="token_classification", max_seq_len=32), model, dataset, tmp_path)
    common(report, tmp_path, unit="word")
    regression = report.subnetworks[0].regression
    assert regression is not None
    assert regression.overall.units == sum(len(row["tags"]) for row in dev_rows(dataset))
    assert regression.overall.teacher_right == pytest.approx(
        report.teacher.metrics["accuracy"] * regression.overall.units
    )
    assert {group.name for group in regression.by_label} == {"B-GOOD", "B-LOC", "I-LOC", "O"}
    assert report.main_metric == "entity_f1"
    assert report.teacher.fine_tuned_steps == 60
    assert report.teacher.accuracy > 0.8
    assert report.dataset.labels == ("B-GOOD", "B-LOC", "I-LOC", "O")
    right = words = 0
    rows = dev_rows(dataset)
    answers = predict(tmp_path, *(" ".join(row["tokens"]) for row in rows))
    for row, answer in zip(rows, answers, strict=True):
        assert answer["words"] == row["tokens"]
        right += sum(a == b for a, b in zip(answer["tags"], row["tags"], strict=True))
        words += len(row["tags"])
    assert right / words == pytest.approx(report.subnetworks[0].metrics["accuracy"], abs=1e-9)
    card = (tmp_path / "w1_2" / "MODEL_CARD.md").read_text()
    assert "| entity F1 on dev |" in card
    manifest = json.loads((tmp_path / "w1_2" / "manifest.json").read_text())
    assert manifest["output"]["shape"] == ["batch", "length", 4]


def test_questions_are_answered_from_upload_to_bundle(tmp_path: Path) -> None:
    model = tiny_bert(tmp_path / "model", num_labels=None, words=(*WORDS, *CHINESE), seed=1)
    dataset = tiny_questions(tmp_path / "dataset", rows=ROWS, seed=1)
    task = {"kind": "question_answering", "max_seq_len": 36, "doc_stride": 4}
    report = compress(spec(**task, max_answer_length=4), model, dataset, tmp_path)
    common(report, tmp_path, unit="question")
    regression = report.subnetworks[0].regression
    assert regression is not None
    assert regression.overall.units == ROWS["dev"]
    flips = regression.overall.wrong_to_right - regression.overall.right_to_wrong
    assert (regression.overall.teacher_right + flips) / ROWS["dev"] == pytest.approx(
        report.subnetworks[0].metrics["exact_match"]
    )
    assert all(row.truth is row.teacher is row.subnetwork is None for row in regression.worst_rows)
    assert report.main_metric == "f1"
    assert report.teacher.accuracy > 0.3
    rows = dev_rows(dataset)
    asked = [text for row in rows for text in (row["question"], row["context"])]
    answers = [answer["answer"] for answer in predict(tmp_path, *asked)]
    exact = np.mean(
        [
            answer.strip() == row["answers"]["text"][0]
            for row, answer in zip(rows, answers, strict=True)
        ]
    )
    assert exact == pytest.approx(report.subnetworks[0].metrics["exact_match"], abs=1e-9)
    card = (tmp_path / "w1_2" / "MODEL_CARD.md").read_text()
    assert "a passage of `context`" in card
    assert "| exact match on dev |" in card


def test_tags_are_shown_a_word_a_line_and_answers_with_their_question() -> None:
    assert WORD.findall("a good 北京 film.") == ["a", "good", "北", "京", "film."]
    tags = {"words": ["a", "北"], "tags": ["O", None]}
    assert in_words(tags, ["a 北"]) == "a\tO\n北\t(cut off)\n"
    answer = {"answer": "北京", "probability": 0.5}
    assert in_words(answer, ["where", "a 北京"]) == "北京\t0.5000\twhere | a 北京"


def test_an_uploaded_head_is_kept(tmp_path: Path) -> None:
    folder = tiny_bert(tmp_path / "model", num_labels=2, words=(*WORDS, *CHINESE), seed=1)
    model = with_token_head(folder, "QuestionAnswering")
    dataset = tiny_questions(tmp_path / "dataset", rows={"train": 16, "dev": 8}, seed=1)
    task = {"kind": "question_answering", "max_seq_len": 36}
    report = compress(spec(**task), model, dataset, tmp_path)
    assert report.teacher.fine_tuned_steps == 0
    assert report.dataset.label_names == ("start", "end")
    assert report.subnetworks[0].formats[0].published
