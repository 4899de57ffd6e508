"""Single-sentence and sentence-pair classification. Letters: B rows, C classes."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np
from paddle import Tensor
from paddle.nn import functional as F

from compression.batches import Batch, Encoded
from compression.regression import Judged
from compression.tasks.base import Count, Predictions, Task
from compression.tasks.scores import accuracy, f1, marked_counts, matthews, true_margins


@dataclass(frozen=True)
class Classification(Task):
    """One of C labels a row. Labels int64 [rows]."""

    def decisions(self, predictions: Predictions, data: Encoded) -> Sequence[Hashable]:
        """Each row's label."""
        return np.asarray(predictions).argmax(axis=-1).tolist()

    def label_loss(self, logits: Tensor, batch: Batch, *, total: Count | None = None) -> Tensor:
        """Cross-entropy of logits [B, C] against labels [B]."""
        entropies = F.cross_entropy(logits, batch.labels, reduction="sum")
        return entropies / (self.count(batch) if total is None else total)

    def logit_loss(
        self, *, student: Tensor, teacher: Tensor, batch: Batch, total: Count | None = None
    ) -> Tensor:
        """Cross-entropy of the student's logits against the teacher's softmax, both [B, C]."""
        entropies = -(F.softmax(teacher) * F.log_softmax(student)).sum()
        return entropies / (self.count(batch) if total is None else total)

    def outcomes(self, predictions: Predictions, data: Encoded) -> np.ndarray:
        """The label found and the row's own, [rows, 2]."""
        return np.stack([np.asarray(predictions).argmax(axis=-1), np.asarray(data.labels)], axis=1)

    def metrics_of(self, outcomes: np.ndarray) -> dict[str, float]:
        """Accuracy, Matthews correlation and F1: of the second of two labels, as GLUE does it.

        Of more labels, the mean F1 of those that occur in data or predictions.
        """
        found, labels = outcomes.T
        classes = np.arange(len(self.labels))
        counts = marked_counts(found[:, None] == classes, labels[:, None] == classes)
        each = f1(*counts)
        occurs = counts[1] + counts[2] > 0
        return {
            "accuracy": accuracy(found, labels),
            "f1": float(each[1] if len(classes) == 2 else each[occurs].mean()),
            "matthews": matthews(found, labels, len(classes)),
        }

    def judged(self, predictions: Predictions, data: Encoded) -> Judged:
        logits, labels = np.asarray(predictions), np.asarray(data.labels)
        truths = [self.labels[label] for label in labels]
        return Judged(
            unit="row",
            rule="right: the likeliest label is the true one; margin: the true label's logit over "
            "the largest other",
            rows=np.arange(len(labels)),
            right=logits.argmax(axis=-1) == labels,
            margins=true_margins(logits, labels),
            answers=[self.labels[best] for best in logits.argmax(axis=-1)],
            truths=truths,
            labels=[(truth,) for truth in truths],
        )
