"""Distillation of the supernet: DynaBERT (arXiv:2004.04037), width stage.

Left out: data augmentation and the depth stage. Letters: B rows, T tokens, H
hidden size, C classes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import paddle
from paddle import Tensor

from compression.batches import Batch, Encoded, make_batch, sorted_rows
from compression.encoder import Encoder, EncoderStates
from compression.noise import Noise
from compression.parallel import Replicas
from compression.report import TrainingReport
from compression.spec import DistillationSpec
from compression.supernet import Subnetwork
from compression.tasks.base import Count, Task
from compression.training import Step, Surroundings, train

DISTILLATION = Surroundings("distil", "distillation")  # with nothing to go on from, and no limit


def representation_loss(
    *,
    student: Sequence[Tensor],
    teacher: Sequence[Tensor],
    attention_mask: Tensor,
    total: Count | None = None,
) -> Tensor:
    """Sum over states of the mean squared difference over real tokens; states [B, T, H].

    `total` are the tokens to divide by, where this is a part of a larger batch.
    """
    mask = attention_mask.astype("float32").unsqueeze(-1)  # [B, T, 1]
    units = (mask.sum() if total is None else total) * student[0].shape[-1]
    return sum(
        ((own - other).square() * mask).sum() / units
        for own, other in zip(student, teacher, strict=True)
    )


def distillation_loss(
    student: EncoderStates,
    teacher: EncoderStates,
    batch: Batch,
    spec: DistillationSpec,
    task: Task,
    *,
    totals: Totals | None = None,
) -> Tensor:
    """lambda_rep * representation loss + lambda_logit * logit loss of one sub-network.

    `totals` are those of the whole, where the batch is a share of a larger one.
    """
    mask = batch.attention_mask
    loss = spec.lambda_logit * task.logit_loss(
        student=student.logits,
        teacher=teacher.logits,
        batch=batch,
        total=totals and totals.units,
    )
    if spec.lambda_rep:
        loss = loss + spec.lambda_rep * representation_loss(
            student=student.hidden,
            teacher=teacher.hidden,
            attention_mask=paddle.ones_like(mask) if spec.padded_mean else mask,
            total=totals and totals.tokens,
        )
    return loss


@dataclass(frozen=True)
class Totals:
    """What the losses of a batch's shares divide by; shares are padded to `length` tokens."""

    units: Count  # of the task's logit loss
    tokens: int
    length: int | None

    @classmethod
    def of(cls, batch: Batch, task: Task, spec: DistillationSpec) -> Totals:
        rows, length = batch.attention_mask.shape
        if spec.padded_mean:
            return cls(task.count(batch), rows * length, length)
        return cls(task.count(batch), int(batch.attention_mask.sum()), None)


def distil(
    supernet: Encoder,
    teacher: Encoder,
    data: Encoded,
    subnetworks: Sequence[Subnetwork],
    spec: DistillationSpec,
    task: Task,
    surroundings: Surroundings = DISTILLATION,
    *,
    seed: int,
    on_step: Callable[[Step], None],
    replicas: int = 1,
) -> TrainingReport:
    """Trains the supernet in place.

    Each batch: the teacher once, without gradients; every sub-network forward and
    backward; one optimizer step. `replicas` threads share each batch.
    """
    with Replicas(supernet, replicas) as parallel:
        return train(
            supernet,
            data,
            spec,
            SupernetGradients(parallel, teacher, data, subnetworks, spec, task, seed),
            surroundings,
            seed=seed,
            on_step=on_step,
        )


@dataclass(frozen=True)
class SupernetGradients:
    """What one step does before the optimizer: every sub-network forward and backward.

    The embedding output is computed once and shared by all sub-networks (and so is its
    dropout), and the gradients that it gets from all of them go back together.
    """

    replicas: Replicas
    teacher: Encoder
    data: Encoded
    subnetworks: Sequence[Subnetwork]
    spec: DistillationSpec
    task: Task
    seed: int

    def __call__(
        self, rows: np.ndarray, *, step: int, micro_batch: int | None = None
    ) -> dict[str, float]:
        """The losses of a batch by sub-network; the gradients are left in the supernet."""
        pad_id = self.teacher.config.pad_token_id
        totals = Totals.of(make_batch(self.data, rows, pad_id=pad_id), self.task, self.spec)

        def share(member: Encoder, part: np.ndarray) -> list[float]:
            batch = make_batch(self.data, part, pad_id=pad_id, length=totals.length)
            return self._share(member, batch, totals, step=step)

        losses = self.replicas.map(share, rows, at_once=micro_batch)
        self.replicas.gather_gradients()
        sums = [sum(parts) for parts in zip(*losses, strict=True)]
        return {each.name: loss for each, loss in zip(self.subnetworks, sums, strict=True)}

    def _share(self, supernet: Encoder, batch: Batch, totals: Totals, *, step: int) -> list[float]:
        """Each sub-network's part of the loss, from a share of the batch."""
        with paddle.no_grad():
            targets = self.teacher.encode(*batch.inputs)
        noise = Noise([self.seed, step, int(batch.rows[0])])
        embedded = supernet.embeddings(batch.input_ids, batch.token_type_ids, noise=noise)
        shared = embedded.detach()
        shared.stop_gradient = False
        losses = []
        for subnetwork in self.subnetworks:
            states = supernet.encode_embedded(
                shared, batch.attention_mask, subnetwork=subnetwork, noise=noise
            )
            loss = distillation_loss(states, targets, batch, self.spec, self.task, totals=totals)
            loss.backward()
            losses.append(float(loss))
        embedded.backward(shared.grad)
        return losses

    @paddle.no_grad()
    def judge(self, rows: np.ndarray) -> float:
        """Mean over rows, of the sub-networks' summed losses, without dropout."""
        data, supernet = self.data.take(rows), self.replicas.members[0]
        total = 0.0
        for numbers in sorted_rows(data, batch_size=self.spec.batch_size):
            batch = make_batch(data, numbers, pad_id=supernet.config.pad_token_id)
            targets = self.teacher.encode(*batch.inputs)
            for subnetwork in self.subnetworks:
                states = supernet.encode(*batch.inputs, subnetwork=subnetwork)
                loss = distillation_loss(states, targets, batch, self.spec, self.task)
                total += float(loss) * len(numbers) / len(rows)
        return total
