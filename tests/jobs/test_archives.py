from __future__ import annotations

import gzip
import io
import random
import stat
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from jobs.archives import is_archive, unpack
from jobs.errors import UploadRejected

CONTENT = b"text\tlabel\ngood\t1\n"


def _unpack(archive: Path, *, max_files: int = 50, max_bytes: int = 2**26) -> dict[str, bytes]:
    folder = archive.parent / "out"
    folder.mkdir()
    root = unpack(archive, folder, max_files=max_files, max_bytes=max_bytes)
    return {
        path.relative_to(root).as_posix(): path.read_bytes()
        for path in root.rglob("*")
        if path.is_file()
    }


def _zip(path: Path, *names: str) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        for name in names:
            file.writestr(zipfile.ZipInfo(name), CONTENT)
    return path


def _tar(path: Path, *members: tarfile.TarInfo | str, mode: str = "w:gz") -> Path:
    with tarfile.open(path, mode) as file:  # type: ignore[call-overload]
        for member in members:
            info = member if isinstance(member, tarfile.TarInfo) else tarfile.TarInfo(member)
            if info.isreg():
                info.size = len(CONTENT)
            file.addfile(info, io.BytesIO(CONTENT) if info.isreg() else None)
    return path


def _member(name: str, kind: bytes, link: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, link
    return info


@pytest.mark.parametrize(
    "make",
    [
        lambda folder, *names: _zip(folder / "a.zip", *names),
        lambda folder, *names: _tar(folder / "a.tar.gz", *names),
        lambda folder, *names: _tar(folder / "a.tgz", *names),
        lambda folder, *names: _tar(folder / "a.tar", *names, mode="w:"),
        lambda folder, *names: _tar(folder / "a.tar", *names),  # packed whatever its name says
    ],
)
def test_good_archives_are_unpacked_without_their_wrapping(
    tmp_path: Path, make: Callable[..., Path]
) -> None:
    archive = make(tmp_path, "model/a.tsv", "./model/sub/b.tsv", "__MACOSX/x", "model/._a.tsv")
    assert _unpack(archive) == {"a.tsv": CONTENT, "sub/b.tsv": CONTENT}


BAD_NAMES = [
    "../evil", "a/../../evil", "/etc/evil", "C:\\evil", "C:evil", "..\\evil", "a\\b", "a\nb",
    "x" * 300, "/".join("a" * 20), "",
]  # fmt: skip


@pytest.mark.parametrize("name", BAD_NAMES)
def test_paths_that_leave_the_folder_or_are_odd_are_refused(tmp_path: Path, name: str) -> None:
    before = set(tmp_path.parent.rglob("*evil*"))
    for i, make in enumerate((_zip, _tar)):
        folder = tmp_path / str(i)
        folder.mkdir()
        archive = make(folder / ("a.zip" if make is _zip else "a.tar.gz"), "good", name)
        with pytest.raises(UploadRejected) as caught:
            _unpack(archive)
        assert caught.value.code in ("unsafe-archive", "damaged-archive")
    assert set(tmp_path.parent.rglob("*evil*")) == before


def test_a_name_cut_at_a_nul_is_refused(tmp_path: Path) -> None:
    archive = _zip(tmp_path / "a.zip", "train.tsv?.exe")
    archive.write_bytes(archive.read_bytes().replace(b"train.tsv?.exe", b"train.tsv\0.exe"))
    with pytest.raises(UploadRejected, match="characters that no file name needs"):
        _unpack(archive)


@pytest.mark.parametrize(
    "member",
    [
        _member("link", tarfile.SYMTYPE, "/etc/passwd"),
        _member("link", tarfile.SYMTYPE, "good"),
        _member("link", tarfile.LNKTYPE, "good"),
        _member("device", tarfile.CHRTYPE),
        _member("device", tarfile.BLKTYPE),
        _member("pipe", tarfile.FIFOTYPE),
        _member("sparse", tarfile.GNUTYPE_SPARSE),
        _member("contiguous", tarfile.CONTTYPE),
    ],
)
def test_tars_hold_plain_files_only(tmp_path: Path, member: tarfile.TarInfo) -> None:
    with pytest.raises(UploadRejected) as caught:
        _unpack(_tar(tmp_path / "a.tar.gz", "good", member))
    assert caught.value.code in ("archive-link", "damaged-archive")
    assert not any(path.is_symlink() for path in tmp_path.rglob("*"))


@pytest.mark.parametrize("kind", [stat.S_IFLNK, stat.S_IFCHR, stat.S_IFIFO, stat.S_IFSOCK])
def test_zips_hold_plain_files_only(tmp_path: Path, kind: int) -> None:
    info = zipfile.ZipInfo("link")
    info.create_system = 3
    info.external_attr = (kind | 0o777) << 16
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as file:
        file.writestr(info, "/etc/passwd")
    with pytest.raises(UploadRejected, match="a link or a device"):
        _unpack(tmp_path / "a.zip")
    assert not any(path.is_symlink() for path in tmp_path.rglob("*"))


def test_a_member_that_is_there_twice_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UploadRejected, match="there twice"):
        _unpack(_tar(tmp_path / "a.tar.gz", "x", "./x"))


@pytest.mark.parametrize("names", [("a", "a/b"), ("a/b", "a")])
def test_a_file_that_is_also_a_folder_is_refused(tmp_path: Path, names: tuple[str, str]) -> None:
    with pytest.raises(UploadRejected, match="a file and a folder"):
        _unpack(_zip(tmp_path / "a.zip", *names))


def test_an_encrypted_zip_is_refused(tmp_path: Path) -> None:
    archive = _zip(tmp_path / "a.zip", "x")
    raw = bytearray(archive.read_bytes())
    raw[raw.index(b"PK\x03\x04") + 6] |= 1
    raw[raw.index(b"PK\x01\x02") + 8] |= 1
    archive.write_bytes(raw)
    with pytest.raises(UploadRejected, match="encrypted"):
        _unpack(archive)


@pytest.mark.parametrize("method", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_other_compressions_are_refused(tmp_path: Path, method: int) -> None:
    with zipfile.ZipFile(tmp_path / "a.zip", "w", method) as file:
        file.writestr("x", CONTENT)
    with pytest.raises(UploadRejected, match="use deflate"):
        _unpack(tmp_path / "a.zip")


@pytest.mark.parametrize("suffix", ["zip", "tar.gz"])
def test_a_thousandfold_ratio_is_refused_before_it_is_unpacked(tmp_path: Path, suffix: str) -> None:
    zeros = bytes(16 * 2**20)
    archive = tmp_path / f"a.{suffix}"
    if suffix == "zip":
        with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as file:
            file.writestr("x", zeros)
    else:
        with tarfile.open(archive, "w:gz") as tar:
            info = tarfile.TarInfo("x")
            info.size = len(zeros)
            tar.addfile(info, io.BytesIO(zeros))
    assert archive.stat().st_size * 900 < len(zeros)
    with pytest.raises(UploadRejected, match="decompression bomb"):
        _unpack(archive)
    assert sum(path.stat().st_size for path in tmp_path.rglob("*") if path.is_file()) < 2**23


def test_many_members_and_many_bytes_are_refused(tmp_path: Path) -> None:
    names = [f"{i}.txt" for i in range(60)]
    with pytest.raises(UploadRejected, match="more than 50 members"):
        _unpack(_zip(tmp_path / "a.zip", *names))
    (tmp_path / "other").mkdir()
    with pytest.raises(UploadRejected, match="unpacks to more than 100 bytes"):
        _unpack(_tar(tmp_path / "other" / "a.tar", *names[:40], mode="w:"), max_bytes=100)


@pytest.mark.parametrize("name", ["a.zip", "a.tar.gz", "a.tar"])
def test_every_truncation_is_refused(tmp_path: Path, name: str) -> None:
    chooser = random.Random(0)
    if name.endswith(".zip"):
        archive = _zip(tmp_path / name, "x", "y")
    else:
        archive = _tar(tmp_path / name, "x", "y", mode="w:gz" if name.endswith("gz") else "w:")
    whole = archive.read_bytes()
    # Of a plain tar, what follows the last member is padding.
    needed = len(whole) if not name.endswith(".tar") else 4 * 512 + 512
    for i, size in enumerate([0, 1, 600, 1024, *(chooser.randrange(needed) for _ in range(30))]):
        folder = tmp_path / str(i)
        folder.mkdir()
        (folder / name).write_bytes(whole[: min(size, needed - 1)])
        with pytest.raises(UploadRejected):
            _unpack(folder / name)


def test_damaged_and_empty_archives_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.zip").write_bytes(b"PK\x03\x04 and nothing more")
    (tmp_path / "b.tar.gz").write_bytes(gzip.compress(b"no tar"))
    _zip(tmp_path / "c.zip")
    _tar(tmp_path / "d.tar.gz", "__MACOSX/x")
    raw = bytearray(_zip(tmp_path / "e.zip", "x").read_bytes())
    raw[40] ^= 0xFF  # inside the member: its checksum no longer fits
    (tmp_path / "e.zip").write_bytes(raw)
    for path in sorted(tmp_path.glob("*.*")):
        folder = tmp_path / f"{path.name}.out"
        folder.mkdir()
        with pytest.raises(UploadRejected) as caught:
            unpack(path, folder, max_files=50, max_bytes=2**20)
        assert caught.value.code == "damaged-archive"


def test_names_of_archives() -> None:
    assert is_archive("A.ZIP") and is_archive("m.tar.gz") and is_archive("m.tgz")
    assert not is_archive("train.csv") and not is_archive("model.safetensors")
    for name in ("m.tar.xz", "m.7z", "train.csv.gz"):
        with pytest.raises(UploadRejected, match=r"upload a \.zip or a \.tar\.gz"):
            is_archive(name)
