"""The schedule, what is decayed, and that a teacher learns."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import paddle
import pytest

from compression.batches import Batch, Encoded, make_batch, training_rows
from compression.encoder import Encoder, load_weights, numpy_weights
from compression.errors import OutOfMemory, TrainingDiverged
from compression.evaluate import predict
from compression.report import TrainingReport
from compression.spec import DistillationSpec, FineTuneSpec
from compression.supernet import subnetwork_of
from compression.tasks import Task
from compression.tasks.base import Count
from compression.tasks.classification import Classification
from compression.training import (
    Optimizer,
    Step,
    Surroundings,
    fine_tune,
    held_out,
    step_count,
)
from tests.compression.training_process import checkpoints_in
from tests.encoders import CLASSIFICATION, random_rows, tiny_encoder

TASK = CLASSIFICATION


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


def test_a_second_training_of_the_same_weights_goes_on_with_its_own_moments() -> None:
    """Paddle counts the names of accumulators: those of a second optimizer are others."""
    spec = FineTuneSpec(learning_rate=1e-2, warmup_fraction=0)

    def stepped(optimizer: Optimizer, encoder: Encoder, times: int) -> None:
        for _ in range(times):
            for i, parameter in enumerate(encoder.parameters()):
                (parameter.square() * (i + 1.0)).sum().backward()
            optimizer.step()

    encoder = tiny_encoder()
    stepped(Optimizer(encoder, spec, steps=4), encoder, 2)
    second = Optimizer(encoder, spec, steps=4)
    stepped(second, encoder, 2)
    kept = {name: value.numpy().copy() for name, value in second.tensors().items()}
    assert len(kept) == 4 * len(encoder.parameters())
    weights = numpy_weights(encoder)
    stepped(second, encoder, 2)
    other = tiny_encoder(5)
    stepped(Optimizer(other, spec, steps=4), other, 1)
    load_weights(other, weights)
    resumed = Optimizer(other, spec, steps=4)
    resumed.restore(kept, step=2)
    stepped(resumed, other, 2)
    for name, value in numpy_weights(encoder).items():
        np.testing.assert_array_equal(numpy_weights(other)[name], value, err_msg=name)


def test_fine_tuning_learns_a_rule_and_repeats_itself() -> None:
    rows = random_rows(96, labels=2)
    data = Encoded(
        rows.input_ids, rows.token_type_ids, np.array([int(r[0] > 25) for r in rows.input_ids])
    )
    spec = FineTuneSpec(epochs=12, batch_size=16, learning_rate=5e-3)
    ends = []
    for _ in range(2):
        encoder = tiny_encoder(num_labels=2, hidden_dropout=0.05)
        before = TASK.score(predict(encoder, data), data)
        seen: list[int] = []

        def on_step(step: Step, seen: list[int] = seen) -> None:
            assert step.total == 72
            seen.append(step.done)

        report = fine_tune(encoder, data, spec, TASK, seed=5, on_step=on_step)
        assert (report.steps, report.ended) == (72, "complete")
        assert seen == list(range(1, 73))
        assert TASK.score(predict(encoder, data), data) > max(0.85, before)
        ends.append(numpy_weights(encoder))
    for name in ends[0]:
        np.testing.assert_array_equal(ends[0][name], ends[1][name])


def test_subnetworks_are_fine_tuned_together_with_one_step_a_batch() -> None:
    data, spec = random_rows(16), FineTuneSpec(max_steps=1, batch_size=16)
    calm = {"hidden_dropout": 0.0, "attention_dropout": 0.0}
    tuned, by_hand = tiny_encoder(**calm), tiny_encoder(**calm)
    subnetworks = [subnetwork_of(tuned.config, Fraction(w)) for w in ("1", "1/2")]
    seen: list[float] = []
    report = fine_tune(
        tuned,
        data,
        spec,
        TASK,
        subnetworks=subnetworks,
        seed=0,
        on_step=lambda step: seen.extend(step.losses.values()),
    )
    (rows,) = training_rows(data, batch_size=16, steps=1, seed=0)
    batch = make_batch(data, rows, pad_id=0)
    optimizer = Optimizer(by_hand, spec, steps=1)
    losses = [
        TASK.label_loss(by_hand(*batch.inputs, subnetwork=each), batch) for each in subnetworks
    ]
    sum(losses).backward()
    optimizer.step()
    assert report.steps == 1
    assert seen == pytest.approx([float(loss) for loss in losses], rel=1e-5)
    after, before = numpy_weights(tuned), numpy_weights(tiny_encoder(**calm))
    for name, value in numpy_weights(by_hand).items():
        # A key's bias has no gradient but rounding's, which AdamW makes as large as any.
        if not name.endswith("key.bias"):
            np.testing.assert_allclose(after[name], value, atol=1e-6, err_msg=name)
    assert any(not np.array_equal(after[name], before[name]) for name in before)


def test_a_loss_that_is_not_finite_stops_the_training_and_names_the_step() -> None:
    encoder, data = tiny_encoder(), random_rows(64)
    done: list[int] = []

    def on_step(step: Step) -> None:
        done.append(step.done)
        if step.done == 2:
            encoder.classifier.weight.set_value(np.full((24, 3), np.nan, np.float32))

    with pytest.raises(TrainingDiverged, match=r"nan at step 3: lower teacher\.learning_rate"):
        fine_tune(encoder, data, FineTuneSpec(batch_size=8), TASK, seed=0, on_step=on_step)
    assert done == [1, 2]


def test_the_error_of_a_broken_loss_names_rows_and_checkpoint(tmp_path: Path) -> None:
    encoder, data = tiny_encoder(), random_rows(64)
    checkpoints = checkpoints_in(tmp_path)

    def on_step(step: Step) -> None:
        if step.done == 2:
            encoder.classifier.weight.set_value(np.full((24, 3), np.nan, np.float32))

    spec = FineTuneSpec(batch_size=12, patience=1)
    with pytest.raises(TrainingDiverged) as error:
        fine_tune(
            encoder,
            data,
            spec,
            TASK,
            Surroundings("teacher", "teacher", checkpoints),
            seed=0,
            on_step=on_step,
        )
    kept, _ = held_out(64, spec, seed=0)
    third = list(training_rows(data.take(kept), batch_size=12, steps=3, seed=0))[2]
    rows = ", ".join(str(row) for row in np.sort(kept[third])[:10])
    assert f"the batch's 12 rows of train (counted from 0): {rows}, ...; " in error.value.message
    assert checkpoints.newest is not None and checkpoints.newest.name in error.value.message
    assert error.value.pointer == "/teacher/learning_rate"


def test_a_patience_keeps_rows_back_and_the_best_weights() -> None:
    data = random_rows(60)
    seen: list[int] = []
    kept = []

    def on_step(step: Step) -> None:
        seen.append(step.done)
        if step.done == 8:  # from the second evaluation on, far from any good
            kept.append(numpy_weights(encoder))
        if step.done == 9:
            encoder.classifier.weight.set_value(np.full((24, 3), 50, np.float32))

    encoder = tiny_encoder()
    spec = FineTuneSpec(batch_size=9, epochs=20, patience=2, evaluate_every=4, learning_rate=1e-3)
    report = fine_tune(encoder, data, spec, TASK, seed=0, on_step=on_step)
    rows, judging = held_out(60, spec, seed=0)
    assert (len(rows), len(judging)) == (54, 6)
    assert set(rows) | set(judging) == set(range(60))
    assert (report.ended, report.planned_steps) == ("plateau", 120)
    assert report.best_step in (4, 8)
    assert report.steps == seen[-1] == report.best_step + 8
    if report.best_step == 8:
        for name, value in numpy_weights(encoder).items():
            np.testing.assert_array_equal(value, kept[0][name])


def test_a_deadline_ends_a_training_with_the_best_so_far(tmp_path: Path) -> None:
    def ended(**surroundings: Any) -> TrainingReport:
        checkpoints = checkpoints_in(tmp_path / "none", every_seconds=1000)
        return fine_tune(
            tiny_encoder(),
            random_rows(60),
            FineTuneSpec(batch_size=8, patience=5),
            TASK,
            Surroundings("teacher", "teacher", checkpoints, **surroundings),
            seed=0,
            on_step=lambda step: None,
        )

    report = ended(deadline=0.0)
    assert (report.steps, report.best_step, report.ended) == (1, 1, "time")
    assert report.planned_steps == 21
    assert ended(deadline=1000.0).ended == "complete"


@dataclass(frozen=True)
class Greedy(Classification):
    """Classification whose loss really makes paddle's allocator fail above `rows` rows."""

    rows: int = 0

    def label_loss(
        self, logits: paddle.Tensor, batch: Batch, *, total: Count | None = None
    ) -> paddle.Tensor:
        if logits.shape[0] > self.rows:
            paddle.zeros([1 << 40, 1 << 10])
        return super().label_loss(logits, batch, total=total)


def too_much_for(rows: int) -> Greedy:
    return Greedy(TASK.labels, TASK.main_metric, rows)


@dataclass(frozen=True)
class Broken(Classification):
    def label_loss(
        self, logits: paddle.Tensor, batch: Batch, *, total: Count | None = None
    ) -> paddle.Tensor:
        raise RuntimeError("something else")


def test_a_memory_that_is_too_small_halves_the_micro_batch_and_changes_nothing_else() -> None:
    def trained(task: Task, **changes: Any) -> Any:
        encoder = tiny_encoder(hidden_dropout=0.0, attention_dropout=0.0)
        spec = FineTuneSpec(batch_size=16, epochs=2, learning_rate=1e-3, **changes)
        losses: list[float] = []
        report = fine_tune(
            encoder,
            random_rows(40),
            spec,
            task,
            seed=3,
            on_step=lambda step: losses.extend(step.losses.values()),
        )
        return report.micro_batch, losses, numpy_weights(encoder)

    size, losses, whole = trained(TASK)
    assert size is None
    for found in (trained(too_much_for(5)), trained(TASK, micro_batch=4)):
        assert found[0] == 4
        np.testing.assert_allclose(found[1], losses, rtol=1e-4)
        for name, value in found[2].items():
            # A key's bias moves no attention weight: its gradient is rounding, and AdamW scales
            # that up to full steps.
            if not name.endswith("key.bias"):
                np.testing.assert_allclose(value, whole[name], atol=2e-5, err_msg=name)
    for changes, rows in (({"micro_batch": None}, 16), ({"micro_batch": 8}, 8), ({}, 1)):
        with pytest.raises(OutOfMemory, match=f"too small for {rows} rows at once") as error:
            trained(too_much_for(0), **changes)
        assert error.value.pointer == "/teacher/micro_batch"


def test_another_error_is_not_taken_for_a_small_memory() -> None:
    broken = Broken(TASK.labels, TASK.main_metric)
    with pytest.raises(RuntimeError, match="something else"):
        fine_tune(
            tiny_encoder(),
            random_rows(8),
            FineTuneSpec(),
            broken,
            seed=0,
            on_step=lambda step: None,
        )


def test_predict_keeps_row_order() -> None:
    encoder, data = tiny_encoder(), random_rows(10)
    logits = predict(encoder, data, batch_size=3)
    np.testing.assert_array_equal(predict(encoder, data, batch_size=3, threads=2), logits)
    for row in (0, 4, 9):
        np.testing.assert_allclose(predict(encoder, data.take([row]))[0], logits[row], atol=1e-5)
    assert not paddle.to_tensor(logits).isnan().any()
