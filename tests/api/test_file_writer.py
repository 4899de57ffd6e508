"""What is gathered and written by turns is what came, and errors come to whoever sends."""

from __future__ import annotations

import asyncio
import errno
import hashlib
import os
import random
from pathlib import Path

import pytest

from api.file_writer import FileWriter, write_all


def opened(path: Path) -> int:
    return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)


@pytest.mark.parametrize("seed", range(3))
def test_pieces_of_any_size_become_the_file(tmp_path: Path, seed: int) -> None:
    chance = random.Random(seed)
    sizes = (1, 17, 4095, 4096, 70_000, 1 << 20, 3 << 20)
    pieces = [chance.randbytes(chance.choice(sizes)) for _ in range(60)]
    digest = hashlib.sha256()

    async def write() -> None:
        writer = FileWriter(opened(tmp_path / "file"), digest)
        for number, piece in enumerate(pieces):
            writer.add(memoryview(piece) if number % 2 else piece)
            await writer.relieve()
        await writer.finish()
        await writer.close()

    asyncio.run(write())
    assert (tmp_path / "file").read_bytes() == b"".join(pieces)
    assert digest.digest() == hashlib.sha256(b"".join(pieces)).digest()


def test_more_pieces_than_one_call_takes(tmp_path: Path) -> None:
    pieces: list[bytes | bytearray | memoryview] = [bytes([number % 256]) for number in range(5000)]
    descriptor = opened(tmp_path / "file")
    write_all(descriptor, pieces)
    os.close(descriptor)
    assert (tmp_path / "file").read_bytes() == b"".join(pieces)


def test_a_block_that_cannot_be_written_is_told_and_none_follows_it(tmp_path: Path) -> None:
    """/dev/full says that the disk is full, whatever is written to it."""

    async def write() -> None:
        writer = FileWriter(os.open("/dev/full", os.O_WRONLY))
        try:
            writer.add(bytes(2 << 20))
            await writer.relieve()
            writer.add(bytes(2 << 20))
            for _ in range(2):
                with pytest.raises(OSError) as error:
                    await writer.finish()
                assert error.value.errno == errno.ENOSPC
        finally:
            await writer.close()

    asyncio.run(write())


def test_a_cancelled_upload_closes_its_file_after_the_last_write(tmp_path: Path) -> None:
    read, write = os.pipe()  # full after 64 KiB: the writing thread waits until somebody reads

    async def cancelled() -> None:
        writer = FileWriter(write)
        writer.add(bytes(2 << 20))
        await writer.relieve()
        closing = asyncio.create_task(writer.close())
        await asyncio.sleep(0.05)
        closing.cancel()
        with pytest.raises(asyncio.CancelledError):
            await closing
        os.fstat(write)  # still open, as the thread still writes to it
        left = 2 << 20
        while left:
            left -= len(os.read(read, left))
        with pytest.raises(OSError):
            while True:  # until it is closed
                os.fstat(write)
                await asyncio.sleep(0.01)

    asyncio.run(cancelled())
    os.close(read)
