"""The sandwich rule: what every step trains, and what a draw depends on."""

from __future__ import annotations

from collections import Counter
from fractions import Fraction

from compression.sampling import Sandwich
from compression.supernet import Subnetwork


def subnetworks(count: int) -> list[Subnetwork]:
    one = Fraction(1)
    return [Subnetwork(str(i), one, one, (0,), (1,), (1,)) for i in range(count)]


def names(count: int, step: int | None, seed: int = 3) -> list[str]:
    return [each.name for each in Sandwich(subnetworks(count), seed).at(step)]


def test_a_step_takes_the_largest_the_smallest_and_two_others_in_order() -> None:
    for count in (5, 12, 200):
        for step in range(1, 20):
            taken = [int(name) for name in names(count, step)]
            assert len(set(taken)) == 4
            assert taken == sorted(taken)
            assert (taken[0], taken[-1]) == (0, count - 1)


def test_of_few_and_outside_of_training_all_are_taken() -> None:
    for count in (1, 2, 3, 4):
        assert names(count, 7) == [str(i) for i in range(count)]
    assert len(names(12, None)) == 12


def test_a_draw_is_a_function_of_seed_and_step() -> None:
    steps = [names(12, step) for step in range(1, 60)]
    assert steps == [names(12, step) for step in range(1, 60)]
    assert steps != [names(12, step, seed=4) for step in range(1, 60)]
    drawn = Counter(name for step in steps for name in step[1:-1])
    assert set(drawn) == {str(i) for i in range(1, 11)}
