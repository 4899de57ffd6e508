"""Every row once, the same seed the same batches."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from compression.batches import (
    Encoded,
    epoch_order,
    make_batch,
    pad,
    sorted_batches,
    training_rows,
)
from tests.encoders import random_rows


def test_an_epoch_has_every_row_once_in_batches_of_all_lengths() -> None:
    lengths = np.random.default_rng(0).integers(3, 60, 1000)
    batches = epoch_order(lengths, batch_size=32, generator=np.random.default_rng(1))
    assert sorted(np.concatenate(batches).tolist()) == list(range(1000))
    assert [len(rows) for rows in batches] == [32] * 31 + [8]
    for rows in batches:
        assert lengths[rows].tolist() == sorted(lengths[rows])
    means = np.array([lengths[rows].mean() for rows in batches[:-1]])
    assert means.std() < 1.5 * lengths.std() / 32**0.5  # as of rows drawn at random


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


def test_batches_go_on_from_any_step() -> None:
    data = random_rows(37)

    def rows(start: int) -> list[list[int]]:
        batches = training_rows(data, batch_size=8, steps=13, seed=3, start=start)
        return [rows.tolist() for rows in batches]

    for start in (1, 4, 5, 6, 10, 12, 13):  # 5 batches an epoch
        assert rows(start) == rows(0)[start:]


def test_sorted_batches_hold_every_row_once() -> None:
    data = random_rows(13)
    batches = list(sorted_batches(data, batch_size=4, pad_id=0))
    assert sorted(np.concatenate([b.rows for b in batches]).tolist()) == list(range(13))
    for batch in batches:
        np.testing.assert_array_equal(batch.labels.numpy(), data.labels[batch.rows])


def test_joined_rows_have_no_labels_and_keep_their_masks() -> None:
    one, two = random_rows(2), random_rows(3, seed=1)
    both = one.joined(two)
    assert both.input_ids == [*one.input_ids, *two.input_ids]
    assert both.token_type_ids == [*one.token_type_ids, *two.token_type_ids]
    assert (both.labels, both.label_mask) == (None, None)
    masked = [
        replace(each, label_mask=[np.array(row) > 25 for row in each.input_ids])
        for each in (one, two)
    ]
    mask = masked[0].joined(masked[1]).label_mask
    assert mask is not None
    assert [row.tolist() for row in mask] == [[i > 25 for i in row] for row in both.input_ids]


def test_pad_marks_real_tokens() -> None:
    data = random_rows(3)
    arrays = pad(data, [2, 0], pad_id=9, length=20)
    assert arrays["attention_mask"].sum(axis=1).tolist() == [
        len(data.input_ids[2]),
        len(data.input_ids[0]),
    ]
    assert (arrays["input_ids"][arrays["attention_mask"] == 0] == 9).all()
    assert arrays["input_ids"][0, : len(data.input_ids[2])].tolist() == data.input_ids[2]


def test_labels_of_tokens_are_padded_with_their_row_and_taken_with_it() -> None:
    data = random_rows(3)
    labels = [np.arange(1, len(row) + 1) for row in data.input_ids]
    mask = [own > 1 for own in labels]
    tagged = Encoded(data.input_ids, data.token_type_ids, labels, mask).take([2, 0])
    batch = make_batch(tagged, [1], pad_id=0, length=20)
    length = len(data.input_ids[0])
    assert batch.labels.numpy().tolist() == [[*range(1, length + 1), *[0] * (20 - length)]]
    assert batch.label_mask.numpy().tolist() == [[0, *[1] * (length - 1), *[0] * (20 - length)]]
    bare = make_batch(Encoded(data.input_ids, data.token_type_ids, None), [1], pad_id=0)
    assert (bare.labels, bare.label_mask) == (None, None)
