"""Plain uploads: request body -> spool folder, as a stream, hashed and bounded on the way.

Two forms: a raw body, whose file name is in `?filename=` or Content-Disposition, and
multipart/form-data with one or more `file` parts, the single files of one folder.
Neither is ever held in memory. File names are hostile: a plain name or a refusal.
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
import unicodedata
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from fastapi import Request
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header
from starlette.requests import ClientDisconnect

from api.errors import ApiError
from api.file_writer import FileWriter
from jobs.errors import StoreFull

MAX_FILES = 64  # parts of one upload; a model folder has about ten
MAX_NAME_BYTES = 200


@dataclass(frozen=True)
class UploadedFile:
    name: str
    path: Path
    size_bytes: int
    sha256: str


# --- names ----------------------------------------------------------------------------------


def safe_name(name: str) -> str:
    """`name` if it is a plain file name; ApiError 400 for anything that could leave a folder."""
    reason = None
    if not name.strip():
        reason = "is empty"
    elif "/" in name or "\\" in name:
        reason = "has a path in it; send plain file names"
    elif name in (".", ".."):
        reason = "is not a file's name"
    elif any(unicodedata.category(character).startswith("C") for character in name):
        reason = "has control characters in it"
    elif len(name.encode("utf-8", "replace")) > MAX_NAME_BYTES:
        reason = f"is longer than {MAX_NAME_BYTES} bytes"
    if reason is not None:
        raise ApiError(400, "invalid-filename", f"The file name {name[:80]!r} {reason}.")
    return name


def _disposition_filename(header: bytes) -> str | None:
    _, options = parse_options_header(header)
    raw = options.get(b"filename")
    if raw is None:
        return None
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError:
        raise ApiError(400, "invalid-filename", "A file name is not UTF-8.") from None


# --- reading --------------------------------------------------------------------------------


class _Sink:
    """One file of an upload."""

    def __init__(self, name: str, path: Path) -> None:
        self.name = name
        self.path = path
        self.size = 0
        self.complete = False
        self._hash = hashlib.sha256()
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
        self._writer = FileWriter(descriptor, self._hash)

    def add(self, data: bytes | memoryview) -> None:
        self.size += len(data)
        self._writer.add(data)

    async def relieve(self) -> None:
        if self.complete:
            await self._writer.finish()
        else:
            await self._writer.relieve()

    async def finish(self) -> None:
        await self._writer.finish()

    async def close(self) -> None:
        await self._writer.close()

    def finished(self) -> UploadedFile:
        return UploadedFile(self.name, self.path, self.size, self._hash.hexdigest())


class _Folder:
    """The sinks of one upload, each in turn."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._sinks: list[_Sink] = []
        self._names: set[str] = set()

    def open(self, name: str) -> _Sink:
        name = safe_name(name)
        if name.casefold() in self._names:  # some file systems do not tell case apart
            raise ApiError(400, "invalid-upload", f"The file {name!r} was sent twice.")
        if len(self._sinks) == MAX_FILES:
            raise ApiError(
                400, "invalid-upload", f"Send at most {MAX_FILES} files, or one archive."
            )
        self._names.add(name.casefold())
        sink = _Sink(name, self._folder / name)
        self._sinks.append(sink)
        return sink

    async def relieve(self) -> None:
        for sink in self._sinks:
            await sink.relieve()

    async def finish(self) -> None:
        for sink in self._sinks:
            await sink.finish()

    async def close(self) -> None:
        for sink in self._sinks:
            await sink.close()

    def finished(self) -> list[UploadedFile]:
        return [sink.finished() for sink in self._sinks]


async def receive_upload(
    request: Request, folder: Path, *, max_bytes: int, filename: str | None
) -> list[UploadedFile]:
    """Streams the request's body into `folder`, which must exist; the files in order of arrival.

    ApiError: 400 for a body that is cut short, malformed, empty or oddly named, 413 above
    `max_bytes` (counted over the body, as soon as it is known), 415 for an encoded one.
    """
    declared = declared_length(request)
    if declared is not None and declared > max_bytes:
        raise too_large(max_bytes)
    if request.headers.get("content-encoding", "identity").lower() != "identity":
        raise ApiError(
            415, "unsupported-encoding", "Send the bytes as they are, without Content-Encoding."
        )
    media_type, options = parse_options_header(request.headers.get("content-type"))
    files = _Folder(folder)
    try:
        with full_disk_told():
            body = bounded_body(request, max_bytes=max_bytes, declared=declared)
            if media_type == b"multipart/form-data":
                await _receive_multipart(body, options.get(b"boundary", b""), files)
            elif media_type.startswith(b"multipart/"):
                raise ApiError(
                    415, "unsupported-media-type", "Of multipart, only form-data is read."
                )
            else:
                await _receive_raw(body, _raw_filename(request, filename), files)
            await files.finish()
    finally:
        await files.close()
    uploaded = files.finished()
    if not uploaded:
        raise ApiError(400, "invalid-upload", "The form has no part named 'file'.")
    for file in uploaded:
        if file.size_bytes == 0:
            raise ApiError(400, "invalid-upload", f"The file {file.name!r} is empty.")
    return uploaded


def declared_length(request: Request) -> int | None:
    header = request.headers.get("content-length")
    if header is None:
        return None
    if not re.fullmatch(r"[0-9]{1,18}", header):
        raise ApiError(400, "invalid-upload", "Content-Length is not a number.")
    return int(header)


def _raw_filename(request: Request, filename: str | None) -> str:
    if filename is None:
        filename = _disposition_filename(
            request.headers.get("content-disposition", "").encode("latin-1")
        )
    if filename is None:
        raise ApiError(
            400,
            "missing-filename",
            "Name the file: add ?filename=model.tar.gz, or send multipart/form-data.",
        )
    return safe_name(filename)


def too_large(max_bytes: int) -> ApiError:
    return ApiError(
        413,
        "upload-too-large",
        f"An upload may have at most {max_bytes} bytes.",
        title="The upload is too large",
        max_bytes=max_bytes,
    )


@contextmanager
def full_disk_told() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise StoreFull("The disk that uploads are received on is full.") from error
        raise


async def bounded_body(
    request: Request, *, max_bytes: int, declared: int | None, refusal: ApiError | None = None
) -> AsyncIterator[bytes]:
    """The request's body as it comes. ApiError 400 where it is cut short, `refusal` (by default
    413) where there is more of it than `max_bytes`."""
    received = 0
    try:
        async for chunk in request.stream():
            received += len(chunk)
            if received > max_bytes:
                raise refusal or too_large(max_bytes)
            if chunk:
                yield chunk
    except ClientDisconnect:
        raise cut_short(f"The connection ended after {received} bytes.") from None
    if declared is not None and received != declared:
        raise cut_short(f"Content-Length says {declared} bytes, {received} came.")


def cut_short(detail: str) -> ApiError:
    return ApiError(400, "upload-incomplete", detail, title="The upload was cut short")


async def _receive_raw(body: AsyncIterator[bytes], name: str, files: _Folder) -> None:
    sink = files.open(name)
    async for chunk in body:
        sink.add(chunk)
        await sink.relieve()


class _MultipartEvents:
    """The parser's callbacks: each part named `file` becomes a sink, anything else a refusal."""

    def __init__(self, files: _Folder) -> None:
        self._files = files
        self._sink: _Sink | None = None
        self._field = bytearray()
        self._value = bytearray()
        self._disposition = b""
        self.ended = False

    def on_part_begin(self) -> None:
        self._disposition = b""

    def on_header_begin(self) -> None:
        self._field.clear()
        self._value.clear()

    def on_header_field(self, data: bytes, start: int, end: int) -> None:
        self._field += data[start:end]

    def on_header_value(self, data: bytes, start: int, end: int) -> None:
        self._value += data[start:end]

    def on_header_end(self) -> None:
        if bytes(self._field).lower() == b"content-disposition":
            self._disposition = bytes(self._value)

    def on_headers_finished(self) -> None:
        _, options = parse_options_header(self._disposition)
        field = options.get(b"name", b"").decode("utf-8", "replace")
        if field != "file":
            raise ApiError(
                400,
                "invalid-upload",
                f"The form has a part named {field[:80]!r}; name every part 'file'.",
            )
        name = _disposition_filename(self._disposition)
        if name is None:
            raise ApiError(400, "missing-filename", "A 'file' part has no filename.")
        self._sink = self._files.open(name)

    def on_part_data(self, data: bytes, start: int, end: int) -> None:
        assert self._sink is not None
        self._sink.add(memoryview(data)[start:end])

    def on_part_end(self) -> None:
        assert self._sink is not None
        self._sink.complete = True
        self._sink = None

    def on_end(self) -> None:
        self.ended = True


async def _receive_multipart(body: AsyncIterator[bytes], boundary: bytes, files: _Folder) -> None:
    if not boundary:
        raise _malformed_form("it names no boundary")
    events = _MultipartEvents(files)
    try:
        parser = MultipartParser(
            boundary,
            {
                "on_part_begin": events.on_part_begin,
                "on_part_data": events.on_part_data,
                "on_part_end": events.on_part_end,
                "on_header_begin": events.on_header_begin,
                "on_header_field": events.on_header_field,
                "on_header_value": events.on_header_value,
                "on_header_end": events.on_header_end,
                "on_headers_finished": events.on_headers_finished,
                "on_end": events.on_end,
            },
        )
        async for chunk in body:
            parser.write(chunk)
            await files.relieve()
    except FormParserError as error:
        raise _malformed_form(str(error)) from None
    if not events.ended:
        raise cut_short("The form ends before its closing boundary.")


def _malformed_form(reason: str) -> ApiError:
    return ApiError(400, "invalid-upload", f"The multipart form is malformed: {reason}.")
