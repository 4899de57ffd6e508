"""One score a row. Letters: B rows."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from paddle import Tensor

from compression.batches import Batch, Encoded
from compression.regression import Judged
from compression.tasks.base import Count, Predictions, Task
from compression.tasks.scores import pearson, spearman


@dataclass(frozen=True)
class Regression(Task):
    """The classifier's one output is the score. Labels float32 [rows]."""

    def decisions(self, predictions: Predictions, data: Encoded) -> None:
        """None: a score is near another or far from it, never the same."""

    def label_loss(self, logits: Tensor, batch: Batch, *, total: Count | None = None) -> Tensor:
        """Squared difference of logits [B, 1] from labels [B]."""
        return self._squares(logits, batch.labels.unsqueeze(-1), batch, total)

    def logit_loss(
        self, *, student: Tensor, teacher: Tensor, batch: Batch, total: Count | None = None
    ) -> Tensor:
        """Squared difference of the student's from the teacher's scores, [B, 1]."""
        return self._squares(student, teacher, batch, total)

    def _squares(self, one: Tensor, other: Tensor, batch: Batch, total: Count | None) -> Tensor:
        return (one - other).square().sum() / (self.count(batch) if total is None else total)

    def outcomes(self, predictions: Predictions, data: Encoded) -> np.ndarray:
        """The score given and the row's own, [rows, 2]."""
        return np.stack([np.asarray(predictions)[:, 0], np.asarray(data.labels)], axis=1)

    def metrics_of(self, outcomes: np.ndarray) -> dict[str, float]:
        scores, labels = outcomes.T
        return {"pearson": pearson(scores, labels), "spearman": spearman(scores, labels)}

    def judged(self, predictions: Predictions, data: Encoded) -> Judged:
        scores, labels = np.asarray(predictions)[:, 0], np.asarray(data.labels)
        errors, near = np.abs(scores - labels), float(labels.std()) / 2
        return Judged(
            unit="row",
            rule="right: within half a standard deviation of the split's labels "
            f"({near:.4g}) of the label; alike: as near to each other; margin: minus the error",
            rows=np.arange(len(labels)),
            right=errors <= near,
            margins=-errors,
            answers=[f"{score:.4g}" for score in scores],
            truths=[f"{label:.4g}" for label in labels],
            labels=[()] * len(labels),
            scores=scores,
            tolerance=near,
        )
