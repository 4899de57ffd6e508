"""A small evolutionary search over per-layer widths and depth, seeded. Paddle-free.

As once-for-all's (arXiv:1908.09791) under a latency: the best are parents, children are mutated or
crossed, or trade a width between two layers, and what does not fit the budget is drawn again.
Nothing is scored twice.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from compression.search_space import Genes, SearchSpace
from compression.supernet import Subnetwork

PARENTS = 4  # one in so many of a generation
MUTATION_RATE = 0.1
TRIES = 50  # for each child that the budget may refuse


@dataclass(frozen=True)
class Scored:
    """A candidate: `accuracy` is what it was scored with, `cost` what decides between equals."""

    genes: Genes
    subnetwork: Subnetwork
    accuracy: float
    cost: float


def evolve(
    space: SearchSpace,
    *,
    first: Sequence[Genes],
    fits: Callable[[Subnetwork], bool],
    score: Callable[[Subnetwork], float],
    cost: Callable[[Subnetwork], float],
    population: int,
    generations: int,
    seed: int,
    on_scored: Callable[[int], None] = lambda count: None,
) -> list[Scored]:
    """Every candidate that was scored, the most accurate first and of equals the cheapest.

    `first` are candidates of the first generation, filled up with random ones. Each generation
    scores at most `population` new ones that fit. Empty where nothing that was drawn fits.
    """
    generator = np.random.default_rng([seed, 7])
    known: dict[tuple[tuple[int, ...], ...], Scored] = {}

    def add(genes: Genes) -> bool:
        subnetwork = space.subnetwork(genes, "candidate")
        if subnetwork.shape in known or not fits(subnetwork):
            return False
        known[subnetwork.shape] = Scored(genes, subnetwork, score(subnetwork), cost(subnetwork))
        on_scored(len(known))
        return True

    def ranked() -> list[Scored]:
        return sorted(known.values(), key=lambda each: (-each.accuracy, each.cost))

    def fill(propose: Callable[[], Genes], count: int) -> int:
        """Adds up to `count` new candidates; how many it found."""
        found = 0
        for _ in range(TRIES * count):
            if found == count:
                break
            found += add(propose())
        return found

    added = sum(add(genes) for genes in first)
    fill(lambda: space.random(generator), max(0, population - added))
    for _ in range(generations):
        parents = ranked()[: max(1, population // PARENTS)]
        if not parents:
            break

        def child(parents: Sequence[Scored] = parents) -> Genes:
            one, other = (parents[int(i)].genes for i in generator.integers(len(parents), size=2))
            kind = generator.integers(3)
            if kind == 0:
                return space.shifted(one, generator)
            genes = space.crossed(one, other, generator) if kind == 1 else one
            return space.mutated(genes, generator, rate=MUTATION_RATE)

        if fill(child, population) == 0:
            break  # all that is near has been scored
    return ranked()
