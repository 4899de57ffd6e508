"""Distillation of the supernet: DynaBERT (arXiv:2004.04037), width stage.

Left out: data augmentation and the depth stage. Letters: B rows, T tokens, H
hidden size, C classes.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import paddle
from paddle import Tensor

from compression.batches import Batch, Encoded, training_batches
from compression.encoder import Encoder, EncoderStates
from compression.spec import DistillationSpec
from compression.supernet import Subnetwork
from compression.tasks.base import Count
from compression.training import Optimizer, finite, step_count

LogitLoss = Callable[..., Tensor]  # Task.logit_loss: (*, student, teacher, batch) -> scalar


@dataclass(frozen=True)
class StepReport:
    """One step's losses by sub-network name (weighted sums) and its duration."""

    done: int
    total: int
    losses: dict[str, float]
    seconds: float


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
    logit_loss: LogitLoss,
) -> Tensor:
    """lambda_rep * representation loss + lambda_logit * logit loss of one sub-network."""
    mask = batch.attention_mask
    loss = spec.lambda_logit * logit_loss(
        student=student.logits, teacher=teacher.logits, batch=batch
    )
    if spec.lambda_rep:
        loss = loss + spec.lambda_rep * representation_loss(
            student=student.hidden,
            teacher=teacher.hidden,
            attention_mask=paddle.ones_like(mask) if spec.padded_mean else mask,
        )
    return loss


def distil(
    supernet: Encoder,
    teacher: Encoder,
    data: Encoded,
    subnetworks: Sequence[Subnetwork],
    spec: DistillationSpec,
    logit_loss: LogitLoss,
    *,
    seed: int,
    on_step: Callable[[StepReport], None],
) -> int:
    """Trains the supernet in place and returns the steps done.

    Each batch: the teacher once, without gradients; every sub-network forward and
    backward; one optimizer step.
    """
    steps = step_count(spec, len(data))
    paddle.seed(seed)
    optimizer = Optimizer(supernet, spec, steps=steps)
    batches = training_batches(
        data,
        batch_size=spec.batch_size,
        steps=steps,
        seed=seed,
        pad_id=supernet.config.pad_token_id,
    )
    teacher.eval()
    supernet.train()
    for done, batch in enumerate(batches, start=1):
        start = time.perf_counter()
        with paddle.no_grad():
            targets = teacher.encode(*batch.inputs)
        losses = {}
        for subnetwork in subnetworks:
            states = supernet.encode(*batch.inputs, subnetwork=subnetwork)
            loss = distillation_loss(states, targets, batch, spec, logit_loss)
            losses[subnetwork.name] = finite(float(loss), stage="distillation", step=done)
            loss.backward()
        optimizer.step()
        on_step(StepReport(done, steps, losses, time.perf_counter() - start))
    supernet.eval()
    return steps
