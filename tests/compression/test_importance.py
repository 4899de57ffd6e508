"""Importance against finite differences and against its own definition."""

from __future__ import annotations

import numpy as np
import paddle
import pytest

from compression.batches import Batch, make_batch
from compression.encoder import Encoder, build_encoder, numpy_weights
from compression.importance import measure_importance
from tests.encoders import CLASSIFICATION, gradients, random_rows, tiny_encoder

LOSS = CLASSIFICATION.label_loss
STEP = 1e-2  # of the finite differences, in float32


def loss_of(encoder: Encoder, batch: Batch, gates: list[paddle.Tensor] | None = None) -> float:
    with paddle.no_grad():
        return float(LOSS(encoder.encode(*batch.inputs, head_gates=gates).logits, batch))


def batch_of(rows: range, seed: int = 0) -> Batch:
    return make_batch(random_rows(rows.stop, seed=seed), rows, pad_id=0)


def test_head_importance_is_the_slope_of_the_loss_in_each_gate() -> None:
    encoder, batch = tiny_encoder(), batch_of(range(8))
    found = measure_importance(encoder, random_rows(8), [np.arange(8)], CLASSIFICATION)
    for layer in range(2):
        for head in range(4):
            sides = []
            for sign in (1, -1):
                gates = [np.ones(4, np.float32), np.ones(4, np.float32)]
                gates[layer][head] += sign * STEP
                sides.append(loss_of(encoder, batch, [paddle.to_tensor(g) for g in gates]))
            slope = abs(sides[0] - sides[1]) / (2 * STEP)
            assert found.heads[layer][head] == pytest.approx(slope, rel=0.02, abs=2e-4)


def test_neuron_importance_is_the_slope_in_each_neurons_own_scale() -> None:
    encoder, batch = tiny_encoder(), batch_of(range(8))
    found = measure_importance(encoder, random_rows(8), [np.arange(8)], CLASSIFICATION)
    weights = numpy_weights(encoder)

    def slope(layer: int, neuron: int, side: str) -> float:
        ends = []
        for sign in (1, -1):
            scaled = {k: v.copy() for k, v in weights.items()}
            factor = np.float32(1 + sign * STEP)
            if side == "in":
                scaled[f"layers.{layer}.ffn.intermediate.weight"][:, neuron] *= factor
                scaled[f"layers.{layer}.ffn.intermediate.bias"][neuron] *= factor
            else:
                scaled[f"layers.{layer}.ffn.output.weight"][neuron] *= factor
            moved = build_encoder(encoder.config, scaled)
            ends.append(loss_of(moved, batch))
        return abs(ends[0] - ends[1]) / (2 * STEP)

    for layer in range(2):
        for neuron in (0, 7, 15):
            expected = slope(layer, neuron, "in") + slope(layer, neuron, "out")
            assert found.neurons[layer][neuron] == pytest.approx(expected, rel=0.03, abs=3e-4)


def test_batches_add_their_own_absolute_values() -> None:
    encoder = tiny_encoder()
    data, one, two = random_rows(14), np.arange(5), np.arange(5, 14)
    both = measure_importance(encoder, data, [one, two], CLASSIFICATION)
    apart = [measure_importance(encoder, data, [rows], CLASSIFICATION) for rows in (one, two)]
    for layer in range(2):
        np.testing.assert_allclose(
            both.heads[layer], apart[0].heads[layer] + apart[1].heads[layer], rtol=1e-5
        )
        np.testing.assert_allclose(
            both.neurons[layer], apart[0].neurons[layer] + apart[1].neurons[layer], rtol=1e-5
        )


def test_replicas_do_not_change_importance_and_nothing_is_left_behind() -> None:
    encoder, data = tiny_encoder(), random_rows(6)
    before = numpy_weights(encoder)
    one = measure_importance(encoder, data, [np.arange(6)], CLASSIFICATION)
    # Each replica pads its own rows: neither they nor their padding may matter.
    three = measure_importance(encoder, data, [np.arange(6)], CLASSIFICATION, replicas=3)
    for found, expected in zip(three.heads + three.neurons, one.heads + one.neurons, strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-6)
    assert gradients(encoder) == {}
    for name, value in numpy_weights(encoder).items():
        np.testing.assert_array_equal(value, before[name])


def test_a_unit_that_reaches_nothing_scores_zero() -> None:
    encoder = tiny_encoder()
    weights = numpy_weights(encoder)
    weights["layers.1.attention.value.weight"][:, 6:12] = 0
    weights["layers.1.attention.value.bias"][6:12] = 0
    weights["layers.0.ffn.output.weight"][5] = 0
    weights["layers.0.ffn.intermediate.weight"][:, 5] = 0
    weights["layers.0.ffn.intermediate.bias"][5] = 0
    dead = build_encoder(encoder.config, weights)
    found = measure_importance(dead, random_rows(8), [np.arange(8)], CLASSIFICATION)
    assert found.heads[1][1] == 0
    assert found.neurons[0][5] == 0
    assert (np.delete(found.heads[1], 1) > 0).all()
