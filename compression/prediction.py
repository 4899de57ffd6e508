"""The latency of a network on a device, from what its building blocks cost there.

A sum over blocks: what a call costs, the embeddings, an attention and a feed-forward half of each
layer, the head. Counts, batch sizes, lengths and threads between measured ones are interpolated,
and nothing is said beyond them. Plain Python: it also runs on the device that was measured.

What a sum leaves out is what a runtime gains or loses between blocks. So a profile holds times
of whole networks too, which the sum is not made from: `errors` is how far off it is there.
"""

from __future__ import annotations

import itertools
import math
from bisect import bisect_left
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

AXES = ("batch_size", "seq_len", "threads")
LIMITS = {"batch_size": (1, 256), "seq_len": (2, 512), "threads": (1, 256)}  # those of a spec
# What a profile may hold: it may come from anywhere.
MAX_TABLES = 128
MAX_COUNTS = 64  # of heads, and of neurons
MAX_COUNT = 1 << 20  # one of them, or a size of the shape
MAX_NETWORKS = 256
MAX_LAYERS = 64
HEADS = {"sequence": "pooled_head", "token": "token_head"}  # a table's entry by kind of head
TOKEN_TASKS = ("token_classification", "question_answering")  # spec.TASK_KINDS whose head is so
Table = Mapping[str, Any]
"""One setting's milliseconds: AXES, "call", "embeddings", those of HEADS, and by count
"attention" and "ffn", of one layer each."""


class OutsideProfile(ValueError):
    """What is asked lies beyond what was measured; `field` is heads, ffn or one of AXES."""

    def __init__(self, field: str, asked: int, measured: Sequence[int]) -> None:
        named = {"ffn": "neurons", "seq_len": "tokens"}.get(field, field.replace("_", " "))
        span = (
            f"from {measured[0]} to {measured[-1]}"
            if measured[1:]
            else f"{measured[0]} and no other"
        )
        super().__init__(f"{named} {asked} lies outside the profile, which has {span}")
        self.field = field


class LatencyModel:
    """What one device's tables say; they hold every combination of their values on AXES."""

    def __init__(self, tables: Sequence[Table]) -> None:
        self._axes = {axis: sorted({table[axis] for table in tables}) for axis in AXES}
        self._tables = {tuple(table[axis] for axis in AXES): _Costs(table) for table in tables}

    def predict(
        self,
        setting: Mapping[str, int],
        *,
        heads: Sequence[int],
        ffn: Sequence[int],
        head: str = "sequence",
    ) -> float:
        """Milliseconds of a call with `heads[i]` and `ffn[i]` in layer i; `setting` has AXES.

        OutsideProfile for what lies beyond the tables.
        """
        sides = [
            # A part of the work is one thread's, the rest is shared: linear in 1 / threads.
            _neighbours(axis, self._axes[axis], setting[axis], inverse=axis == "threads")
            for axis in AXES
        ]
        total = 0.0
        for corner in itertools.product(*sides):
            costs = self._tables[tuple(value for value, _ in corner)]
            weight = math.prod(each for _, each in corner)
            total += weight * costs.total(heads=heads, ffn=ffn, head=head)
        return total

    def errors(self, networks: Sequence[Mapping[str, Any]]) -> list[float]:
        """predicted / measured - 1 of each: AXES, "heads", "ffn", "head" and "measured_ms"."""
        return [
            self.predict(each, heads=each["heads"], ffn=each["ffn"], head=each["head"])
            / each["measured_ms"]
            - 1
            for each in networks
        ]


def head_of(task: str) -> str:
    """The kind of head that a task's files have."""
    return "token" if task in TOKEN_TASKS else "sequence"


class _Costs:
    """One table."""

    def __init__(self, table: Table) -> None:
        self._table = table
        self._layer = {
            field: {int(count): float(ms) for count, ms in table[kind].items()}
            for field, kind in (("heads", "attention"), ("ffn", "ffn"))
        }
        self._measured = {field: sorted(costs) for field, costs in self._layer.items()}

    def total(self, *, heads: Sequence[int], ffn: Sequence[int], head: str) -> float:
        total = float(self._table["call"] + self._table["embeddings"] + self._table[HEADS[head]])
        for field, counts in (("heads", heads), ("ffn", ffn)):
            costs, measured = self._layer[field], self._measured[field]
            for count, times in Counter(counts).items():
                for each, weight in _neighbours(field, measured, count):
                    total += times * weight * costs[each]
        return total


def _neighbours(
    field: str, measured: Sequence[int], asked: int, *, inverse: bool = False
) -> list[tuple[int, float]]:
    """The one or two measured values that `asked` is made of, with their weights."""
    if not measured[0] <= asked <= measured[-1]:
        raise OutsideProfile(field, asked, measured)
    above = bisect_left(measured, asked)
    if measured[above] == asked:
        return [(asked, 1.0)]
    low, high = measured[above - 1], measured[above]
    if inverse:
        weight = (1 / low - 1 / asked) / (1 / low - 1 / high)
    else:
        weight = (asked - low) / (high - low)
    return [(low, 1 - weight), (high, weight)]
