"""The plan of faults."""

from __future__ import annotations

from collections import Counter

import pytest

from tests.chaos.plan import LIGHT, SHARES, Kind, make_plan


def test_a_seed_is_a_plan_and_another_seed_another() -> None:
    assert make_plan(7, 200) == make_plan(7, 200)
    assert make_plan(7, 200) != make_plan(8, 200)


def test_a_shorter_plan_begins_the_longer_one() -> None:
    assert make_plan(7, 1000)[:60] == make_plan(7, 60)


@pytest.mark.parametrize("seed", range(20))
def test_every_kind_comes_first_once(seed: int) -> None:
    kinds = [fault.kind for fault in make_plan(seed, len(Kind))]
    assert sorted(kinds) == sorted(Kind)
    assert set(kinds[: len(LIGHT)]) == LIGHT


def test_a_long_plan_keeps_the_shares() -> None:
    counts = Counter(fault.kind for fault in make_plan(1, 10_000))
    assert sum(SHARES.values()) == 100
    for kind, share in SHARES.items():
        assert abs(counts[kind] / 100 - share) < 1.5, kind


def test_both_workers_are_hit_by_every_kind() -> None:
    hit = {(fault.kind, fault.worker) for fault in make_plan(1, 1000)}
    assert hit == {(kind, worker) for kind in Kind for worker in (0, 1)}
