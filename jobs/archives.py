"""Unpacking archives that nobody trusts. Called inside the sandbox alone.

Nothing is written outside the given folder, nothing but plain files and folders
is written at all, and what comes out is bounded against what went in.
"""

from __future__ import annotations

import gzip
import re
import stat
import tarfile
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import IO, Protocol

from jobs.errors import UploadRejected

SUFFIXES = (".zip", ".tar.gz", ".tgz", ".tar")
_UNREAD_SUFFIXES = (".bz2", ".tbz2", ".xz", ".txz", ".zst", ".7z", ".rar", ".gz")

# Weights hardly compress, text some ten times; only made-up data comes near this.
MAX_RATIO = 200
# Below this size a high ratio does no harm: a table of one repeated line is no bomb.
_RATIO_FREE_BYTES = 2**20
_MAX_ENTRY_BYTES = 1024  # of a zip's directory for a member, on average
_MAX_HEADER_BYTES = 2**15  # of a tar's extended headers before a member
_CHUNK = 2**20
_DRIVE = re.compile(r"[A-Za-z]:")
# What desktop systems put into archives unasked.
_CLUTTER = ("__MACOSX", ".DS_Store", "Thumbs.db")


def is_archive(name: str) -> bool:
    """Whether a file of this name is unpacked. UploadRejected for archives of other kinds."""
    lower = name.lower()
    if lower.endswith(SUFFIXES):
        return True
    if lower.endswith(_UNREAD_SUFFIXES):
        raise UploadRejected(
            f"{name} is an archive of a kind that is not read; upload a .zip or a .tar.gz",
            code="archive-unsupported",
            pointer=name,
        )
    return False


def unpack(archive: Path, folder: Path, *, max_files: int, max_bytes: int) -> Path:
    """Unpacks into `folder` (which exists and is empty); the folder that holds the content.

    That is `folder`, or the one folder in it where the archive wraps everything in one.
    UploadRejected where a member's path leaves the folder or is odd ("unsafe-archive"), a
    member is a link or a device ("archive-link"), encrypted ("archive-encrypted") or there
    twice ("archive-duplicate"), where it unpacks to more than MAX_RATIO times its size or
    than `max_bytes` ("archive-bomb"), has more than `max_files` members
    ("archive-too-many-files"), is compressed by another method than deflate
    ("archive-unsupported"), or is damaged or cut short ("damaged-archive").
    """
    target = _Target(archive, folder, max_files=max_files, max_bytes=max_bytes)
    try:
        if archive.name.lower().endswith(".zip"):
            _unpack_zip(archive, target)
        else:
            _unpack_tar(archive, target)
    except UploadRejected:
        raise
    except (
        tarfile.TarError, zipfile.BadZipFile, zlib.error, EOFError, gzip.BadGzipFile,
        NotImplementedError, RuntimeError, ValueError, OverflowError, IndexError, KeyError,
    ) as error:  # fmt: skip
        raise UploadRejected(
            f"{archive.name} is damaged or cut short: {str(error)[:200]}",
            code="damaged-archive",
            pointer=archive.name,
        ) from error
    if target.files == 0:
        raise UploadRejected(
            f"{archive.name} holds no files", code="damaged-archive", pointer=archive.name
        )
    return _content(folder)


def _content(folder: Path) -> Path:
    while True:
        entries = list(folder.iterdir())
        if len(entries) != 1 or not entries[0].is_dir():
            return folder
        folder = entries[0]


class _Source(Protocol):
    def read(self, size: int, /) -> bytes: ...


class _Target:
    """The folder that members are written to, and the counters that bound them."""

    def __init__(self, archive: Path, folder: Path, *, max_files: int, max_bytes: int) -> None:
        self.archive = archive
        self.folder = folder
        self.max_files = max_files
        by_ratio = max(_RATIO_FREE_BYTES, archive.stat().st_size * MAX_RATIO)
        self.allowed_bytes = min(max_bytes, by_ratio)
        self.members = 0
        self.files = 0
        self.bytes = 0
        self.names: set[PurePosixPath] = set()

    def refuse(self, message: str, code: str = "unsafe-archive") -> UploadRejected:
        return UploadRejected(
            f"{self.archive.name}: {message}", code=code, pointer=self.archive.name
        )

    def count(self) -> None:
        self.members += 1
        if self.members > self.max_files:
            raise self.too_many()

    def too_many(self) -> UploadRejected:
        return self.refuse(f"more than {self.max_files} members", "archive-too-many-files")

    def count_bytes(self, size: int) -> None:
        self.bytes += size
        if self.bytes > self.allowed_bytes:
            raise self.refuse(
                f"unpacks to more than {self.allowed_bytes} bytes from "
                f"{self.archive.stat().st_size}; that is refused as a decompression bomb",
                "archive-bomb",
            )

    def path(self, name: str) -> PurePosixPath:
        """The member's path below the folder; refused unless it plainly stays there."""
        shown = repr(name[:100])
        if not name or any(ord(c) < 32 or ord(c) == 127 for c in name) or "\\" in name:
            raise self.refuse(f"the member's name {shown} has characters that no file name needs")
        if name.startswith("/") or _DRIVE.match(name):
            raise self.refuse(f"the path of the member {shown} is absolute")
        path = PurePosixPath(name)
        if ".." in path.parts:
            raise self.refuse(f"the path of the member {shown} leaves the folder")
        try:
            encoded = [part.encode() for part in path.parts]
        except UnicodeEncodeError as error:
            raise self.refuse(f"the member's name {shown} is not UTF-8") from error
        if len(encoded) > 16 or any(len(part) > 255 for part in encoded):
            raise self.refuse(f"the path of the member {shown} is too long")
        return path

    def make_folder(self, path: PurePosixPath) -> None:
        if not _is_clutter(path):
            self._make(self.folder / path)

    def write(self, path: PurePosixPath, source: _Source) -> None:
        if path in self.names:
            raise self.refuse(f"the member {str(path)[:100]!r} is there twice", "archive-duplicate")
        self.names.add(path)
        if _is_clutter(path):
            return
        place = self.folder / path
        self._make(place.parent)
        self.files += 1
        try:
            out = place.open("xb")
        except FileExistsError as error:
            raise self.refuse(
                f"{str(path)[:100]!r} is a file and a folder", "archive-duplicate"
            ) from error
        with out:
            for chunk in _chunks(source):
                self.count_bytes(len(chunk))
                out.write(chunk)

    def _make(self, folder: Path) -> None:
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except (FileExistsError, NotADirectoryError) as error:
            raise self.refuse(
                f"{folder.name[:100]!r} is a file and a folder", "archive-duplicate"
            ) from error


def _is_clutter(path: PurePosixPath) -> bool:
    return any(part in _CLUTTER or part.startswith("._") for part in path.parts)


def _chunks(source: _Source) -> Iterator[bytes]:
    while chunk := source.read(_CHUNK):
        yield chunk


def open_zip(source: IO[bytes], *, max_files: int) -> zipfile.ZipFile | None:
    """The archive in `source`; None where it lists more than `max_files` members.

    zipfile makes an object of every entry of the central directory as it opens the file, 600
    bytes each, so the directory's size is looked at first. It is read by zipfile's own
    function: another reading of the same bytes might find another directory.
    """
    end = zipfile._EndRecData(source)  # type: ignore[attr-defined]
    if end is None:
        raise zipfile.BadZipFile("the end of its directory is missing")
    entries, size = end[zipfile._ECD_ENTRIES_TOTAL], end[zipfile._ECD_SIZE]  # type: ignore[attr-defined]
    if entries > max_files or size > max_files * _MAX_ENTRY_BYTES:
        return None
    source.seek(0)
    return zipfile.ZipFile(source)


def _unpack_zip(archive: Path, target: _Target) -> None:
    with archive.open("rb") as raw:
        opened = open_zip(raw, max_files=target.max_files)
        if opened is None:
            raise target.too_many()
        with opened as file:
            _unpack_members(file, target)


def _unpack_members(file: zipfile.ZipFile, target: _Target) -> None:
    for info in file.infolist():
        target.count()
        # zipfile cuts names at a NUL; what stands behind it was meant to deceive.
        path = target.path(info.orig_filename)
        kind = stat.S_IFMT(info.external_attr >> 16)
        if kind not in (0, stat.S_IFREG, stat.S_IFDIR):
            raise target.refuse(
                f"the member {str(path)[:100]!r} is a link or a device", "archive-link"
            )
        if info.flag_bits & 0x1:
            raise target.refuse(f"the member {str(path)[:100]!r} is encrypted", "archive-encrypted")
        if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise target.refuse(
                f"the member {str(path)[:100]!r} is compressed by a method that is not read; "
                "use deflate",
                "archive-unsupported",
            )
        if info.is_dir():
            target.make_folder(path)
        else:
            with file.open(info) as source:
                target.write(path, source)


def _unpack_tar(archive: Path, target: _Target) -> None:
    with archive.open("rb") as file:
        packed = file.read(2) == b"\x1f\x8b"
    if not packed:
        _unpack_plain_tar(archive, target)
        return
    # Unpacked to a file of its own first: the ratio is bounded before any header is believed,
    # and the tar is then read by position.
    plain = target.folder.with_name(target.folder.name + ".tar")
    try:
        with gzip.open(archive) as source, plain.open("xb") as out:
            for chunk in _chunks(source):
                target.count_bytes(len(chunk))
                out.write(chunk)
        target.bytes = 0  # the same bytes are counted again as members
        _unpack_plain_tar(plain, target)
    finally:
        plain.unlink(missing_ok=True)


class _Headers:
    """A tar's headers, for tarfile. It reads an extended header whole, whatever size that claims,
    and searches it with expressions whose time grows with its square."""

    def __init__(self, file: IO[bytes], target: _Target) -> None:
        self._file = file
        self._target = target
        self.left = _MAX_HEADER_BYTES

    def read(self, size: int) -> bytes:
        if size < 0:  # a header may claim even that
            raise tarfile.ReadError("a size below zero")
        self.left -= size
        if self.left < 0:
            raise self._target.refuse(
                f"more than {_MAX_HEADER_BYTES} bytes of headers before a member", "archive-bomb"
            )
        return self._file.read(size)

    def seek(self, position: int) -> int:
        return self._file.seek(position)

    def tell(self) -> int:
        return self._file.tell()


class _Part:
    """`size` bytes of a file from where it stands."""

    def __init__(self, file: IO[bytes], size: int) -> None:
        self._file = file
        self._left = size

    def read(self, size: int) -> bytes:
        data = self._file.read(min(size, self._left))
        if not data and self._left:
            raise tarfile.ReadError("unexpected end of data")
        self._left -= len(data)
        return data


def _unpack_plain_tar(path: Path, target: _Target) -> None:
    with path.open("rb") as raw, path.open("rb") as content:
        headers = _Headers(raw, target)
        with tarfile.open(fileobj=headers, mode="r:") as file:  # type: ignore[call-overload]
            for info in file:
                headers.left = _MAX_HEADER_BYTES
                target.count()
                if info.size < 0:
                    raise tarfile.ReadError("a size below zero")
                member = target.path(info.name)
                if info.isdir():
                    target.make_folder(member)
                elif info.type in (tarfile.REGTYPE, tarfile.AREGTYPE) and not info.issparse():
                    content.seek(info.offset_data)
                    target.write(member, _Part(content, info.size))
                else:
                    raise target.refuse(
                        f"the member {str(member)[:100]!r} is a link or a device", "archive-link"
                    )
            end = file.offset
        raw.seek(end)
        if len(raw.read(tarfile.BLOCKSIZE)) < tarfile.BLOCKSIZE:
            raise tarfile.ReadError("the end of the archive is missing")
