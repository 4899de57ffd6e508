"""Each task's losses and metrics against numbers by hand, and what padding may not do."""

from __future__ import annotations

from typing import get_args

import numpy as np
import paddle
import pytest
from sklearn import metrics as sklearn_metrics

from compression.batches import Encoded, make_batch
from compression.report import METRIC_NAMES
from compression.spec import TASK_KINDS, TaskSpec
from compression.tasks import TASKS, Task, make_task
from compression.tasks.scores import matthews, pearson, ranks, spearman
from tests.encoders import clear, gradients, random_rows, tiny_encoder

LOGITS = np.array([[2.0, -1.0, 0.5], [0.0, 1.0, -3.0], [0.5, 0.5, 0.0]], np.float32)
TEACHER = np.array([[1.0, 0.0, 0.5], [2.0, 1.0, 1.0], [-1.0, 0.5, 0.0]], np.float32)


def softmax(logits: np.ndarray) -> np.ndarray:
    return np.exp(logits) / np.exp(logits).sum(axis=-1, keepdims=True)


def sigmoid(logits: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-logits))


def cross_entropy(logits: np.ndarray, targets: np.ndarray) -> float:
    return float(-(targets * np.log(softmax(logits))).sum(axis=-1).mean())


def sigmoid_entropy(logits: np.ndarray, targets: np.ndarray) -> float:
    p = sigmoid(logits)
    return float(-(targets * np.log(p) + (1 - targets) * np.log(1 - p)).mean())


def case(kind: str) -> tuple[Task, np.ndarray, int]:
    """A task, labels of three rows, and its outputs."""
    task = make_task(TaskSpec(kind=kind), () if kind == "regression" else ("a", "b", "c"))
    labels = {
        "classification": np.array([0, 2, 1]),
        "multi_label": np.array([[1, 0, 1], [0, 0, 0], [1, 1, 1]], np.float32),
        "regression": np.array([0.5, -1.0, 2.0], np.float32),
    }[kind]
    return task, labels, 1 if kind == "regression" else 3


def three_rows(labels: np.ndarray) -> Encoded:
    rows = random_rows(3)
    return Encoded(rows.input_ids, rows.token_type_ids, labels)


KINDS = [kind for kind, facts in TASK_KINDS.items() if facts.head == "sequence"]


@pytest.mark.parametrize("kind", KINDS)
def test_losses_are_the_numbers_worked_out_by_hand(kind: str) -> None:
    task, labels, outputs = case(kind)
    batch = make_batch(three_rows(labels), range(3), pad_id=0)
    logits, teacher = LOGITS[:, :outputs], TEACHER[:, :outputs]
    by_hand = {
        "classification": (
            cross_entropy(logits, np.eye(3)[[0, 2, 1]]),
            cross_entropy(logits, softmax(teacher)),
        ),
        "multi_label": (
            sigmoid_entropy(logits, np.asarray(labels)),
            sigmoid_entropy(logits, sigmoid(teacher)),
        ),
        # ((2 - 0.5)^2 + (0 + 1)^2 + (0.5 - 2)^2) / 3 and ((2 - 1)^2 + (0 - 2)^2 + (0.5 + 1)^2) / 3
        "regression": (5.5 / 3, 7.25 / 3),
    }[kind]
    own = paddle.to_tensor(logits), paddle.to_tensor(teacher)
    found = (
        task.label_loss(own[0], batch),
        task.logit_loss(student=own[0], teacher=own[1], batch=batch),
    )
    assert [float(value) for value in found] == pytest.approx(by_hand, rel=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_the_parts_of_a_batch_add_up_to_it(kind: str) -> None:
    task, labels, outputs = case(kind)
    logits, teacher = (paddle.to_tensor(v[:, :outputs]) for v in (LOGITS, TEACHER))
    data = three_rows(labels)

    def losses(rows: list[int], total: int | None) -> np.ndarray:
        batch = make_batch(data, rows, pad_id=0)
        own, other = logits[rows], teacher[rows]
        return np.array(
            [
                float(task.label_loss(own, batch, total=total)),
                float(task.logit_loss(student=own, teacher=other, batch=batch, total=total)),
            ]
        )

    whole = losses([0, 1, 2], None)
    np.testing.assert_allclose(losses([0, 2], 3) + losses([1], 3), whole, rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_padding_a_batch_further_changes_neither_loss_nor_gradient(kind: str) -> None:
    task, labels, outputs = case(kind)
    student, teacher = tiny_encoder(1, num_labels=outputs), tiny_encoder(2, num_labels=outputs)
    data = three_rows(labels)

    def learnt(length: int | None) -> list[tuple[float, dict[str, np.ndarray]]]:
        batch = make_batch(data, range(3), pad_id=0, length=length)
        with paddle.no_grad():
            targets = teacher(*batch.inputs)
        found = []
        for loss in (
            lambda own: task.label_loss(own, batch),
            lambda own: task.logit_loss(student=own, teacher=targets, batch=batch),
        ):
            clear(student)
            value = loss(student(*batch.inputs))
            value.backward()
            found.append((float(value), gradients(student)))
        return found

    for near, far in zip(learnt(None), learnt(31), strict=True):
        (close, close_gradients), (wide, wide_gradients) = near, far
        assert close == pytest.approx(wide, rel=1e-5)
        assert close_gradients.keys() == wide_gradients.keys()
        for name, value in close_gradients.items():
            np.testing.assert_allclose(value, wide_gradients[name], atol=2e-5, err_msg=name)


@pytest.mark.parametrize("kind", KINDS)
def test_the_logit_loss_has_a_gradient_that_vanishes_at_the_teacher(kind: str) -> None:
    task, labels, outputs = case(kind)
    batch = make_batch(three_rows(labels), range(3), pad_id=0)
    teacher = paddle.to_tensor(TEACHER[:, :outputs])

    def gradient(logits: np.ndarray) -> np.ndarray:
        student = paddle.to_tensor(logits[:, :outputs], stop_gradient=False)
        task.logit_loss(student=student, teacher=teacher, batch=batch).backward()
        return student.grad.numpy()

    assert (np.abs(gradient(LOGITS)).max(axis=1) > 1e-3).all()  # of every row
    np.testing.assert_allclose(gradient(TEACHER), 0, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_metrics_are_those_that_the_spec_knows(kind: str) -> None:
    task, labels, outputs = case(kind)
    found = task.metrics(LOGITS[:, :outputs], three_rows(labels))
    assert tuple(found) == TASK_KINDS[kind].metrics
    assert task.score(LOGITS[:, :outputs], three_rows(labels)) == found[TASK_KINDS[kind].metrics[0]]
    assert all(type(value) is float and -1 <= value <= 1 for value in found.values())
    assert found.keys() <= METRIC_NAMES.keys()
    for name in found:
        chosen = make_task(TaskSpec(kind=kind, metric=name), task.labels)
        assert chosen.score(LOGITS[:, :outputs], three_rows(labels)) == found[name]


def test_every_kind_of_the_spec_is_registered() -> None:
    kinds = get_args(TaskSpec.model_fields["kind"].annotation)
    assert set(kinds) == set(TASKS) == set(TASK_KINDS)


@pytest.mark.parametrize("classes", [2, 4])
def test_metrics_of_a_classification_are_scikit_learns(classes: int) -> None:
    generator = np.random.default_rng(classes)
    labels = generator.integers(0, classes, 50)
    logits = generator.normal(size=(50, classes)) + 2 * np.eye(classes)[labels]
    rows = random_rows(50)
    data = Encoded(rows.input_ids, rows.token_type_ids, labels)
    task = make_task(TaskSpec(), [str(i) for i in range(classes)])
    given = logits.argmax(axis=1)
    average = "binary" if classes == 2 else "macro"
    assert task.metrics(logits, data) == pytest.approx(
        {
            "accuracy": sklearn_metrics.accuracy_score(labels, given),
            "f1": sklearn_metrics.f1_score(labels, given, average=average),
            "matthews": sklearn_metrics.matthews_corrcoef(labels, given),
        }
    )
    one_sided = np.zeros((50, classes))
    assert task.metrics(one_sided, data)["matthews"] == 0
    assert matthews(labels, labels, classes) == pytest.approx(1)


def test_metrics_of_several_labels_are_scikit_learns() -> None:
    generator = np.random.default_rng(0)
    marks = (generator.random((40, 5)) < 0.3).astype(np.float32)
    logits = generator.normal(size=(40, 5)) + 2 * marks - 1
    rows = random_rows(40)
    task = make_task(TaskSpec(kind="multi_label"), tuple("abcde"))
    found = task.metrics(logits, Encoded(rows.input_ids, rows.token_type_ids, marks))
    given = logits > 0
    assert found == pytest.approx(
        {
            "micro_f1": sklearn_metrics.f1_score(marks, given, average="micro"),
            "macro_f1": sklearn_metrics.f1_score(marks, given, average="macro"),
            "exact_match": sklearn_metrics.accuracy_score(marks, given),
        }
    )
    nothing = task.metrics(
        -np.ones((40, 5)), Encoded(rows.input_ids, rows.token_type_ids, 0 * marks)
    )
    assert nothing == {"micro_f1": 0.0, "macro_f1": 0.0, "exact_match": 1.0}


def test_correlations_by_hand() -> None:
    scores, labels = np.array([1.0, 2.0, 3.0, 10.0]), np.array([1.0, 3.0, 2.0, 4.0])
    # Centred: (-3, -2, -1, 6) and (-1.5, 0.5, -0.5, 1.5); 13 / sqrt(50 * 5).
    assert pearson(scores, labels) == pytest.approx(13 / 250**0.5)
    # Ranks 1 2 3 4 and 1 3 2 4: 1 - 6 * 2 / (4 * 15).
    assert spearman(scores, labels) == pytest.approx(0.8)
    assert pearson(scores, -scores) == pytest.approx(-1)
    assert pearson(np.ones(4), labels) == spearman(scores, np.ones(4)) == 0
    assert ranks(np.array([5.0, 1.0, 5.0, 7.0])).tolist() == [2.5, 1, 2.5, 4]
