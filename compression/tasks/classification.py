"""Single-sentence and sentence-pair classification. Letters: B rows, C classes."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from paddle import Tensor
from paddle.nn import functional as F

from compression.batches import Batch, Encoded
from compression.tasks.base import Count, Predictions, Task


@dataclass(frozen=True)
class Classification(Task):
    """One of C labels a row. Labels int64 [rows]."""

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

    def metrics(self, predictions: Predictions, data: Encoded) -> dict[str, float]:
        return {"accuracy": accuracy(np.asarray(predictions).argmax(axis=-1), data.labels)}


def accuracy(found: np.ndarray, labels: np.ndarray) -> float:
    """Share of rows whose label [rows] was found, 0..1."""
    return float((found == labels).mean())
