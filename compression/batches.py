"""Rows to padded batches: drawn at random, or sorted by length. Letters: B rows, T tokens."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import paddle
from paddle import Tensor


@dataclass(frozen=True)
class Encoded:
    """Tokenised rows: ids, types and labels of each.

    `labels` is an array [rows, ...], or for token-level tasks an array [T_i, ...] a row;
    None where the rows have none. `label_mask` then says, True or False [T_i] a row,
    which tokens a token-level loss counts. `references` are what only the task's metric
    reads of a row: where its words or answers stand. `cut` counts the rows of a whole split
    that were longer than the model takes. `numbers` are the rows' own, in the rows that these
    were taken from; None where they were not taken from any.
    """

    input_ids: Sequence[Sequence[int]]
    token_type_ids: Sequence[Sequence[int]]
    labels: np.ndarray | Sequence[np.ndarray] | None
    label_mask: Sequence[np.ndarray] | None = None
    references: Sequence[Any] | None = None
    cut: int = 0
    numbers: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.input_ids)

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each row [rows]."""
        return np.array([len(row) for row in self.input_ids])

    def numbers_of(self, rows: Sequence[int] | np.ndarray) -> np.ndarray:
        """What these rows are called in the rows that they were first taken from."""
        numbers = np.asarray(rows, np.int64)
        return numbers if self.numbers is None else self.numbers[numbers]

    def take(self, rows: Sequence[int] | np.ndarray) -> Encoded:
        return Encoded(
            [self.input_ids[r] for r in rows],
            [self.token_type_ids[r] for r in rows],
            _taken(self.labels, rows),
            _taken(self.label_mask, rows),
            _taken(self.references, rows),
            numbers=self.numbers_of(rows),
        )

    def joined(self, other: Encoded) -> Encoded:
        """These rows and the other's, none with labels: the teacher labels them all alike."""
        masks = (self.label_mask, other.label_mask)
        return Encoded(
            [*self.input_ids, *other.input_ids],
            [*self.token_type_ids, *other.token_type_ids],
            None,
            None if None in masks else [row for mask in masks for row in mask or ()],
        )


def _taken(values: Any, rows: Sequence[int] | np.ndarray) -> Any:
    if isinstance(values, np.ndarray):
        return values[np.asarray(rows, dtype=np.int64)]
    return None if values is None else [values[r] for r in rows]


@dataclass(frozen=True)
class Batch:
    """Tensors [B, T] int64 and the numbers of their rows, as `Encoded.numbers_of` says them.

    `labels` is [B, ...], or [B, T, ...] of token-level tasks, with zeros at padding; None
    where the rows have none. `label_mask` is float32 [B, T]: 1 for tokens that count.
    """

    input_ids: Tensor
    token_type_ids: Tensor
    attention_mask: Tensor
    labels: Tensor | None
    rows: np.ndarray
    lengths: np.ndarray  # real tokens of each row
    label_mask: Tensor | None = None

    @property
    def inputs(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.input_ids, self.token_type_ids, self.attention_mask


def pad(
    data: Encoded, rows: Sequence[int] | np.ndarray, *, pad_id: int, length: int | None = None
) -> dict[str, np.ndarray]:
    """int64 arrays [B, T] by input name; T is the longest row's length unless given."""
    ids = [data.input_ids[r] for r in rows]
    types = [data.token_type_ids[r] for r in rows]
    length = length or max(len(row) for row in ids)
    shape = (len(ids), length)
    arrays = {
        "input_ids": np.full(shape, pad_id, np.int64),
        "token_type_ids": np.zeros(shape, np.int64),
        "attention_mask": np.zeros(shape, np.int64),
    }
    for i, (row, kinds) in enumerate(zip(ids, types, strict=True)):
        arrays["input_ids"][i, : len(row)] = row
        arrays["token_type_ids"][i, : len(row)] = kinds
        arrays["attention_mask"][i, : len(row)] = 1
    return arrays


def make_batch(
    data: Encoded, rows: Sequence[int] | np.ndarray, *, pad_id: int, length: int | None = None
) -> Batch:
    arrays = pad(data, rows, pad_id=pad_id, length=length)
    numbers = np.asarray(rows, dtype=np.int64)
    padded = arrays["input_ids"].shape[1]
    mask = _collated(data.label_mask, numbers, padded)
    return Batch(
        **{name: paddle.to_tensor(value) for name, value in arrays.items()},
        labels=_collated(data.labels, numbers, padded),
        rows=data.numbers_of(numbers),
        lengths=np.array([len(data.input_ids[r]) for r in numbers], np.int64),
        label_mask=None if mask is None else mask.astype("float32"),
    )


def _collated(values: Any, rows: np.ndarray, length: int) -> Tensor | None:
    """The rows' labels as one tensor; those of tokens are padded with zeros to `length`."""
    own = _taken(values, rows)
    if isinstance(own, list):
        padded = np.zeros((len(own), length, *own[0].shape[1:]), own[0].dtype)
        for i, row in enumerate(own):
            padded[i, : len(row)] = row
        own = padded
    return None if own is None else paddle.to_tensor(own)


def epoch_order(
    lengths: np.ndarray, *, batch_size: int, generator: np.random.Generator
) -> list[np.ndarray]:
    """Row numbers of each batch of one epoch: every row once, drawn at random.

    Within a batch shortest first, so that parts of it can be made that are alike. Batches of rows
    of like length would need no packing, but cost accuracy (DECISIONS.md).
    """
    shuffled = generator.permutation(len(lengths))
    batches = [shuffled[i : i + batch_size] for i in range(0, len(shuffled), batch_size)]
    return [batch[np.argsort(lengths[batch], kind="stable")] for batch in batches]


def training_rows(
    data: Encoded, *, batch_size: int, steps: int, seed: int, start: int = 0
) -> Iterator[np.ndarray]:
    """Row numbers of batches `start` to before `steps`, epoch after epoch.

    A seed gives the same ones always.
    """
    lengths = data.lengths
    each_epoch = -(-len(data) // batch_size)
    epoch, done = start // each_epoch, start
    while True:
        generator = np.random.default_rng([seed, epoch])
        order = epoch_order(lengths, batch_size=batch_size, generator=generator)
        for rows in order[done - epoch * each_epoch :]:
            if done == steps:
                return
            yield rows
            done += 1
        epoch += 1


def sorted_rows(data: Encoded, *, batch_size: int) -> Iterator[np.ndarray]:
    """Row numbers of batches that hold every row once, shortest first."""
    order = np.argsort(data.lengths, kind="stable")
    for start in range(0, len(order), batch_size):
        yield order[start : start + batch_size]


def sorted_batches(data: Encoded, *, batch_size: int, pad_id: int) -> Iterator[Batch]:
    """Every row once, shortest first: for evaluation."""
    for rows in sorted_rows(data, batch_size=batch_size):
        yield make_batch(data, rows, pad_id=pad_id)
