"""API keys: `Authorization: Bearer wwk_...`, checked before anything of the body is read."""

from __future__ import annotations

import os
import re
import secrets
import stat
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import structlog
from sqlalchemy.exc import DBAPIError, IntegrityError
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from api.errors import ApiError, api_problem
from jobs import access
from jobs.access import Actor, hash_key, new_key
from jobs.db import Database, now
from jobs.idempotency import Hold
from jobs.records import DEFAULT_PROJECT
from jobs.roles import Role

KEY_FILE = "api_key"
_KEY = re.compile(r"wwk_[A-Za-z0-9_-]{43}")
_BEARER = re.compile(r"Bearer +(\S+) *", re.IGNORECASE)

_log = structlog.get_logger(__name__)


@dataclass(frozen=True)
class Principal:
    """Who asks, and as what: everything a request reads or writes lies in this project. `hold`: of
    a request with an Idempotency-Key, given to it by api.idempotency."""

    key_id: str
    key_name: str
    project_id: str
    role: Role
    expires_at: datetime | None
    request_id: str | None
    client: str | None
    hold: Hold | None = None

    @property
    def actor(self) -> Actor:
        return Actor(self.project_id, self.key_id, self.request_id, self.client, self.hold)

    @property
    def is_operator(self) -> bool:
        """Whether this key may make projects: an admin's of the installation's first project."""
        return self.project_id == DEFAULT_PROJECT and self.role.includes(Role.ADMIN)


class Authentication:
    """Lets nothing below `prefix` through without a valid key; the principal goes into the
    request's state. A middleware and not a dependency: FastAPI reads a JSON body before it
    resolves dependencies, and a new route cannot forget it."""

    def __init__(self, app: ASGIApp, *, prefix: str) -> None:
        self.app = app
        self.prefix = prefix

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or not lies_below(scope["path"], self.prefix):
            await self.app(scope, receive, send)
            return
        database: Database = scope["app"].state.services.database
        try:
            principal, unrecorded = await _authenticate(database, scope)
        except ApiError as error:
            await api_problem(scope, error)(scope, receive, send)
            return
        scope.setdefault("state", {})["principal"] = principal
        await self.app(scope, receive, send)
        if unrecorded:  # now that the answer is out: a write may wait for other writers
            await run_in_threadpool(_record_use, database, principal.key_id)


def lies_below(path: str, prefix: str) -> bool:
    return path == prefix or path.startswith(prefix + "/")


async def _authenticate(database: Database, scope: Scope) -> tuple[Principal, bool]:
    """The principal, and whether this use of its key is to be written down."""
    header = Headers(scope=scope).get("authorization")
    if header is None:
        raise _unauthorized(
            "missing-api-key", "Send your API key in the header Authorization: Bearer wwk_...", ""
        )
    match = _BEARER.fullmatch(header)
    if match is not None and _KEY.fullmatch(match[1]):
        found = await run_in_threadpool(_find, database, hash_key(match[1]), scope)
        if found is not None:
            return found
    raise _unauthorized(
        "invalid-api-key",
        "This API key is not known, has expired or was revoked.",
        ', error="invalid_token"',
    )


def _find(database: Database, hash: str, scope: Scope) -> tuple[Principal, bool] | None:
    with database.reading() as session:
        at = now(session)
        key = access.find_api_key(session, hash, at=at)
    if key is None:
        return None
    principal = Principal(
        key_id=key.id,
        key_name=key.name,
        project_id=key.project_id,
        role=key.role,
        expires_at=key.expires_at,
        request_id=scope.get("state", {}).get("request_id"),
        client=scope["client"][0][:64] if scope.get("client") else None,
    )
    return principal, access.use_is_unrecorded(key, at=at)


def _record_use(database: Database, key_id: str) -> None:
    try:
        with database.transaction() as session:
            access.record_use(session, key_id)
    except DBAPIError as error:
        # The request was answered; a busy or read-only database costs this one line alone.
        _log.warning("api_key.use_not_recorded", key_id=key_id, error=str(error.orig))


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
        if access.has_api_keys(session):
            return
    path = data_dir / KEY_FILE
    _write_once(path, new_key())
    key = _read_private(path)  # ours, or that of a process that was quicker
    try:
        with database.transaction() as session:
            if access.find_api_key(session, hash_key(key), at=now(session)) is None:
                record = access.add_api_key(
                    session,
                    project_id=DEFAULT_PROJECT,
                    name="first key",
                    hash=hash_key(key),
                    role=Role.ADMIN,
                )
                access.record_action(
                    session, Actor(DEFAULT_PROJECT), "key.created", record.id, name=record.name
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
