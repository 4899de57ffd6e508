"""One step's work on several threads: each has a replica of the encoder and a share of the rows.

Paddle's kernels release Python's lock, but only its matrix products use more than one
thread of their own. So on the CPU n replicas of one kernel thread each finish a step
sooner than one with n. Replicas share their weights and have gradients of their own,
which are added up in a fixed order: for one number of replicas a step is repeatable bit
for bit; another number rounds differently.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from types import TracebackType
from typing import TypeVar

import numpy as np
import paddle
from paddle import Tensor

from compression.encoder import Encoder

T = TypeVar("T")
Item = TypeVar("Item")


class Replicas:
    """`members[0]` is the encoder itself. A context manager: leaving it ends the threads."""

    def __init__(self, encoder: Encoder, count: int) -> None:
        self.members = [encoder, *(_replica(encoder) for _ in range(count - 1))]
        self._pool = ThreadPoolExecutor(count)

    def __enter__(self) -> Replicas:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)

    def map(self, work: Callable[[Encoder, np.ndarray], T], rows: np.ndarray) -> list[T]:
        """work(replica, its share of the rows) for each share, at the same time."""
        parts = shares(rows, len(self.members))
        jobs = [
            self._pool.submit(work, member, part)
            for member, part in zip(self.members, parts, strict=False)
        ]
        wait(jobs)  # an error in one must not leave the others running
        return [job.result() for job in jobs]

    def each(self, work: Callable[[Item], T], items: Sequence[Item]) -> list[T]:
        """work(item) for each item, as many at the same time as there are replicas."""
        jobs = [self._pool.submit(work, item) for item in items]
        wait(jobs)
        return [job.result() for job in jobs]

    def gather_gradients(self) -> None:
        """Adds every replica's gradients to the encoder's own and clears theirs."""
        if len(self.members) > 1:
            same = list(zip(*(member.parameters() for member in self.members), strict=True))
            parts = balanced(same, len(self.members), size=lambda each: int(each[0].size))
            self.each(_gather, parts)

    def clear_gradients(self) -> None:
        for member in self.members:
            member.clear_gradients(set_to_zero=False)


def shares(rows: np.ndarray, count: int) -> Sequence[np.ndarray]:
    """At most `count` shares, none empty; rows in order of length give shares of like work."""
    return [rows[i::count] for i in range(min(count, len(rows)))]


def balanced(items: Sequence[Item], count: int, *, size: Callable[[Item], int]) -> list[list[Item]]:
    """The items in at most `count` parts of like total size; the same ones in the same parts."""
    parts: list[list[Item]] = [[] for _ in range(count)]
    totals = [0] * count
    for item in sorted(items, key=size, reverse=True):
        smallest = totals.index(min(totals))
        parts[smallest].append(item)
        totals[smallest] += size(item)
    return [part for part in parts if part]


@paddle.no_grad()  # or the gradients, leaves themselves, could not be changed in place
def _gather(parameters: Sequence[tuple[Tensor, ...]]) -> None:
    """Of each parameter, whose replicas these are: all gradients into the first one's."""
    for own, *others in parameters:
        for other in others:
            if other.grad is None:
                continue
            if own.grad is None:
                own.grad = other.grad
            else:
                own.grad.add_(other.grad)
            other.clear_gradient(False)  # freed, not zeroed


def _replica(encoder: Encoder) -> Encoder:
    """Another encoder whose parameters are the same memory."""
    replica = Encoder(encoder.config)
    for own, shared in zip(replica.parameters(), encoder.parameters(), strict=True):
        shared._share_buffer_to(own)
    replica.embeddings.rows = encoder.embeddings.rows
    return replica
