"""Hosts of the production profile: processes that share servers and no folder."""

from __future__ import annotations

import os
import signal
import subprocess
from pathlib import Path

import httpx

from tests.e2e.service import ROOT, processes_of, service_environment
from tests.services import free_port, wait_until
from tools.rest import Client
from tools.serve import API_PYTHON, WORKER_PYTHON

STOP_SECONDS = 30


class Host:
    """What runs on it has its data, home, working and temporary folders here, and is told of no
    other host."""

    def __init__(self, folder: Path, **settings: str) -> None:
        for part in ("data", "home", "tmp"):
            (folder / part).mkdir(parents=True)
        self.folder = folder
        self.data_dir = folder / "data"
        self._settings = settings
        self._processes: list[subprocess.Popen[bytes]] = []

    def start(self, python: Path, module: str, **settings: str) -> subprocess.Popen[bytes]:
        environment = service_environment(self.data_dir, **self._settings, **settings) | {
            "HOME": str(self.folder / "home"),
            "TMPDIR": str(self.folder / "tmp"),
            "PYTHONPATH": str(ROOT),
            "PYTHONDONTWRITEBYTECODE": "1",
        }
        with (self.folder / f"{module}.log").open("ab") as log:
            process = subprocess.Popen(
                [python, "-m", module], cwd=self.folder, env=environment, stdout=log, stderr=log
            )
        self._processes.append(process)
        return process

    def start_api(self) -> str:
        """Its URL, once it is ready. A loopback address of its own stands for another machine."""
        host, port = "127.0.0.2", free_port()
        process = self.start(API_PYTHON, "api", WIDTHWISE_HOST=host, WIDTHWISE_PORT=str(port))
        url = f"http://{host}:{port}"

        def ready() -> bool:
            assert process.poll() is None, self.logs()
            try:
                return httpx.get(f"{url}/readyz", timeout=10).status_code == 200
            except httpx.TransportError:
                return False

        wait_until(ready, "the API is ready", seconds=60)
        return url

    def start_worker(self) -> int:
        """The process's id, once it takes jobs."""
        process = self.start(WORKER_PYTHON, "worker")

        def started() -> bool:
            assert process.poll() is None, self.logs()
            return "worker started" in self.logs()

        wait_until(started, "the worker has started", seconds=60)
        return process.pid

    def client(self, url: str) -> Client:
        """With the first key, which an API of this host has made."""
        return Client(url, (self.data_dir / "api_key").read_text().strip())

    def runs(self, pid: int) -> bool:
        return any(process.pid == pid and process.poll() is None for process in self._processes)

    def lose(self) -> None:
        """As if its power failed: everything on it ends at once."""
        for process in self._processes:
            process.kill()
        for pid in processes_of(self.data_dir):
            os.kill(pid, signal.SIGKILL)
        self._wait_for_the_end()

    def stop(self) -> None:
        """SIGTERM; AssertionError where something fails, takes too long or stays."""
        running = [process for process in self._processes if process.poll() is None]
        for process in running:
            process.terminate()
        for process in running:
            # Uvicorn ends by the signal that it was sent, once it has drained.
            assert process.wait(STOP_SECONDS) in (0, -signal.SIGTERM), self.logs()
        self._wait_for_the_end()

    def logs(self) -> str:
        """Also of a process that was killed in the midst of a letter."""
        paths = sorted(self.folder.glob("*.log"))
        return "\n".join(path.read_text(errors="replace") for path in paths)

    def _wait_for_the_end(self) -> None:
        for process in self._processes:
            process.wait(STOP_SECONDS)
        wait_until(lambda: not processes_of(self.data_dir), "nothing runs here any more")
