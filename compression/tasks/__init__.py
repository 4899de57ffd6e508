"""What a model predicts: one file a task, registered in TASKS below.

What of a task is known without paddle (its head, its metrics' names) stands in
`compression.spec.TASK_KINDS`.
"""

from __future__ import annotations

from collections.abc import Sequence

from compression.spec import TaskSpec
from compression.tasks.base import Predictions, Task
from compression.tasks.classification import Classification
from compression.tasks.multi_label import MultiLabel
from compression.tasks.regression import Regression

TASKS: dict[str, type[Task]] = {
    "classification": Classification,
    "multi_label": MultiLabel,
    "regression": Regression,
}

__all__ = ["TASKS", "Predictions", "Task", "make_task"]


def make_task(spec: TaskSpec, labels: Sequence[str]) -> Task:
    """The task that a spec names; `labels` are the dataset's values in the outputs' order."""
    return TASKS[spec.kind](tuple(labels), spec.main_metric)
