"""Ed25519 signatures (RFC 8032) of manifests, by a key that an installation keeps. Paddle-free.

Keys are PEM files as openssl writes them; what is signed are the manifest's bytes as they
stand, so that openssl can check a signature too.
"""

from __future__ import annotations

import base64
import hashlib
import os
from pathlib import Path
from typing import Literal

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
    load_pem_public_key,
)
from pydantic import Field, field_validator

from compression.errors import SigningKeyRefused
from compression.spec import Frozen


class Signature(Frozen):
    """signature.json of a bundle. The key in it proves nothing by itself: compare its id."""

    widthwise_signature: Literal[1] = 1
    algorithm: Literal["ed25519"] = "ed25519"
    signed: Literal["manifest.json"] = "manifest.json"
    key_id: str = Field(description="SHA-256 of the raw public key.")
    public_key: str = Field(description="The raw public key (32 bytes) in base64.")
    signature: str = Field(description="64 bytes in base64.")

    @field_validator("public_key", "signature")
    @classmethod
    def _base64(cls, value: str) -> str:
        base64.b64decode(value, validate=True)  # binascii.Error is a ValueError
        return value


def new_key(path: Path) -> Path:
    """Writes a new private key to `path`, for its owner alone, and its public key beside it.

    Returns the public key's file, `path` with .pub appended. FileExistsError where there is
    a key already: who replaces it can no longer sign as before.
    """
    public = path.with_name(path.name + ".pub")
    if public.exists():
        raise FileExistsError(f"{public} exists")
    key = Ed25519PrivateKey.generate()
    pem = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(pem)
    public.write_bytes(
        key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    )
    return public


def read_private_key(pem: bytes) -> Ed25519PrivateKey:
    """SigningKeyRefused where the text is no Ed25519 private key without a passphrase."""
    try:
        key = load_pem_private_key(pem, password=None)
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise SigningKeyRefused(f"the signing key cannot be read: {error}") from error
    if not isinstance(key, Ed25519PrivateKey):
        raise SigningKeyRefused(
            "the signing key is not an Ed25519 key; `python -m compression keygen FILE` makes one"
        )
    return key


def read_public_key(pem: bytes) -> Ed25519PublicKey:
    """SigningKeyRefused where the text is no Ed25519 public key."""
    try:
        key = load_pem_public_key(pem)
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise SigningKeyRefused(f"the public key cannot be read: {error}") from error
    if not isinstance(key, Ed25519PublicKey):
        raise SigningKeyRefused("the public key is not an Ed25519 key")
    return key


def key_id(key: Ed25519PublicKey) -> str:
    """SHA-256 of the raw public key: what two people compare."""
    return hashlib.sha256(key.public_bytes_raw()).hexdigest()


def sign(manifest: bytes, key: Ed25519PrivateKey) -> Signature:
    """Ed25519 is deterministic: the same bytes and key give the same signature."""
    public = key.public_key()
    return Signature(
        key_id=key_id(public),
        public_key=base64.b64encode(public.public_bytes_raw()).decode(),
        signature=base64.b64encode(key.sign(manifest)).decode(),
    )


def faults(
    signature: Signature, manifest: bytes, trusted: Ed25519PublicKey | None = None
) -> list[str]:
    """What does not hold of a signature, in words. `trusted` None takes the key that it names."""
    raw = base64.b64decode(signature.public_key)
    try:
        named = Ed25519PublicKey.from_public_bytes(raw)
    except ValueError:
        return ["the signature's public key is none"]
    found = []
    if signature.key_id != key_id(named):
        found.append("the signature's key id is not that of its public key")
    if trusted is not None and trusted.public_bytes_raw() != raw:
        found.append(f"it is signed with another key: {key_id(named)}, and not {key_id(trusted)}")
    try:
        (trusted or named).verify(base64.b64decode(signature.signature), manifest)
    except InvalidSignature:
        found.append("the signature is not one of this manifest")
    return found
