"""Where the bytes of resumable uploads gather: one writer at a time for each, and the newest wins.

A client whose connection broke comes again while the server may still hold the old connection open:
it hears of a silent peer only after minutes. So whoever comes later ends the receiving of whoever
came before; what that one received stays, and is counted. Later is who `arrive`d later: a request
that was held up on its way to here does not end one that has come after it.
"""

from __future__ import annotations

import fcntl
import itertools
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import anyio

from api.errors import ApiError
from api.file_writer import FileWriter, Hasher
from jobs import resumable

_WAIT_SECONDS = 10.0  # for another process of this host that writes the same upload


class Gathering:
    """The files below `data_dir`, for one process of the API."""

    def __init__(self, data_dir: Path) -> None:
        self._data_dir = data_dir
        self._writers: dict[str, Writer] = {}
        self._latest: dict[str, int] = {}
        self._arrivals = itertools.count(1)

    def arrive(self) -> int:
        """The place of a request among all of this process; to be asked for as it comes in."""
        return next(self._arrivals)

    def file(self, upload_id: str) -> Path:
        return resumable.gathering_file(self._data_dir, upload_id)

    async def offset(self, upload_id: str, arrival: int) -> int:
        """How far the upload is. No request that arrived before moves it afterwards."""
        self._is_late(upload_id, arrival)
        writer = self._writers.get(upload_id)
        if writer is not None and writer.is_complete:
            return writer.offset  # it is being inspected; nobody need wait for that
        await self._end_receiving(upload_id)
        return resumable.offset_of(self.file(upload_id))

    def offset_now(self, upload_id: str) -> int:
        """How far it is just now, without a word to whoever writes it."""
        return resumable.offset_of(self.file(upload_id))

    @asynccontextmanager
    async def writing(self, upload_id: str, arrival: int) -> AsyncIterator[Writer]:
        """The upload's only writer, as long as the block lasts. ApiError 409 where a later request
        was quicker, 423 where another process does not let go of it."""
        if not self._is_late(upload_id, arrival):
            await self._end_receiving(upload_id)
        if self._is_late(upload_id, arrival):
            raise ApiError(
                409, "upload-superseded", "A newer request goes on with this upload; ask with HEAD."
            )
        writer = Writer(self.file(upload_id))
        self._writers[upload_id] = writer
        try:
            await writer.open()
            yield writer
        finally:
            writer.close()
            if self._writers.get(upload_id) is writer:
                del self._writers[upload_id]

    def forget(self, upload_id: str) -> None:
        """Nothing more is to come."""
        self._latest.pop(upload_id, None)

    def forget_gone(self) -> None:
        """The same of all uploads whose file is gone, whichever process has removed it."""
        for upload_id in list(self._latest):
            if upload_id not in self._writers and not self.file(upload_id).exists():
                self.forget(upload_id)

    def _is_late(self, upload_id: str, arrival: int) -> bool:
        latest = self._latest[upload_id] = max(arrival, self._latest.get(upload_id, 0))
        return arrival < latest

    async def _end_receiving(self, upload_id: str) -> None:
        while (writer := self._writers.get(upload_id)) is not None:
            writer.end_receiving()
            await writer.closed.wait()


class Writer:
    """The right to write one gathering file. `superseded`: another one wants it; `is_complete`:
    nothing more is to come."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self.closed = anyio.Event()
        self.superseded = False
        self.is_complete = False
        self._receiving: anyio.CancelScope | None = None
        self._descriptor: int | None = None

    async def open(self) -> None:
        self.file.parent.mkdir(mode=0o700, exist_ok=True)
        deadline = anyio.current_time() + _WAIT_SECONDS
        while not self._try_open():
            if anyio.current_time() > deadline:
                raise ApiError(
                    423, "upload-locked", "Another request writes this upload; try again."
                )
            await anyio.sleep(0.1)
        size = resumable.offset_of(self.file)
        os.ftruncate(self._fileno(), size)  # of what came unchecked when a process was killed
        resumable.unchecked_mark(self.file).unlink(missing_ok=True)

    def _try_open(self) -> bool:
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
        descriptor = os.open(self.file, flags, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.fstat(descriptor).st_nlink > 0:  # else it was deleted before we had the lock
                self._descriptor, descriptor = descriptor, -1
                return True
        except BlockingIOError:
            return False
        finally:
            if descriptor >= 0:
                os.close(descriptor)
        return False

    @property
    def offset(self) -> int:
        return os.fstat(self._fileno()).st_size

    async def append(self, blocks: AsyncIterator[bytes], *hashers: Hasher) -> None:
        """Appends what comes, until it ends or another writer wants the file (`superseded`)."""
        if self.superseded:
            return
        out = FileWriter(os.dup(self._fileno()), *hashers)
        try:
            with anyio.CancelScope() as self._receiving:
                async for block in blocks:
                    out.add(block)
                    await out.relieve()
        finally:
            self._receiving = None
            with anyio.CancelScope(shield=True):
                try:
                    await out.finish()
                finally:
                    await out.close()

    def end_receiving(self) -> None:
        if not self.is_complete:
            self.superseded = True
        if self._receiving is not None:
            self._receiving.cancel()

    def truncate(self, size: int) -> None:
        os.ftruncate(self._fileno(), size)

    def remove(self) -> None:
        resumable.remove_file(self.file)

    def close(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None
        self.closed.set()

    def _fileno(self) -> int:
        assert self._descriptor is not None
        return self._descriptor
