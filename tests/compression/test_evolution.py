"""The search finds what it is after, within its budget, once each, and again with the same seed."""

from __future__ import annotations

from collections import Counter
from fractions import Fraction

from compression.evolution import Scored, evolve
from compression.search_space import SearchSpace
from compression.supernet import Subnetwork
from tests.encoders import tiny_config

WIDTHS = (Fraction(1), Fraction(3, 4), Fraction(1, 2), Fraction(1, 4))
SPACE = SearchSpace(
    tiny_config(layers=4, heads=(4,) * 4, ffn=(16,) * 4), WIDTHS, (Fraction(1), Fraction(1, 2))
)
VALUE = (1, 5, 2, 9)  # of a head in each layer; neurons are worth nothing


def worth(subnetwork: Subnetwork) -> float:
    pairs = zip(subnetwork.layers, subnetwork.heads, strict=True)
    return float(sum(VALUE[layer] * heads for layer, heads in pairs))


def price(subnetwork: Subnetwork) -> float:
    return float(sum(subnetwork.heads) + sum(subnetwork.ffn) / 16)


def search(budget: float, *, generations: int = 12, seed: int = 1) -> tuple[list[Scored], Counter]:
    seen: Counter[tuple[tuple[int, ...], ...]] = Counter()

    def score(subnetwork: Subnetwork) -> float:
        assert price(subnetwork) <= budget
        seen[(subnetwork.layers, subnetwork.heads, subnetwork.ffn)] += 1
        return worth(subnetwork)

    found = evolve(
        SPACE,
        first=[SPACE.uniform(width, Fraction(1)) for width in WIDTHS],
        fits=lambda subnetwork: price(subnetwork) <= budget,
        score=score,
        cost=price,
        population=40,
        generations=generations,
        seed=seed,
    )
    return found, seen


def test_it_finds_the_best_that_the_budget_allows_and_of_equals_the_cheapest() -> None:
    """11 units: 4 heads where one is worth 9 and 5, 1 and 1 elsewhere, and the fewest neurons."""
    found, seen = search(11)
    best = found[0]
    assert best.subnetwork.heads == (1, 4, 1, 4)
    assert best.subnetwork.ffn == (4, 4, 4, 4)
    assert (best.accuracy, best.cost) == (9 * 4 + 5 * 4 + 1 + 2, 11)
    uniform = worth(SPACE.subnetwork(SPACE.uniform(Fraction(1, 2), Fraction(1)), "half"))
    assert best.accuracy > uniform
    ranks = [(-each.accuracy, each.cost) for each in found]
    assert ranks == sorted(ranks)
    assert set(seen.values()) == {1}
    assert len(found) == len(seen) <= 40 * 13


def test_generations_find_more_than_chance_did() -> None:
    assert search(11, generations=12)[0][0].accuracy > search(11, generations=0)[0][0].accuracy


def test_the_same_seed_finds_the_same() -> None:
    found = search(9, generations=2, seed=4)[0]
    assert search(9, generations=2, seed=4)[0] == found
    assert search(9, generations=2, seed=5)[0] != found


def test_where_nothing_fits_nothing_is_found() -> None:
    found, seen = search(1)
    assert found == [] and not seen
