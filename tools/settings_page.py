"""Writes docs/settings.md from jobs/settings.py: `make docs`. A test fails when it is stale."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from jobs.settings import Settings, is_secret, variable_of

PAGE = Path(__file__).resolve().parent.parent / "docs/settings.md"
_BEFORE = """# Settings

Generated from `jobs/settings.py` by `make docs`: do not edit it here.

Every setting is an environment variable; one that is empty counts as not set. The embedded
profile, everything in one folder on one machine, needs none. The production profile is the same
code with `WIDTHWISE_DATABASE_URL`, `WIDTHWISE_BROKER_URL` and `WIDTHWISE_STORE_URL` set.

| variable | default | meaning |
| --- | --- | --- |
"""
_AFTER = """
A setting with a file may hold a secret. The file that the variable in brackets names then holds the
value (blanks around it do not count), as container engines mount secrets; to set both is an error.
A secret is never logged, and reaches neither the process that inspects uploads nor a job's.

With `s3://`, obstore reads the standard variables too: `AWS_ENDPOINT_URL` (a store that is not
Amazon's; with `AWS_ALLOW_HTTP=true` one without TLS too), `AWS_REGION`, and, if the settings are
missing, `AWS_ACCESS_KEY_ID`, `AWS_SECRET_ACCESS_KEY`, `AWS_SESSION_TOKEN`, or the host's role.
The store must know conditional writes (`If-None-Match: *`), as Amazon's does.

Uvicorn reads `FORWARDED_ALLOW_IPS` (`127.0.0.1,::1` by default): addresses or networks of the
proxies whose `X-Forwarded-For` is believed, for the logs and the audit log.
"""


def render() -> str:
    """The page. LookupError for a setting without a description, or a default that can be shown."""
    rows = [_row(name, field) for name, field in Settings.model_fields.items()]
    return _BEFORE + "\n".join(rows) + "\n" + _AFTER


def _row(name: str, field: FieldInfo) -> str:
    if not field.description:
        raise LookupError(f"{name} has no description in jobs/settings.py")
    variable = variable_of(name)
    meaning = field.description
    if is_secret(field):
        meaning += f" (`{variable}_FILE`)"
    cells = (f"`{variable}`", _default(field), meaning)
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _default(field: FieldInfo) -> str:
    extra: Any = field.json_schema_extra
    if isinstance(extra, dict) and "shown_default" in extra:
        return str(extra["shown_default"])
    if field.default is PydanticUndefined:
        raise LookupError(f"{field.description!r} has no shown_default in jobs/settings.py")
    if field.default is None or field.default == ():
        return "none"
    if isinstance(field.default, bool):
        return str(field.default).lower()
    return str(field.default)


if __name__ == "__main__":
    PAGE.write_text(render(), encoding="utf-8")
