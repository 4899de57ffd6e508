"""A running API in a place of its own, and what it leaves behind there."""

from __future__ import annotations

import logging
import os
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import func, select

from jobs.records import Record
from jobs.sandbox import Usage
from tests.api.conftest import Service, plain_logs, serving

__all__ = ["plain_logs"]  # a fixture of every session that logs

TOKENIZER_SECONDS = 5.0
SECRET = "a-secret-of-the-service"


class Usages(logging.Handler):
    """What each sandbox's child took, as the sandbox logs it."""

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self.found: list[Usage] = []

    def emit(self, record: logging.LogRecord) -> None:
        if hasattr(record, "usage"):
            self.found.append(record.usage)


@pytest.fixture(scope="session")
def temporary(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The temporary folder of this process while the API runs in it."""
    folder, before = tmp_path_factory.mktemp("temporary"), tempfile.tempdir
    tempfile.tempdir = str(folder)
    yield folder
    tempfile.tempdir = before


@pytest.fixture(scope="session")
def service(tmp_path_factory: pytest.TempPathFactory, temporary: Path) -> Iterator[Service]:
    os.environ["WIDTHWISE_TEST_SECRET"] = SECRET
    with serving(
        tmp_path_factory.mktemp("hostile") / "data", sandbox_tokenizer_seconds=TOKENIZER_SECONDS
    ) as running:
        yield running


@pytest.fixture(scope="session")
def usages() -> Iterator[list[Usage]]:
    handler, logger = Usages(), logging.getLogger("jobs.sandbox")
    level = logger.level
    logger.setLevel(logging.INFO)
    logger.addHandler(handler)
    yield handler.found
    logger.removeHandler(handler)
    logger.setLevel(level)


@pytest.fixture(scope="session")
def listener() -> Iterator[socket.socket]:
    """A socket on this host that nobody has a reason to connect to."""
    with socket.create_server(("127.0.0.1", 0), backlog=100) as server:
        server.setblocking(False)
        yield server


def everything(service: Service, temporary: Path) -> dict[str, Any]:
    """All that an upload could leave: rows, objects, files and processes."""
    with service.services.database.reading() as session:
        rows = {
            name: session.scalar(select(func.count()).select_from(table))
            for name, table in Record.metadata.tables.items()
        }
    data = service.settings.data_dir
    return {
        "rows": rows,
        "objects": sorted(service.services.store.keys("")),
        "spool": service.spooled(),
        # SQLite's own files come and go.
        "files": sorted(
            str(path.relative_to(data))
            for path in data.rglob("*")
            if not path.name.startswith("widthwise.db")
        ),
        "temporary": sorted(str(path.relative_to(temporary)) for path in temporary.rglob("*")),
        "processes": _sandboxes(data),
    }


def _sandboxes(data: Path) -> list[int]:
    """Processes whose home lies in the spool: a sandbox's child and what it started."""
    home = f"HOME={data}".encode()
    found = []
    for place in Path("/proc").glob("[0-9]*"):
        try:
            environment = (place / "environ").read_bytes().split(b"\0")
        except OSError:  # it has ended, or is not ours
            continue
        if any(variable.startswith(home) for variable in environment):
            found.append(int(place.name))
    return found
