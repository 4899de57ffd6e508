"""Archives: paths that leave, links, devices, bombs, headers that lie, a million entries."""

from __future__ import annotations

import gzip
import io
import stat
import struct
import tarfile
import warnings
import zipfile
import zlib
from collections.abc import Callable, Iterator

import numpy as np

from tests.hostile.corpus import Content, Corpus, Hostile, noise

TABLE = b"text,label\na,0\nb,1\na,0\nb,1\n"
ZIP, TAR, PACKED = "data.zip", "data.tar", "data.tar.gz"


def _made(name: str, kind: str, content: Callable[[], Content]) -> Hostile:
    return Hostile("datasets", kind, lambda _: {name: content()})


# --- zip ------------------------------------------------------------------------------------


def _zip(
    *members: tuple[str | zipfile.ZipInfo, bytes], method: int = zipfile.ZIP_DEFLATED
) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as archive, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that a name is there twice may be the point
        for name, content in members:
            archive.writestr(name, content)
    return buffer.getvalue()


def _named(name: str) -> Callable[[], bytes]:
    return lambda: _zip(("train.csv", TABLE), (name, b"evil"))


def _of_kind(kind: int) -> Callable[[], bytes]:
    """A member that Unix would unpack as a link or a device."""

    def build() -> bytes:
        info = zipfile.ZipInfo("train.csv")
        info.create_system, info.external_attr = 3, (kind | 0o777) << 16
        return _zip((info, b"/etc/passwd"))

    return build


def _patched(old: bytes, new: bytes, *, times: int) -> Callable[[], bytes]:
    def build() -> bytes:
        raw = _zip(("train.csv", TABLE), method=zipfile.ZIP_STORED)
        assert raw.count(old) == times
        return raw.replace(old, new)

    return build


def _flagged_encrypted() -> bytes:
    raw = bytearray(_zip(("train.csv", TABLE)))
    raw[raw.index(b"PK\x03\x04") + 6] |= 1
    raw[raw.index(b"PK\x01\x02") + 8] |= 1
    return bytes(raw)


def many_entries(count: int, *, told: int | None = None) -> bytes:
    """A zip of `count` empty files; `told`: how many the end of its directory claims."""
    local = np.zeros(count, [("head", "S26"), ("lengths", "<u2", 2), ("name", "S8")])
    local["head"], local["lengths"][:, 0] = b"PK\x03\x04\x14", 8
    central = np.zeros(
        count,
        [("head", "S28"), ("lengths", "<u2", 3), ("rest", "S8"), ("at", "<u4"), ("name", "S8")],
    )
    central["head"], central["lengths"][:, 0] = b"PK\x01\x02\x14\0\x14", 8
    names = np.char.zfill(np.arange(count).astype("S8"), 8)
    local["name"] = central["name"] = names
    central["at"] = np.arange(count, dtype=np.uint32) * local.itemsize
    start, size = local.nbytes, central.nbytes
    told = count if told is None else told
    end64 = struct.pack("<4sQ2H2L4Q", b"PK\x06\x06", 44, 45, 45, 0, 0, told, told, size, start)
    locator = struct.pack("<4sLQL", b"PK\x06\x07", 0, start + size, 1)
    short = min(told, 0xFFFF)
    end = struct.pack("<4s4H2LH", b"PK\x05\x06", 0, 0, short, short, 2**32 - 1, 2**32 - 1, 0)
    return local.tobytes() + central.tobytes() + end64 + locator + end


def _overlapping() -> bytes:
    """Three hundred members that are all the same bytes of the file."""
    content = zlib.compress(bytes(2**20), 9)[2:-4]
    crc, name = zlib.crc32(bytes(2**20)), b"%04d"
    fields = struct.pack("<5H3L", 20, 0, 8, 0, 0, crc, len(content), 2**20)
    local = b"PK\x03\x04" + fields + struct.pack("<2H", 4, 0) + name % 0 + content
    central = b"".join(
        b"PK\x01\x02" + struct.pack("<H", 20) + fields + struct.pack("<5H2L", 4, 0, 0, 0, 0, 0, 0)
        + b"0000"
        for _ in range(300)
    )  # fmt: skip
    return (
        local
        + central
        + struct.pack("<4s4H2LH", b"PK\x05\x06", 0, 0, 300, 300, len(central), len(local), 0)
    )


def _nested_bomb() -> bytes:
    inner = _zip(("train.csv", bytes(2**24)))
    for _ in range(5):
        inner = _zip(*((f"{i}.zip", inner) for i in range(4)))
    return inner


# --- tar ------------------------------------------------------------------------------------


def _member(
    name: str, kind: bytes = tarfile.REGTYPE, content: bytes = b"", **fields: object
) -> bytes:
    """One member's header and content, whatever they say."""
    info = tarfile.TarInfo(name)
    info.type, info.size = kind, len(content)
    for field, value in fields.items():
        setattr(info, field, value)
    padding = bytes(-len(content) % tarfile.BLOCKSIZE)
    return info.tobuf(tarfile.GNU_FORMAT, "utf-8", "surrogateescape") + content + padding


def _header(size: int, kind: bytes) -> bytes:
    """A header that claims a size of its own."""
    raw = bytearray(_member("x", kind))
    number = (
        b"\x80" + size.to_bytes(11, "big")
        if size >= 0
        else b"\xff" + (size % 2**88).to_bytes(11, "big")
    )
    raw[124:136] = number
    raw[148:156] = b" " * 8
    raw[148:156] = b"%06o\0 " % sum(raw[:512])
    return bytes(raw)


END = bytes(2 * tarfile.BLOCKSIZE)


def _tar(*members: bytes) -> Callable[[], bytes]:
    return lambda: _member("train.csv", content=TABLE) + b"".join(members) + END


def _packed(*members: bytes) -> Callable[[], bytes]:
    return lambda: gzip.compress(_tar(*members)())


def _pax(records: bytes) -> bytes:
    return _member("x", tarfile.XHDTYPE, records)


def _record(key: bytes, value: bytes) -> bytes:
    length = len(key) + len(value) + 3
    while len(b"%d" % length) + len(key) + len(value) + 3 != length:
        length = len(b"%d" % length) + len(key) + len(value) + 3
    return b"%d %s=%s\n" % (length, key, value)


def _through_a_link() -> bytes:
    """A link to a folder outside, then a file through it."""
    link = _member("out", tarfile.SYMTYPE, linkname="/tmp")
    return _packed(link, _member("out/evil", content=b"evil"))()


def _zeros(mebibytes: int) -> Callable[[], Iterator[bytes]]:
    """A gzip of a tar of one member of zeros: as many members of gzip as mebibytes."""

    def stream() -> Iterator[bytes]:
        chunk = gzip.compress(bytes(2**20))
        yield gzip.compress(_header(mebibytes * 2**20, tarfile.REGTYPE))
        for _ in range(mebibytes):
            yield chunk

    return stream


ARCHIVES: Corpus = {
    # Paths.
    "zip: a path that leaves": _made(ZIP, "unsafe-archive", _named("../../evil")),
    "zip: an absolute path": _made(ZIP, "unsafe-archive", _named("/tmp/evil")),
    "zip: backslashes": _made(ZIP, "unsafe-archive", _named("..\\..\\evil")),
    "zip: a name that a NUL cuts": _made(
        ZIP, "unsafe-archive", _patched(b"train.csv", b"train\0csv", times=2)
    ),
    "zip: twenty folders deep": _made(ZIP, "unsafe-archive", _named("a/" * 20 + "evil")),
    "tar: a path that leaves": _made(PACKED, "unsafe-archive", _packed(_member("../../evil"))),
    "tar: a path that leaves, in a pax header": _made(
        PACKED, "unsafe-archive", _packed(_pax(_record(b"path", b"../../evil")), _member("good"))
    ),
    "tar: a name that is not UTF-8": _made(
        PACKED, "unsafe-archive", _packed(_member("\udcff\udcfe.csv"))
    ),
    # Links, devices and the like.
    "tar: a symbolic link": _made(
        PACKED, "archive-link", _packed(_member("a", tarfile.SYMTYPE, linkname="/etc/passwd"))
    ),
    "tar: a file through a link": _made(PACKED, "archive-link", _through_a_link),
    "tar: a hard link": _made(
        PACKED, "archive-link", _packed(_member("a", tarfile.LNKTYPE, linkname="train.csv"))
    ),
    "tar: a character device": _made(
        PACKED, "archive-link", _packed(_member("a", tarfile.CHRTYPE, devmajor=1, devminor=5))
    ),
    "tar: a pipe": _made(PACKED, "archive-link", _packed(_member("a", tarfile.FIFOTYPE))),
    "tar: a sparse file of a terabyte": _made(
        PACKED,
        "archive-link",
        _packed(
            _pax(
                _record(b"GNU.sparse.major", b"0") + _record(b"GNU.sparse.minor", b"1")
                + _record(b"GNU.sparse.map", b"0,0") + _record(b"GNU.sparse.size", b"%d" % 2**40)
            ),
            _member("a"),
        ),
    ),
    "zip: a symbolic link": _made(ZIP, "archive-link", _of_kind(stat.S_IFLNK)),
    "zip: a character device": _made(ZIP, "archive-link", _of_kind(stat.S_IFCHR)),
    # The same twice.
    "zip: a name twice": _made(ZIP, "archive-duplicate", _named("train.csv")),
    "zip: a file that is a folder": _made(ZIP, "archive-duplicate", _named("train.csv/evil")),
    # Bombs.
    "zip: a thousandfold": _made(ZIP, "archive-bomb", lambda: _zip(("train.csv", bytes(2**26)))),
    "zip: members that overlap": _made(ZIP, "archive-duplicate", _overlapping),
    "zip: a zip of zips of zips": _made(ZIP, "invalid-dataset", _nested_bomb),
    "tar: a thousandfold": _made(PACKED, "archive-bomb", lambda: gzip.compress(bytes(2**26))),
    "tar: half a gigabyte of zeros": _made(PACKED, "archive-bomb", lambda: _zeros(512)),
    "zip: a million entries": _made(ZIP, "archive-too-many-files", lambda: many_entries(10**6)),
    "zip: a million entries, told as one": _made(
        ZIP, "archive-too-many-files", lambda: many_entries(10**6, told=1)
    ),
    "tar.gz: twenty thousand entries": _made(
        PACKED,
        "archive-too-many-files",
        lambda: gzip.compress(b"".join(_member(f"{i}") for i in range(20_000)) + END, 1),
    ),
    # Headers that lie.
    "tar: a pax header of a gigabyte": _made(
        TAR, "archive-bomb", _tar(_header(2**30, tarfile.XHDTYPE))
    ),
    "tar: a pax header below zero": _made(
        TAR, "damaged-archive", _tar(_header(-512, tarfile.XHDTYPE))
    ),
    "tar: a file below zero": _made(TAR, "damaged-archive", _tar(_header(-1024, tarfile.REGTYPE))),
    "tar: a thousand pax headers in a row": _made(
        TAR, "archive-bomb", _tar(*[_pax(_record(b"comment", b"x"))] * 1000)
    ),
    "tar: a pax header that is slow to search": _made(
        TAR, "archive-bomb", _tar(_pax(b"1" * 2**20), _member("a"))
    ),
    "tar: cut short": _made(PACKED, "damaged-archive", lambda: _packed(noise(2**14))()[:-5000]),
    "gzip: a wrong checksum": _made(
        PACKED, "damaged-archive", lambda: _packed()()[:-8] + bytes(8)
    ),
    "zip: a wrong checksum": _made(
        ZIP, "damaged-archive", _patched(TABLE, TABLE.replace(b"b", b"c"), times=1)
    ),
    "zip: another name within than in its directory": _made(
        ZIP, "damaged-archive", lambda: _named("x")().replace(b"train.csv", b"../evil..", 1)
    ),
    # What is not read.
    "zip: encrypted": _made(ZIP, "archive-encrypted", _flagged_encrypted),
    "zip: bzip2": _made(
        ZIP, "archive-unsupported", lambda: _zip(("train.csv", TABLE), method=zipfile.ZIP_BZIP2)
    ),
    "7z": _made("data.7z", "archive-unsupported", lambda: b"7z\xbc\xaf\x27\x1c" + bytes(26)),
    "a table in gzip alone": _made(
        "train.csv.gz", "archive-unsupported", lambda: gzip.compress(TABLE)
    ),
}  # fmt: skip
