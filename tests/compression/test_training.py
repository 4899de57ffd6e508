"""The schedule, what is decayed, and that a teacher learns."""

from __future__ import annotations

import numpy as np
import paddle
import pytest

from compression.batches import Encoded
from compression.encoder import numpy_weights
from compression.errors import TrainingDiverged
from compression.evaluate import predict
from compression.spec import DistillationSpec, FineTuneSpec
from compression.tasks import TASKS
from compression.training import Optimizer, fine_tune, step_count
from tests.encoders import random_rows, tiny_encoder

TASK = TASKS["classification"]


def test_step_count() -> None:
    assert step_count(FineTuneSpec(epochs=3, batch_size=32), 6920) == 3 * 217
    assert step_count(FineTuneSpec(epochs=0.5, batch_size=10), 100) == 5
    assert step_count(FineTuneSpec(epochs=3, max_steps=7), 6920) == 7
    assert step_count(DistillationSpec(epochs=0.001), 3) == 1


def test_the_rate_warms_up_and_decays_to_zero() -> None:
    encoder = tiny_encoder()
    spec = FineTuneSpec(learning_rate=1.0 - 1e-9, warmup_fraction=0.2)
    optimizer = Optimizer(encoder, spec, steps=10)
    rates = []
    for _ in range(10):
        rates.append(optimizer.rate.get_lr())
        optimizer.rate.step()
    np.testing.assert_allclose(rates, [0.5, 1, 1, 0.875, 0.75, 0.625, 0.5, 0.375, 0.25, 0.125])
    assert optimizer.rate.get_lr() == 0


def test_biases_and_norms_are_not_decayed() -> None:
    encoder = tiny_encoder()
    before = numpy_weights(encoder)
    spec = FineTuneSpec(learning_rate=0.1, weight_decay=0.5, warmup_fraction=0)
    optimizer = Optimizer(encoder, spec, steps=2)
    for parameter in encoder.parameters():  # zero gradients: decay alone moves a weight
        (parameter * 0.0).sum().backward()
    optimizer.step()
    after = numpy_weights(encoder)
    for name, value in after.items():
        decayed = not name.endswith(".bias") and ".norm." not in name
        expected = before[name] * (0.95 if decayed else 1.0)
        np.testing.assert_allclose(value, expected, atol=1e-6, err_msg=name)


def test_fine_tuning_learns_a_rule_and_repeats_itself() -> None:
    rows = random_rows(96, labels=2)
    data = Encoded(
        rows.input_ids, rows.token_type_ids, np.array([int(r[0] > 25) for r in rows.input_ids])
    )
    spec = FineTuneSpec(epochs=12, batch_size=16, learning_rate=5e-3)
    ends = []
    for _ in range(2):
        encoder = tiny_encoder(num_labels=2, hidden_dropout=0.05)
        before = TASK.metric(predict(encoder, data), data.labels)
        seen: list[int] = []

        def on_step(done: int, total: int, loss: float, seen: list[int] = seen) -> None:
            assert total == 72
            seen.append(done)

        steps = fine_tune(encoder, data, spec, TASK.label_loss, seed=5, on_step=on_step)
        assert steps == 72
        assert seen == list(range(1, 73))
        assert TASK.metric(predict(encoder, data), data.labels) > max(0.85, before)
        ends.append(numpy_weights(encoder))
    for name in ends[0]:
        np.testing.assert_array_equal(ends[0][name], ends[1][name])


def test_a_loss_that_is_not_finite_stops_the_training_and_names_the_step() -> None:
    encoder, data = tiny_encoder(), random_rows(64)
    done: list[int] = []

    def on_step(step: int, total: int, loss: float) -> None:
        done.append(step)
        if step == 2:
            encoder.classifier.weight.set_value(np.full((24, 3), np.nan, np.float32))

    with pytest.raises(TrainingDiverged, match="nan at step 3: lower its learning_rate"):
        fine_tune(
            encoder, data, FineTuneSpec(batch_size=8), TASK.label_loss, seed=0, on_step=on_step
        )
    assert done == [1, 2]


def test_predict_keeps_row_order() -> None:
    encoder, data = tiny_encoder(), random_rows(10)
    logits = predict(encoder, data, batch_size=3)
    for row in (0, 4, 9):
        np.testing.assert_allclose(predict(encoder, data.take([row]))[0], logits[row], atol=1e-5)
    assert not paddle.to_tensor(logits).isnan().any()
