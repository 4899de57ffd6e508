"""Which sub-networks a training step takes. Paddle-free."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from compression.supernet import Subnetwork

RANDOM = 2  # of a step, beside the largest and the smallest


@dataclass(frozen=True)
class Sandwich:
    """The sandwich rule (arXiv:1903.05134): the largest, the smallest and two drawn at random.

    What a step costs then does not grow with the number of sub-networks. `subnetworks` has the
    largest first and the smallest last. A draw is a function of seed and step, so a training goes
    on from a checkpoint as if it had never stopped.
    """

    subnetworks: Sequence[Subnetwork]
    seed: int

    def at(self, step: int | None) -> Sequence[Subnetwork]:
        """Those of a step, in their order; all of them where there is no step to take."""
        between = range(1, len(self.subnetworks) - 1)
        if step is None or len(between) <= RANDOM:
            return self.subnetworks
        drawn = np.random.default_rng([self.seed, 5, step]).choice(between, RANDOM, replace=False)
        return [self.subnetworks[i] for i in (0, *sorted(drawn.tolist()), -1)]
