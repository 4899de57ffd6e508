"""Head and neuron importance (DynaBERT, arXiv:2004.04037, section 2.1; Michel et al. 2019)."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
import paddle
from paddle import Tensor

from compression.batches import Batch
from compression.encoder import Encoder


@dataclass(frozen=True)
class Importance:
    """One score a unit: `heads[i]` [heads of layer i], `neurons[i]` [neurons of layer i]."""

    heads: tuple[np.ndarray, ...]
    neurons: tuple[np.ndarray, ...]


def measure_importance(
    encoder: Encoder,
    batches: Iterable[Batch],
    loss: Callable[[Tensor, Batch], Tensor],
    *,
    on_batch: Callable[[int], None] = lambda done: None,
) -> Importance:
    """Sums each unit's first-order effect on the loss over batches.

    Head: |d loss / d gate| of a gate of ones on its output. Neuron:
    |sum(w_in * grad) + b_in * grad| + |sum(w_out * grad)|. Every batch has
    gradients of its own; absolute values are taken for each batch and then summed.
    The encoder runs in evaluation mode and is left unchanged.
    """
    encoder.eval()
    config = encoder.config
    # Paddle 3.3.1's layer_norm on the CPU passes a wrong gradient to its input where its
    # weight's gradient is not wanted; asking for the norms' gradients too makes it right.
    norms = [value for name, value in encoder.named_parameters() if name.endswith("norm.weight")]
    heads = [np.zeros(n) for n in config.heads]
    neurons = [np.zeros(n) for n in config.ffn]
    for done, batch in enumerate(batches, start=1):
        gates = [paddle.ones([n]) for n in config.heads]
        for gate in gates:
            gate.stop_gradient = False
        states = encoder.encode(*batch.inputs, head_gates=gates)
        units = [
            parameter
            for layer in encoder.layers
            for parameter in (
                layer.ffn.intermediate.weight,
                layer.ffn.intermediate.bias,
                layer.ffn.output.weight,
            )
        ]
        # paddle.grad returns this batch's gradients alone: nothing is left to accumulate.
        gradients = paddle.grad(loss(states.logits, batch), [*gates, *units, *norms])
        for i in range(config.layers):
            heads[i] += np.abs(gradients[i].numpy())
            w_in, b_in, w_out = units[3 * i : 3 * i + 3]
            w_in_grad, b_in_grad, w_out_grad = gradients[config.layers + 3 * i :][:3]
            into = (w_in * w_in_grad).sum(axis=0) + b_in * b_in_grad  # [H, F] -> [F]
            out = (w_out * w_out_grad).sum(axis=1)  # [F, H] -> [F]
            neurons[i] += (into.abs() + out.abs()).numpy()
        on_batch(done)
    return Importance(tuple(heads), tuple(neurons))
