"""What a model predicts: one file a task, registered in TASKS below."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from paddle import Tensor

from compression.tasks import classification


@dataclass(frozen=True)
class Task:
    """label_loss(logits, labels), logit_loss(*, student, teacher), metric(logits, labels) 0..1."""

    label_loss: Callable[[Tensor, Tensor], Tensor]
    logit_loss: Callable[..., Tensor]
    metric: Callable[[np.ndarray, np.ndarray], float]


TASKS = {
    "classification": Task(
        label_loss=classification.label_loss,
        logit_loss=classification.logit_loss,
        metric=classification.accuracy,
    ),
}
