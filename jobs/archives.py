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
from typing import IO

from jobs.errors import UploadRejected

SUFFIXES = (".zip", ".tar.gz", ".tgz", ".tar")
_UNREAD_SUFFIXES = (".bz2", ".tbz2", ".xz", ".txz", ".zst", ".7z", ".rar", ".gz")

# Weights hardly compress, text some ten times; only made-up data comes near this.
MAX_RATIO = 200
# Below this size a high ratio does no harm: a table of one repeated line is no bomb.
_RATIO_FREE_BYTES = 2**20
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
            code="unsafe-archive",
            pointer=name,
        )
    return False


def unpack(archive: Path, folder: Path, *, max_files: int, max_bytes: int) -> Path:
    """Unpacks into `folder` (which exists and is empty); the folder that holds the content.

    That is `folder`, or the one folder in it where the archive wraps everything in one.
    UploadRejected ("unsafe-archive" or "damaged-archive") where a member's path leaves the
    folder or is odd, a member is a link, a device, encrypted or there twice, the
    archive unpacks to more than MAX_RATIO times its size or than `max_bytes`, has more
    than `max_files` members, or is cut short.
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

    def refuse(self, message: str) -> UploadRejected:
        return UploadRejected(
            f"{self.archive.name}: {message}", code="unsafe-archive", pointer=self.archive.name
        )

    def count(self) -> None:
        self.members += 1
        if self.members > self.max_files:
            raise self.refuse(f"more than {self.max_files} members")

    def count_bytes(self, size: int) -> None:
        self.bytes += size
        if self.bytes > self.allowed_bytes:
            raise self.refuse(
                f"unpacks to more than {self.allowed_bytes} bytes from "
                f"{self.archive.stat().st_size}; that is refused as a decompression bomb"
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

    def write(self, path: PurePosixPath, source: IO[bytes]) -> None:
        if path in self.names:
            raise self.refuse(f"the member {str(path)[:100]!r} is there twice")
        self.names.add(path)
        if _is_clutter(path):
            return
        place = self.folder / path
        self._make(place.parent)
        self.files += 1
        try:
            out = place.open("xb")
        except FileExistsError as error:
            raise self.refuse(f"{str(path)[:100]!r} is a file and a folder") from error
        with out:
            for chunk in _chunks(source):
                self.count_bytes(len(chunk))
                out.write(chunk)

    def _make(self, folder: Path) -> None:
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except (FileExistsError, NotADirectoryError) as error:
            raise self.refuse(f"{folder.name[:100]!r} is a file and a folder") from error


def _is_clutter(path: PurePosixPath) -> bool:
    return any(part in _CLUTTER or part.startswith("._") for part in path.parts)


def _chunks(source: IO[bytes] | gzip.GzipFile) -> Iterator[bytes]:
    while chunk := source.read(_CHUNK):
        yield chunk


def _unpack_zip(archive: Path, target: _Target) -> None:
    with zipfile.ZipFile(archive) as file:
        for info in file.infolist():
            target.count()
            # zipfile cuts names at a NUL; what stands behind it was meant to deceive.
            path = target.path(info.orig_filename)
            kind = stat.S_IFMT(info.external_attr >> 16)
            if kind not in (0, stat.S_IFREG, stat.S_IFDIR):
                raise target.refuse(f"the member {str(path)[:100]!r} is a link or a device")
            if info.flag_bits & 0x1:
                raise target.refuse(f"the member {str(path)[:100]!r} is encrypted")
            if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                raise target.refuse(
                    f"the member {str(path)[:100]!r} is compressed by a method that is not read; "
                    "use deflate"
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


def _unpack_plain_tar(path: Path, target: _Target) -> None:
    with tarfile.open(path, "r:") as file:
        for info in file:
            target.count()
            member = target.path(info.name)
            if info.isdir():
                target.make_folder(member)
            elif info.type in (tarfile.REGTYPE, tarfile.AREGTYPE) and not info.issparse():
                if info.size > path.stat().st_size:
                    raise tarfile.ReadError("a member is longer than the archive")
                source = file.extractfile(info)
                assert source is not None  # a plain file has content
                target.write(member, source)
            else:
                raise target.refuse(f"the member {str(member)[:100]!r} is a link or a device")
        end = file.offset
    with path.open("rb") as raw:
        raw.seek(end)
        if len(raw.read(tarfile.BLOCKSIZE)) < tarfile.BLOCKSIZE:
            raise tarfile.ReadError("the end of the archive is missing")
