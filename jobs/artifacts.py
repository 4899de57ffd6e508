"""Stored files: a local folder or an S3 bucket behind one small interface.

An object is written once and never overwritten. A run's keys carry its fencing number,
so what a stale run uploads can never replace what the current one did.
"""

from __future__ import annotations

import errno
import hashlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from obstore.exceptions import AlreadyExistsError, BaseError
from obstore.store import LocalStore, S3Store

from jobs.errors import ObjectExists, ObjectMissing, StoreFull

_CHUNK_BYTES = 1 << 20
# A "create only" put takes the whole file into memory. Larger files go in parts, which
# obstore cannot make "create only": their keys are looked up first. That leaves no race
# worth the name, for keys hold random ids or fencing numbers and have a single writer.
_SINGLE_PUT_BYTES = 64 << 20


def run_prefix(job_id: str, fence: int) -> str:
    """Where a run's objects lie."""
    return f"jobs/{job_id}/{fence}/"


def model_key(model_id: str, name: str) -> str:
    return f"models/{model_id}/{name}"


def dataset_key(dataset_id: str, name: str) -> str:
    return f"datasets/{dataset_id}/{name}"


class ObjectStore:
    """One obstore store. Safe to share between threads."""

    def __init__(self, store: LocalStore | S3Store) -> None:
        self._store = store

    def put_file(self, key: str, path: Path) -> None:
        """Stores a file. ObjectExists if the key is taken; StoreFull if there is no room."""
        try:
            if path.stat().st_size <= _SINGLE_PUT_BYTES:
                self._store.put(key, path, mode="create", use_multipart=False)
                return
            if self.exists(key):
                raise ObjectExists(f"The object {key!r} exists already.")
            self._store.put(key, path, use_multipart=True)
        except AlreadyExistsError as error:
            raise ObjectExists(f"The object {key!r} exists already.") from error
        except (BaseError, OSError) as error:
            if _is_full(error):
                raise StoreFull("The object store has no room left.") from error
            raise

    def get_to_file(self, key: str, path: Path, *, sha256: str | None = None) -> None:
        """Writes an object to a new file. ObjectMissing if it is not there, or if its
        bytes are not those that `sha256` (hex) was computed from."""
        digest = hashlib.sha256()
        try:
            found = self._store.get(key)
        except FileNotFoundError as error:
            raise ObjectMissing(f"The object {key!r} is not in the store.") from error
        try:
            with path.open("xb") as out:
                for chunk in found.stream(min_chunk_size=_CHUNK_BYTES):
                    view = memoryview(chunk)
                    digest.update(view)
                    out.write(view)
        except OSError as error:
            if _is_full(error):
                raise StoreFull("The disk has no room left.") from error
            raise
        if sha256 is not None and digest.hexdigest() != sha256:
            raise ObjectMissing(f"The object {key!r} is not what was stored: its hash differs.")

    async def read(self, key: str, start: int = 0, end: int | None = None) -> AsyncIterator[bytes]:
        """Bytes `start` to before `end` in chunks. ObjectMissing, at the first chunk, if
        the object is not there."""
        options: dict[str, Any] = {}
        if end is not None:
            if end <= start:
                return
            options["range"] = (start, end)
        elif start:
            options["range"] = {"offset": start}
        try:
            result = await self._store.get_async(key, options=options)  # type: ignore[arg-type]
        except FileNotFoundError as error:
            raise ObjectMissing(f"The object {key!r} is not in the store.") from error
        async for chunk in result.stream(min_chunk_size=_CHUNK_BYTES):
            yield bytes(chunk)

    def size(self, key: str) -> int | None:
        """In bytes; None if there is no such object."""
        try:
            return int(self._store.head(key)["size"])
        except FileNotFoundError:
            return None

    def exists(self, key: str) -> bool:
        return self.size(key) is not None

    def keys(self, prefix: str) -> list[str]:
        """Every key below a prefix that ends in "/"."""
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

    def check(self) -> None:
        """Raises if the store cannot be reached. For readiness probes."""
        self.size("readiness-probe")


def open_store(url: str, **credentials: Any) -> ObjectStore:
    """`file:///folder` (made if absent) or `s3://bucket/prefix`, with S3's `access_key_id` and
    `secret_access_key` unless obstore is to look for them itself."""
    parts = urlsplit(url)
    if parts.scheme == "file":
        folder = Path(unquote(parts.path))
        folder.mkdir(parents=True, exist_ok=True)
        return ObjectStore(LocalStore(folder, automatic_cleanup=True))
    if parts.scheme == "s3":
        return ObjectStore(S3Store.from_url(url, **credentials))
    raise ValueError(f"unknown object store {parts.scheme!r}: use file:// or s3://")


def _is_full(error: BaseException) -> bool:
    if isinstance(error, OSError):
        return error.errno in (errno.ENOSPC, errno.EDQUOT)
    return f"os error {errno.ENOSPC}" in str(error) or f"os error {errno.EDQUOT}" in str(error)
