"""What every task offers. Letters: B rows, T tokens, C outputs of the classifier."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from paddle import Tensor
from tokenizers import Tokenizer

from compression.batches import Batch, Encoded
from compression.regression import Judged
from compression.spec import TaskSpec
from compression.tokenization import encode_rows

Predictions = np.ndarray | Sequence[np.ndarray]
"""Logits of a split in the rows' order: [rows, C], or with a token head an array [T_i, C] a row."""

Count = int | float | Tensor


@dataclass(frozen=True)
class Task(ABC):
    """One kind of task: its losses, its metrics and how its rows become labelled tokens.

    Both losses are a sum over `count(batch)` units divided by `total`, by default that
    count: a mean over real rows, or with a token head over the tokens of `batch.label_mask`.
    Padding never contributes. A part of a batch is given the whole batch's total, and
    the parts' losses then add up to the whole's.

    `labels` are what the outputs are called; `main_metric` names the entry of `metrics`
    that an accuracy drop is measured in.
    """

    too_long: ClassVar[str] = "more than"  # "rows have ... 128 tokens and were cut"
    labels: tuple[str, ...]
    main_metric: str

    @classmethod
    def of(cls, spec: TaskSpec, labels: Sequence[str]) -> Task:
        """The task as a spec asks for it; `labels` are what the outputs are called."""
        return cls(tuple(labels), spec.main_metric)

    def count(self, batch: Batch) -> Count:
        """How many units a loss of this batch is the mean of: its rows."""
        return len(batch.rows)

    @abstractmethod
    def decisions(self, predictions: Predictions, data: Encoded) -> Sequence[Hashable] | None:
        """What is answered: one decision a row, a word or a question. None where it is a number.

        Two predictions of the same rows are compared by it, whatever their labels are.
        """

    @abstractmethod
    def label_loss(self, logits: Tensor, batch: Batch, *, total: Count | None = None) -> Tensor:
        """The loss of logits [B, C] ([B, T, C] of a token head) against the batch's labels."""

    @abstractmethod
    def logit_loss(
        self, *, student: Tensor, teacher: Tensor, batch: Batch, total: Count | None = None
    ) -> Tensor:
        """The loss of the student's logits against the teacher's; reads no labels."""

    @abstractmethod
    def outcomes(self, predictions: Predictions, data: Encoded) -> np.ndarray:
        """All that the metrics read of each row (of several windows: of each question) [rows, ...].

        Rows can be drawn from it, again and again, without looking at the predictions again.
        """

    @abstractmethod
    def metrics_of(self, outcomes: np.ndarray) -> dict[str, float]:
        """Every metric of the task by name, each in [-1, 1], with `main_metric` among them."""

    def metrics(self, predictions: Predictions, data: Encoded) -> dict[str, float]:
        """The metrics of all rows of `data`."""
        return self.metrics_of(self.outcomes(predictions, data))

    @abstractmethod
    def judged(self, predictions: Predictions, data: Encoded) -> Judged:
        """Each answer, whether it is right and how clearly: what a model is compared by."""

    def row_lengths(self, data: Encoded) -> np.ndarray:
        """Tokens of each row of the dataset [R]."""
        return data.lengths

    def score(self, predictions: Predictions, data: Encoded) -> float:
        """The main metric."""
        return self.metrics(predictions, data)[self.main_metric]

    def encode(self, tokenizer: Tokenizer, examples: Any, max_seq_len: int) -> Encoded:
        """Rows as token ids with their labels; `examples` are those that the plan deals out."""
        rows = encode_rows(tokenizer, examples.texts, examples.pairs, max_seq_len)
        return Encoded(
            [row.ids for row in rows],
            [row.type_ids for row in rows],
            examples.labels,
            cut=sum(bool(row.overflowing) for row in rows),
        )
