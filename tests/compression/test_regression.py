"""What flipped against the teacher, by hand, for every kind of task."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from compression.alignment import Window, Words
from compression.batches import Encoded
from compression.regression import Judged, RegressionReport, RowFacts, compare, row_facts
from compression.spec import TaskSpec
from compression.tables import read_splits
from compression.tasks import make_task
from compression.tasks.question_answering import Asked
from compression.tasks.token_classification import TaggedWords

LENGTHS = np.array([4, 16, 17, 600])
FACTS = RowFacts("dev.csv", [2, 3, 5, 9], {"source": ["web", "web", "", "mail"]}, [""] * 4)


def judged(right: list[bool], margins: list[float], answers: str, truths: str = "abab") -> Judged:
    return Judged(
        unit="row",
        rule="",
        rows=np.arange(4),
        right=np.array(right),
        margins=np.array(margins),
        answers=list(answers),
        truths=list(truths),
        labels=[(truth,) for truth in truths],
    )


TEACHER = judged([True, True, True, False], [3.0, 1.0, 2.0, -1.0], "abaa")
OWN = judged([True, False, True, True], [2.5, -4.0, 2.5, 0.5], "aaab")


def report(facts: RowFacts = FACTS) -> RegressionReport:
    return compare(teacher=TEACHER, subnetwork=OWN, split="dev", facts=facts, lengths=LENGTHS)


def test_agreement_and_flips_by_hand() -> None:
    flips = report().overall
    assert flips.model_dump() == {
        "units": 4,
        "agreement": 0.5,
        "teacher_right": 3,
        "right_to_wrong": 1,
        "wrong_to_right": 1,
    }


def test_groups_add_up_to_the_whole_and_the_worst_come_first() -> None:
    found = report()
    assert [group.name for group in found.by_length] == [
        "1 to 16 tokens",
        "17 to 32 tokens",
        "more than 512 tokens",
    ]
    assert [group.name for group in found.by_column["source"]] == ["web", "(empty)", "mail"]
    for groups in (found.by_label, found.by_length, found.by_column["source"]):
        for field in ("units", "teacher_right", "right_to_wrong", "wrong_to_right"):
            assert sum(getattr(group, field) for group in groups) == getattr(found.overall, field)


def test_the_worst_rows_are_those_whose_true_answer_lost_most() -> None:
    worst = report().worst_rows
    assert [(row.file, row.line, row.margin_lost) for row in worst] == [
        ("dev.csv", 3, 5.0),
        ("dev.csv", 2, 0.5),
    ]
    assert (worst[0].truth, worst[0].teacher, worst[0].subnetwork) == ("b", "b", "a")


def test_ten_worst_rows_at_most_and_a_row_once() -> None:
    units = 60
    base = Judged(
        unit="word",
        rule="",
        rows=np.repeat(np.arange(20), 3),
        right=np.ones(units, bool),
        margins=np.arange(units, dtype=float),
        answers=["O"] * units,
        truths=["O"] * units,
        labels=[("O",)] * units,
        words=np.tile([1, 2, 3], 20),
    )
    facts = RowFacts("dev.jsonl", list(range(1, 21)), {}, [""] * 20)
    worse = replace(base, margins=-base.margins)
    found = compare(
        teacher=base, subnetwork=worse, split="test", facts=facts, lengths=np.full(20, 8)
    )
    assert [row.line for row in found.worst_rows] == list(range(20, 10, -1))
    assert {row.word for row in found.worst_rows} == {3}
    same = compare(teacher=base, subnetwork=base, split="dev", facts=facts, lengths=np.full(20, 8))
    assert same.worst_rows == ()
    assert same.overall.agreement == 1.0


def test_too_many_groups_are_told_together() -> None:
    names = [f"v{i}" for i in range(150)]
    many = replace(
        TEACHER,
        rows=np.arange(150),
        right=np.ones(150, bool),
        margins=np.zeros(150),
        answers=names,
        truths=names,
        labels=[(name,) for name in names],
    )
    facts = RowFacts("dev.csv", list(range(150)), {"id": names}, [""] * 150)
    found = compare(
        teacher=many, subnetwork=many, split="dev", facts=facts, lengths=np.full(150, 8)
    )
    for groups in (found.by_label, found.by_column["id"]):
        assert len(groups) == 101
        assert {group.name: group.units for group in groups}["(50 others)"] == 50


def test_texts_are_quoted_only_where_asked_for(tmp_path: Path) -> None:
    (tmp_path / "train.tsv").write_text("text\tlabel\nsome train text\ta\n")
    (tmp_path / "dev.tsv").write_text("text\tnote\tlabel\na secret text\tx\ta\n\nb\ty\tb\n")
    table = read_splits(tmp_path)["dev"]
    kept = row_facts(table, [4], slices=["note"], text_columns=["text"], excerpt_chars=0)
    assert kept == RowFacts("dev.tsv", [4], {"note": ["y"]}, [""])
    quoted = row_facts(table, [4, 2], slices=[], text_columns=["text"], excerpt_chars=5)
    assert quoted.texts == ["b", "a sec"]

    texts = replace(TEACHER, are_texts=True), replace(OWN, are_texts=True)
    for chars, shown in ((0, None), (1, "b")):
        facts = replace(FACTS, texts=["a text"] * 4, excerpt_chars=chars)
        found = compare(
            teacher=texts[0], subnetwork=texts[1], split="dev", facts=facts, lengths=LENGTHS
        )
        assert found.worst_rows[0].truth == shown
        assert (found.worst_rows[0].text is None) == (shown is None)


def test_different_units_cannot_be_compared() -> None:
    other = replace(OWN, rows=np.array([0, 1, 2, 2]))
    with pytest.raises(ValueError, match="different units"):
        compare(teacher=TEACHER, subnetwork=other, split="dev", facts=FACTS, lengths=LENGTHS)


def rows_of(labels: np.ndarray) -> Encoded:
    return Encoded([[1, 2, 3]] * len(labels), [[0, 0, 0]] * len(labels), labels)


def test_a_classification_is_judged_by_its_true_labels_margin() -> None:
    task = make_task(TaskSpec(), ("a", "b", "c"))
    logits = np.array([[2.0, -1.0, 0.5], [0.0, 1.0, 3.0]], np.float32)
    found = task.judged(logits, rows_of(np.array([0, 1])))
    assert found.right.tolist() == [True, False]
    assert found.margins.tolist() == [1.5, -2.0]
    assert (found.answers, found.truths) == (["a", "c"], ["a", "b"])
    assert found.labels == [("a",), ("b",)]


def test_several_labels_are_right_together_or_not() -> None:
    task = make_task(TaskSpec(kind="multi_label"), ("a", "b"))
    logits = np.array([[2.0, -1.0], [0.5, 3.0], [-1.0, -2.0]], np.float32)
    labels = np.array([[1, 0], [0, 1], [0, 0]], np.float32)
    found = task.judged(logits, rows_of(labels))
    assert found.right.tolist() == [True, False, True]
    assert found.margins.tolist() == [1.0, -0.5, 1.0]
    assert found.answers == ["a", "a, b", "(none)"]
    assert found.labels == [["a"], ["b"], ["(none)"]]


def test_scores_are_alike_within_half_a_standard_deviation() -> None:
    task = make_task(TaskSpec(kind="regression"), ("score",))
    data = rows_of(np.array([0.0, 2.0, 4.0, 2.0], np.float32))  # standard deviation: sqrt(2)
    teacher = task.judged(np.array([[0.1], [2.0], [4.0], [2.0]], np.float32), data)
    own = task.judged(np.array([[0.8], [2.7], [4.0], [0.0]], np.float32), data)
    assert teacher.right.all()
    assert own.right.tolist() == [False, True, True, False]
    found = compare(teacher=teacher, subnetwork=own, split="dev", facts=FACTS, lengths=LENGTHS)
    assert found.overall.agreement == 0.75  # of four, one is 2.0 away
    assert [row.line for row in found.worst_rows] == [9, 3, 2]
    assert found.by_label == ()


def test_words_without_a_token_are_not_judged() -> None:
    task = make_task(TaskSpec(kind="token_classification"), ("B-X", "O"))
    words = Words([2, 7, 8, 9, 3], [0] * 5, np.array([0, 2]), np.array([1, 3]), cut=True)
    data = Encoded(
        [words.input_ids],
        [words.token_type_ids],
        None,
        references=[TaggedWords(np.array([0, 1, 1, 0]), words)],
    )
    logits = [np.array([[0, 9], [2, 1], [0, 9], [3, 1], [9, 0]], np.float32)]
    found = task.judged(logits, data)
    assert found.rows.tolist() == [0, 0]
    assert found.words is not None and found.words.tolist() == [1, 3]
    assert (found.answers, found.truths) == (["B-X", "B-X"], ["B-X", "O"])
    assert found.right.tolist() == [True, False]
    assert found.margins.tolist() == [1.0, -2.0]


def test_a_question_is_judged_once_whatever_its_windows() -> None:
    task = make_task(TaskSpec(kind="question_answering"), ("start", "end"))
    context = "red fox ran"
    offsets = np.array([[0, 3], [4, 7], [8, 11]])

    def window(row: int, first: int, tokens: slice) -> Asked:
        own = offsets[tokens]
        ids = [1] * (first + len(own))
        return Asked(Window(row, ids, ids, first, own), context, ("the fox", "ran"))

    asked = [window(0, 3, slice(0, 2)), window(0, 3, slice(2, 3)), window(1, 3, slice(0, 3))]
    data = Encoded(
        [item.window.input_ids for item in asked],
        [item.window.token_type_ids for item in asked],
        None,
        references=asked,
    )
    logits = [np.zeros((len(item.window.input_ids), 2), np.float32) for item in asked]
    logits[0][4] = 9.0  # "fox"
    logits[2][3, 0] = logits[2][4, 1] = 9.0  # "red fox"
    found = task.judged(logits, data)
    assert found.answers == ["fox", "red fox"]
    assert found.right.tolist() == [True, False]
    assert found.margins == pytest.approx([1.0, 2 / 3])
    assert task.row_lengths(data).tolist() == [5, 6]
