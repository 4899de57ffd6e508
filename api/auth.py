"""API keys: `Authorization: Bearer wwk_...`, checked before anything of the body is read.

Only the SHA-256 of a key is stored. A key is 32 random bytes, so a plain hash suffices:
there is nothing to guess, and looking a hash up gives a timing attacker nothing.
"""

from __future__ import annotations

import hashlib
import os
import re
import secrets
import stat
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import structlog
from sqlalchemy.exc import IntegrityError
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from api.errors import ApiError, api_problem
from jobs import store
from jobs.db import Database
from jobs.records import DEFAULT_PROJECT

KEY_FILE = "api_key"
_KEY = re.compile(r"wwk_[A-Za-z0-9_-]{43}")
_BEARER = re.compile(r"Bearer +(\S+) *", re.IGNORECASE)

_log = structlog.get_logger(__name__)


@dataclass(frozen=True)
class Principal:
    """Who asks: everything a request reads or writes lies in this project."""

    key_id: str
    project_id: str


def new_key() -> str:
    return "wwk_" + secrets.token_urlsafe(32)


def hash_key(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()


class Authentication:
    """Lets nothing below `prefix` through without a valid key; the principal goes into the
    request's state. A middleware and not a dependency: FastAPI reads a JSON body before it
    resolves dependencies, and a new route cannot forget it."""

    def __init__(self, app: ASGIApp, *, prefix: str) -> None:
        self.app = app
        self.prefix = prefix

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        path = scope.get("path", "")
        guarded = path == self.prefix or path.startswith(self.prefix + "/")
        if scope["type"] != "http" or not guarded:
            await self.app(scope, receive, send)
            return
        database: Database = scope["app"].state.services.database
        try:
            principal = await _authenticate(database, Headers(scope=scope).get("authorization"))
        except ApiError as error:
            await api_problem(scope, error)(scope, receive, send)
            return
        scope.setdefault("state", {})["principal"] = principal
        await self.app(scope, receive, send)


async def _authenticate(database: Database, header: str | None) -> Principal:
    if header is None:
        raise _unauthorized(
            "missing-api-key", "Send your API key in the header Authorization: Bearer wwk_...", ""
        )
    match = _BEARER.fullmatch(header)
    if match is not None and _KEY.fullmatch(match[1]):
        principal = await run_in_threadpool(_find, database, hash_key(match[1]))
        if principal is not None:
            return principal
    raise _unauthorized(
        "invalid-api-key", "This API key is not known, or was revoked.", ', error="invalid_token"'
    )


def _find(database: Database, hash: str) -> Principal | None:
    with database.reading() as session:
        key = store.find_api_key(session, hash)
        return None if key is None else Principal(key.id, key.project_id)


def _unauthorized(code: str, detail: str, challenge: str) -> ApiError:
    return ApiError(
        401,
        code,
        detail,
        headers={"WWW-Authenticate": f'Bearer realm="widthwise"{challenge}'},
    )


def ensure_first_key(database: Database, data_dir: Path) -> None:
    """Makes the first API key where there is none: its hash goes into the database, the key
    into `data_dir/api_key`, readable by its owner alone. Safe to run many times at once."""
    with database.reading() as session:
        if store.has_api_keys(session):
            return
    path = data_dir / KEY_FILE
    _write_once(path, new_key())
    key = _read_private(path)  # ours, or that of a process that was quicker
    try:
        with database.transaction() as session:
            if store.find_api_key(session, hash_key(key)) is None:
                store.add_api_key(
                    session, project_id=DEFAULT_PROJECT, name="first key", hash=hash_key(key)
                )
    except IntegrityError:
        return  # another process has just stored the same key
    _log.info("api_key.created", path=str(path))


def _write_once(path: Path, key: str) -> None:
    """The file appears with all of its content or not at all, and is never overwritten."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
    try:
        with os.fdopen(descriptor, "w") as file:
            os.fchmod(descriptor, 0o600)  # whatever the umask
            file.write(key + "\n")
            file.flush()
            os.fsync(descriptor)
        with suppress(FileExistsError):
            os.link(draft, path, follow_symlinks=False)
    finally:
        draft.unlink()


def _read_private(path: Path) -> str:
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
    with os.fdopen(descriptor) as file:
        status = os.fstat(descriptor)
        key = file.read(100).strip()
    if not stat.S_ISREG(status.st_mode) or status.st_mode & 0o077:
        raise PermissionError(f"{path} can be read by others: remove it, a new one is made")
    if not _KEY.fullmatch(key):
        raise ValueError(f"{path} holds no API key: remove it, a new one is made")
    return key
