"""Packed tokens against padded ones: the same function, losses and gradients."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import paddle
import pytest

from compression.batches import Batch, make_batch
from compression.encoder import Encoder
from compression.layout import Layout, Packed, Padded
from compression.noise import Noise
from compression.supernet import subnetwork_of
from tests.encoders import clear, gradients, random_rows, tiny_encoder

ROWS = [3, 17, 0, 9, 12, 5, 1, 20, 8, 2, 30]  # more than one group


def layouts(batch: Batch) -> dict[str, Layout]:
    return {
        "padded": Padded(batch.attention_mask),
        "packed": Packed(batch.lengths, batch.input_ids.shape[1]),
    }


def answers(encoder: Encoder, layout: Layout, batch: Batch, width: str) -> list[np.ndarray]:
    states = encoder.encode(
        *batch.inputs, layout=layout, subnetwork=subnetwork_of(encoder.config, Fraction(width))
    )
    return [*(layout.padded(each).numpy() for each in states.hidden), states.logits.numpy()]


@pytest.mark.parametrize("head", ["sequence", "token"])
@pytest.mark.parametrize("width", ["1", "1/2"])
@pytest.mark.parametrize("with_gradients", [False, True])
def test_packed_tokens_have_the_states_and_logits_of_padded_ones(
    head: str, width: str, with_gradients: bool
) -> None:
    encoder = tiny_encoder(head=head)
    batch = make_batch(random_rows(40), ROWS, pad_id=0, length=15)
    real = batch.attention_mask.numpy().astype(bool)
    with paddle.set_grad_enabled(with_gradients):
        padded, packed = (
            answers(encoder, layout, batch, width) for layout in layouts(batch).values()
        )
    assert len(padded) == len(packed)
    for own, other in zip(packed, padded, strict=True):
        if own.ndim == 3:
            np.testing.assert_allclose(own[real], other[real], atol=1e-5)
            assert not own[~real].any()
        else:
            np.testing.assert_allclose(own, other, atol=1e-5)


def test_gradients_are_the_same() -> None:
    encoder = tiny_encoder(head="token")
    batch = make_batch(random_rows(40), ROWS, pad_id=0)
    weights = paddle.randn([len(ROWS), batch.input_ids.shape[1], 3])
    weights = weights * batch.attention_mask.astype("float32").unsqueeze(-1)
    gates = [paddle.full([n], 0.5, "float32") for n in encoder.config.heads]
    found = {}
    for name, layout in layouts(batch).items():
        for gate in gates:
            gate.stop_gradient = False
        states = encoder.encode(*batch.inputs, layout=layout, head_gates=gates)
        distance = layout.squared_distance(states.hidden[1], states.hidden[2].detach())
        ((states.logits * weights).sum() + distance).backward()
        found[name] = gradients(encoder) | {
            f"gate.{i}": g.grad.numpy() for i, g in enumerate(gates)
        }
        clear(encoder)
        for gate in gates:
            gate.clear_grad()
    assert found["packed"].keys() == found["padded"].keys()
    for name, value in found["padded"].items():
        np.testing.assert_allclose(
            found["packed"][name], value, atol=2e-5 * max(np.abs(value).max(), 1), err_msg=name
        )


def test_attention_dropout_draws_masks_that_can_be_drawn_again() -> None:
    encoder = tiny_encoder(attention_dropout=0.5, hidden_dropout=0.0)
    batch = make_batch(random_rows(40), ROWS, pad_id=0)
    packed = layouts(batch)["packed"]
    first, again, other, calm = (
        encoder.encode(*batch.inputs, layout=packed, noise=noise).logits.numpy()
        for noise in (Noise([1]), Noise([1]), Noise([2]), None)
    )
    np.testing.assert_array_equal(first, again)
    assert not np.allclose(first, other)
    assert not np.allclose(first, calm)
