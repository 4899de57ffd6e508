"""The optimizer and schedule of every training, and fine-tuning on labels."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np
import paddle
from paddle import nn

from compression.batches import Encoded, make_batch, training_rows
from compression.encoder import Encoder
from compression.errors import TrainingDiverged
from compression.noise import Noise
from compression.parallel import Replicas
from compression.supernet import Subnetwork
from compression.tasks.base import Count, Task


class Schedule(Protocol):
    """What a training needs of a spec section."""

    @property
    def epochs(self) -> float: ...
    @property
    def max_steps(self) -> int | None: ...
    @property
    def batch_size(self) -> int: ...
    @property
    def learning_rate(self) -> float: ...
    @property
    def warmup_fraction(self) -> float: ...
    @property
    def weight_decay(self) -> float: ...
    @property
    def max_grad_norm(self) -> float: ...


def step_count(schedule: Schedule, rows: int) -> int:
    """Optimizer steps: epochs over the rows, at most max_steps, at least one."""
    steps = math.ceil(schedule.epochs * math.ceil(rows / schedule.batch_size))
    return max(1, min(steps, schedule.max_steps or steps))


def finite(loss: float, *, stage: str, step: int) -> float:
    """The loss. TrainingDiverged, naming the step, where it is not a finite number."""
    if not math.isfinite(loss):
        raise TrainingDiverged(
            f"the loss of {stage} is {loss} at step {step}: lower its learning_rate"
        )
    return loss


class Optimizer:
    """AdamW with linear warm-up, linear decay to 0 and clipping by global norm.

    Biases and norms are not decayed, as in BERT.
    """

    def __init__(self, model: nn.Layer, schedule: Schedule, *, steps: int) -> None:
        warmup = round(schedule.warmup_fraction * steps)

        def factor(step: int) -> float:  # of the peak rate, for the step that comes next
            if step < warmup:
                return (step + 1) / warmup
            return max(0.0, (steps - step) / max(1, steps - warmup))

        decayed = {
            parameter.name
            for name, parameter in model.named_parameters()
            if not name.endswith(".bias") and ".norm." not in name
        }
        self.rate = paddle.optimizer.lr.LambdaDecay(schedule.learning_rate, factor)
        self.optimizer = paddle.optimizer.AdamW(
            self.rate,
            parameters=model.parameters(),
            weight_decay=schedule.weight_decay,
            apply_decay_param_fun=lambda name: name in decayed,
            grad_clip=nn.ClipGradByGlobalNorm(schedule.max_grad_norm),
        )

    def step(self) -> None:
        """One update with the gradients that have been accumulated, which are then cleared."""
        self.optimizer.step()
        self.rate.step()
        self.optimizer.clear_grad(set_to_zero=False)


def fine_tune(
    encoder: Encoder,
    data: Encoded,
    spec: Schedule,
    task: Task,
    *,
    subnetworks: Sequence[Subnetwork | None] = (None,),
    seed: int,
    on_step: Callable[[int, int, float], None],
    replicas: int = 1,
) -> int:
    """Trains the encoder in place on labels and returns the steps.

    `None` is the whole network. Of several sub-networks each batch takes the sum of the
    losses, one after the other, and then one optimizer step: DynaBERT's (arXiv:2004.04037)
    final fine-tuning. on_step(done, total, mean loss of the sub-networks). `replicas`
    threads share each batch.
    """
    steps = step_count(spec, len(data))
    pad_id = encoder.config.pad_token_id
    optimizer = Optimizer(encoder, spec, steps=steps)
    batches = training_rows(data, batch_size=spec.batch_size, steps=steps, seed=seed)
    with Replicas(encoder, replicas) as parallel:
        for done, rows in enumerate(batches, start=1):
            total = task.count(make_batch(data, rows, pad_id=pad_id))

            def share(
                member: Encoder, part: np.ndarray, total: Count = total, done: int = done
            ) -> float:
                batch = make_batch(data, part, pad_id=pad_id)
                noise = Noise([seed, done, int(part[0])])
                losses = 0.0
                for subnetwork in subnetworks:
                    states = member.encode(*batch.inputs, subnetwork=subnetwork, noise=noise)
                    loss = task.label_loss(states.logits, batch, total=total)
                    loss.backward()
                    losses += float(loss)
                return losses

            loss = finite(sum(parallel.map(share, rows)), stage="fine-tuning", step=done)
            parallel.gather_gradients()
            optimizer.step()
            on_step(done, steps, loss / len(subnetworks))
    return steps
