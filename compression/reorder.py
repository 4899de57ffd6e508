"""Surgery that puts important heads and neurons first; the function is unchanged."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from compression.teachers.config import EncoderConfig


def descending(scores: np.ndarray) -> np.ndarray:
    """Unit numbers, highest score first; equal scores keep their order."""
    return np.argsort(-scores, kind="stable")


def reorder(
    config: EncoderConfig,
    tensors: Mapping[str, np.ndarray],
    *,
    head_orders: Sequence[np.ndarray],
    neuron_orders: Sequence[np.ndarray],
) -> dict[str, np.ndarray]:
    """The weights with layer i's heads in `head_orders[i]`, its neurons in `neuron_orders[i]`."""
    moved = dict(tensors)
    for i in range(config.layers):
        _require_permutation(head_orders[i], config.heads[i], f"heads of layer {i}")
        _require_permutation(neuron_orders[i], config.ffn[i], f"neurons of layer {i}")
        units = np.arange(config.heads[i] * config.head_dim).reshape(config.heads[i], -1)
        columns = units[head_orders[i]].ravel()  # whole heads move, their units stay in order
        attention, ffn = f"layers.{i}.attention", f"layers.{i}.ffn"
        for part in ("query", "key", "value"):
            moved[f"{attention}.{part}.weight"] = tensors[f"{attention}.{part}.weight"][:, columns]
            moved[f"{attention}.{part}.bias"] = tensors[f"{attention}.{part}.bias"][columns]
        moved[f"{attention}.output.weight"] = tensors[f"{attention}.output.weight"][columns]
        order = neuron_orders[i]
        moved[f"{ffn}.intermediate.weight"] = tensors[f"{ffn}.intermediate.weight"][:, order]
        moved[f"{ffn}.intermediate.bias"] = tensors[f"{ffn}.intermediate.bias"][order]
        moved[f"{ffn}.output.weight"] = tensors[f"{ffn}.output.weight"][order]
    return moved


def _require_permutation(order: np.ndarray, count: int, what: str) -> None:
    if not np.array_equal(np.sort(order), np.arange(count)):
        raise ValueError(f"the order of the {what} is not a permutation of {count} units")
