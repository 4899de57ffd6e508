"""Is the process alive, and is all that it needs there? Neither asks for a key."""

from __future__ import annotations

import secrets
import tempfile
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path

import anyio
import structlog
from fastapi import APIRouter

from api.deps import Services, ServicesDep
from api.errors import ApiError
from api.schemas import Health, Readiness
from jobs.migrate import SchemaUnfit, require_fit

router = APIRouter(tags=["health"])

CHECK_SECONDS = 5.0

_log = structlog.get_logger(__name__)


@router.get("/healthz", summary="The process is alive")
async def healthz() -> Health:
    return Health(status="ok")


@router.get(
    "/readyz",
    summary="The service can do its work",
    description="The database is reachable and migrated, the object store can be written, the "
    "broker answers. 503 with `checks` where one does not.",
)
async def readyz(services: ServicesDep) -> Readiness:
    checks: dict[str, str] = {}
    async with anyio.create_task_group() as group:
        for name, check in CHECKS.items():
            group.start_soon(_run, name, partial(check, services), checks)
    checks = {name: checks[name] for name in CHECKS}
    failed = [name for name, finding in checks.items() if finding != "ok"]
    if failed:
        raise ApiError(
            503,
            "not-ready",
            "; ".join(f"{name}: {checks[name]}" for name in failed) + ".",
            title="The service is not ready",
            headers={"Retry-After": "5"},
            checks=checks,
        )
    return Readiness(status="ok", checks=checks)


class NotReady(Exception):
    """Why, in words that hold no address and no password."""


async def _run(name: str, check: Callable[[], None], checks: dict[str, str]) -> None:
    checks[name] = f"no answer within {CHECK_SECONDS:.0f} seconds"
    with anyio.move_on_after(CHECK_SECONDS):
        try:
            # Threads of its own: requests that wait must not make the service look dead.
            await anyio.to_thread.run_sync(check, abandon_on_cancel=True, limiter=_limiter())
            checks[name] = "ok"
        except NotReady as error:
            checks[name] = str(error)
        except Exception as error:
            _log.warning("readiness.failed", check=name, exc_info=error)
            checks[name] = f"unreachable ({type(error).__name__})"


@cache
def _limiter() -> anyio.CapacityLimiter:
    return anyio.CapacityLimiter(8)


def _database(services: Services) -> None:
    try:
        require_fit(services.database)
    except SchemaUnfit as error:
        raise NotReady(error.message) from None


def _store(services: Services) -> None:
    """Writes, finds and deletes a small object."""
    key = f"probes/{secrets.token_hex(8)}"
    with tempfile.NamedTemporaryFile(dir=services.spool.folder) as probe:
        probe.write(b"ready?")
        probe.flush()
        services.store.put_file(key, Path(probe.name))
    try:
        if services.store.size(key) != len(b"ready?"):
            raise NotReady("what was written is not there")
    finally:
        services.store.delete([key])


def _broker(services: Services) -> None:
    with services.celery.connection_for_write() as connection:
        connection.ensure_connection(max_retries=0, timeout=CHECK_SECONDS)


CHECKS: dict[str, Callable[[Services], None]] = {
    "database": _database,
    "store": _store,
    "broker": _broker,
}
