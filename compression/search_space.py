"""Sub-networks with widths of their own in each layer: drawn, changed and mixed. Paddle-free."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import TypeVar

import numpy as np

from compression.supernet import Subnetwork, kept_layers
from compression.teachers.config import EncoderConfig

T = TypeVar("T")


@dataclass(frozen=True)
class Genes:
    """A depth, and of each of the supernet's layers the width of its heads and of its neurons.

    Layers that the depth leaves out have genes too, for those that keep them.
    """

    depth: Fraction
    heads: tuple[Fraction, ...]
    ffn: tuple[Fraction, ...]


@dataclass(frozen=True)
class SearchSpace:
    """Every layer has one of the `widths` for its heads, and one for its neurons.

    All of them must be legal for the config; both lists are in descending order.
    """

    config: EncoderConfig
    widths: tuple[Fraction, ...]
    depths: tuple[Fraction, ...]

    def subnetwork(self, genes: Genes, name: str) -> Subnetwork:
        """What the genes mean."""
        kept = kept_layers(self.config.layers, genes.depth)
        return Subnetwork(
            name=name,
            width_mult=None,
            depth_mult=genes.depth,
            layers=kept,
            heads=tuple(int(self.config.heads[layer] * genes.heads[layer]) for layer in kept),
            ffn=tuple(int(self.config.ffn[layer] * genes.ffn[layer]) for layer in kept),
        )

    def uniform(self, width: Fraction, depth: Fraction) -> Genes:
        """One width for everything."""
        widths = (width,) * self.config.layers
        return Genes(depth, widths, widths)

    def random(self, generator: np.random.Generator) -> Genes:
        """Widths of a range that is drawn first.

        Drawn one by one from all widths, networks of many layers would all be of middling size.
        """
        ends = np.sort(generator.integers(len(self.widths), size=2))
        widths = self.widths[ends[0] : ends[1] + 1]
        layers = range(self.config.layers)
        return Genes(
            depth=_one_of(self.depths, generator),
            heads=tuple(_one_of(widths, generator) for _ in layers),
            ffn=tuple(_one_of(widths, generator) for _ in layers),
        )

    def mutated(self, genes: Genes, generator: np.random.Generator, *, rate: float) -> Genes:
        """Each gene drawn anew with the probability `rate`."""

        def drawn(own: Fraction, values: Sequence[Fraction]) -> Fraction:
            return _one_of(values, generator) if generator.random() < rate else own

        return Genes(
            depth=drawn(genes.depth, self.depths),
            heads=tuple(drawn(each, self.widths) for each in genes.heads),
            ffn=tuple(drawn(each, self.widths) for each in genes.ffn),
        )

    def shifted(self, genes: Genes, generator: np.random.Generator) -> Genes:
        """One layer's heads (or neurons) a width wider, another's a width narrower.

        At the edge of a budget what is only wider does not fit any more.
        """
        kind = "heads" if generator.random() < 0.5 else "ffn"
        widths = list(getattr(genes, kind))
        wider, narrower = generator.choice(len(widths), 2, replace=len(widths) < 2)
        for layer, step in ((wider, -1), (narrower, 1)):
            place = self.widths.index(widths[layer]) + step
            widths[layer] = self.widths[min(max(place, 0), len(self.widths) - 1)]
        if kind == "heads":
            return dataclasses.replace(genes, heads=tuple(widths))
        return dataclasses.replace(genes, ffn=tuple(widths))

    def crossed(self, one: Genes, other: Genes, generator: np.random.Generator) -> Genes:
        """Each gene from one or the other."""

        def either(own: T, theirs: T) -> T:
            return own if generator.random() < 0.5 else theirs

        return Genes(
            depth=either(one.depth, other.depth),
            heads=tuple(either(*pair) for pair in zip(one.heads, other.heads, strict=True)),
            ffn=tuple(either(*pair) for pair in zip(one.ffn, other.ffn, strict=True)),
        )


def _one_of(values: Sequence[Fraction], generator: np.random.Generator) -> Fraction:
    return values[int(generator.integers(len(values)))]
