"""Question answering: windows, losses, decoding and metrics against cases made by hand."""

from __future__ import annotations

import numpy as np
import paddle
import pytest
from tokenizers import Tokenizer

from compression.alignment import Window
from compression.batches import Encoded, make_batch
from compression.examples import Answer, AskedExamples
from compression.spec import TaskSpec
from compression.tasks import make_task
from compression.tasks.question_answering import (
    answer_words,
    best_answer,
    exact_match,
    token_f1,
)
from compression.tokenization import load_tokenizer
from tests.builders import tiny_bert

SPEC = TaskSpec(kind="question_answering", max_seq_len=36, doc_stride=4, max_answer_length=3)
TASK = make_task(SPEC, ("start", "end"))
LONG = " ".join(["the", "film"] * 20 + ["good", "play"])
ROWS = AskedExamples(
    ["who", "where", "谁"],
    ["the good play.", LONG, "中国人好。"],
    [
        (Answer("good play", 4), Answer("play", 9)),
        (Answer("good play", LONG.index("good")),),
        (Answer("国人", 1),),
    ],
    [1, 2, 3],
)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    words = ("who", "where", "谁", "the", "film", "good", "play", "中", "国", "人", ".")
    return load_tokenizer(
        tiny_bert(tmp_path_factory.mktemp("asked") / "m", num_labels=None, words=words)
    )


@pytest.fixture(scope="module")
def data(tokenizer: Tokenizer) -> Encoded:
    return TASK.encode(tokenizer, ROWS, SPEC.max_seq_len)


def test_answers_stand_at_their_first_and_last_token(data: Encoded) -> None:
    assert data.labels is not None and data.label_mask is not None and data.references is not None
    assert [asked.window.row for asked in data.references] == [0, 1, 1, 2]
    #  [CLS] who [SEP] the good play . [SEP]
    assert np.argwhere(data.labels[0]).tolist() == [[4, 0], [5, 1]]
    assert np.flatnonzero(data.label_mask[0]).tolist() == [0, 3, 4, 5, 6]
    #  the first window of the long context does not hold the answer: [CLS] stands for that
    assert np.argwhere(data.labels[1]).tolist() == [[0, 0], [0, 1]]
    last = len(data.input_ids[2]) - 2  # before [SEP]
    assert np.argwhere(data.labels[2]).tolist() == [[last - 1, 0], [last, 1]]
    #  [CLS] 谁 [SEP] 中 国 人 ...
    assert np.argwhere(data.labels[3]).tolist() == [[4, 0], [5, 1]]


def random_logits(data: Encoded, rows: list[int], seed: int, length: int) -> np.ndarray:
    """[B, T, 2], the same for the same tokens whatever the padding."""
    logits = np.full((len(rows), length, 2), 9, np.float32)
    generator = np.random.default_rng(seed)
    for i, row in enumerate(rows):
        count = len(data.input_ids[row])
        logits[i, :count] = generator.normal(0, 2, (count, 2))
    return logits


def log_softmax(logits: np.ndarray) -> np.ndarray:
    return logits - np.log(np.exp(logits).sum(axis=0))


def test_the_label_loss_is_over_the_context_and_cls(data: Encoded) -> None:
    rows = [0, 1, 3]
    batch = make_batch(data, rows, pad_id=0)
    logits = random_logits(data, rows, 0, batch.input_ids.shape[1])
    candidates = [[0, 3, 4, 5, 6], [0, *range(3, 35)], [0, 3, 4, 5, 6, 7]]
    answers = [(2, 3), (0, 0), (2, 3)]  # among the candidates
    expected = []
    for row, (tokens, (start, end)) in enumerate(zip(candidates, answers, strict=True)):
        scores = log_softmax(logits[row, tokens])
        expected.append(-(scores[start, 0] + scores[end, 1]) / 2)
    loss = float(TASK.label_loss(paddle.to_tensor(logits), batch))
    assert loss == pytest.approx(np.mean(expected), rel=1e-5)
    part = float(TASK.label_loss(paddle.to_tensor(logits), batch, total=6))
    assert part == pytest.approx(np.mean(expected) / 2, rel=1e-5)


def test_the_logit_loss_is_by_hand_and_has_a_gradient(data: Encoded) -> None:
    batch = make_batch(data, [0], pad_id=0)
    own, other = (random_logits(data, [0], seed, 8) for seed in (1, 2))
    student = paddle.to_tensor(own, stop_gradient=False)
    loss = TASK.logit_loss(student=student, teacher=paddle.to_tensor(other), batch=batch)
    tokens = [0, 3, 4, 5, 6]
    wanted, found = np.exp(log_softmax(other[0, tokens])), log_softmax(own[0, tokens])
    assert float(loss) == pytest.approx(-(wanted * found).sum() / 2, rel=1e-5)
    loss.backward()
    expected = np.zeros_like(own)
    expected[0, tokens] = (np.exp(found) - wanted) / 2
    assert np.abs(expected).max() > 0.01
    np.testing.assert_allclose(student.grad.numpy(), expected, atol=1e-6)


def test_padding_further_changes_neither_loss_nor_gradient(data: Encoded) -> None:
    found = []
    rows = [0, 2, 3]
    for length in (30, 47):
        batch = make_batch(data, rows, pad_id=0, length=length)
        student = paddle.to_tensor(random_logits(data, rows, 3, length), stop_gradient=False)
        teacher = paddle.to_tensor(random_logits(data, rows, 4, length))
        both = TASK.label_loss(student, batch) + TASK.logit_loss(
            student=student, teacher=teacher, batch=batch
        )
        both.backward()
        found.append((float(both), student.grad.numpy()))
    (loss, gradient), (padded_loss, padded_gradient) = found
    assert padded_loss == pytest.approx(loss, rel=1e-6)
    np.testing.assert_allclose(padded_gradient[:, :30], gradient, atol=1e-7)
    assert not padded_gradient[:, 30:].any()


def test_the_best_answer_is_that_of_all_spans() -> None:
    offsets = np.array([[0, 3], [4, 8], [9, 13], [13, 14], [15, 19]])
    window = Window(0, [0] * 8, [0] * 8, 2, offsets)
    context = "the good play. film"
    generator = np.random.default_rng(0)
    for longest in (1, 2, 3, 9):
        logits = generator.normal(0, 3, (8, 2))
        scores = log_softmax(logits[[0, 2, 3, 4, 5, 6]])[1:]
        spans = [
            (scores[start, 0] + scores[end, 1], start, end)
            for start in range(5)
            for end in range(start, min(5, start + longest))
        ]
        score, start, end = max(spans)
        found = best_answer(logits, window, context, longest)
        assert found[0] == pytest.approx(score)
        assert found[1] == context[offsets[start, 0] : offsets[end, 1]]


def test_a_window_that_is_sure_of_nothing_loses_to_one_that_is() -> None:
    """Raw logits would say the opposite: a softmax does not know how high they stand."""
    offsets = np.array([[0, 3], [4, 8]])
    window = Window(0, [0] * 4, [0] * 4, 2, offsets)
    sure = np.array([[-9, -9], [0, 0], [3, -3], [-3, 3]], float)
    high = np.array([[60, 60], [0, 0], [50, 50], [50, 50]], float)
    assert best_answer(sure, window, "the good", 9)[0] > best_answer(high, window, "no idea", 9)[0]
    assert best_answer(sure, window, "the good", 9)[1] == "the good"


def test_the_answer_of_a_question_is_that_of_its_best_window(data: Encoded) -> None:
    assert data.references is not None
    logits = [np.zeros((len(ids), 2), np.float32) for ids in data.input_ids]
    for own in logits:
        own[0] = 5  # not here
    logits[0][5] = 20  # "play": the second of two right answers
    last = len(data.input_ids[2]) - 2
    logits[2][last] = 20  # "play" of "good play"
    logits[3][[4, 5], [0, 1]] = 20
    assert TASK.decisions(logits, data) == ["play", "play", "国人"]
    figures = TASK.metrics(logits, data)
    assert figures == pytest.approx({"exact_match": 2 / 3, "f1": (1 + 2 / 3 + 1) / 3})


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("The  Cat, sat on-a mat!", ["cat", "sat", "ona", "mat"]),
        ("An answer", ["answer"]),
        ("“Quoted”", ["“quoted”"]),  # as SQuAD's own script: only ASCII punctuation goes
        ("《中国》人民 2008年", ["中", "国", "人", "民", "2008", "年"]),
        ("在 Beijing 大学。", ["在", "beijing", "大", "学"]),
        ("...", []),
    ],
)
def test_words_of_an_answer(text: str, words: list[str]) -> None:
    assert answer_words(text) == words


def test_scores_by_hand() -> None:
    assert exact_match("the Cat.", "cat") == 1
    assert exact_match("cats", "cat") == 0
    assert token_f1("good old film", "the film") == pytest.approx(2 * (1 / 3) * 1 / (1 / 3 + 1))
    assert token_f1("a b b", "b b b") == pytest.approx(2 * 2 / (2 + 3))
    assert token_f1("中国人", "国人民") == pytest.approx(2 / 3)
    assert token_f1("中国。", "中国") == exact_match("中国。", "中国") == 1
    assert token_f1("", "film") == token_f1("film", "good") == 0
    assert token_f1("...", "the") == 1
