"""Every row once, little padding, the same seed the same batches."""

from __future__ import annotations

import numpy as np

from compression.batches import epoch_order, pad, sorted_batches, training_rows
from tests.encoders import random_rows


def test_an_epoch_has_every_row_once_and_like_lengths_together() -> None:
    lengths = np.random.default_rng(0).integers(3, 60, 1000)
    batches = epoch_order(lengths, batch_size=32, generator=np.random.default_rng(1))
    assert sorted(np.concatenate(batches).tolist()) == list(range(1000))
    padded = sum(lengths[rows].max() * len(rows) for rows in batches)
    assert padded < 1.06 * lengths.sum()
    firsts = [int(lengths[rows[0]]) for rows in batches]
    assert firsts != sorted(firsts)  # short rows do not all come first


def test_the_seed_alone_decides_the_batches() -> None:
    data = random_rows(40)

    def rows(seed: int) -> list[list[int]]:
        batches = training_rows(data, batch_size=8, steps=12, seed=seed)
        return [rows.tolist() for rows in batches]

    assert rows(3) == rows(3)
    assert rows(3) != rows(4)
    assert len(rows(3)) == 12
    assert sorted(row for batch in rows(3)[:5] for row in batch) == list(range(40))
    assert rows(3)[:5] != rows(3)[5:10]  # the next epoch has an order of its own


def test_sorted_batches_hold_every_row_once() -> None:
    data = random_rows(13)
    batches = list(sorted_batches(data, batch_size=4, pad_id=0))
    assert sorted(np.concatenate([b.rows for b in batches]).tolist()) == list(range(13))
    for batch in batches:
        np.testing.assert_array_equal(batch.labels.numpy(), data.labels[batch.rows])


def test_pad_marks_real_tokens() -> None:
    data = random_rows(3)
    arrays = pad(data, [2, 0], pad_id=9, length=20)
    assert arrays["attention_mask"].sum(axis=1).tolist() == [
        len(data.input_ids[2]),
        len(data.input_ids[0]),
    ]
    assert (arrays["input_ids"][arrays["attention_mask"] == 0] == 9).all()
    assert arrays["input_ids"][0, : len(data.input_ids[2])].tolist() == data.input_ids[2]
