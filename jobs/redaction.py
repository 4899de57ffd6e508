"""What must never be written down: API keys, webhooks' secrets, and passwords in addresses."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

_SECRET = re.compile(r"(wwk_|whsec_)[\w+/=-]+")
_WORD = re.compile(r"\S+")
_USER = re.compile(r"://[^:/]*:(?=.)")


def redact(text: str) -> str:
    """`text` without API keys, webhooks' secrets and passwords in addresses."""
    text = _SECRET.sub(r"\1***", text)
    return _WORD.sub(lambda match: _without_passwords(match[0]), text) if "@" in text else text


def _without_passwords(word: str) -> str:
    """What stands between a "://user:" and the next @. Piece by piece, for each byte is looked at
    a few times at most: a path that a client sends is redacted too, and may be long."""
    *before, last = word.split("@")
    for number, piece in enumerate(before):
        if user := _USER.search(piece):
            before[number] = piece[: user.end()] + "***"
    return "@".join([*before, last])


def redact_all(value: Any) -> Any:
    """`value` with every text in it redacted, also the keys and values of what it nests."""
    if isinstance(value, str):
        return redact(value)
    if isinstance(value, Mapping):
        return {redact_all(key): redact_all(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [redact_all(item) for item in value]
    return value
