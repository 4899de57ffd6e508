"""Which faults a run injects, in which order: a pure function of its seed."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator, Mapping
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


# How often each is drawn, in a hundred of its own lane. Jobs must also get on: what costs most of
# their time comes least often.
SHARES: Mapping[Kind, int] = MappingProxyType(
    {
        Kind.CHILD_KILLED: 20,
        Kind.WORKER_KILLED: 17,
        Kind.API_KILLED: 18,
        Kind.WORKER_FROZEN: 6,
        Kind.REDIS_LOST: 14,
        Kind.POSTGRESQL_RESTARTED: 11,
        Kind.DISK_FILLED: 14,
        Kind.MESSAGE_DOUBLED: 50,
        Kind.MESSAGE_DROPPED: 50,
    }
)
# A worker in five stands still so long that its run's objects are swept before it wakes up.
LONG_FREEZE_SHARE, LONG_FREEZE_SECONDS = 0.2, (18.0, 22.0)
# Two lanes: who waits for a message keeps nobody from breaking something meanwhile.
MESSAGES = frozenset({Kind.MESSAGE_DOUBLED, Kind.MESSAGE_DROPPED})
LANES = (MESSAGES, frozenset(Kind) - MESSAGES)

# What these could hit is there only as long as jobs wait or run.
OF_JOBS = MESSAGES | {Kind.CHILD_KILLED, Kind.WORKER_FROZEN}


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


def make_plan(seed: int, lane: frozenset[Kind]) -> Iterator[Fault]:
    """Without end: each kind of the lane once, then as `SHARES` has them."""
    draw = random.Random(seed)
    kinds = sorted(lane)
    weights = [SHARES[kind] for kind in kinds]
    first = draw.sample(kinds, len(kinds))
    for number in itertools.count():
        kind = first[number] if number < len(first) else draw.choices(kinds, weights)[0]
        lasts = draw.uniform(0.5, 3)
        if kind is Kind.WORKER_FROZEN and draw.random() < LONG_FREEZE_SHARE:
            lasts = draw.uniform(*LONG_FREEZE_SECONDS)
        yield Fault(
            number=number,
            kind=kind,
            worker=draw.randrange(2),
            pause=round(draw.uniform(0.5, 4), 3),
            lasts=round(lasts, 3),
        )
