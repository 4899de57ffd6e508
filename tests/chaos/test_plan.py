"""The plan of faults."""

from __future__ import annotations

from collections import Counter
from itertools import islice

import pytest

from tests.chaos.plan import LANES, SHARES, Fault, Kind, make_plan


def first(count: int, seed: int, lane: frozenset[Kind]) -> list[Fault]:
    return list(islice(make_plan(seed, lane), count))


def test_each_kind_has_one_lane() -> None:
    assert sorted(kind for lane in LANES for kind in lane) == sorted(Kind)


@pytest.mark.parametrize("lane", LANES)
def test_a_seed_is_a_plan_and_another_seed_another(lane: frozenset[Kind]) -> None:
    assert first(200, 7, lane) == first(200, 7, lane)
    assert first(200, 7, lane) != first(200, 8, lane)


@pytest.mark.parametrize("lane", LANES)
@pytest.mark.parametrize("seed", range(20))
def test_every_kind_comes_first_once(seed: int, lane: frozenset[Kind]) -> None:
    assert sorted(fault.kind for fault in first(len(lane), seed, lane)) == sorted(lane)


@pytest.mark.parametrize("lane", LANES)
def test_a_long_plan_keeps_the_shares(lane: frozenset[Kind]) -> None:
    counts = Counter(fault.kind for fault in first(10_000, 1, lane))
    assert sum(SHARES[kind] for kind in lane) == 100
    assert counts.keys() == lane
    for kind in lane:
        assert abs(counts[kind] / 100 - SHARES[kind]) < 1.5, kind


@pytest.mark.parametrize("lane", LANES)
def test_both_workers_are_hit_by_every_kind(lane: frozenset[Kind]) -> None:
    hit = {(fault.kind, fault.worker) for fault in first(1000, 1, lane)}
    assert hit == {(kind, worker) for kind in lane for worker in (0, 1)}
