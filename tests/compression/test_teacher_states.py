"""The teacher's answers that are kept in a file over epochs."""

from __future__ import annotations

import errno
import os
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import numpy as np
import pytest
from pydantic import ValidationError

from compression.batches import Encoded, make_batch
from compression.distillation import AloneLosses, SupernetLosses, distil
from compression.encoder import Encoder, numpy_weights
from compression.job import Job
from compression.layout import Padded
from compression.learning import kept_states, training_warnings
from compression.report import TrainingReport
from compression.spec import DistillationSpec, RefinementSpec, Spec
from compression.supernet import subnetwork_of
from compression.teacher_states import KeptStates, states_bytes
from tests.encoders import CLASSIFICATION, random_rows, tiny_encoder

CALM = {"hidden_dropout": 0.0, "attention_dropout": 0.0}


@pytest.mark.parametrize("head", ["sequence", "token"])
@pytest.mark.parametrize("taken", [False, True])
def test_a_batch_gets_what_the_teacher_says_of_it(tmp_path: Path, head: str, taken: bool) -> None:
    teacher = tiny_encoder(1, head=head)
    data = random_rows(70)
    if taken:  # rows that know what they are called elsewhere
        data = data.take(np.arange(69, 9, -1))
    kept = KeptStates.compute(teacher, data, tmp_path, threads=2)
    part = data.take([5, 40, 3, 11])
    batch = make_batch(part, [3, 0, 1], pad_id=0, length=14)
    expected = teacher.encode(*batch.inputs)
    found = kept(batch, Padded(batch.attention_mask))
    real = batch.attention_mask.numpy().astype(bool)
    assert len(found.hidden) == len(expected.hidden)
    for own, other in zip(found.hidden, expected.hidden, strict=True):
        np.testing.assert_allclose(own.numpy()[real], other.numpy()[real], atol=1e-5)
        assert not own.numpy()[~real].any()
    chosen = real if head == "token" else slice(None)
    np.testing.assert_allclose(
        found.logits.numpy()[chosen], expected.logits.numpy()[chosen], atol=1e-5
    )
    (file,) = tmp_path.iterdir()
    assert file.stat().st_size == states_bytes(teacher.config, data)


def trained(data: Encoded, kept: KeptStates | None, spec: DistillationSpec) -> Encoder:
    teacher, supernet = tiny_encoder(1, **CALM), tiny_encoder(2, **CALM)
    subnetworks = [subnetwork_of(teacher.config, Fraction(w)) for w in ("1", "1/2")]
    distil(
        supernet,
        teacher,
        data,
        subnetworks,
        spec,
        CLASSIFICATION,
        seed=4,
        replicas=2,
        kept=kept,
        on_step=lambda step: None,
    )
    return supernet


def test_a_training_with_kept_answers_is_one_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With rows held back for a patience, which have numbers of their own, and a small rate."""
    data = random_rows(40)
    spec = DistillationSpec(epochs=3, batch_size=8, learning_rate=1e-5, patience=9)
    computed = numpy_weights(trained(data, None, spec))
    kept = KeptStates.compute(tiny_encoder(1, **CALM), data, tmp_path, threads=1)
    asked = []
    answer = KeptStates.__call__
    monkeypatch.setattr(
        KeptStates, "__call__", lambda self, *words: asked.append(words) or answer(self, *words)
    )
    found = numpy_weights(trained(data, kept, spec))
    assert len(asked) >= 15 * 2
    start = numpy_weights(tiny_encoder(2, **CALM))
    for name, value in computed.items():
        if name.endswith("key.bias"):  # its gradient is rounding, which AdamW scales up
            continue
        moved = np.abs(value - start[name]).max()
        assert np.abs(found[name] - value).max() <= 0.2 * moved, name


def test_kept_answers_stand_in_for_the_teacher(tmp_path: Path) -> None:
    data = random_rows(8)
    teacher, other = tiny_encoder(1, **CALM), tiny_encoder(7, **CALM)
    kept = KeptStates.compute(teacher, data, tmp_path, threads=1)
    batch = make_batch(data, range(8), pad_id=0)
    supernet = tiny_encoder(2, **CALM)

    def loss(asked: Encoder, kept: KeptStates | None) -> float:
        subnetworks = [subnetwork_of(teacher.config, Fraction(1))]
        losses = SupernetLosses(asked, subnetworks, DistillationSpec(), CLASSIFICATION, kept)
        return float(next(iter(losses(supernet, batch, batch, None)))[1])

    assert loss(other, kept) == pytest.approx(loss(teacher, None), rel=1e-5)
    assert loss(other, None) != pytest.approx(loss(teacher, None), rel=1e-2)


def test_a_network_that_learns_alone_is_answered_by_what_is_kept(tmp_path: Path) -> None:
    data = random_rows(8)
    teacher, other = tiny_encoder(1, **CALM), tiny_encoder(7, **CALM)
    kept = KeptStates.compute(teacher, data, tmp_path, threads=1)
    batch, spec = make_batch(data, range(8), pad_id=0), RefinementSpec()
    network = tiny_encoder(2, **CALM)

    def loss(asked: Encoder, kept: KeptStates | None) -> float:
        states = range(teacher.config.layers + 1)
        losses = AloneLosses(asked, "w1", states, spec, CLASSIFICATION, kept)
        return float(next(iter(losses(network, batch, batch, None)))[1])

    assert loss(other, kept) == pytest.approx(loss(teacher, None), rel=1e-5)
    assert loss(other, None) != pytest.approx(loss(teacher, None), rel=1e-2)


def test_why_nothing_is_kept_is_told_once() -> None:
    training = TrainingReport(
        steps=1,
        planned_steps=1,
        best_step=1,
        ended="complete",
        step_seconds=1.0,
        micro_batch=None,
        notes=("why",),
    )
    told = training_warnings(Spec(), {"distil": training, "refine w1_2": training})
    assert list(told) == ["why"]


def test_a_full_disk_is_an_error_before_anything_is_computed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    data, teacher = random_rows(4), tiny_encoder()
    with pytest.raises(OSError, match="No space left"):
        KeptStates.compute(teacher, data, tmp_path, threads=1)
    assert list(tmp_path.iterdir()) == []
    # A job then computes them in each step, and says so.
    assert kept_states(job_with_a_cache(), teacher, data, tmp_path) == (
        None,
        (
            "the teacher's answers were not kept but computed in each step: 0 MB could not be "
            "written: No space left on device",
        ),
    )


def job_with_a_cache() -> Job:
    """As much of a job as the question takes."""
    spec = Spec.model_validate({"distillation": {"teacher_cache_mb": 1}})
    return cast("Job", SimpleNamespace(spec=spec, replicas=1))


def test_answers_that_are_too_many_are_computed_in_each_step(tmp_path: Path) -> None:
    data, teacher = random_rows(3000), tiny_encoder()
    assert states_bytes(teacher.config, data) > 1e6
    kept, notes = kept_states(job_with_a_cache(), teacher, data, tmp_path)
    assert kept is None and list(tmp_path.iterdir()) == []
    assert "more than teacher_cache_mb (1)" in notes[0]


@pytest.mark.parametrize("changes", [{"processes": 2}, {"engine": "paddleslim"}])
def test_answers_are_kept_where_one_process_of_ours_trains(changes: dict[str, object]) -> None:
    with pytest.raises(ValidationError, match="teacher_cache_mb is for engine"):
        Spec.model_validate({"distillation": {"teacher_cache_mb": 1}, **changes})


def test_states_of_padding_are_not_kept() -> None:
    with pytest.raises(ValidationError, match="keeps no states of padding"):
        DistillationSpec(teacher_cache_mb=1, padded_mean=True)
