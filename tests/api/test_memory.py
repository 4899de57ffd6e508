"""A file of any size takes a few blocks of memory on its way up and down. How many megabytes a
process grows by over two gigabytes is measured: benchmarks/service.py."""

from __future__ import annotations

import asyncio
import os
import tracemalloc
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from fastapi import Request
from starlette.types import Message

from api.uploads import receive_upload
from jobs.artifacts import open_store

CHUNK = 1 << 16
CHUNKS = 512
SIZE = CHUNKS * CHUNK
MOST_BYTES = 8 << 20  # of 32 MiB
HEAD = b'--boundary\r\nContent-Disposition: form-data; name="file"; filename="model.tar"\r\n\r\n'
END = b"\r\n--boundary--\r\n"


@contextmanager
def little_memory() -> Iterator[None]:
    tracemalloc.start()
    try:
        yield
        _, most = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert most < MOST_BYTES


def sent(head: bytes, end: bytes) -> Callable[[], Awaitable[Message]]:
    """A client that is faster than any disk."""

    def pieces() -> Iterator[bytes]:
        yield head
        for _ in range(CHUNKS):
            yield bytes(CHUNK)
        yield end

    left = pieces()

    async def receive() -> Message:
        piece = next(left, None)
        return {"type": "http.request", "body": piece or b"", "more_body": piece is not None}

    return receive


@pytest.mark.parametrize(
    ("media_type", "head", "end"),
    [(b"application/x-tar", b"", b""), (b"multipart/form-data; boundary=boundary", HEAD, END)],
    ids=["raw", "form"],
)
def test_an_upload_is_not_held_in_memory(
    tmp_path: Path, media_type: bytes, head: bytes, end: bytes
) -> None:
    scope = {"type": "http", "method": "POST", "headers": [(b"content-type", media_type)]}

    async def receive() -> int:
        request = Request(scope, sent(head, end))
        (file,) = await receive_upload(request, tmp_path, max_bytes=2 * SIZE, filename="model.tar")
        return file.size_bytes

    with little_memory():
        assert asyncio.run(receive()) == SIZE
    assert (tmp_path / "model.tar").stat().st_size == SIZE


def test_a_download_is_not_held_in_memory(tmp_path: Path) -> None:
    store = open_store(tmp_path.as_uri())
    (tmp_path / "model").touch()
    os.truncate(tmp_path / "model", SIZE)

    async def read() -> int:
        return sum([len(block) async for block in store.read("model", 0, SIZE)])

    with little_memory():
        assert asyncio.run(read()) == SIZE
