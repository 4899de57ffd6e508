"""The two stages of the reference process, on the spec of a job."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from pathlib import Path

from safetensors.numpy import save_file

from compression.errors import TrainingDiverged
from compression.importance import Importance
from compression.reference.exchange import SUPERNET, Request, write_scores
from compression.reference.recipe import (
    ReferenceLoop,
    TutorialOptimizer,
    reference_batch,
    shuffled_batches,
)
from compression.training import step_count

Send = Callable[..., None]


def start(request: Request, steps: int) -> ReferenceLoop:
    spec = request.spec.distillation
    config = request.config
    own = (config.hidden_dropout, config.attention_dropout)
    return ReferenceLoop(
        config,
        request.weights,
        request.spec.supernet.width_mults,
        lambda_rep=spec.lambda_rep,
        lambda_logit=spec.lambda_logit,
        make_optimizer=lambda student: TutorialOptimizer(
            student,
            steps=steps,
            learning_rate=spec.learning_rate,
            warmup_steps=round(spec.warmup_fraction * steps),
            weight_decay=spec.weight_decay,
        ),
        dropouts=own if spec.dropout is None else (spec.dropout, spec.dropout),
        teacher_records=False,
    )


def importance(request: Request, folder: Path, send: Send) -> None:
    rows, size = request.rows, request.spec.importance.batch_size
    batches = [
        reference_batch(
            rows, range(i, min(i + size, len(rows))), pad_id=request.config.pad_token_id
        )
        for i in range(0, len(rows), size)
    ]
    heads, neurons = start(request, steps=1).importance(
        batches, on_batch=lambda done: send(step=done, total=len(batches))
    )
    write_scores(folder, Importance(tuple(heads), tuple(neurons)))


def distil(request: Request, folder: Path, send: Send) -> None:
    spec = request.spec.distillation
    steps = step_count(spec, len(request.rows))
    loop = start(request, steps)
    if request.orders is None:
        raise ValueError(f"{folder} holds no orders to put heads and neurons into")
    loop.reorder(request.orders.heads, request.orders.neurons)
    batches = shuffled_batches(
        request.rows,
        batch_size=spec.batch_size,
        steps=steps,
        seed=request.spec.seed,
        pad_id=request.config.pad_token_id,
    )
    for done, batch in enumerate(batches, start=1):
        started = time.perf_counter()
        losses = loop.step(batch)
        if not all(map(math.isfinite, losses)):
            raise TrainingDiverged(
                f"the losses of distillation are {losses} at step {done}: lower its learning_rate"
            )
        send(step=done, total=steps, losses=losses, seconds=time.perf_counter() - started)
    save_file(loop.weights(), folder / SUPERNET)
