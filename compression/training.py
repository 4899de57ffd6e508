"""The optimizer and schedule of both trainings, and the fine-tuning that makes a teacher."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Protocol

import numpy as np
import paddle
from paddle import Tensor, nn

from compression.batches import Encoded, make_batch, training_rows
from compression.encoder import Encoder
from compression.errors import TrainingDiverged
from compression.noise import Noise
from compression.parallel import Replicas
from compression.spec import FineTuneSpec


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
    spec: FineTuneSpec,
    loss: Callable[[Tensor, Tensor], Tensor],
    *,
    seed: int,
    on_step: Callable[[int, int, float], None],
    replicas: int = 1,
) -> int:
    """Trains the encoder in place on labels; on_step(done, total, loss). Returns the steps.

    `replicas` threads share each batch.
    """
    steps = step_count(spec, len(data))
    optimizer = Optimizer(encoder, spec, steps=steps)
    batches = training_rows(data, batch_size=spec.batch_size, steps=steps, seed=seed)
    with Replicas(encoder, replicas) as parallel:
        for done, rows in enumerate(batches, start=1):

            def share(
                member: Encoder, part: np.ndarray, rows: np.ndarray = rows, done: int = done
            ) -> float:
                batch = make_batch(data, part, pad_id=encoder.config.pad_token_id)
                noise = Noise([seed, int(part[0]), done])
                logits = member.encode(*batch.inputs, noise=noise).logits
                value = loss(logits, batch.labels) * (len(part) / len(rows))
                value.backward()
                return float(value)

            scalar = finite(sum(parallel.map(share, rows)), stage="fine-tuning", step=done)
            parallel.gather_gradients()
            optimizer.step()
            on_step(done, steps, scalar)
    return steps
