"""Head and neuron importance (DynaBERT, arXiv:2004.04037, section 2.1; Michel et al. 2019)."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
import paddle
from paddle import Tensor

from compression.batches import Encoded, make_batch
from compression.encoder import Encoder
from compression.parallel import Replicas
from compression.tasks.base import Count, Task


@dataclass(frozen=True)
class Importance:
    """One score a unit: `heads[i]` [heads of layer i], `neurons[i]` [neurons of layer i]."""

    heads: tuple[np.ndarray, ...]
    neurons: tuple[np.ndarray, ...]


def measure_importance(
    encoder: Encoder,
    data: Encoded,
    batches: Iterable[np.ndarray],
    task: Task,
    *,
    replicas: int = 1,
    on_batch: Callable[[int], None] = lambda done: None,
) -> Importance:
    """Sums each unit's first-order effect on the loss over batches of row numbers of `data`.

    Head: |d loss / d gate| of a gate of ones on its output. Neuron:
    |sum(w_in * grad) + b_in * grad| + |sum(w_out * grad)|. Every batch has
    gradients of its own; absolute values are taken for each batch and then summed.
    The encoder runs without dropout and is left unchanged. `replicas` threads share a batch.
    """
    config = encoder.config
    heads = [paddle.zeros([n]) for n in config.heads]
    neurons = [paddle.zeros([n]) for n in config.ffn]
    with Replicas(encoder, replicas) as parallel:
        for done, rows in enumerate(batches, start=1):
            total = task.count(make_batch(data, rows, pad_id=config.pad_token_id))

            def share(member: Encoder, part: np.ndarray, total: Count = total) -> list[Tensor]:
                batch = make_batch(data, part, pad_id=config.pad_token_id)
                gates = [paddle.ones([n]) for n in config.heads]
                for gate in gates:
                    gate.stop_gradient = False
                states = member.encode(*batch.inputs, head_gates=gates)
                # Not paddle.grad: it keeps a state of its own for the whole process.
                task.label_loss(states.logits, batch, total=total).backward()
                return [gate.grad for gate in gates]

            slopes = parallel.map(share, rows)  # [shares][layers] of [heads]
            parallel.gather_gradients()
            for i, layer in enumerate(encoder.layers):
                heads[i] += sum(each[i] for each in slopes).abs()
                neurons[i] += _neuron_scores(layer.ffn.intermediate, layer.ffn.output)
            encoder.clear_gradients(set_to_zero=False)
            on_batch(done)
    return Importance(
        tuple(scores.numpy() for scores in heads), tuple(scores.numpy() for scores in neurons)
    )


@paddle.no_grad()
def _neuron_scores(into: paddle.nn.Linear, out: paddle.nn.Linear) -> Tensor:
    """[F] of one batch's gradients: weights [H, F] and bias [F] into a neuron, [F, H] out."""
    entering = (into.weight * into.weight.grad).sum(axis=0) + into.bias * into.bias.grad
    leaving = (out.weight * out.weight.grad).sum(axis=1)
    return entering.abs() + leaving.abs()
