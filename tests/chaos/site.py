"""What the faults hit: servers, a host with the API and two with a worker each.

Everything that dies is started again, as a service manager would. All of it is this process's own:
it runs in a process namespace and a mount namespace that the kernel clears away with this process
(see __main__), so no signal can reach anything else, and nothing outlives it.
"""

from __future__ import annotations

import errno
import os
import subprocess
import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from types import TracebackType
from typing import Self

import httpx

from tests.chaos.evidence import Death
from tests.e2e.hosts import Host
from tests.e2e.service import processes_of
from tests.services import (
    free_port,
    new_database,
    postgresql_folder,
    redis_server,
    running_postgresql,
    wait_until,
)
from tools.serve import API_PYTHON, WORKER_PYTHON

LEASE_SECONDS = 5.0
CHECKPOINT_SECONDS = 0.5  # some in each training; storing one takes less
ORPHAN_GRACE_SECONDS = 15.0
SETTINGS = {
    "WIDTHWISE_LEASE_SECONDS": str(LEASE_SECONDS),
    "WIDTHWISE_RECONCILE_SECONDS": "1",
    "WIDTHWISE_CANCEL_POLL_SECONDS": "0.5",
    "WIDTHWISE_STOP_GRACE_SECONDS": "5",
    "WIDTHWISE_CHECKPOINT_SECONDS": str(CHECKPOINT_SECONDS),
    "WIDTHWISE_PROGRESS_SECONDS": "0",  # an event of every step: then they can be counted
    # A run that is lost was lost to us.
    "WIDTHWISE_MAX_RUNS": "1000",
    "WIDTHWISE_ORPHAN_GRACE_SECONDS": str(ORPHAN_GRACE_SECONDS),
    "WIDTHWISE_RATE_LIMIT_PER_MINUTE": "0",
}
STORE_MEBIBYTES = 256
DISK = f"a tmpfs of {STORE_MEBIBYTES} MiB in a mount namespace of its own"
API_ADDRESS = "127.0.0.2"
RESTART_SECONDS = 1.0  # after a process that ended by itself
KEEP_SECONDS = 0.2


class Server:
    """One that can be stopped, and started again at the same address."""

    def __init__(self, start: Callable[[], AbstractContextManager[str]]) -> None:
        self._start = start
        self._running = ExitStack()
        self.url = ""

    def start(self) -> None:
        self.url = self._running.enter_context(self._start())

    def stop(self) -> None:
        self._running.close()


class Disk:
    """A small file system that can be filled to the last byte."""

    def __init__(self, folder: Path) -> None:
        self._filler = folder / "filler"
        self.store = folder / "objects"

    def fill(self) -> None:
        with self._filler.open("ab") as file:
            size = self._filler.stat().st_size
            for piece in (1 << 24, 1 << 20, 1 << 16, 1 << 12):
                while True:
                    try:
                        os.posix_fallocate(file.fileno(), size, piece)
                    except OSError as error:
                        if error.errno != errno.ENOSPC:
                            raise
                        break
                    size += piece

    def free(self) -> None:
        self._filler.unlink(missing_ok=True)


class Kept:
    """A process that is started again when it has ended."""

    def __init__(self, name: str, start: Callable[[], subprocess.Popen[bytes]], host: Host) -> None:
        self.name = name
        self.host = host
        self._start = start
        self.process = start()
        self.was_killed = False
        self.restart_at = 0.0

    @property
    def pid(self) -> int:
        return self.process.pid

    def start_again(self) -> None:
        self.process = self._start()
        self.was_killed = False


class Site:
    """`folder` is new, and gets everything; `folder/disk` is mounted already."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.disk = Disk(folder / "disk")
        self.deaths: list[Death] = []
        self.lock = threading.Lock()
        self._open = ExitStack()
        self._stopping = threading.Event()
        self._keeper = threading.Thread(target=self._keep, name="keeper", daemon=True)
        self._failure: BaseException | None = None  # of the keeper
        redis_port, postgresql_port = free_port(), free_port()
        records = self._open.enter_context(postgresql_folder())
        self.redis = Server(lambda: redis_server(port=redis_port))
        self.postgresql = Server(lambda: running_postgresql(records, port=postgresql_port))
        self.api_url = f"http://{API_ADDRESS}:{free_port()}"
        self.hosts: list[Host] = []
        self.workers: list[Kept] = []

    def __enter__(self) -> Self:
        try:
            for server in (self.redis, self.postgresql):
                server.start()
                self._open.callback(server.stop)
            self.database_url = new_database(self.postgresql.url, "chaos")
            self.disk.store.mkdir()
            self.api = self._kept_api()
            wait_until(self._api_answers, "the API is ready", seconds=60)
            self.workers = [self._kept_worker(number) for number in (0, 1)]
            self._keeper.start()
        except BaseException:
            self._clear()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._clear()

    @property
    def address(self) -> str:
        """Of the database, as psycopg takes it."""
        return self.database_url.replace("+psycopg", "")

    @property
    def key(self) -> str:
        return (self.api.host.data_dir / "api_key").read_text().strip()

    def check(self) -> None:
        """Raises what ended the keeper before its time, if something did."""
        if self._failure is not None:
            raise self._failure

    def stop(self) -> list[str]:
        """SIGTERM to API and workers; in words what of them did not end as it should, or stayed."""
        self._stopping.set()
        self._keeper.join()
        self.check()
        wrong = []
        for kept in (self.api, *self.workers):
            status = kept.process.poll()
            if status is not None and not (kept.was_killed or kept.restart_at):
                words = kept.host.logs()[-1500:]
                wrong.append(f"{kept.name} ended by itself with {status}: {words}")
            try:
                if status is None:
                    kept.host.stop()
            except (AssertionError, subprocess.TimeoutExpired) as error:
                wrong.append(f"{kept.name} did not stop: {str(error)[-2000:]}")
            wrong += [
                f"{kept.name} left {line} behind"
                for line in processes_of(kept.host.data_dir).values()
            ]
        return wrong

    def left(self) -> list[str]:
        """Files of runs on the workers' own disks."""
        return [
            path.relative_to(self.folder).as_posix()
            for kept in self.workers
            for path in sorted((kept.host.data_dir / "work").glob("*"))
        ]

    def _clear(self) -> None:
        self._stopping.set()
        if self._keeper.ident is not None:
            self._keeper.join()
        for host in self.hosts:
            host.lose()
        self._open.close()

    def _host(self, name: str) -> Host:
        host = Host(
            self.folder / name,
            WIDTHWISE_DATABASE_URL=self.database_url,
            WIDTHWISE_BROKER_URL=self.redis.url,
            WIDTHWISE_STORE_URL=self.disk.store.as_uri(),
            **SETTINGS,
        )
        self.hosts.append(host)
        return host

    def _kept_api(self) -> Kept:
        host, port = self._host("api"), self.api_url.rpartition(":")[2]
        return Kept(
            "api",
            lambda: host.start(API_PYTHON, "api", WIDTHWISE_HOST=API_ADDRESS, WIDTHWISE_PORT=port),
            host,
        )

    def _kept_worker(self, number: int) -> Kept:
        host = self._host(f"worker-{number}")
        return Kept(f"worker-{number}", lambda: host.start(WORKER_PYTHON, "worker"), host)

    def _api_answers(self) -> bool:
        assert self.api.process.poll() is None, self.api.host.logs()
        try:
            return httpx.get(f"{self.api_url}/readyz", timeout=10).status_code == 200
        except httpx.TransportError:
            return False

    def _keep(self) -> None:
        try:
            self._keep_all()
        except BaseException as failure:
            self._failure = failure

    def _keep_all(self) -> None:
        while not self._stopping.wait(KEEP_SECONDS):
            with self.lock:
                for kept in (self.api, *self.workers):
                    status = kept.process.poll()
                    if status is None:
                        continue
                    if not kept.was_killed and not kept.restart_at:
                        words = kept.host.logs()[-1500:]
                        self.deaths.append(Death(time.time(), kept.name, status, words))
                        kept.restart_at = time.monotonic() + RESTART_SECONDS
                    if time.monotonic() >= kept.restart_at:
                        kept.restart_at = 0.0
                        kept.start_again()
