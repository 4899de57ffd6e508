"""A sum over layers is found again where there is one, and its error told where there is none."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest

from compression.latency_model import fit, relative_errors
from compression.search_space import SearchSpace
from compression.supernet import Subnetwork
from tests.encoders import tiny_config

WIDTHS = (Fraction(1), Fraction(3, 4), Fraction(1, 2), Fraction(1, 4))
SPACE = SearchSpace(
    tiny_config(layers=6, heads=(4,) * 6, ffn=(16,) * 6), WIDTHS, (Fraction(1), Fraction(1, 2))
)
HEADS = {1: 0.1, 2: 0.15, 3: 0.3, 4: 0.35}  # not a straight line, as on a real machine
FFN = {4: 0.05, 8: 0.2, 12: 0.22, 16: 0.5}


def additive(subnetwork: Subnetwork) -> float:
    return 0.7 + sum(HEADS[n] for n in subnetwork.heads) + sum(FFN[n] for n in subnetwork.ffn)


def drawn(count: int, seed: int) -> list[Subnetwork]:
    generator = np.random.default_rng(seed)
    return [SPACE.subnetwork(SPACE.random(generator), str(i)) for i in range(count)]


def test_what_is_a_sum_over_layers_is_predicted_exactly() -> None:
    model = fit([(each, additive(each)) for each in drawn(18, seed=0)])
    for each in drawn(50, seed=1):
        assert model.predict(each) == pytest.approx(additive(each), rel=1e-9)


def test_what_is_none_has_an_error_with_its_sign() -> None:
    measured = [(each, 1.1 * additive(each)) for each in drawn(18, seed=0)]
    model = fit([(each, additive(each)) for each in drawn(18, seed=0)])
    assert relative_errors(model, measured) == pytest.approx([1 / 1.1 - 1] * 18)


def test_a_size_that_was_never_measured_is_not_guessed() -> None:
    model = fit([(each, additive(each)) for each in drawn(18, seed=0) if 4 not in each.heads])
    whole = SPACE.subnetwork(SPACE.uniform(Fraction(1), Fraction(1)), "whole")
    with pytest.raises(KeyError):
        model.predict(whole)
