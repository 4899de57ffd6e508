"""Keys as openssl knows them, and signatures that hold for nothing else."""

from __future__ import annotations

import base64
import shutil
import stat
import subprocess
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    NoEncryption,
    PrivateFormat,
)

from compression.errors import SigningKeyRefused
from compression.signing import (
    Signature,
    faults,
    key_id,
    new_key,
    read_private_key,
    read_public_key,
    sign,
)

MANIFEST = b'{"files": []}\n'
PKCS8 = (Encoding.PEM, PrivateFormat.PKCS8)


@pytest.fixture
def key() -> Ed25519PrivateKey:
    return Ed25519PrivateKey.generate()


def test_a_new_key_is_its_owners_alone_and_never_overwritten(tmp_path: Path) -> None:
    public = new_key(tmp_path / "key.pem")
    assert public == tmp_path / "key.pem.pub"
    assert stat.S_IMODE((tmp_path / "key.pem").stat().st_mode) == 0o600
    private = read_private_key((tmp_path / "key.pem").read_bytes())
    assert key_id(private.public_key()) == key_id(read_public_key(public.read_bytes()))
    before = (tmp_path / "key.pem").read_bytes()
    with pytest.raises(FileExistsError):
        new_key(tmp_path / "key.pem")
    public.unlink()
    with pytest.raises(FileExistsError):
        new_key(tmp_path / "key.pem")
    assert (tmp_path / "key.pem").read_bytes() == before
    assert not public.exists()


def test_a_signature_holds_for_its_manifest_and_key_alone(key: Ed25519PrivateKey) -> None:
    signature = sign(MANIFEST, key)
    assert sign(MANIFEST, key) == signature
    assert faults(signature, MANIFEST) == []
    assert faults(signature, MANIFEST, key.public_key()) == []
    assert faults(signature, MANIFEST + b" ") == ["the signature is not one of this manifest"]
    stranger = Ed25519PrivateKey.generate()
    found = faults(sign(MANIFEST, stranger), MANIFEST, key.public_key())
    assert found[0].startswith("it is signed with another key")
    assert key_id(stranger.public_key()) in found[0]
    assert "the signature is not one of this manifest" in found
    renamed = signature.model_copy(update={"key_id": key_id(stranger.public_key())})
    assert faults(renamed, MANIFEST) == ["the signature's key id is not that of its public key"]
    swapped = signature.model_copy(update={"public_key": sign(b"", stranger).public_key})
    assert faults(swapped, MANIFEST, key.public_key()) != []


@pytest.mark.parametrize("field", ["public_key", "signature"])
@pytest.mark.parametrize("value", ["", "AAAA", base64.b64encode(bytes(64)).decode()])
def test_what_is_no_key_or_signature_does_not_hold(
    key: Ed25519PrivateKey, field: str, value: str
) -> None:
    assert faults(sign(MANIFEST, key).model_copy(update={field: value}), MANIFEST) != []


def test_what_is_not_base64_is_refused(key: Ed25519PrivateKey) -> None:
    document = sign(MANIFEST, key).model_dump() | {"signature": "no base64"}
    with pytest.raises(ValueError, match="signature"):
        Signature.model_validate(document)


def test_other_keys_are_refused(key: Ed25519PrivateKey) -> None:
    other = X25519PrivateKey.generate().private_bytes(*PKCS8, NoEncryption())
    locked = key.private_bytes(*PKCS8, BestAvailableEncryption(b"a passphrase"))
    for pem in (b"", b"-----BEGIN PRIVATE KEY-----\n", other, locked):
        with pytest.raises(SigningKeyRefused):
            read_private_key(pem)
        with pytest.raises(SigningKeyRefused):
            read_public_key(pem)


def test_openssl_makes_such_keys_and_checks_such_signatures(
    tmp_path: Path, key: Ed25519PrivateKey
) -> None:
    openssl = shutil.which("openssl")
    assert openssl is not None, "this test needs the command openssl"
    public = new_key(tmp_path / "key.pem")
    private = read_private_key((tmp_path / "key.pem").read_bytes())
    signature = base64.b64decode(sign(MANIFEST, private).signature)
    (tmp_path / "manifest.json").write_bytes(MANIFEST)
    (tmp_path / "signature").write_bytes(signature)

    def check() -> int:
        command = [openssl, "pkeyutl", "-verify", "-rawin", "-in", "manifest.json"]
        command += ["-pubin", "-inkey", str(public), "-sigfile", "signature"]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, check=False).returncode

    assert check() == 0
    (tmp_path / "manifest.json").write_bytes(MANIFEST + b" ")
    assert check() != 0
    subprocess.run(
        [openssl, "genpkey", "-algorithm", "ed25519", "-out", "theirs.pem"],
        cwd=tmp_path,
        check=True,
        capture_output=True,
    )
    read_private_key((tmp_path / "theirs.pem").read_bytes())
