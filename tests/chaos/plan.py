"""Which faults a run injects, in which order: a pure function of its seed."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from types import MappingProxyType


class Kind(StrEnum):
    CHILD_KILLED = "child-killed"
    WORKER_KILLED = "worker-killed"
    API_KILLED = "api-killed"
    WORKER_FROZEN = "worker-frozen"
    REDIS_LOST = "redis-lost"
    POSTGRESQL_RESTARTED = "postgresql-restarted"
    DISK_FILLED = "disk-filled"
    MESSAGE_DOUBLED = "message-doubled"
    MESSAGE_DROPPED = "message-dropped"


# How often each is drawn, in a hundred. Jobs must also get on: those that cost one its run, or both
# workers a server, are the rarer ones.
SHARES: Mapping[Kind, int] = MappingProxyType(
    {
        Kind.CHILD_KILLED: 7,
        Kind.WORKER_KILLED: 6,
        Kind.API_KILLED: 6,
        Kind.WORKER_FROZEN: 3,
        Kind.REDIS_LOST: 5,
        Kind.POSTGRESQL_RESTARTED: 4,
        Kind.DISK_FILLED: 5,
        Kind.MESSAGE_DOUBLED: 32,
        Kind.MESSAGE_DROPPED: 32,
    }
)
# A worker in five stands still so long that its run's objects are swept before it wakes up.
LONG_FREEZE_SHARE, LONG_FREEZE_SECONDS = 0.2, (18.0, 22.0)
LIGHT = frozenset({Kind.MESSAGE_DOUBLED, Kind.MESSAGE_DROPPED})


@dataclass(frozen=True)
class Fault:
    """`worker`: which of the two it hits, where its kind hits one. `pause`: seconds before it,
    after the one before. `lasts`: seconds that a server is away, that the disk is full, that a
    worker is frozen beyond its lease."""

    number: int
    kind: Kind
    worker: int
    pause: float
    lasts: float


def make_plan(seed: int, count: int) -> tuple[Fault, ...]:
    """Each kind once, then as `SHARES` has them; of two counts the shorter plan begins the longer.

    Messages come first, while jobs wait: only then there are some.
    """
    draw = random.Random(seed)
    kinds = sorted(Kind, key=lambda kind: (kind not in LIGHT, draw.random()))
    faults = []
    for number in range(count):
        if number < len(kinds):
            kind = kinds[number]
        else:
            (kind,) = draw.choices(list(SHARES), weights=list(SHARES.values()))
        lasts = draw.uniform(0.5, 3)
        if kind is Kind.WORKER_FROZEN and draw.random() < LONG_FREEZE_SHARE:
            lasts = draw.uniform(*LONG_FREEZE_SECONDS)
        faults.append(
            Fault(
                number=number,
                kind=kind,
                worker=draw.randrange(2),
                pause=round(draw.uniform(0, 0.2) if kind in LIGHT else draw.uniform(0.5, 4), 3),
                lasts=round(lasts, 3),
            )
        )
    return tuple(faults)
