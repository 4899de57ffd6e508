"""The distillation loss and step: what padding, the teacher and the weights must (not) do."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import paddle
import pytest

from compression.batches import make_batch
from compression.distillation import (
    AloneLosses,
    DepthLosses,
    distil,
    distil_alone,
    distil_depth,
    distillation_loss,
    layout_of,
    representation_loss,
)
from compression.encoder import Encoder, numpy_weights
from compression.evaluate import predict
from compression.layout import Layout, Packed, Padded
from compression.networks import Networks
from compression.sampling import Sandwich
from compression.spec import DepthSpec, DistillationSpec, RefinementSpec
from compression.supernet import Subnetwork, replaced_states, subnetwork_of
from tests.encoders import CLASSIFICATION, clear, gradients, random_rows, tiny_encoder

SPEC = DistillationSpec()


def loss_and_gradients(length: int | None) -> tuple[float, dict[str, np.ndarray]]:
    student, teacher, data = tiny_encoder(1), tiny_encoder(2), random_rows(6)
    batch = make_batch(data, range(6), pad_id=0, length=length)
    layout = layout_of(batch, SPEC)
    with paddle.no_grad():
        targets = teacher.encode(*batch.inputs, layout=layout)
    half = subnetwork_of(student.config, Fraction(1, 2))
    clear(student)
    states = student.encode(*batch.inputs, layout=layout, subnetwork=half)
    loss = distillation_loss(states, targets, batch, layout, SPEC, CLASSIFICATION)
    loss.backward()
    return float(loss), gradients(student)


def test_padding_a_batch_further_changes_neither_loss_nor_gradient() -> None:
    close, close_gradients = loss_and_gradients(None)
    wide, wide_gradients = loss_and_gradients(31)
    assert close == pytest.approx(wide, rel=1e-5)
    for name, value in close_gradients.items():
        if name == "embeddings.position.weight":
            # Positions beyond the rows exist in the wide batch alone; their gradient is zero.
            np.testing.assert_allclose(wide_gradients[name][13:], 0, atol=1e-7)
        np.testing.assert_allclose(value, wide_gradients[name], atol=2e-5, err_msg=name)


def test_the_representation_loss_is_a_mean_over_real_tokens_and_units() -> None:
    generator = np.random.default_rng(0)
    own, other = (generator.normal(size=(2, 3, 4)).astype(np.float32) for _ in range(2))
    mask = np.array([[1, 1, 0], [1, 0, 0]])
    real = mask.astype(bool)
    found = representation_loss(
        student=[paddle.to_tensor(own)] * 2,
        teacher=[paddle.to_tensor(other)] * 2,
        layout=Padded(paddle.to_tensor(mask)),
        total=3,
    )
    assert float(found) == pytest.approx(2 * np.square(own - other)[real].mean(), rel=1e-5)


def test_the_logit_loss_has_a_gradient_and_its_minimum_at_the_teacher() -> None:
    batch = make_batch(random_rows(1), [0], pad_id=0)
    teacher = paddle.to_tensor([[2.0, -1.0, 0.5]])
    student = paddle.to_tensor([[0.0, 0.0, 0.0]], stop_gradient=False)
    CLASSIFICATION.logit_loss(student=student, teacher=teacher, batch=batch).backward()
    expected = np.full(3, 1 / 3) - np.exp([2.0, -1.0, 0.5]) / np.exp([2.0, -1.0, 0.5]).sum()
    np.testing.assert_allclose(student.grad.numpy()[0], expected, atol=1e-6)
    same = paddle.to_tensor(teacher.numpy(), stop_gradient=False)
    CLASSIFICATION.logit_loss(student=same, teacher=teacher, batch=batch).backward()
    np.testing.assert_allclose(same.grad.numpy(), 0, atol=1e-6)


def test_a_mean_over_padding_is_had_by_setting_alone() -> None:
    student, teacher, data = tiny_encoder(1), tiny_encoder(2), random_rows(4)

    def loss(length: int, padded_mean: bool) -> tuple[float, float]:
        batch = make_batch(data, range(4), pad_id=0, length=length)
        spec = DistillationSpec(lambda_rep=1, lambda_logit=0, padded_mean=padded_mean)
        layout = layout_of(batch, spec)
        states, targets = (each.encode(*batch.inputs, layout=layout) for each in (student, teacher))
        plain = sum(
            np.square(a.numpy() - b.numpy()).mean()
            for a, b in zip(states.hidden, targets.hidden, strict=True)
        )
        found = distillation_loss(states, targets, batch, layout, spec, CLASSIFICATION)
        return float(found), float(plain)

    assert not SPEC.padded_mean
    for length in (13, 31):  # PaddleSlim's mse_loss: every position counts, padding too
        found, plain = loss(length, True)
        assert found == pytest.approx(plain, rel=1e-5)
        assert found != pytest.approx(loss(length, False)[0], rel=1e-3)
    assert loss(13, True)[0] != pytest.approx(loss(31, True)[0], rel=1e-3)


def test_the_parts_of_a_representation_loss_add_up_to_it() -> None:
    student, teacher, data = tiny_encoder(1), tiny_encoder(2), random_rows(6)

    tokens = sum(map(len, data.input_ids))

    def loss(rows: list[int], layout: type[Layout]) -> float:
        batch = make_batch(data, rows, pad_id=0)
        kind = Padded(batch.attention_mask) if layout is Padded else layout_of(batch, SPEC)
        return float(
            representation_loss(
                student=student.encode(*batch.inputs, layout=kind).hidden,
                teacher=teacher.encode(*batch.inputs, layout=kind).hidden,
                layout=kind,
                total=tokens,
            )
        )

    parts = loss([0, 1], Packed) + loss([2, 3, 4, 5], Packed)
    assert parts == pytest.approx(loss([0, 1, 2, 3, 4, 5], Packed), rel=1e-5)
    assert parts == pytest.approx(loss([0, 1, 2, 3, 4, 5], Padded), rel=1e-5)


def test_the_loss_weights_are_those_of_the_spec() -> None:
    student, teacher, data = tiny_encoder(1), tiny_encoder(2), random_rows(4)
    batch = make_batch(data, range(4), pad_id=0)
    layout = layout_of(batch, SPEC)
    states, targets = (each.encode(*batch.inputs, layout=layout) for each in (student, teacher))
    logit_loss = CLASSIFICATION.logit_loss

    def loss(rep: float, logit: float) -> float:
        spec = DistillationSpec(lambda_rep=rep, lambda_logit=logit)
        return float(distillation_loss(states, targets, batch, layout, spec, CLASSIFICATION))

    assert loss(0.1, 1.0) == pytest.approx(0.1 * loss(1, 0) + loss(0, 1), rel=1e-5)
    assert loss(0, 1) == pytest.approx(
        float(logit_loss(student=states.logits, teacher=targets.logits, batch=batch)), rel=1e-6
    )


def test_distillation_brings_every_width_nearer_and_leaves_the_teacher() -> None:
    data = random_rows(64)
    calm = {"hidden_dropout": 0.0, "attention_dropout": 0.0}
    teacher, supernet = tiny_encoder(2, **calm), tiny_encoder(2, **calm)
    subnetworks = [subnetwork_of(teacher.config, Fraction(w)) for w in ("1/2", "1/4")]
    before = numpy_weights(teacher)
    target = predict(teacher, data)

    def distance(index: int) -> float:
        return float(np.abs(predict(supernet, data, subnetwork=subnetworks[index]) - target).mean())

    start = [distance(0), distance(1)]
    seen = []
    report = distil(
        supernet,
        teacher,
        data,
        subnetworks,
        DistillationSpec(epochs=15, batch_size=16, learning_rate=1e-2),
        CLASSIFICATION,
        seed=0,
        on_step=seen.append,
    )
    assert report.steps == len(seen) == 60
    assert set(seen[0].losses) == {"w1_2", "w1_4"}
    assert distance(0) < 0.7 * start[0]
    assert distance(1) < 0.7 * start[1]
    assert gradients(teacher) == {}
    for name, value in numpy_weights(teacher).items():
        np.testing.assert_array_equal(value, before[name])


def test_the_same_seed_ends_with_the_same_weights() -> None:
    ends = []
    for _ in range(2):
        supernet, teacher, data = tiny_encoder(1), tiny_encoder(2), random_rows(24)
        subnetworks = [subnetwork_of(teacher.config, Fraction(w)) for w in ("1", "1/2")]
        distil(
            supernet,
            teacher,
            data,
            subnetworks,
            DistillationSpec(epochs=2, batch_size=8),
            CLASSIFICATION,
            seed=9,
            on_step=lambda report: None,
        )
        ends.append(numpy_weights(supernet))
    for name in ends[0]:
        np.testing.assert_array_equal(ends[0][name], ends[1][name])


def test_micro_batches_change_nothing_but_rounding() -> None:
    calm = {"hidden_dropout": 0.0, "attention_dropout": 0.0}
    ends, losses = [], []
    for size in (None, 3):
        supernet, teacher = tiny_encoder(1, **calm), tiny_encoder(2, **calm)
        seen: list[dict[str, float]] = []
        distil(
            supernet,
            teacher,
            random_rows(24),
            [subnetwork_of(teacher.config, Fraction(w)) for w in ("1", "1/2")],
            DistillationSpec(max_steps=3, batch_size=8, micro_batch=size, learning_rate=1e-3),
            CLASSIFICATION,
            seed=9,
            on_step=lambda step, seen=seen: seen.append(dict(step.losses)),
        )
        ends.append(numpy_weights(supernet))
        losses.append(seen)
    for whole, parts in zip(*losses, strict=True):
        assert parts == pytest.approx(whole, rel=1e-4)
    for name, value in ends[0].items():
        if not name.endswith("key.bias"):  # without a gradient: AdamW scales rounding up
            np.testing.assert_allclose(ends[1][name], value, atol=2e-5, err_msg=name)


# --- the depth stage ------------------------------------------------------------------------

CALM = {"hidden_dropout": 0.0, "attention_dropout": 0.0}
DEEP = {**CALM, "layers": 4, "heads": (4,) * 4, "ffn": (16,) * 4}


def combinations(encoder: Encoder, *depths: str) -> Sandwich:
    return Sandwich(
        [
            subnetwork_of(encoder.config, Fraction(width), Fraction(depth))
            for width in ("1", "1/2")
            for depth in depths
        ],
        seed=3,
    )


def test_a_shallow_network_learns_the_states_that_its_layers_had_at_full_depth() -> None:
    """The loss worked out by hand: the width stage's own states 0, 2, 4 of the same width."""
    supernet, frozen, data = tiny_encoder(1, **DEEP), tiny_encoder(2, **DEEP), random_rows(5)
    batch = make_batch(data, range(5), pad_id=0)
    spec = DepthSpec(lambda_rep=0.7, lambda_logit=0.3)
    sampled = combinations(supernet, "1/2")
    losses = dict(DepthLosses(frozen, sampled, spec, CLASSIFICATION)(supernet, batch, batch, None))
    assert list(losses) == ["w1-d1_2", "w1_2-d1_2"]
    real = batch.attention_mask.numpy().astype(bool)
    for shallow in sampled.subnetworks:
        deep = subnetwork_of(frozen.config, shallow.width_mult)
        own = supernet.encode(*batch.inputs, subnetwork=shallow)
        target = frozen.encode(*batch.inputs, subnetwork=deep)
        states = sum(
            np.square(own.hidden[i].numpy() - target.hidden[j].numpy())[real].mean()
            for i, j in ((0, 0), (1, 2), (2, 4))
        )
        logits = CLASSIFICATION.logit_loss(student=own.logits, teacher=target.logits, batch=batch)
        expected = 0.7 * states + 0.3 * float(logits)
        assert float(losses[shallow.name]) == pytest.approx(expected, rel=1e-5)


def test_at_the_start_full_depth_has_only_its_entropy_to_lose() -> None:
    """Frozen and supernet are then one: no state is wrong, and no logit pulls."""
    supernet, frozen, data = tiny_encoder(1, **DEEP), tiny_encoder(1, **DEEP), random_rows(5)
    batch = make_batch(data, range(5), pad_id=0)
    spec = DepthSpec(lambda_logit=0)
    sampled = combinations(supernet, "1", "1/2")
    losses = dict(DepthLosses(frozen, sampled, spec, CLASSIFICATION)(supernet, batch, batch, None))
    assert [float(losses["w1"]), float(losses["w1_2"])] == [0, 0]
    assert float(losses["w1-d1_2"]) > 0 and float(losses["w1_2-d1_2"]) > 0


def test_the_depth_stage_brings_shallow_networks_nearer_and_keeps_full_depth() -> None:
    supernet, frozen, data = tiny_encoder(1, **DEEP), tiny_encoder(1, **DEEP), random_rows(64)
    before = numpy_weights(frozen)
    sampled = combinations(supernet, "1", "3/4", "1/2", "1/4")

    def distances() -> dict[str, float]:
        found = {}
        for each in sampled.subnetworks:
            target = predict(frozen, data, subnetwork=subnetwork_of(frozen.config, each.width_mult))
            own = predict(supernet, data, subnetwork=each)
            found[each.name] = float(np.abs(own - target).mean())
        return found

    start, seen = distances(), []
    report = distil_depth(
        supernet,
        frozen,
        data,
        sampled,
        DepthSpec(epochs=30, batch_size=16, learning_rate=3e-3),
        CLASSIFICATION,
        seed=0,
        on_step=seen.append,
    )
    assert report.steps == len(seen) == 120
    assert all(len(step.losses) == 4 for step in seen)
    assert {name for step in seen for name in step.losses} == set(start)
    end = distances()
    for name, distance in start.items():
        if "-d" in name:
            assert end[name] < 0.7 * distance, name
        else:  # no further from what it was than the shallow ones have come to it
            assert end[name] < min(end[other] for other in start if "-d" in other), name
    assert gradients(frozen) == {}
    for name, value in numpy_weights(frozen).items():
        np.testing.assert_array_equal(value, before[name])


def test_micro_batches_of_the_depth_stage_change_nothing_but_rounding() -> None:
    ends, losses = [], []
    for size in (None, 3):
        supernet, frozen = tiny_encoder(1, **DEEP), tiny_encoder(2, **DEEP)
        seen: list[dict[str, float]] = []
        distil_depth(
            supernet,
            frozen,
            random_rows(24),
            combinations(supernet, "1", "1/2", "1/4"),
            DepthSpec(max_steps=3, batch_size=8, micro_batch=size, learning_rate=1e-3),
            CLASSIFICATION,
            seed=9,
            replicas=1 if size is None else 2,
            on_step=lambda step, seen=seen: seen.append(dict(step.losses)),
        )
        ends.append(numpy_weights(supernet))
        losses.append(seen)
    for whole, parts in zip(*losses, strict=True):
        assert parts == pytest.approx(whole, rel=1e-4)
    for name, value in ends[0].items():
        if not name.endswith("key.bias"):  # without a gradient: AdamW scales rounding up
            np.testing.assert_allclose(ends[1][name], value, atol=2e-5, err_msg=name)


# --- a network that was cut out ---------------------------------------------------------------

CUT = Subnetwork("p1", None, Fraction(1, 2), (0, 2), (2, 4), (16, 8))  # of DEEP


def test_a_cut_out_networks_states_learn_those_that_they_stand_for() -> None:
    supernet, teacher, data = tiny_encoder(1, **DEEP), tiny_encoder(2, **DEEP), random_rows(5)
    network = Networks(supernet).extracted(CUT, supernet.config)
    batch = make_batch(data, range(5), pad_id=0)
    spec = RefinementSpec(lambda_rep=0.7, lambda_logit=0.3)
    states = replaced_states(4, CUT.depth_mult)
    losses = AloneLosses(teacher, "p1", states, spec, CLASSIFICATION)
    ((name, loss),) = losses(network, batch, batch, None)
    own = supernet.encode(*batch.inputs, subnetwork=CUT)
    target = teacher.encode(*batch.inputs)
    real = batch.attention_mask.numpy().astype(bool)
    distance = sum(
        np.square(own.hidden[i].numpy() - target.hidden[j].numpy())[real].mean()
        for i, j in ((0, 0), (1, 2), (2, 4))
    )
    logits = CLASSIFICATION.logit_loss(student=own.logits, teacher=target.logits, batch=batch)
    assert name == "p1"
    assert float(loss) == pytest.approx(0.7 * distance + 0.3 * float(logits), rel=1e-5)


def test_a_cut_out_network_comes_nearer_to_the_teacher_and_its_supernet_stays() -> None:
    supernet, teacher, data = tiny_encoder(1, **DEEP), tiny_encoder(1, **DEEP), random_rows(64)
    before = numpy_weights(supernet)
    network = Networks(supernet).extracted(CUT, supernet.config)
    losses: list[float] = []
    report = distil_alone(
        network,
        teacher,
        CUT,
        data,
        RefinementSpec(epochs=100, max_steps=80, batch_size=16, learning_rate=5e-3, lambda_logit=0),
        CLASSIFICATION,
        seed=0,
        on_step=lambda step: losses.append(step.losses["p1"]),
    )
    assert report.steps == len(losses) == 80
    assert sum(losses[-4:]) < 0.7 * sum(losses[:4])  # an epoch has four batches
    assert gradients(teacher) == {}
    for name, value in numpy_weights(supernet).items():
        np.testing.assert_array_equal(value, before[name])
