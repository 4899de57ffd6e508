"""What must never be written down: API keys, webhooks' secrets, and passwords in addresses."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

_SECRET = re.compile(r"(wwk_|whsec_)[\w+/=-]+")
_URL_PASSWORD = re.compile(r"(://[^\s:/@]*):[^\s@]+@")


def redact(text: str) -> str:
    """`text` without API keys, webhooks' secrets and passwords in addresses."""
    return _URL_PASSWORD.sub(r"\1:***@", _SECRET.sub(r"\1***", text))


def redact_all(value: Any) -> Any:
    """`value` with every text in it redacted, also the keys and values of what it nests."""
    if isinstance(value, str):
        return redact(value)
    if isinstance(value, Mapping):
        return {redact_all(key): redact_all(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [redact_all(item) for item in value]
    return value
