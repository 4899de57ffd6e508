"""PaddleSlim's side of test_reference.py: `python -m tests.reference_side FOLDER`.

FOLDER holds a request whose rows are equally long within each batch; it receives
answer.safetensors: the scores, and for each optimizer the reordered weights' logits,
the loss of each step and width, and the weights at the end.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import paddle
from paddle import nn
from safetensors.numpy import save_file

from compression.reference.exchange import read_request
from compression.reference.recipe import ReferenceLoop, reference_batch
from compression.reorder import descending
from tests.encoders import OPTIMIZERS


def main() -> None:
    folder = Path(sys.argv[1])
    request = read_request(folder)
    spec, config, rows = request.spec, request.config, request.rows
    size = spec.distillation.batch_size
    batches = [
        reference_batch(rows, range(i, i + size), pad_id=config.pad_token_id)
        for i in range(0, len(rows), size)
    ]
    answer: dict[str, np.ndarray] = {}
    for name, make in OPTIMIZERS.items():

        def optimizer(student: nn.Layer, make=make) -> paddle.optimizer.Optimizer:
            return make(student.parameters())

        loop = ReferenceLoop(
            config,
            request.weights,
            spec.supernet.width_mults,
            lambda_rep=spec.distillation.lambda_rep,
            lambda_logit=spec.distillation.lambda_logit,
            make_optimizer=optimizer,
        )
        heads, neurons = loop.importance(batches)
        loop.reorder(*(np.stack([descending(row) for row in each]) for each in (heads, neurons)))
        answer |= {"heads": heads, "neurons": neurons}
        for width in spec.supernet.width_mults:
            answer[f"{name}.logits.{width}"] = loop.logits(batches[0], width)
        answer |= {f"{name}.reordered.{key}": value for key, value in loop.weights().items()}
        answer[f"{name}.losses"] = np.array([loop.step(batch) for batch in batches])
        answer |= {f"{name}.trained.{key}": value for key, value in loop.weights().items()}
    save_file(answer, folder / "answer.safetensors")


if __name__ == "__main__":
    main()
