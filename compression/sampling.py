"""Which sub-networks a training step takes. Paddle-free."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from compression.search_space import SearchSpace
from compression.supernet import Subnetwork

RANDOM = 2  # of a step, beside the largest and the smallest

S = TypeVar("S", bound=Subnetwork | None)


@dataclass(frozen=True)
class Sandwich:
    """The sandwich rule (arXiv:1903.05134): the largest, the smallest and two drawn at random.

    What a step costs then does not grow with the number of sub-networks. `subnetworks` has the
    largest first and the smallest last. With a `space` one of the two has widths of its own in
    each layer (both, where nothing is between largest and smallest). A draw is a function of seed
    and step, so a training goes on from a checkpoint as if it had never stopped.
    """

    subnetworks: Sequence[Subnetwork]
    seed: int
    space: SearchSpace | None = None

    def at(self, step: int | None) -> Sequence[Subnetwork]:
        """Those of a step; all of `subnetworks` where there is no step to take."""
        between = range(1, len(self.subnetworks) - 1)
        if step is None or (self.space is None and len(between) <= RANDOM):
            return self.subnetworks
        generator = np.random.default_rng([self.seed, 5, step])
        named = min(RANDOM if self.space is None else RANDOM - 1, len(between))
        drawn = generator.choice(between, named, replace=False).tolist() if named else []
        chosen = [self.subnetworks[i] for i in (0, *sorted(drawn))]
        if self.space is not None:
            chosen += [
                self.space.subnetwork(self.space.random(generator), f"per-layer {number}")
                for number in range(1, RANDOM - named + 1)
            ]
        return [*chosen, self.subnetworks[-1]]


def taken(
    subnetworks: Sequence[S] | Sandwich, step: int | None
) -> Sequence[S] | Sequence[Subnetwork]:
    """The sandwich's of a step, or all."""
    return subnetworks.at(step) if isinstance(subnetworks, Sandwich) else subnetworks
