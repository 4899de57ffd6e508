"""Widths for each layer: what genes mean, and how they are drawn, changed and mixed."""

from __future__ import annotations

from fractions import Fraction

import numpy as np

from compression.search_space import Genes, SearchSpace
from compression.supernet import deepened, subnetwork_of
from tests.encoders import tiny_config

WIDTHS = (Fraction(1), Fraction(3, 4), Fraction(1, 2), Fraction(1, 4))
DEPTHS = (Fraction(1), Fraction(2, 3), Fraction(1, 3))
CONFIG = tiny_config(layers=6, heads=(4, 4, 4, 4, 8, 8), ffn=(16,) * 6)
SPACE = SearchSpace(CONFIG, WIDTHS, DEPTHS)


def test_genes_of_layers_that_are_left_out_say_nothing() -> None:
    widths = (*WIDTHS, Fraction(1, 2), Fraction(1))
    genes = Genes(Fraction(2, 3), widths, widths[::-1])
    found = SPACE.subnetwork(genes, "p1")
    assert (found.name, found.width_mult, found.depth_mult) == ("p1", None, Fraction(2, 3))
    assert found.layers == (0, 1, 3, 4)
    assert found.heads == (4, 3, 1, 4)  # layer 4 has eight heads, half of which stay
    assert found.ffn == (16, 8, 8, 12)
    same = Genes(genes.depth, (*widths[:5], Fraction(1, 4)), genes.ffn)
    assert SPACE.subnetwork(same, "p1") == found


def test_genes_of_one_width_are_the_sub_network_of_that_width() -> None:
    for width in WIDTHS:
        for depth in DEPTHS:
            found = SPACE.subnetwork(SPACE.uniform(width, depth), "x")
            named = subnetwork_of(CONFIG, width, depth)
            assert (found.layers, found.heads, found.ffn) == (
                named.layers,
                named.heads,
                named.ffn,
            )


def test_random_genes_repeat_and_reach_every_size() -> None:
    def drawn(seed: int) -> list[Genes]:
        generator = np.random.default_rng(seed)
        return [SPACE.random(generator) for _ in range(200)]

    genes = drawn(1)
    assert genes == drawn(1) != drawn(2)
    assert {each.depth for each in genes} == set(DEPTHS)
    means = [float(sum(each.ffn)) / 6 for each in genes]
    assert min(means) < 0.35 and max(means) > 0.9
    differing = [each for each in genes if len(set(each.heads)) > 1]
    assert len(differing) > 100


def test_mutation_changes_as_many_genes_as_its_rate_says_and_children_have_their_parents() -> None:
    generator = np.random.default_rng(0)
    wide, narrow = SPACE.uniform(WIDTHS[0], DEPTHS[0]), SPACE.uniform(WIDTHS[3], DEPTHS[2])
    assert SPACE.mutated(wide, generator, rate=0) == wide
    changed = [
        own != before
        for _ in range(200)
        for own, before in zip(SPACE.mutated(wide, generator, rate=0.2).ffn, wide.ffn, strict=True)
    ]
    assert 0.1 < np.mean(changed) < 0.2  # a quarter of the draws are what was there before
    children = [SPACE.crossed(wide, narrow, generator) for _ in range(50)]
    for child in children:
        assert {*child.heads, *child.ffn} <= {WIDTHS[0], WIDTHS[3]}
    assert any(len(set(child.heads)) == 2 for child in children)


def test_a_shift_gives_one_layer_what_it_takes_from_another() -> None:
    generator, half = np.random.default_rng(0), SPACE.uniform(Fraction(1, 2), DEPTHS[0])
    for _ in range(30):
        found = SPACE.shifted(half, generator)
        changed = found.heads if found.heads != half.heads else found.ffn
        assert sorted(changed) == [Fraction(1, 4), *[Fraction(1, 2)] * 4, Fraction(3, 4)]
        assert half.heads in (found.heads, found.ffn)
    widest = SPACE.uniform(Fraction(1), DEPTHS[0])
    assert max(SPACE.shifted(widest, generator).heads) == 1  # nothing is wider


def test_at_full_depth_the_layers_that_were_left_out_are_whole() -> None:
    genes = Genes(Fraction(1, 3), (Fraction(1, 2),) * 6, (Fraction(1, 4),) * 6)
    shallow = SPACE.subnetwork(genes, "x")
    assert shallow.layers == (0, 3)
    deep = deepened(CONFIG, shallow)
    assert deep.layers == (0, 1, 2, 3, 4, 5)
    assert deep.heads == (2, 4, 4, 2, 8, 8)
    assert deep.ffn == (4, 16, 16, 4, 16, 16)
    named = subnetwork_of(CONFIG, Fraction(1, 2), Fraction(1, 3))
    assert deepened(CONFIG, named) == subnetwork_of(CONFIG, Fraction(1, 2))
