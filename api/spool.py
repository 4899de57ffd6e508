"""The spool: where uploads wait on this host's disk while they are inspected."""

from __future__ import annotations

import fcntl
import secrets
import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import anyio
import structlog

_LOCK_NAME = ".lock"

_log = structlog.get_logger(__name__)


class Spool:
    """A folder for each process, locked while it lives: so the next start can tell what a crash
    left behind, and removes it."""

    def __init__(self, root: Path) -> None:
        root.mkdir(parents=True, exist_ok=True, mode=0o700)
        with (root / _LOCK_NAME).open("w") as gate:
            # Nobody sweeps between another's mkdir and its lock.
            fcntl.flock(gate, fcntl.LOCK_EX)
            _sweep(root)
            self.folder = root / secrets.token_hex(8)
            self.folder.mkdir(mode=0o700)
            self._lock = (self.folder / _LOCK_NAME).open("w")
            fcntl.flock(self._lock, fcntl.LOCK_EX)

    def close(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)
        self._lock.close()

    @asynccontextmanager
    async def upload_folder(self) -> AsyncIterator[Path]:
        """A fresh folder that is gone afterwards, whatever happens."""
        folder = self.folder / secrets.token_hex(8)
        folder.mkdir(mode=0o700)
        try:
            yield folder
        finally:
            try:
                with anyio.CancelScope(shield=True):
                    await anyio.to_thread.run_sync(_remove, folder)
            finally:
                _remove(folder)  # a server that is forced to stop breaks even that shield


def _sweep(root: Path) -> None:
    for folder in root.iterdir():
        if not folder.is_dir():
            continue
        try:
            with (folder / _LOCK_NAME).open("a") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(folder, ignore_errors=True)
                _log.info("spool.swept", folder=folder.name)
        except BlockingIOError:
            continue  # another process is using it


def _remove(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
