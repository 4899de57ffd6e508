"""Reordering moves units and leaves the function alone."""

from __future__ import annotations

import numpy as np
import pytest

from compression.batches import make_batch
from compression.encoder import build_encoder, numpy_weights
from compression.reorder import descending, reorder
from tests.encoders import random_rows, tiny_encoder


def test_any_order_leaves_the_function_unchanged() -> None:
    encoder, batch = tiny_encoder(), make_batch(random_rows(8), range(8), pad_id=0)
    generator = np.random.default_rng(0)
    head_orders = [generator.permutation(4) for _ in range(2)]
    neuron_orders = [generator.permutation(16) for _ in range(2)]
    weights = numpy_weights(encoder)
    moved = reorder(encoder.config, weights, head_orders=head_orders, neuron_orders=neuron_orders)
    other = build_encoder(encoder.config, moved)
    for own, theirs in zip(
        encoder.encode(*batch.inputs).hidden, other.encode(*batch.inputs).hidden, strict=True
    ):
        np.testing.assert_allclose(own.numpy(), theirs.numpy(), atol=1e-5)
    first = head_orders[0][0]
    np.testing.assert_array_equal(
        moved["layers.0.attention.query.weight"][:, :6],
        weights["layers.0.attention.query.weight"][:, 6 * first : 6 * first + 6],
    )
    np.testing.assert_array_equal(
        moved["layers.1.ffn.intermediate.bias"],
        weights["layers.1.ffn.intermediate.bias"][neuron_orders[1]],
    )


def test_descending_is_stable() -> None:
    assert descending(np.array([1.0, 3.0, 1.0, 2.0])).tolist() == [1, 3, 0, 2]


def test_an_order_that_loses_a_unit_is_refused() -> None:
    encoder = tiny_encoder()
    good = [np.arange(4)] * 2
    with pytest.raises(ValueError, match="neurons of layer 1 is not a permutation of 16"):
        reorder(
            encoder.config,
            numpy_weights(encoder),
            head_orders=good,
            neuron_orders=[np.arange(16), np.zeros(16, int)],
        )
