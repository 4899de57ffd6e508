"""Distillation of the supernet: DynaBERT (arXiv:2004.04037), width stage.

Left out: data augmentation and the depth stage. Letters: B rows, T tokens, H
hidden size, C classes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import paddle
from paddle import Tensor

from compression.batches import Batch, Encoded, sorted_batches
from compression.encoder import Encoder, EncoderStates
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
    share_of: Batch | None = None,
) -> Tensor:
    """lambda_rep * representation loss + lambda_logit * logit loss of one sub-network.

    Of a part of a batch, with `share_of` that batch: the part's share, so that the parts' add up.
    """
    whole = batch if share_of is None else share_of
    loss = spec.lambda_logit * task.logit_loss(
        student=student.logits, teacher=teacher.logits, batch=batch, total=task.count(whole)
    )
    if spec.lambda_rep:
        loss = loss + spec.lambda_rep * representation_loss(
            student=student.hidden,
            teacher=teacher.hidden,
            attention_mask=batch.attention_mask,
            total=whole.attention_mask.astype("float32").sum(),
        )
    return loss


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
) -> TrainingReport:
    """Trains the supernet in place.

    Each batch: the teacher once, without gradients; every sub-network forward and
    backward; one optimizer step.
    """
    teacher.eval()

    def losses(batch: Batch, part: Batch) -> Iterator[tuple[str, Tensor]]:
        with paddle.no_grad():
            targets = teacher.encode(*part.inputs)
        for subnetwork in subnetworks:
            states = supernet.encode(*part.inputs, subnetwork=subnetwork)
            yield (
                subnetwork.name,
                distillation_loss(states, targets, part, spec, task, share_of=batch),
            )

    def gradients(batch: Batch, micro_batch: int | None) -> dict[str, float]:
        totals = {subnetwork.name: 0.0 for subnetwork in subnetworks}
        for part in batch.parts(micro_batch):
            for name, loss in losses(batch, part):
                totals[name] += float(loss)
                loss.backward()
        return totals

    @paddle.no_grad()
    def held_out_loss(judging: Encoded) -> float:
        """The mean over rows, of the sum over sub-networks."""
        batches = sorted_batches(
            judging, batch_size=spec.batch_size, pad_id=supernet.config.pad_token_id
        )
        return sum(
            float(loss) * len(batch.rows) / len(judging)
            for batch in batches
            for _, loss in losses(batch, batch)
        )

    return train(
        supernet,
        data,
        spec,
        surroundings,
        seed=seed,
        gradients=gradients,
        held_out_loss=held_out_loss,
        on_step=on_step,
    )
