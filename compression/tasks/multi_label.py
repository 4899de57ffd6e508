"""Any number of labels a row. Letters: B rows, C labels."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np
from paddle import Tensor
from paddle.nn import functional as F

from compression.batches import Batch, Encoded
from compression.regression import Judged
from compression.tasks.base import Count, Predictions, Task
from compression.tasks.scores import f1, marked_counts


@dataclass(frozen=True)
class MultiLabel(Task):
    """Each of C labels applies to a row or not. Labels float32 [rows, C], 0 or 1.

    A label is given where its logit is above 0, that is from a probability of 1/2 on.
    """

    def decisions(self, predictions: Predictions, data: Encoded) -> Sequence[Hashable]:
        """Each row's labels, as many marks as there are labels."""
        return [tuple(marks) for marks in (np.asarray(predictions) > 0).tolist()]

    def label_loss(self, logits: Tensor, batch: Batch, *, total: Count | None = None) -> Tensor:
        """Sigmoid cross-entropy of logits [B, C] against labels [B, C], a mean over labels too."""
        return self._entropy(logits, batch.labels, batch, total)

    def logit_loss(
        self, *, student: Tensor, teacher: Tensor, batch: Batch, total: Count | None = None
    ) -> Tensor:
        """The same against the teacher's sigmoids; logits [B, C]."""
        return self._entropy(student, F.sigmoid(teacher), batch, total)

    def _entropy(
        self, logits: Tensor, targets: Tensor, batch: Batch, total: Count | None
    ) -> Tensor:
        # Not F.binary_cross_entropy_with_logits: at a logit of exactly 0 its gradient is too small
        # by 1 (Paddle 3.3.1, CPU).
        entropies = F.softplus(logits) - logits * targets
        rows = self.count(batch) if total is None else total
        return entropies.sum() / (rows * logits.shape[-1])

    def outcomes(self, predictions: Predictions, data: Encoded) -> np.ndarray:
        """Which labels were found and which apply, bool [rows, 2, C]."""
        return np.stack([np.asarray(predictions) > 0, np.asarray(data.labels) > 0.5], axis=1)

    def metrics_of(self, outcomes: np.ndarray) -> dict[str, float]:
        """F1 of all marks together, the mean F1 of the labels, and rows with every mark right.

        A label that is neither wanted nor given is left out of the mean.
        """
        found, wanted = outcomes[:, 0], outcomes[:, 1]
        counts = marked_counts(found, wanted)
        occurs = counts[1] + counts[2] > 0
        return {
            "micro_f1": float(f1(*(count.sum() for count in counts))),
            "macro_f1": float(f1(*counts)[occurs].mean()) if occurs.any() else 0.0,
            "exact_match": float((found == wanted).all(axis=1).mean()),
        }

    def judged(self, predictions: Predictions, data: Encoded) -> Judged:
        logits, wanted = np.asarray(predictions), np.asarray(data.labels) > 0.5
        truths = [self._named(marks) for marks in wanted]
        return Judged(
            unit="row",
            rule="right: every label that applies is given and no other; margin: the logit of the "
            "least certain label, negative where that is wrong",
            rows=np.arange(len(wanted)),
            right=((logits > 0) == wanted).all(axis=1),
            margins=np.where(wanted, logits, -logits).min(axis=1),
            answers=[", ".join(self._named(marks)) for marks in logits > 0],
            truths=[", ".join(names) for names in truths],
            labels=truths,
        )

    def _named(self, marks: np.ndarray) -> list[str]:
        names = [label for label, marked in zip(self.labels, marks, strict=True) if marked]
        return names or ["(none)"]
