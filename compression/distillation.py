"""Distillation of the supernet: DynaBERT (arXiv:2004.04037), width stage.

Left out: data augmentation and the depth stage. Letters: B rows, T tokens, H
hidden size, C classes.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import paddle
from paddle import Tensor

from compression.batches import Encoded, make_batch, training_rows
from compression.encoder import Encoder, EncoderStates
from compression.noise import Noise
from compression.parallel import Replicas
from compression.spec import DistillationSpec
from compression.supernet import Subnetwork
from compression.training import Optimizer, finite, step_count

LogitLoss = Callable[..., Tensor]  # (*, student [B, C], teacher [B, C]) -> scalar


@dataclass(frozen=True)
class StepReport:
    """One step's losses by sub-network name (weighted sums) and its duration."""

    done: int
    total: int
    losses: dict[str, float]
    seconds: float


def representation_loss(
    *, student: Sequence[Tensor], teacher: Sequence[Tensor], attention_mask: Tensor
) -> Tensor:
    """Sum over states of the mean squared difference over real tokens; states [B, T, H]."""
    mask = attention_mask.astype("float32").unsqueeze(-1)  # [B, T, 1]
    units = mask.sum() * student[0].shape[-1]
    return sum(
        ((own - other).square() * mask).sum() / units
        for own, other in zip(student, teacher, strict=True)
    )


def distillation_loss(
    student: EncoderStates,
    teacher: EncoderStates,
    attention_mask: Tensor,
    spec: DistillationSpec,
    logit_loss: LogitLoss,
) -> Tensor:
    """lambda_rep * representation loss + lambda_logit * logit loss of one sub-network."""
    loss = spec.lambda_logit * logit_loss(student=student.logits, teacher=teacher.logits)
    if spec.lambda_rep:
        loss = loss + spec.lambda_rep * representation_loss(
            student=student.hidden, teacher=teacher.hidden, attention_mask=attention_mask
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
    replicas: int = 1,
) -> int:
    """Trains the supernet in place and returns the steps done.

    Each batch: the teacher once, without gradients; every sub-network forward and
    backward; one optimizer step. `replicas` threads share each batch.
    """
    steps = step_count(spec, len(data))
    optimizer = Optimizer(supernet, spec, steps=steps)
    batches = training_rows(data, batch_size=spec.batch_size, steps=steps, seed=seed)
    with Replicas(supernet, replicas) as parallel:
        gradients = SupernetGradients(parallel, teacher, data, subnetworks, spec, logit_loss, seed)
        for done, rows in enumerate(batches, start=1):
            start = time.perf_counter()
            losses = gradients(rows, step=done)
            for loss in losses.values():
                finite(loss, stage="distillation", step=done)
            optimizer.step()
            on_step(StepReport(done, steps, losses, time.perf_counter() - start))
    return steps


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
    logit_loss: LogitLoss
    seed: int

    def __call__(self, rows: np.ndarray, *, step: int) -> dict[str, float]:
        """The losses of a batch by sub-network; the gradients are left in the supernet."""
        tokens = int(self.data.lengths[rows].sum())

        def share(member: Encoder, part: np.ndarray) -> list[float]:
            return self._share(member, part, rows=len(rows), tokens=tokens, step=step)

        losses = self.replicas.map(share, rows)
        self.replicas.gather_gradients()
        totals = [sum(parts) for parts in zip(*losses, strict=True)]
        return {each.name: loss for each, loss in zip(self.subnetworks, totals, strict=True)}

    def _share(
        self, supernet: Encoder, part: np.ndarray, *, rows: int, tokens: int, step: int
    ) -> list[float]:
        """Each sub-network's loss on some rows of a batch of `rows` rows and `tokens` tokens."""
        batch = make_batch(self.data, part, pad_id=supernet.config.pad_token_id)
        # Means over a share count as much as the share is of the batch.
        spec = self.spec.model_copy(
            update={
                "lambda_rep": self.spec.lambda_rep * int(self.data.lengths[part].sum()) / tokens,
                "lambda_logit": self.spec.lambda_logit * len(part) / rows,
            }
        )
        with paddle.no_grad():
            targets = self.teacher.encode(*batch.inputs)
        noise = Noise([self.seed, step, int(part[0])])
        embedded = supernet.embeddings(batch.input_ids, batch.token_type_ids, noise=noise)
        shared = embedded.detach()
        shared.stop_gradient = False
        losses = []
        for subnetwork in self.subnetworks:
            states = supernet.encode_embedded(
                shared, batch.attention_mask, subnetwork=subnetwork, noise=noise
            )
            loss = distillation_loss(states, targets, batch.attention_mask, spec, self.logit_loss)
            loss.backward()
            losses.append(float(loss))
        embedded.backward(shared.grad)
        return losses
