"""Single-sentence and sentence-pair classification. Letters: B rows, C classes."""

from __future__ import annotations

import numpy as np
from paddle import Tensor
from paddle.nn import functional as F


def label_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean cross-entropy of logits [B, C] against labels [B]."""
    return F.cross_entropy(logits, labels)


def logit_loss(*, student: Tensor, teacher: Tensor) -> Tensor:
    """Mean cross-entropy of the student's logits against the teacher's softmax, both [B, C]."""
    return -(F.softmax(teacher) * F.log_softmax(student)).sum(axis=-1).mean()


def accuracy(logits: np.ndarray, labels: np.ndarray) -> float:
    """Share of rows whose largest logit is the label's, 0..1."""
    return float((logits.argmax(axis=-1) == labels).mean())
