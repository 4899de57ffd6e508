"""Replicas: one memory of weights, gradients that add up, and a step that can be repeated."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from paddle import Tensor

from compression.distillation import SupernetLosses
from compression.encoder import Encoder, EncoderStates, numpy_weights
from compression.parallel import Replicas, shares
from compression.spec import DistillationSpec, FineTuneSpec
from compression.supernet import subnetwork_of
from compression.training import BatchGradients, Optimizer, fine_tune, pieces
from tests.encoders import CLASSIFICATION, gradients, random_rows, tiny_encoder

ROWS = np.arange(10)


def step_gradients(
    count: int, *, step: int = 1, micro_batch: int | None = None
) -> tuple[dict[str, float], dict[str, np.ndarray]]:
    """Losses and gradients of one batch of ten rows, with dropout off."""
    calm = {"hidden_dropout": 0.0, "attention_dropout": 0.0}
    supernet, teacher = tiny_encoder(1, **calm), tiny_encoder(2, **calm)
    subnetworks = [subnetwork_of(teacher.config, Fraction(w)) for w in ("1", "1/2")]
    losses = SupernetLosses(teacher, subnetworks, DistillationSpec(), CLASSIFICATION)
    with Replicas(supernet, count) as replicas:
        compute = BatchGradients(replicas, random_rows(10), losses, seed=3)
        return compute(ROWS, step=step, micro_batch=micro_batch), gradients(supernet)


@pytest.mark.parametrize(
    ("count", "micro_batch"), [(2, None), (3, None), (12, None), (1, 4), (2, 4)]
)
def test_shares_of_a_batch_give_the_whole_batchs_losses_and_gradients(
    count: int, micro_batch: int | None
) -> None:
    losses, whole = step_gradients(1)
    shared_losses, shared = step_gradients(count, micro_batch=micro_batch)
    assert shared_losses == pytest.approx(losses, rel=1e-5)
    assert shared.keys() == whole.keys()
    for name, value in whole.items():
        np.testing.assert_allclose(
            shared[name], value, atol=1e-5 * np.abs(value).max() + 1e-7, err_msg=name
        )


def test_no_more_tokens_than_a_cap_are_computed_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    encode = Encoder.encode_embedded

    def counted(self: Encoder, x: Tensor, *rest: Any, **named: Any) -> EncoderStates:
        seen.append(x.shape[0])  # packed: [tokens, hidden]
        return encode(self, x, *rest, **named)

    losses, whole = step_gradients(1)
    monkeypatch.setattr(Encoder, "encode_embedded", counted)
    monkeypatch.setattr("compression.training.TOKENS_AT_ONCE", 30)
    parts_losses, parts = step_gradients(1)
    assert len(seen) > 3 and max(seen) <= 30  # of teacher and supernet; rows have up to 12 tokens
    assert parts_losses == pytest.approx(losses, rel=1e-5)
    for name, value in whole.items():
        np.testing.assert_allclose(
            parts[name], value, atol=1e-5 * np.abs(value).max() + 1e-7, err_msg=name
        )


def test_pieces_hold_every_row_and_no_more_than_is_allowed() -> None:
    part = np.arange(100, 110)
    lengths = np.array([3, 3, 4, 5, 6, 8, 9, 12, 20, 30])
    whole = pieces(part, lengths, rows=10, tokens=None)
    assert [each.tolist() for each in whole] == [part.tolist()]
    few = pieces(part, lengths, rows=4, tokens=None)
    assert sorted(np.concatenate(few).tolist()) == part.tolist()
    assert len(few) == 3 and max(map(len, few)) == 4
    short = pieces(part, lengths, rows=10, tokens=35)
    assert sorted(np.concatenate(short).tolist()) == part.tolist()
    assert max(lengths[each - 100].sum() for each in short) <= 35
    assert len(pieces(part, lengths, rows=10, tokens=1)) == 10  # one row may have more


def test_one_number_of_replicas_repeats_itself_bit_for_bit() -> None:
    first = step_gradients(2)
    for _ in range(5):
        again = step_gradients(2)
        assert again[0] == first[0]
        for name, value in first[1].items():
            np.testing.assert_array_equal(again[1][name], value, err_msg=name)


def test_every_replica_sees_what_the_optimizer_does() -> None:
    encoder = tiny_encoder()
    with Replicas(encoder, 2) as replicas:
        before = numpy_weights(encoder)
        optimizer = Optimizer(encoder, DistillationSpec(warmup_fraction=0), steps=2)
        for member in replicas.members:
            (member.classifier.weight * 3.0).sum().backward()
        replicas.gather_gradients()
        np.testing.assert_array_equal(encoder.classifier.weight.grad.numpy(), 6.0)
        assert replicas.members[1].classifier.weight.grad is None
        optimizer.step()
    first, second = (numpy_weights(member) for member in replicas.members)
    assert not np.array_equal(first["classifier.weight"], before["classifier.weight"])
    for name, value in first.items():
        np.testing.assert_array_equal(second[name], value)


def test_shares_are_disjoint_complete_and_never_empty() -> None:
    for count in (1, 2, 3, 11):
        parts = shares(ROWS, count)
        assert sorted(np.concatenate(parts)) == ROWS.tolist()
        assert all(len(part) for part in parts)


def test_a_training_with_dropout_and_replicas_repeats_itself() -> None:
    ends: list[Encoder] = []
    for _ in range(2):
        encoder = tiny_encoder()
        fine_tune(
            encoder,
            random_rows(20),
            FineTuneSpec(batch_size=7, epochs=2),
            CLASSIFICATION,
            seed=1,
            on_step=lambda step: None,
            replicas=3,
        )
        ends.append(encoder)
    one, other = (numpy_weights(encoder) for encoder in ends)
    for name, value in one.items():
        np.testing.assert_array_equal(other[name], value)


def test_an_error_in_one_share_reaches_the_caller() -> None:
    def work(member: Encoder, rows: np.ndarray) -> None:
        if 1 in rows:
            raise MemoryError("no room")

    with Replicas(tiny_encoder(), 2) as replicas, pytest.raises(MemoryError, match="no room"):
        replicas.map(work, ROWS)
