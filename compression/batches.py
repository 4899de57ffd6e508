"""Rows to padded batches, with rows of like length together. Letters: B rows, T tokens."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import paddle
from paddle import Tensor

POOL_BATCHES = 64  # rows are sorted by length within a shuffled pool of this many batches


@dataclass(frozen=True)
class Encoded:
    """Tokenised rows: ids and types of each row, and labels [rows]."""

    input_ids: Sequence[Sequence[int]]
    token_type_ids: Sequence[Sequence[int]]
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.input_ids)

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each row [rows]."""
        return np.array([len(row) for row in self.input_ids])

    def take(self, rows: Sequence[int] | np.ndarray) -> Encoded:
        return Encoded(
            [self.input_ids[r] for r in rows],
            [self.token_type_ids[r] for r in rows],
            self.labels[np.asarray(rows, dtype=np.int64)],
        )


@dataclass(frozen=True)
class Batch:
    """Tensors [B, T] int64 (labels [B]) and the row numbers they came from."""

    input_ids: Tensor
    token_type_ids: Tensor
    attention_mask: Tensor
    labels: Tensor
    rows: np.ndarray

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


def make_batch(data: Encoded, rows: Sequence[int] | np.ndarray, *, pad_id: int) -> Batch:
    arrays = pad(data, rows, pad_id=pad_id)
    numbers = np.asarray(rows, dtype=np.int64)
    return Batch(
        **{name: paddle.to_tensor(value) for name, value in arrays.items()},
        labels=paddle.to_tensor(data.labels[numbers]),
        rows=numbers,
    )


def epoch_order(
    lengths: np.ndarray, *, batch_size: int, generator: np.random.Generator
) -> list[np.ndarray]:
    """Row numbers of each batch of one epoch, in random order, like lengths together.

    Rows are shuffled, sorted by length within pools of POOL_BATCHES batches, cut
    into batches, and the batches shuffled: every row once, little padding.
    """
    shuffled = generator.permutation(len(lengths))
    batches: list[np.ndarray] = []
    pool_rows = POOL_BATCHES * batch_size
    for start in range(0, len(shuffled), pool_rows):
        pool = shuffled[start : start + pool_rows]
        pool = pool[np.argsort(lengths[pool], kind="stable")]
        batches += [pool[i : i + batch_size] for i in range(0, len(pool), batch_size)]
    return [batches[i] for i in generator.permutation(len(batches))]


def training_rows(data: Encoded, *, batch_size: int, steps: int, seed: int) -> Iterator[np.ndarray]:
    """Row numbers of `steps` batches, epoch after epoch; the same seed gives the same ones."""
    lengths = data.lengths
    epoch = done = 0
    while True:
        generator = np.random.default_rng([seed, epoch])
        for rows in epoch_order(lengths, batch_size=batch_size, generator=generator):
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
