"""Whether a bundle is the one that was published: every digest, and the signature. Paddle-free.

A bundle may come from anywhere. Nothing of it is written to disk or run; an archive is read
once from its beginning to its end, and what it may claim or unpack to is bounded.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import tarfile
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO, Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from pydantic import TypeAdapter, ValidationError

from compression.manifest import MANIFEST, SIGNATURE
from compression.report import FileReport
from compression.signing import Signature, faults, key_id

MAX_FILES = 1000
MAX_DOCUMENT_BYTES = 8 << 20  # of the manifest and of the signature
MAX_RATIO = 100  # of an archive's content to its size; weights hardly compress
SMALL_BYTES = 64 << 20  # that any archive may unpack to
HEADER_BYTES = 1 << 20  # between two files of an archive
CHUNK_BYTES = 1 << 20
SHOWN_CHARACTERS = 200  # of a name that came with the bundle
FILES = TypeAdapter(tuple[FileReport, ...])
DOCUMENTS = (MANIFEST, SIGNATURE)


class NoBundle(Exception):
    """This is no bundle, or one that nobody should unpack; the message says why."""


@dataclass(frozen=True)
class Verdict:
    """`faults`: what does not hold, in words; `signed_by`: the id of the key, None without one."""

    files: int
    faults: tuple[str, ...]
    signed_by: str | None

    @property
    def holds(self) -> bool:
        return not self.faults


@dataclass(frozen=True)
class _Found:
    """What a bundle holds, by path: size and SHA-256, and the documents themselves."""

    digests: Mapping[str, tuple[int, str]]
    documents: Mapping[str, bytes]


def verify_bundle(bundle: Path, public_key: Ed25519PublicKey | None = None) -> Verdict:
    """Compares an archive, or the folder that it was unpacked to, with its manifest.

    With `public_key` a signature by that key is asked for; without, one that is there must
    hold by itself, which shows that nothing was changed by accident and not who signed.
    NoBundle where there is nothing to compare.
    """
    found = _read_folder(bundle) if bundle.is_dir() else _read_archive(bundle)
    if MANIFEST not in found.documents:
        raise NoBundle(f"there is no {MANIFEST}")
    manifest = found.documents[MANIFEST]
    promised = _promised(manifest)
    complaints = list(_differences(promised, found.digests))
    signature = _signature(found.documents.get(SIGNATURE))
    if signature is not None:
        complaints += faults(signature, manifest, public_key)
    elif public_key is not None:
        complaints.append(f"it is not signed, and a signature by {key_id(public_key)} is wanted")
    return Verdict(len(promised), tuple(complaints), signature.key_id if signature else None)


def _promised(manifest: bytes) -> dict[str, FileReport]:
    """The manifest's files. Its other fields may be those of a newer version."""
    try:
        listed = json.loads(manifest)["files"]
        files = FILES.validate_python(listed)
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise NoBundle(f"{MANIFEST} lists no files that can be read") from error
    by_path = {file.path: file for file in files}
    if len(by_path) != len(files):
        raise NoBundle(f"{MANIFEST} lists a file twice")
    return by_path


def _signature(document: bytes | None) -> Signature | None:
    if document is None:
        return None
    try:
        return Signature.model_validate_json(document)
    except ValidationError as error:
        raise NoBundle(f"{SIGNATURE} is no signature of a bundle") from error


def _differences(
    promised: Mapping[str, FileReport], found: Mapping[str, tuple[int, str]]
) -> Iterator[str]:
    for path, file in promised.items():
        if path not in found:
            yield f"{_shown(path)} is missing"
        elif found[path] != (file.size_bytes, file.sha256):
            yield f"{_shown(path)} is not the file that was published: its SHA-256 is another"
    for path in found:
        if path not in promised and path not in DOCUMENTS:
            yield f"{_shown(path)} is not in the manifest"


def _shown(name: str) -> str:
    """A stranger's name for a file: short, and without what would move a terminal's cursor."""
    cut = name[:SHOWN_CHARACTERS]
    return cut if cut.isprintable() else ascii(cut)


# --- folders --------------------------------------------------------------------------------


def _read_folder(folder: Path) -> _Found:
    digests: dict[str, tuple[int, str]] = {}
    documents: dict[str, bytes] = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_symlink():
            raise NoBundle(f"{_shown(name)} is a link")
        if path.is_dir():
            continue
        if not path.is_file():
            raise NoBundle(f"{_shown(name)} is no plain file")
        if len(digests) == MAX_FILES:
            raise NoBundle(f"it holds more than {MAX_FILES} files")
        with path.open("rb") as file:
            _take(name, file, path.stat().st_size, digests, documents)
    return _Found(digests, documents)


# --- archives -------------------------------------------------------------------------------


def _read_archive(path: Path) -> _Found:
    digests: dict[str, tuple[int, str]] = {}
    documents: dict[str, bytes] = {}
    tops: set[str] = set()
    left = max(SMALL_BYTES, MAX_RATIO * path.stat().st_size)
    try:
        with gzip.open(path) as unpacked:
            stream = _Metered(unpacked)
            with tarfile.open(fileobj=stream, mode="r|") as archive:
                while (member := archive.next()) is not None:
                    top, name = _placed(member)
                    tops.add(top)
                    left -= member.size
                    if left < 0 or len(digests) == MAX_FILES:
                        raise NoBundle("it unpacks to more than any bundle does")
                    if name in digests:
                        raise NoBundle(f"it holds {_shown(name)} twice")
                    if len(tops) > 1:
                        raise NoBundle("it holds more than one folder")
                    stream.allow(member.size + HEADER_BYTES)
                    content = archive.extractfile(member)
                    assert content is not None  # of a plain file
                    _take(name, content, member.size, digests, documents)
                    stream.allow(HEADER_BYTES)
    except (tarfile.TarError, EOFError, OSError, zlib.error, ValueError, RecursionError) as error:
        raise NoBundle(f"it cannot be read as a .tar.gz: {error}") from error
    return _Found(digests, documents)


class _Metered(io.RawIOBase):
    """Hands out no more than it was last allowed: headers of an archive may claim any size."""

    def __init__(self, source: gzip.GzipFile) -> None:
        self._source = source
        self._left = HEADER_BYTES

    def allow(self, size: int) -> None:
        self._left = size

    def read(self, size: int = -1) -> bytes:
        data = self._source.read(min(size, CHUNK_BYTES) if size >= 0 else CHUNK_BYTES)
        self._left -= len(data)
        if self._left < 0:
            raise NoBundle("what stands between its files is too large")
        return data


def _placed(member: tarfile.TarInfo) -> tuple[str, str]:
    """The bundle's folder, and the file's path in it."""
    plain = member.type in (tarfile.REGTYPE, tarfile.AREGTYPE) and not member.issparse()
    if not plain or member.size < 0:
        raise NoBundle(f"{_shown(member.name)} is no plain file")
    parts = PurePosixPath(member.name).parts
    if len(parts) < 2 or parts[0] == "/" or ".." in parts or "\\" in member.name:
        raise NoBundle(f"{_shown(member.name)} does not lie in the bundle's folder")
    return parts[0], "/".join(parts[1:])


def _take(
    name: str,
    file: IO[bytes],
    size: int,
    digests: dict[str, tuple[int, str]],
    documents: dict[str, bytes],
) -> None:
    """Adds a file's size and digest, and its bytes where it is one of the documents."""
    if name in DOCUMENTS:
        if size > MAX_DOCUMENT_BYTES:
            raise NoBundle(f"{name} is too large")
        documents[name] = file.read(MAX_DOCUMENT_BYTES + 1)
        digests[name] = (len(documents[name]), hashlib.sha256(documents[name]).hexdigest())
        return
    digest: Any = hashlib.sha256()
    read = 0
    while chunk := file.read(CHUNK_BYTES):
        digest.update(chunk)
        read += len(chunk)
    digests[name] = (read, digest.hexdigest())


__all__ = ["NoBundle", "Verdict", "verify_bundle"]
