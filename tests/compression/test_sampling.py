"""The sandwich rule: what every step trains, and what a draw depends on."""

from __future__ import annotations

from collections import Counter
from fractions import Fraction

from compression.sampling import Sandwich
from compression.search_space import SearchSpace
from compression.supernet import Subnetwork, subnetwork_of
from tests.encoders import tiny_config


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


def test_with_a_space_one_of_the_two_has_a_width_for_each_layer() -> None:
    config = tiny_config(layers=4, heads=(4,) * 4, ffn=(16,) * 4)
    widths = (Fraction(1), Fraction(3, 4), Fraction(1, 2), Fraction(1, 4))
    space = SearchSpace(config, widths, (Fraction(1),))
    sandwich = Sandwich([subnetwork_of(config, width) for width in widths], 3, space)
    steps = [sandwich.at(step) for step in range(1, 40)]
    assert steps == [sandwich.at(step) for step in range(1, 40)]
    for largest, named, random, smallest in steps:
        assert (largest.name, smallest.name) == ("w1", "w1_4")
        assert named.name in ("w3_4", "w1_2")
        assert (random.name, random.width_mult) == ("per-layer 1", None)
    assert len({random.heads + random.ffn for _, _, random, _ in steps}) > 20
    assert sandwich.at(None) == sandwich.subnetworks
    two = Sandwich([subnetwork_of(config, width) for width in widths[:2]], 3, space)
    assert [each.name for each in two.at(1)] == ["w1", "per-layer 1", "per-layer 2", "w3_4"]
