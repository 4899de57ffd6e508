"""A file on its way to the disk: the event loop receives while a thread hashes and writes."""

from __future__ import annotations

import asyncio
import os
from typing import Protocol

_BLOCK_BYTES = 1 << 20  # gathered before each write, so that threads are not woken for crumbs
_CRUMB_BYTES = 1 << 12  # pieces below this are joined
_MAX_PIECES = 1000  # of one writev; the kernel takes 1024


Piece = bytes | bytearray | memoryview


class Hasher(Protocol):
    def update(self, data: Piece, /) -> None: ...


class FileWriter:
    """Appends to an open descriptor, which it closes. One block is written while the next one is
    gathered; never more than these two are in memory."""

    def __init__(self, descriptor: int, *hashers: Hasher) -> None:
        self._descriptor = descriptor
        self._hashers = hashers
        self._pieces: list[Piece] = []
        self._gathered = 0
        self._writing: asyncio.Future[None] | None = None

    def add(self, data: bytes | memoryview) -> None:
        self._gathered += len(data)
        if len(data) >= _CRUMB_BYTES:
            self._pieces.append(data)
        elif self._pieces and isinstance(self._pieces[-1], bytearray):
            self._pieces[-1] += data
        else:
            self._pieces.append(bytearray(data))

    async def relieve(self, *, at_least: int = _BLOCK_BYTES) -> None:
        """Call it after each `add`: it waits while the disk is slower than the network."""
        if self._gathered >= at_least:
            await self._written()
            pieces, self._pieces, self._gathered = self._pieces, [], 0
            loop = asyncio.get_running_loop()
            self._writing = loop.run_in_executor(None, self._write, pieces)

    async def finish(self) -> None:
        """All of it is written. OSError where that could not be."""
        await self.relieve(at_least=1)
        await self._written()

    async def close(self) -> None:
        """Closes the descriptor once no thread writes to it any more, whatever became of that."""
        writing, self._writing = self._writing, None
        if writing is None:
            os.close(self._descriptor)
            return
        writing.add_done_callback(self._abandon)
        await asyncio.wait([writing])

    def _abandon(self, writing: asyncio.Future[None]) -> None:
        if not writing.cancelled():
            writing.exception()  # the upload is given up already
        os.close(self._descriptor)

    async def _written(self) -> None:
        if self._writing is not None:
            await asyncio.shield(self._writing)  # it stays ours where we are cancelled
            self._writing = None

    def _write(self, pieces: list[Piece]) -> None:
        for piece in pieces:
            for hasher in self._hashers:
                hasher.update(piece)
        write_all(self._descriptor, pieces)


def write_all(descriptor: int, pieces: list[Piece]) -> None:
    left = [memoryview(piece) for piece in pieces]
    while left:
        written = os.writev(descriptor, left[:_MAX_PIECES])
        while left and written >= len(left[0]):
            written -= len(left.pop(0))
        if left and written:
            left[0] = left[0][written:]
