"""A bundle that was changed in any way is said to be, and a hostile one harms nobody."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from compression.__main__ import main
from compression.signing import new_key, read_private_key, read_public_key, sign
from compression.verify import HEADER_BYTES, MAX_FILES, NoBundle, verify_bundle

FILES = {"onnx/model.onnx": b"weights" * 1000, "predict.py": b"print(1)\n"}


def manifest_of(files: dict[str, bytes]) -> bytes:
    listed = [
        {"path": path, "size_bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        for path, data in files.items()
    ]
    return json.dumps({"widthwise_bundle": 9, "of a later version": 1, "files": listed}).encode()


def archive(path: Path, files: dict[str, bytes], top: str = "w1_2") -> Path:
    with tarfile.open(path, "w:gz") as written:
        for name, data in files.items():
            member = tarfile.TarInfo(f"{top}/{name}")
            member.size = len(data)
            written.addfile(member, io.BytesIO(data))
    return path


def folder(path: Path, files: dict[str, bytes]) -> Path:
    for name, data in files.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(data)
    return path


WRITERS: list[Callable[[Path, dict[str, bytes]], Path]] = [archive, folder]
ALL = {**FILES, "manifest.json": manifest_of(FILES)}


@pytest.fixture
def key() -> Ed25519PrivateKey:
    return Ed25519PrivateKey.generate()


@pytest.mark.parametrize("write", WRITERS)
def test_what_was_published_holds(
    tmp_path: Path, key: Ed25519PrivateKey, write: Callable[[Path, dict[str, bytes]], Path]
) -> None:
    unsigned = verify_bundle(write(tmp_path / "a", ALL))
    assert (unsigned.holds, unsigned.files, unsigned.signed_by) == (True, 2, None)
    signature = sign(ALL["manifest.json"], key)
    signed = write(tmp_path / "b", {**ALL, "signature.json": signature.model_dump_json().encode()})
    for trusted in (None, key.public_key()):
        verdict = verify_bundle(signed, trusted)
        assert (verdict.faults, verdict.signed_by) == ((), signature.key_id)


@pytest.mark.parametrize("write", WRITERS)
def test_every_change_is_named(
    tmp_path: Path, key: Ed25519PrivateKey, write: Callable[[Path, dict[str, bytes]], Path]
) -> None:
    document = sign(ALL["manifest.json"], key).model_dump_json().encode()
    without = {name: data for name, data in ALL.items() if name != "predict.py"}
    other = manifest_of({"predict.py": b"evil"}) + b" "
    changes: dict[str, tuple[dict[str, bytes], tuple[str, ...]]] = {
        "byte": (
            {**ALL, "predict.py": b"print(2)\n"},
            ("predict.py is not the file that was published: its SHA-256 is another",),
        ),
        "gone": (without, ("predict.py is missing",)),
        "more": ({**ALL, "x\x1b[2J.py": b""}, ("'x\\x1b[2J.py' is not in the manifest",)),
        "manifest": (
            {"predict.py": b"evil", "manifest.json": other},
            ("the signature is not one of this manifest",),
        ),
    }
    for name, (files, faults) in changes.items():
        verdict = verify_bundle(write(tmp_path / name, {**files, "signature.json": document}))
        assert verdict.faults == faults


def test_a_wanted_signature_must_be_there_and_of_that_key(
    tmp_path: Path, key: Ed25519PrivateKey
) -> None:
    (fault,) = verify_bundle(archive(tmp_path / "a", ALL), key.public_key()).faults
    assert "it is not signed" in fault
    stranger = sign(ALL["manifest.json"], Ed25519PrivateKey.generate())
    forged = archive(tmp_path / "b", {**ALL, "signature.json": stranger.model_dump_json().encode()})
    assert verify_bundle(forged).holds  # by itself
    assert not verify_bundle(forged, key.public_key()).holds


@pytest.mark.parametrize(
    ("files", "says"),
    [
        (FILES, "there is no manifest"),
        ({"manifest.json": b"{"}, "lists no files"),
        ({"manifest.json": b"[" * 100_000}, "lists no files"),
        ({"manifest.json": b'{"files": [{"path": 1}]}'}, "lists no files"),
        ({**ALL, "signature.json": b"{}"}, "is no signature"),
        ({str(i): b"" for i in range(MAX_FILES + 1)}, "more than"),
    ],
)
@pytest.mark.parametrize("write", WRITERS)
def test_what_is_no_bundle_is_refused(
    tmp_path: Path,
    write: Callable[[Path, dict[str, bytes]], Path],
    files: dict[str, bytes],
    says: str,
) -> None:
    with pytest.raises(NoBundle, match=says):
        verify_bundle(write(tmp_path / "bundle", files))


def one_member(path: Path, member: tarfile.TarInfo) -> Path:
    with tarfile.open(path, "w:gz") as written:
        written.addfile(member)
    return path


@pytest.mark.parametrize("name", ["../x", "w1/../../x", "/etc/x", "alone", "w1/a\\b"])
def test_paths_outside_the_folder_are_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(NoBundle, match="does not lie in"):
        verify_bundle(one_member(tmp_path / "bundle", tarfile.TarInfo(name)))


@pytest.mark.parametrize(
    "kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE, tarfile.DIRTYPE]
)
def test_links_and_devices_are_refused(tmp_path: Path, kind: bytes) -> None:
    member = tarfile.TarInfo("w1/x")
    member.type, member.linkname = kind, "/etc/passwd"
    with pytest.raises(NoBundle, match="no plain file"):
        verify_bundle(one_member(tmp_path / "bundle", member))


def test_a_link_in_a_folder_is_refused_and_not_followed(tmp_path: Path) -> None:
    folder(tmp_path / "bundle", ALL)
    (tmp_path / "bundle" / "more").symlink_to("/")
    with pytest.raises(NoBundle, match="is a link"):
        verify_bundle(tmp_path / "bundle")


def test_two_folders_or_a_file_twice_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "bundle"
    for names, says in ((("w1/a", "w1/a"), "twice"), (("w1/a", "w2/b"), "more than one folder")):
        with tarfile.open(path, "w:gz") as written:
            for name in names:
                written.addfile(tarfile.TarInfo(name))
        with pytest.raises(NoBundle, match=says):
            verify_bundle(path)


def test_an_archive_that_unpacks_to_much_more_is_not_read_to_its_end(tmp_path: Path) -> None:
    bomb = archive(tmp_path / "bomb", {"onnx/model.onnx": bytes(80 << 20)})
    assert bomb.stat().st_size < 1 << 20
    with pytest.raises(NoBundle, match="more than any bundle"):
        verify_bundle(bomb)


def test_a_header_that_claims_gigabytes_takes_no_memory_for_them(tmp_path: Path) -> None:
    """An extended header is read whole by tarfile, whatever size it says it has."""
    header = tarfile.TarInfo("w1/x")
    header.type, header.size = tarfile.XHDTYPE, 8**11 - 1  # 8 GiB
    with gzip.open(tmp_path / "bundle", "wb") as written:
        written.write(header.tobuf(tarfile.USTAR_FORMAT))
        written.write(bytes(4 * HEADER_BYTES))
    with pytest.raises(NoBundle, match="between its files is too large"):
        verify_bundle(tmp_path / "bundle")


@pytest.mark.parametrize("cut", [0, 10, 200])
def test_what_is_no_archive_or_half_of_one_is_refused(tmp_path: Path, cut: int) -> None:
    data = archive(tmp_path / "whole", ALL).read_bytes()
    (tmp_path / "half").write_bytes(data[:cut])
    (tmp_path / "text").write_text("hello")
    for name in ("half", "text"):
        with pytest.raises(NoBundle):
            verify_bundle(tmp_path / name)


def test_the_command_says_what_holds_and_exits_0_or_1(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["keygen", str(tmp_path / "key.pem")]) == 0
    public = tmp_path / "key.pem.pub"
    assert public.read_text() not in capsys.readouterr().out
    assert main(["keygen", str(tmp_path / "key.pem")]) == 1
    assert "exists" in capsys.readouterr().err

    plain = str(archive(tmp_path / "plain", ALL))
    assert main(["verify", plain]) == 0
    assert "all 2 files are as published\nnot signed" in capsys.readouterr().out
    assert main(["verify", plain, "--public-key", str(public)]) == 1
    assert "it is not signed" in capsys.readouterr().err

    key = read_private_key((tmp_path / "key.pem").read_bytes())
    document = sign(ALL["manifest.json"], key).model_dump_json().encode()
    signed = str(archive(tmp_path / "signed", {**ALL, "signature.json": document}))
    assert main(["verify", signed, "--public-key", str(public)]) == 0
    assert "the one that was given" in capsys.readouterr().out
    new_key(tmp_path / "other.pem")
    assert main(["verify", signed, "--public-key", str(tmp_path / "other.pem.pub")]) == 1
    assert "another key" in capsys.readouterr().err

    assert main(["verify", str(tmp_path / "nothing")]) == 1
    assert main(["verify", signed, "--public-key", signed]) == 1
    assert "cannot be verified" in capsys.readouterr().err
    assert read_public_key(public.read_bytes())
