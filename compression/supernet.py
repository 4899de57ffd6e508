"""The supernet's sub-networks: which heads and neurons each keeps, and how one is cut out.

The supernet itself is an `Encoder` whose units are in order of importance; a
sub-network keeps the first ones of every layer and shares their weights. Paddle-free.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
import numpy.typing as npt

from compression.teachers.config import EncoderConfig


@dataclass(frozen=True)
class Subnetwork:
    """Layer i keeps its first `heads[i]` heads and its first `ffn[i]` neurons."""

    name: str
    width_mult: Fraction
    heads: tuple[int, ...]
    ffn: tuple[int, ...]


def subnetwork_name(width: Fraction) -> str:
    """A name that is safe as a folder: "w1", "w3_4"."""
    return f"w{width}".replace("/", "_")


def subnetwork_of(config: EncoderConfig, width: Fraction) -> Subnetwork:
    """The sub-network of one width. InvalidSpec where it leaves no whole heads or neurons."""
    narrow = config.narrowed(width)
    return Subnetwork(subnetwork_name(width), width, narrow.heads, narrow.ffn)


def extract_weights(
    config: EncoderConfig, tensors: Mapping[str, npt.NDArray[np.float32]], subnetwork: Subnetwork
) -> dict[str, npt.NDArray[np.float32]]:
    """The weights of the physically smaller network: the blocks that `subnetwork` uses."""
    small = dict(tensors)
    for i in range(config.layers):
        width = subnetwork.heads[i] * config.head_dim
        neurons = subnetwork.ffn[i]
        attention, ffn = f"layers.{i}.attention", f"layers.{i}.ffn"
        for part in ("query", "key", "value"):
            small[f"{attention}.{part}.weight"] = tensors[f"{attention}.{part}.weight"][:, :width]
            small[f"{attention}.{part}.bias"] = tensors[f"{attention}.{part}.bias"][:width]
        small[f"{attention}.output.weight"] = tensors[f"{attention}.output.weight"][:width]
        small[f"{ffn}.intermediate.weight"] = tensors[f"{ffn}.intermediate.weight"][:, :neurons]
        small[f"{ffn}.intermediate.bias"] = tensors[f"{ffn}.intermediate.bias"][:neurons]
        small[f"{ffn}.output.weight"] = tensors[f"{ffn}.output.weight"][:neurons]
    return {name: np.ascontiguousarray(value) for name, value in small.items()}
