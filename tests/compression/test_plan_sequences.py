"""Plans of the tasks that label tokens: columns, tags, heads, and what is wrong with rows."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from compression.errors import InvalidDataset, InvalidSpec
from compression.examples import AskedExamples, TaggedExamples, with_defects
from compression.plan import ModelInfo, Plan, make_plan, model_info, resolve_rows
from compression.spec import Spec
from compression.tables import DatasetProfile, Table, profile
from compression.teachers import Checkpoint, EncoderConfig
from tests.encoders import tiny_config

CONFIG: EncoderConfig = tiny_config(heads=(4, 4), max_positions=128)


def model(
    num_labels: int | None = None,
    labels: tuple[str, ...] | None = None,
    task: str | None = None,
    head: str = "token",
) -> ModelInfo:
    config = dataclasses.replace(CONFIG, num_labels=num_labels, head=head)
    return model_info(Checkpoint(config, {}, labels, "huggingface", (), head_task=task))


def table(file: str, **columns: list[Any]) -> Table:
    rows = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
    return Table(tuple(columns), rows, list(range(1, len(rows) + 1)), file)


def tagged(file: str, tags: list[tuple[str, ...]], words: list[Any] | None = None) -> Table:
    words = words or [tuple(f"w{i}{j}" for j in range(len(own))) for i, own in enumerate(tags)]
    return table(file, tokens=words, ner_tags=tags)


def asked(file: str, count: int, *, contexts: int | None = None, start: str = "4") -> Table:
    """Every context of a question holds "good" at character 4."""
    texts = [f"the good film {i % (contexts or count)}" for i in range(count)]
    return table(
        file,
        question=[f"which {i}" for i in range(count)],
        context=texts,
        **{"answers.text": [("good",)] * count, "answers.answer_start": [(start,)] * count},
    )


def plan_of(
    spec: dict[str, Any], info: ModelInfo, splits: dict[str, Table], *, inspected: bool = True
) -> Plan:
    found: DatasetProfile = profile(splits)
    if inspected:
        found = DatasetProfile.model_validate_json(with_defects(found, splits).model_dump_json())
    return make_plan(Spec.model_validate(spec), info, found)


def refused(pointer: str, spec: dict[str, Any], info: ModelInfo, splits: dict[str, Table]) -> str:
    with pytest.raises(InvalidSpec) as caught:
        plan_of(spec, info, splits)
    assert caught.value.pointer == pointer
    return caught.value.message


TAGS = {"task": {"kind": "token_classification"}}
ASKED = {"task": {"kind": "question_answering"}}
WORDS = {
    "train": tagged("train.jsonl", [("O", "B-X"), ("O", "I-X", "O")] * 20),
    "dev": tagged("dev.jsonl", [("O", "B-X")] * 10),
}
QUESTIONS = {"train": asked("train.jsonl", 40), "dev": asked("dev.jsonl", 10)}


def test_words_and_tags_are_found_by_their_usual_names() -> None:
    plan = plan_of(TAGS, model(), WORDS)
    assert (plan.text, plan.text_pair, plan.label) == ("tokens", None, "ner_tags")
    assert plan.labels == plan.label_names == ("B-X", "I-X", "O")
    assert plan.fine_tune
    rows = resolve_rows(Spec.model_validate(TAGS), plan, WORDS, 0)
    assert isinstance(rows["dev"], TaggedExamples)
    assert rows["dev"].tags is not None
    assert rows["dev"].tags[0].tolist() == [2, 0]
    assert rows["train"].words[1] == ("w10", "w11", "w12")


def test_a_heads_names_order_the_tags_and_say_what_numbers_mean() -> None:
    info = model(3, ("O", "B-X", "I-X"), "token_classification")
    assert plan_of(TAGS, info, WORDS).labels == ("O", "B-X", "I-X")
    numbers = {"train": tagged("train.jsonl", [("0", "1"), ("0", "2", "0")] * 20)}
    plan = plan_of(TAGS, info, numbers)
    assert (plan.labels, plan.label_names) == (("0", "1", "2"), ("O", "B-X", "I-X"))


def test_tags_that_mark_no_entities_need_another_metric() -> None:
    splits = {"train": tagged("train.jsonl", [("NN", "VB"), ("VB",)] * 20)}
    assert "accuracy" in refused("/task/metric", TAGS, model(), splits)
    spec = {"task": {"kind": "token_classification", "metric": "accuracy"}}
    assert plan_of(spec, model(), splits).labels == ("NN", "VB")


def test_a_tag_that_train_does_not_have_names_its_rows_and_their_count() -> None:
    dev = tagged("dev.jsonl", [("O",), *[("O", "B-Y")] * 12])
    with pytest.raises(InvalidDataset, match="'B-Y' is not in train") as error:
        plan_of(TAGS, model(), {**WORDS, "dev": dev})
    assert [row.line for row in error.value.rows] == list(range(2, 12))
    assert "12" in error.value.message


@pytest.mark.parametrize("inspected", [True, False])
def test_tags_that_do_not_match_their_words_are_refused(inspected: bool) -> None:
    """Inspection knows it before a job is stored; the job would find it too."""
    words = [("a", "b")] * 11 + [("a",)]
    splits = {**WORDS, "dev": tagged("dev.jsonl", [("O",)] * 12, words)}
    with pytest.raises(InvalidDataset) as error:
        plan = plan_of(TAGS, model(), splits, inspected=inspected)
        assert not inspected
        resolve_rows(Spec.model_validate(TAGS), plan, splits, 0)
    assert error.value.message == "dev.jsonl, line 1: 2 words, but 1 tags (11 rows in all)"
    assert [(row.file, row.line) for row in error.value.rows] == [
        ("dev.jsonl", line) for line in range(1, 11)
    ]


def test_questions_contexts_and_answers_are_found_by_their_usual_names() -> None:
    plan = plan_of(ASKED, model(), QUESTIONS)
    assert (plan.text, plan.text_pair) == ("question", "context")
    assert (plan.label, plan.answer_start) == ("answers.text", "answers.answer_start")
    assert (plan.labels, plan.label_names) == ((), ("start", "end"))
    rows = resolve_rows(Spec.model_validate(ASKED), plan, QUESTIONS, 0)
    assert isinstance(rows["dev"], AskedExamples)
    assert rows["dev"].answers == [(("good", 4),)] * 10
    named = {"task": {**ASKED["task"], "label": "answers"}}
    assert plan_of(named, model(), QUESTIONS) == plan


def test_plain_columns_of_an_answer_are_read_too() -> None:
    columns = {"query": ["which"] * 20, "passage": ["the good film"] * 20}
    splits = {
        "train": table("train.jsonl", **columns, answer=["good"] * 20, answer_start=["4"] * 20),
        "dev": table("dev.jsonl", **columns, answer=["film"] * 20, answer_start=["9"] * 20),
    }
    plan = plan_of(ASKED, model(), splits)
    assert (plan.text_pair, plan.label, plan.answer_start) == ("passage", "answer", "answer_start")


@pytest.mark.parametrize("inspected", [True, False])
def test_an_answer_that_is_not_in_its_context_is_refused(inspected: bool) -> None:
    splits = {**QUESTIONS, "dev": asked("dev.jsonl", 12, start="5")}
    with pytest.raises(InvalidDataset) as error:
        plan = plan_of(ASKED, model(), splits, inspected=inspected)
        assert not inspected
        resolve_rows(Spec.model_validate(ASKED), plan, splits, 0)
    assert "'good' is not in its context at character 5; it is at 4 (12 rows" in error.value.message
    assert len(error.value.rows) == 10


def test_a_dev_from_train_parts_no_questions_on_one_context() -> None:
    splits = {"train": asked("train.jsonl", 60, contexts=20)}
    plan = plan_of(ASKED, model(), splits)
    assert plan.rows == {"train": 54, "dev": 6}
    rows = resolve_rows(Spec.model_validate(ASKED), plan, splits, 3)
    train, dev = rows["train"], rows["dev"]
    assert isinstance(train, AskedExamples)
    assert isinstance(dev, AskedExamples)
    assert len(dev) == 6
    assert not set(train.contexts) & set(dev.contexts)


@pytest.mark.parametrize(
    ("spec", "info", "splits", "pointer", "says"),
    [
        (TAGS, model(2, None, "question_answering"), WORDS, "/task/kind", "question_answering"),
        (ASKED, model(2, None, "token_classification"), QUESTIONS, "/task/kind", "token"),
        (ASKED, model(3), QUESTIONS, "/task/kind", "3 outputs"),
        (TAGS, model(3, head="sequence"), WORDS, "/task/kind", "fine-tune a new head"),
        (TAGS, model(3, ("O", "B-X", "B-Y")), WORDS, "/task/labels", "which output"),
        (TAGS, model(), QUESTIONS, "/task/text", "'tokens' or 'words'"),
        (ASKED, model(), WORDS, "/task/text", "its columns are tokens, ner_tags"),
        (
            {"task": {"kind": "token_classification", "text": "question", "label": "answers.text"}},
            model(),
            QUESTIONS,
            "/task/text",
            "holds no lists",
        ),
        (
            {"task": {"kind": "question_answering", "text": "answers.text"}},
            model(),
            QUESTIONS,
            "/task/text",
            "holds lists",
        ),
        ({"task": {**TAGS["task"], "text_pair": "x"}}, model(), WORDS, "/task/text_pair", "no"),
        ({"task": {**ASKED["task"], "label": "a"}}, model(), QUESTIONS, "/task/label", "'a'"),
        ({"task": {**ASKED["task"], "labels": ["a"]}}, model(), QUESTIONS, "/task/labels", "list"),
        ({"task": {"answer_start": "label"}}, model(), WORDS, "/task/answer_start", "no"),
        (
            {"task": {**ASKED["task"], "max_seq_len": 64, "doc_stride": 24}},
            model(),
            QUESTIONS,
            "/task/doc_stride",
            "share at most 23, not 24",
        ),
        (
            {"task": {**ASKED["task"], "max_seq_len": 8}},
            model(),
            QUESTIONS,
            "/task/max_seq_len",
            "",
        ),
    ],
)
def test_what_a_spec_cannot_mean(
    spec: dict[str, Any], info: ModelInfo, splits: dict[str, Table], pointer: str, says: str
) -> None:
    assert says in refused(pointer, spec, info, splits)


def test_a_context_in_more_windows_is_predicted_to_take_longer() -> None:
    long = [f"the good film {'and so on ' * 200}{i}" for i in range(40)]
    one = asked("train.jsonl", 40)
    rows = [{**row, "context": context} for row, context in zip(one.rows, long, strict=True)]
    splits = {**QUESTIONS, "train": dataclasses.replace(one, rows=rows)}
    predicted = [
        plan_of({"task": {**ASKED["task"], "doc_stride": stride}}, model(), splits)
        for stride in (0, 48)
    ]
    few, many = (plan.predicted_stage_seconds["distil"] for plan in predicted)
    assert many / few == pytest.approx(128 / 80, rel=0.25)  # tokens that a window moves on


def test_a_new_head_may_replace_any() -> None:
    spec = {**TAGS, "teacher": {"when": "always"}}
    assert plan_of(spec, model(2, head="sequence"), WORDS).fine_tune
    kept = plan_of(ASKED, model(2, None, "question_answering"), QUESTIONS)
    assert not kept.fine_tune
