"""The supernet's sub-networks: which layers, heads and neurons each keeps, and how one is cut out.

The supernet itself is an `Encoder` whose units are in order of importance; a
sub-network keeps some of the layers and the first units of each, and shares their
weights. Paddle-free.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
import numpy.typing as npt

from compression.errors import InvalidSpec
from compression.teachers.config import EncoderConfig

FULL = Fraction(1)


@dataclass(frozen=True)
class Subnetwork:
    """Runs the supernet's `layers`, counted from 0, in this order and no other.

    The i-th of them keeps its first `heads[i]` heads and its first `ffn[i]` neurons.
    `width_mult` is None where these are not one width of all layers.
    """

    name: str
    width_mult: Fraction | None
    depth_mult: Fraction
    layers: tuple[int, ...]
    heads: tuple[int, ...]
    ffn: tuple[int, ...]

    @property
    def shape(self) -> tuple[tuple[int, ...], ...]:
        """What it computes, whatever it is called."""
        return self.layers, self.heads, self.ffn

    def config(self, full: EncoderConfig) -> EncoderConfig:
        """That of the physically smaller network; `full` is the supernet's."""
        return dataclasses.replace(full, layers=len(self.layers), heads=self.heads, ffn=self.ffn)


def subnetwork_name(width: Fraction, depth: Fraction = FULL) -> str:
    """A name that is safe as a folder: "w1", "w3_4", and where layers are left out "w3_4-d1_2"."""
    name = f"w{width}" if depth == FULL else f"w{width}-d{depth}"
    return name.replace("/", "_")


def kept_layers(layers: int, depth: Fraction, *, keep_last: bool = False) -> tuple[int, ...]:
    """The numbers of the n = depth * layers that stay: DynaBERT's floor(i / depth), i = 0..n-1.

    `keep_last`: floor((i + 1) / depth) - 1 instead, which leaves out the first layer and not the
    last (PaddleNLP's ERNIE recipe). InvalidSpec where n is no whole number of at least 1.
    """
    count = depth * layers
    if count.denominator != 1 or count < 1:
        raise InvalidSpec(
            f"depth {depth} of the {layers} layers is {float(count):g}, not a whole number of at "
            "least 1"
        )
    if keep_last:
        return tuple(math.floor((i + 1) / depth) - 1 for i in range(int(count)))
    return tuple(math.floor(i / depth) for i in range(int(count)))


def replaced_states(layers: int, depth: Fraction) -> tuple[int, ...]:
    """Which state of the full depth each state of a shallow network stands for; 0: the embedding.

    floor(i / depth) for i = 0..n: the input of each kept layer (`keep_last`: the output), and the
    last for the last.
    """
    return tuple(math.floor(i / depth) for i in range(int(depth * layers) + 1))


def subnetwork_of(
    config: EncoderConfig, width: Fraction, depth: Fraction = FULL, *, keep_last: bool = False
) -> Subnetwork:
    """The sub-network of one width and depth.

    InvalidSpec where it leaves no whole heads, neurons or layers.
    """
    narrow = config.narrowed(width)
    kept = kept_layers(config.layers, depth, keep_last=keep_last)
    return Subnetwork(
        name=subnetwork_name(width, depth),
        width_mult=width,
        depth_mult=depth,
        layers=kept,
        heads=tuple(narrow.heads[layer] for layer in kept),
        ffn=tuple(narrow.ffn[layer] for layer in kept),
    )


def deepened(config: EncoderConfig, subnetwork: Subnetwork) -> Subnetwork:
    """Itself at full depth: of the same width, or where layers differ with the others whole."""
    if subnetwork.width_mult is not None:
        return subnetwork_of(config, subnetwork.width_mult)
    heads, ffn = list(config.heads), list(config.ffn)
    for i, layer in enumerate(subnetwork.layers):
        heads[layer], ffn[layer] = subnetwork.heads[i], subnetwork.ffn[i]
    return dataclasses.replace(
        subnetwork,
        depth_mult=FULL,
        layers=tuple(range(config.layers)),
        heads=tuple(heads),
        ffn=tuple(ffn),
    )


def extract_weights(
    config: EncoderConfig, tensors: Mapping[str, npt.NDArray[np.float32]], subnetwork: Subnetwork
) -> dict[str, npt.NDArray[np.float32]]:
    """The weights of the physically smaller network: the blocks that `subnetwork` uses."""
    small = {name: value for name, value in tensors.items() if not name.startswith("layers.")}
    for i, layer in enumerate(subnetwork.layers):
        prefix = f"layers.{layer}."
        own = {
            name.removeprefix(prefix): value
            for name, value in tensors.items()
            if name.startswith(prefix)
        }
        width = subnetwork.heads[i] * config.head_dim
        neurons = subnetwork.ffn[i]
        for part in ("query", "key", "value"):
            own[f"attention.{part}.weight"] = own[f"attention.{part}.weight"][:, :width]
            own[f"attention.{part}.bias"] = own[f"attention.{part}.bias"][:width]
        own["attention.output.weight"] = own["attention.output.weight"][:width]
        own["ffn.intermediate.weight"] = own["ffn.intermediate.weight"][:, :neurons]
        own["ffn.intermediate.bias"] = own["ffn.intermediate.bias"][:neurons]
        own["ffn.output.weight"] = own["ffn.output.weight"][:neurons]
        small |= {f"layers.{i}.{name}": value for name, value in own.items()}
    return {name: np.ascontiguousarray(value) for name, value in small.items()}
