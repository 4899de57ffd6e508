"""Stored files: a local folder or an S3 bucket behind one small interface.

An object is written once and never overwritten. A run's keys carry its fencing number,
so what a stale run uploads can never replace what the current one did.
"""

from __future__ import annotations

import asyncio
import errno
import hashlib
import os
import re
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote, urlsplit

import obstore
import structlog
from obstore.exceptions import (
    AlreadyExistsError,
    BaseError,
    InvalidPathError,
    PermissionDeniedError,
    UnauthenticatedError,
)
from obstore.store import LocalStore, S3Store

from jobs.errors import ObjectExists, ObjectMissing, StoreFull, StoreRefused, StoreUnreachable

_CHUNK_BYTES = 1 << 20
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# Of a folder whose disk, or whose host, is not there.
_AWAY = (errno.EIO, errno.ENODEV, errno.ENOTCONN, errno.ENOTDIR, errno.ESTALE, errno.ETIMEDOUT)
_BUCKET_FULL = ("QuotaExceeded", "StorageFull", "InsufficientStorage", "507 Insufficient Storage")
# A "create only" put takes the whole file into memory. Larger files go in parts, which
# obstore cannot make "create only": their keys are looked up first. That leaves no race
# worth the name, for keys hold random ids or fencing numbers and have a single writer.
_SINGLE_PUT_BYTES = 64 << 20
_DRAFT = re.compile(r"#\d+$")  # obstore's name of a file until it has all its bytes

_log = structlog.get_logger(__name__)
Block = bytes | memoryview


def job_prefix(job_id: str) -> str:
    """Where the objects of a job's runs lie, and no others."""
    return f"jobs/{job_id}/"


def run_prefix(job_id: str, fence: int) -> str:
    """Where a run's objects lie."""
    return f"{job_prefix(job_id)}{fence}/"


def model_key(model_id: str, name: str) -> str:
    return f"models/{model_id}/{name}"


def dataset_key(dataset_id: str, name: str) -> str:
    return f"datasets/{dataset_id}/{name}"


class ObjectStore:
    """One obstore store. Safe to share between threads. `folder`: where a local one lies.

    Whatever it is asked, StoreUnreachable says that it is not there or does not answer."""

    def __init__(self, store: LocalStore | S3Store, folder: Path | None = None) -> None:
        self._store = store
        self._folder = folder

    def put_file(self, key: str, path: Path) -> None:
        """Stores a file, which may become the object itself: do not change it afterwards.

        ObjectExists if the key is taken; StoreFull if there is no room; StoreRefused, with the
        store's reason, if it answers and does not take the file. Then there is no object, not even
        half.
        """
        self._require_folder()
        try:
            if self._folder is not None and _link(path, _file(self._folder, key)):
                return
            if path.stat().st_size <= _SINGLE_PUT_BYTES:
                self._store.put(key, path, mode="create", use_multipart=False)
                return
            if self.exists(key):
                raise ObjectExists(f"The object {key!r} exists already.")
            self._store.put(key, path, use_multipart=True)
        except (AlreadyExistsError, FileExistsError) as error:
            raise ObjectExists(f"The object {key!r} exists already.") from error
        except (BaseError, OSError) as error:
            is_full = _is_full(error)
            reason = _reason(error)
            if not is_full and reason is None:
                raise StoreUnreachable(error) from error
            _log.warning("store.put_failed", key=key, error=str(error)[:1000])
            if is_full:
                raise StoreFull("The object store has no room left.") from error
            raise StoreRefused(f"The object store did not take a file: {reason}.") from error

    def get_to_file(self, key: str, path: Path, *, sha256: str | None = None) -> None:
        """Writes an object to a new file. ObjectMissing if it is not there, or if its
        bytes are not those that `sha256` (hex) was computed from."""
        digest = hashlib.sha256()
        try:
            with self._reaching():
                found = self._store.get(key)
        except FileNotFoundError as error:
            raise ObjectMissing(f"The object {key!r} is not in the store.") from error
        try:
            with path.open("xb") as out:
                for chunk in found.stream(min_chunk_size=_CHUNK_BYTES):
                    view = memoryview(chunk)
                    digest.update(view)
                    out.write(view)
        except OSError as error:  # of our own disk
            if _is_full(error):
                raise StoreFull("The disk has no room left.") from error
            raise
        except BaseError as error:
            raise StoreUnreachable(error) from error
        if sha256 is not None and digest.hexdigest() != sha256:
            raise ObjectMissing(f"The object {key!r} is not what was stored: its hash differs.")

    async def read(self, key: str, start: int = 0, end: int | None = None) -> AsyncIterator[Block]:
        """Bytes `start` to before `end` in chunks. ObjectMissing, at the first chunk, if
        the object is not there."""
        if self._folder is not None:
            blocks = _read_file(_file(self._folder, key), start, end)
        else:
            blocks = self._read_object(key, start, end)
        try:
            with self._reaching():
                async for block in blocks:
                    yield block
        except FileNotFoundError as error:
            raise ObjectMissing(f"The object {key!r} is not in the store.") from error

    async def _read_object(self, key: str, start: int, end: int | None) -> AsyncIterator[Block]:
        options: dict[str, Any] = {}
        if end is not None:
            if end <= start:
                return
            options["range"] = (start, end)
        elif start:
            options["range"] = {"offset": start}
        result = await self._store.get_async(key, options=options)  # type: ignore[arg-type]
        async for chunk in result.stream(min_chunk_size=_CHUNK_BYTES):
            yield bytes(chunk)

    def signed_url(self, key: str, *, seconds: int) -> str | None:
        """An address from which anyone may get the object, for so long; None of a folder."""
        if isinstance(self._store, LocalStore):
            return None
        return str(obstore.sign(self._store, "GET", key, timedelta(seconds=seconds)))

    def path_in_folder(self, key: str) -> str | None:
        """Of a local store, where below its folder the object lies, quoted as in an address."""
        return None if self._folder is None else quote(key)

    def size(self, key: str) -> int | None:
        """In bytes; None if there is no such object."""
        try:
            with self._reaching():
                return int(self._store.head(key)["size"])
        except FileNotFoundError:
            return None

    def exists(self, key: str) -> bool:
        return self.size(key) is not None

    def keys(self, prefix: str) -> list[str]:
        """Every key below a prefix that ends in "/"."""
        self._require_folder()  # without it there seems to be nothing
        with self._reaching():
            return [
                str(entry["path"])
                for batch in self._store.list(prefix.rstrip("/"))
                for entry in batch
                if str(entry["path"]).startswith(prefix)
            ]

    def delete(self, keys: list[str]) -> None:
        """Deletes objects; those that are gone already do not matter."""
        for key in keys:
            try:
                with self._reaching():
                    self._store.delete(key)
            except FileNotFoundError:
                continue

    def delete_prefix(self, prefix: str) -> int:
        """Deletes all objects below a prefix that ends in "/"; how many there were."""
        if not prefix.endswith("/") or len(prefix) < 2:
            raise ValueError("a prefix to delete ends in '/' and names something")
        keys = self.keys(prefix)
        self.delete(keys)
        return len(keys)

    def delete_drafts(self, prefix: str) -> int:
        """Deletes what puts that were cut off, as their process was killed, have left of objects
        whose keys begin so, and that nobody puts any more; how much there was. In a folder these
        are files that are no objects; a bucket keeps such parts to itself."""
        if self._folder is None:
            return 0
        drafts = [
            path
            for path in _file(self._folder, prefix.rpartition("/")[0]).rglob("*")
            if _DRAFT.search(path.name)
            and path.relative_to(self._folder).as_posix().startswith(prefix)
        ]
        for path in drafts:
            path.unlink(missing_ok=True)
        return len(drafts)

    def check(self) -> None:
        """StoreUnreachable where an object may only seem to be missing, as its bucket is."""
        self.keys("probes/")

    def _require_folder(self) -> None:
        """Of a local store: it is made at the start, and never again in place of one that went."""
        # Not Path.is_dir, which raises where a network's file system does not answer.
        if self._folder is not None and not os.path.isdir(self._folder):
            raise StoreUnreachable(f"There is no folder {self._folder}")

    @contextmanager
    def _reaching(self) -> Iterator[None]:
        """FileNotFoundError for an object that is missing; StoreUnreachable for any other reason
        why the store does not answer."""
        try:
            yield
        except FileNotFoundError:
            self._require_folder()
            raise
        except InvalidPathError:
            raise
        except (BaseError, OSError) as error:
            raise StoreUnreachable(error) from error


def open_store(url: str, *, patience_seconds: float = 180, **credentials: Any) -> ObjectStore:
    """`file:///folder` (made if absent) or `s3://bucket/prefix`.

    `patience_seconds`: how long a bucket is asked again that does not answer, or says that the
    fault is its own. `credentials`: S3's `access_key_id` and `secret_access_key`, unless obstore
    is to look for them itself.
    """
    parts = urlsplit(url)
    if parts.scheme == "file":
        folder = Path(unquote(parts.path))
        folder.mkdir(parents=True, exist_ok=True)
        return ObjectStore(LocalStore(folder, automatic_cleanup=True), folder)
    if parts.scheme == "s3":
        patience = timedelta(seconds=patience_seconds)
        return ObjectStore(
            S3Store.from_url(url, retry_config={"retry_timeout": patience}, **credentials)
        )
    raise ValueError(f"unknown object store {parts.scheme!r}: use file:// or s3://")


def _file(folder: Path, key: str) -> Path:
    if any(part in ("", ".", "..") for part in key.split("/")):
        raise ValueError(f"{key!r} is no key of an object")
    return folder / key


def _link(path: Path, target: Path) -> bool:
    """Gives the file a second name as an object, which costs no room and no time. False where
    this is another file system, or one without such links."""
    while True:
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            os.link(path, target, follow_symlinks=False)
            return True
        except FileNotFoundError:
            if not path.exists():
                raise
        except OSError as error:
            if error.errno in (errno.EXDEV, errno.EPERM, errno.EMLINK, errno.ENOTSUP):
                return False
            raise


async def _read_file(path: Path, start: int, end: int | None) -> AsyncIterator[Block]:
    """As ObjectStore.read, of a local file. obstore's stream took five times as long."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        while end is None or start < end:
            wanted = _CHUNK_BYTES if end is None else min(_CHUNK_BYTES, end - start)
            block = _read_cached(descriptor, wanted, start)
            if block is None:
                block = await asyncio.to_thread(os.pread, descriptor, wanted, start)
            if not block:
                break
            start += len(block)
            yield block
    finally:
        os.close(descriptor)


def _read_cached(descriptor: int, wanted: int, start: int) -> Block | None:
    """What of it is in memory already, without waiting for the disk; None where nothing is."""
    buffer = bytearray(wanted)
    try:
        read = os.preadv(descriptor, [buffer], start, os.RWF_NOWAIT)
    except OSError:  # it would wait, or the file system cannot say
        return None
    return memoryview(buffer)[:read] if read else None


def _is_full(error: BaseException) -> bool:
    """Whether a disk, a quota of the file system or a bucket has no room."""
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno in _NO_ROOM
    told = str(error)
    return any(f"os error {number}" in told for number in _NO_ROOM) or any(
        code in told for code in _BUCKET_FULL
    )


def _reason(error: BaseException) -> str | None:
    """Why the store does not take something, in words for whoever uploads (the log has its own);
    None where it gave no answer to tell."""
    if isinstance(error, (PermissionDeniedError, UnauthenticatedError, PermissionError)):
        return "access was denied"
    if isinstance(error, FileNotFoundError):
        return "its bucket or folder is not there"
    if isinstance(error, OSError) and error.strerror and error.errno not in _AWAY:
        return error.strerror.lower()
    return None
