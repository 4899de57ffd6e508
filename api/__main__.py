"""`python -m api`: migrates the database, makes the first API key, serves until a signal."""

from __future__ import annotations

import resource
import signal
import socket
import sys
from contextlib import suppress
from types import FrameType

import structlog
import uvicorn

from api.auth import ensure_first_key
from api.deps import Services
from api.main import create_app
from api.protocol import BoundedHeadProtocol
from jobs.db import Database
from jobs.logs import configure_logging
from jobs.migrate import SchemaBusy, SchemaTooNew, upgrade_once_reachable
from jobs.sandbox import confinement
from jobs.settings import Settings, get_settings

STOP_SECONDS = 15  # that requests in progress have, after the first signal

_log = structlog.get_logger(__name__)

OPEN_FILES = 65_536
STALL_SECONDS = 120  # after which a connection is cut whose client takes nothing of what is sent


class Server(uvicorn.Server):
    """Ends event streams once it is told to stop; Uvicorn alone would wait for their readers."""

    def __init__(self, settings: Settings) -> None:
        self.app = create_app(settings)
        super().__init__(
            uvicorn.Config(
                self.app,
                host=settings.host,
                port=settings.port,
                http=BoundedHeadProtocol,
                log_config=None,
                access_log=False,  # api.middleware writes that line, without keys
                server_header=False,
                timeout_graceful_shutdown=STOP_SECONDS,
            )
        )

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        for server in self.servers:
            for listening in server.sockets:  # from which each connection inherits it
                # The kernel would else wait for ever for whoever has stopped reading.
                listening.setsockopt(
                    socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 1000 * STALL_SECONDS
                )

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        services: Services = self.app.state.services
        services.stopping.set()
        await super().shutdown(sockets)


def prepare(settings: Settings) -> None:
    """The data folder, the newest schema, the first API key. Safe to run many times at once. It
    waits for a database that cannot be reached."""
    settings.data_dir.mkdir(mode=0o700, parents=True, exist_ok=True)  # models and rows lie in it
    database = Database(settings.database_url)
    try:
        upgrade_once_reachable(database)
        ensure_first_key(database, settings.data_dir)
    finally:
        database.close()


def tell_confinement() -> None:
    """Says in the log what uploads are inspected with, and warns of what this kernel refuses."""
    granted = confinement()
    missing = []
    if not granted.namespaces:
        missing.append("without namespaces: a parser that is broken into could reach the network")
    if not granted.landlock:
        missing.append("without Landlock: it could read what the service's user may read")
    if missing:
        _log.warning("sandbox.weakened", detail="; ".join(missing))
    else:
        _log.info("sandbox.confined", namespaces=True, landlock=granted.landlock)


def allow_open_files() -> None:
    """As many as the system lets this process have: each watcher and each upload is one."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = OPEN_FILES if hard == resource.RLIM_INFINITY else min(hard, OPEN_FILES)
    if soft != resource.RLIM_INFINITY and soft < most:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))


def _leave(number: int, frame: FrameType | None) -> None:
    sys.exit(0)


def main() -> None:
    settings = get_settings()
    configure_logging(settings)
    tell_confinement()
    allow_open_files()
    # Or the first process of a container would wait for its database whatever it is told.
    before = signal.signal(signal.SIGTERM, _leave)
    try:
        prepare(settings)
    except (SchemaTooNew, SchemaBusy) as error:
        sys.exit(error.message)
    except KeyboardInterrupt:
        return
    signal.signal(signal.SIGTERM, before)  # Uvicorn has its own while it serves
    with suppress(KeyboardInterrupt):  # which Uvicorn raises again after it has stopped
        Server(settings).run()


if __name__ == "__main__":
    main()
