"""Token classification: alignment, loss and metrics against numbers worked out by hand."""

from __future__ import annotations

import random
import warnings

import numpy as np
import paddle
import pytest
from tokenizers import Tokenizer

from compression.batches import Batch, Encoded, make_batch
from compression.examples import TaggedExamples
from compression.spec import TaskSpec
from compression.tasks import make_task
from compression.tasks.token_classification import (
    entities,
    entity_scores,
    tag_counts,
    word_accuracy,
)
from compression.tokenization import load_tokenizer
from tests.builders import tiny_bert

TAGS = ("O", "B-LOC", "I-LOC")
TASK = make_task(TaskSpec(kind="token_classification"), TAGS)
WORDS = [("Beijing", "is", "cold"), ("我", "在", "北京"), ("good",)]
GIVEN = [[1, 0, 0], [0, 0, 1], [2]]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    vocabulary = ("bei", "##jing", "is", "cold", "我", "在", "北", "京", "good")
    folder = tiny_bert(tmp_path_factory.mktemp("tags") / "m", num_labels=None, words=vocabulary)
    return load_tokenizer(folder)


@pytest.fixture(scope="module")
def data(tokenizer: Tokenizer) -> Encoded:
    tags = [np.array(row) for row in GIVEN]
    return TASK.encode(tokenizer, TaggedExamples(WORDS, tags, [1, 2, 3]), 16)


def random_logits(batch: Batch, seed: int, *, length: int | None = None) -> np.ndarray:
    """[B, T, C], the same for the same tokens whatever the padding."""
    generator = np.random.default_rng(seed)
    rows, tokens = batch.input_ids.shape
    logits = generator.normal(0, 2, (rows, 6, len(TAGS))).astype(np.float32)
    return np.pad(logits, ((0, 0), (0, tokens - 6), (0, 0)), constant_values=7.0)


def test_a_words_tag_stands_at_its_first_token(data: Encoded) -> None:
    assert data.labels is not None and data.label_mask is not None
    #                                  [CLS] bei jing is cold [SEP]
    assert data.labels[0].tolist() == [0, 1, 0, 0, 0, 0]
    assert data.label_mask[0].tolist() == [False, True, False, True, True, False]
    #                                       我 在 北 京
    assert data.labels[1].tolist() == [0, 0, 0, 1, 0, 0]
    assert data.label_mask[1].tolist() == [False, True, True, True, False, False]


def test_the_label_loss_is_the_mean_over_first_tokens(data: Encoded) -> None:
    batch = make_batch(data, [0, 1, 2], pad_id=0)
    logits = random_logits(batch, 0)
    expected = []
    for row, (positions, tags) in enumerate(zip(([1, 3, 4], [1, 2, 3], [1]), GIVEN, strict=True)):
        for position, tag in zip(positions, tags, strict=True):
            own = logits[row, position]
            expected.append(np.log(np.exp(own).sum()) - own[tag])
    loss = float(TASK.label_loss(paddle.to_tensor(logits), batch))
    assert loss == pytest.approx(np.mean(expected), rel=1e-5)
    half = float(TASK.label_loss(paddle.to_tensor(logits), batch, total=14))
    assert half == pytest.approx(np.mean(expected) / 2, rel=1e-5)


def test_the_logit_loss_is_the_mean_over_first_tokens_and_has_a_gradient(data: Encoded) -> None:
    batch = make_batch(data, [0, 2], pad_id=0)
    own, other = random_logits(batch, 1), random_logits(batch, 2)
    student = paddle.to_tensor(own, stop_gradient=False)
    loss = TASK.logit_loss(student=student, teacher=paddle.to_tensor(other), batch=batch)
    counted = [(0, 1), (0, 3), (0, 4), (1, 1)]

    def softmax(logits: np.ndarray) -> np.ndarray:
        return np.exp(logits) / np.exp(logits).sum(axis=-1, keepdims=True)

    by_hand = [-(softmax(other[at]) * np.log(softmax(own[at]))).sum() for at in counted]
    assert float(loss) == pytest.approx(np.mean(by_hand), rel=1e-5)
    loss.backward()
    expected = np.zeros_like(own)
    for at in counted:
        expected[at] = (softmax(own[at]) - softmax(other[at])) / len(counted)
    assert np.abs(expected).max() > 0.01
    np.testing.assert_allclose(student.grad.numpy(), expected, atol=1e-6)


def test_padding_further_changes_neither_loss_nor_gradient(data: Encoded) -> None:
    found = []
    for length in (None, 13):
        batch = make_batch(data, [0, 1, 2], pad_id=0, length=length)
        student = paddle.to_tensor(random_logits(batch, 3), stop_gradient=False)
        teacher = paddle.to_tensor(random_logits(batch, 4))
        both = TASK.label_loss(student, batch) + TASK.logit_loss(
            student=student, teacher=teacher, batch=batch
        )
        both.backward()
        found.append((float(both), student.grad.numpy()))
    (loss, gradient), (padded_loss, padded_gradient) = found
    assert padded_loss == pytest.approx(loss, rel=1e-6)
    np.testing.assert_allclose(padded_gradient[:, :6], gradient, atol=1e-7)
    assert not padded_gradient[:, 6:].any()


def test_a_batch_without_any_word_has_the_loss_0(tokenizer: Tokenizer) -> None:
    rows = TaggedExamples([("\u200b",)], [np.array([1])], [1])
    batch = make_batch(TASK.encode(tokenizer, rows, 16), [0], pad_id=0)
    assert float(TASK.label_loss(paddle.ones([1, 2, 3]), batch)) == 0


def test_words_that_are_cut_off_count_as_outside(tokenizer: Tokenizer) -> None:
    words = [("is",) * 6 + ("Beijing", "is")]
    rows = TaggedExamples(words, [np.array([1, 0, 0, 0, 0, 0, 1, 0])], [1])
    data = TASK.encode(tokenizer, rows, 8)
    logits = np.zeros((8, 3), np.float32)
    logits[1, 1] = logits[2:, 0] = 1  # the first word is found, the seventh was cut off
    assert TASK.metrics([logits], data) == pytest.approx(
        {"accuracy": 7 / 8, "entity_precision": 1, "entity_recall": 1 / 2, "entity_f1": 2 / 3}
    )


def test_unlabelled_rows_are_counted_by_their_words_all_the_same(tokenizer: Tokenizer) -> None:
    data = TASK.encode(tokenizer, TaggedExamples(WORDS, None, [1, 2, 3]), 16)
    batch = make_batch(data, [0, 1, 2], pad_id=0)
    assert batch.labels is None
    logits = paddle.to_tensor(random_logits(batch, 5))
    assert float(TASK.count(batch)) == 7
    assert float(TASK.logit_loss(student=logits, teacher=logits, batch=batch)) > 0


def test_every_word_is_an_answer_of_its_own(data: Encoded) -> None:
    labels = data.labels
    assert labels is not None
    logits = [np.eye(len(TAGS), dtype=np.float32)[tags] for tags in labels]
    assert TASK.decisions(logits, data) == [TAGS[tag] for row in GIVEN for tag in row]
    logits[0][2] = [0, 0, 9]  # of "##jing", which has no tag of its own
    assert TASK.decisions(logits, data) == [TAGS[tag] for row in GIVEN for tag in row]


def test_labels_that_mark_no_entities_are_judged_by_accuracy_alone(tokenizer: Tokenizer) -> None:
    task = make_task(TaskSpec(kind="token_classification", metric="accuracy"), ("NN", "VB"))
    rows = TaggedExamples([("is", "cold")], [np.array([1, 0])], [1])
    data = task.encode(tokenizer, rows, 8)
    logits = np.array([[0, 0], [0, 1], [0, 1], [0, 0]], np.float32)
    assert task.metrics([logits], data) == {"accuracy": 0.5}


@pytest.mark.parametrize(
    ("tags", "expected"),
    [
        ("O B-A I-A O", [("A", 1, 2)]),
        ("I-A I-A B-A O", [("A", 0, 1), ("A", 2, 2)]),  # IOB1
        ("B-A I-B", [("A", 0, 0), ("B", 1, 1)]),
        ("S-A B-A I-A E-A E-A", [("A", 0, 0), ("A", 1, 3), ("A", 4, 4)]),  # IOBES
        ("O O", []),
        ("", []),
    ],
)
def test_entities_by_hand(tags: str, expected: list[tuple[str, int, int]]) -> None:
    assert list(entities(tags.split())) == expected


def counts(gold: list[list[str]], found: list[list[str]]) -> np.ndarray:
    return np.array([tag_counts(*row) for row in zip(gold, found, strict=True)])


def test_scores_by_hand() -> None:
    gold = [["B-A", "I-A", "O"], ["B-B", "O"]]
    found = [["B-A", "I-A", "B-A"], ["B-A", "O"]]
    assert entity_scores(counts(gold, found)) == pytest.approx((1 / 3, 1 / 2, 2 / 5))
    assert word_accuracy(counts(gold, found)) == pytest.approx(3 / 5)
    assert entity_scores(counts([["O"]], [["O"]])) == (0, 0, 0)


def test_scores_are_those_of_seqeval() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from seqeval.metrics import accuracy_score, f1_score, precision_score, recall_score

    chooser = random.Random(0)
    tags = [f"{p}-{kind}" for p in "BIES" for kind in ("PER", "LOC", "x-y")] + ["O"] * 3
    for _ in range(200):
        gold = [chooser.choices(tags, k=chooser.randint(1, 9)) for _ in range(4)]
        gold[0][0] = "B-PER"  # seqeval warns where there is no entity at all
        found = [[chooser.choice((tag, *tags)) for tag in row] for row in gold]
        found[0][0] = "B-LOC"
        assert entity_scores(counts(gold, found)) == pytest.approx(
            (precision_score(gold, found), recall_score(gold, found), f1_score(gold, found))
        )
        assert word_accuracy(counts(gold, found)) == pytest.approx(accuracy_score(gold, found))
