"""Starts the API and a worker on this machine, and stops both: `make serve`.

Standard library only. Each service runs in its own environment, with the same command that its
container uses (`python -m api`, `python -m worker`), in a session of its own: a Ctrl-C reaches
this process alone, which then ends both in order. The death of either ends the other.

Exit status: 0 after a requested stop, 1 when a service died, never became ready or had to be
killed, 2 when nothing was started (port taken, environment missing).
"""

from __future__ import annotations

import argparse
import ctypes
import http.client
import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, Self

ROOT = Path(__file__).resolve().parent.parent
API_PYTHON = ROOT / ".venv/api/bin/python"
WORKER_PYTHON = ROOT / ".venv/worker/bin/python"
READY_SECONDS = 60.0
GRACE_SECONDS = 30.0  # the worker hands its job back meanwhile


class CannotStart(Exception):
    """Nothing was started; the message says why and what to do."""


class ServiceDied(Exception):
    """A service ended, or never answered, though nobody asked it to stop."""


@dataclass(frozen=True)
class Address:
    host: str
    port: int

    @property
    def reachable(self) -> str:
        """The host to connect to: a wildcard address is reached on loopback."""
        return {"0.0.0.0": "127.0.0.1", "::": "::1", "": "127.0.0.1"}.get(self.host, self.host)

    @property
    def url(self) -> str:
        host = f"[{self.reachable}]" if ":" in self.reachable else self.reachable
        return f"http://{host}:{self.port}"


def effective_settings(environment: Mapping[str, str]) -> dict[str, Any]:
    """Host, port and data folder as the services will see them; jobs.settings alone decides.

    CannotStart when the API's environment is missing or a setting is invalid.
    """
    if not API_PYTHON.exists() or not WORKER_PYTHON.exists():
        raise CannotStart("the environments in .venv/ are missing: run `make serve`, not this file")
    program = (
        "import json; from jobs.settings import get_settings; s = get_settings(); "
        "print(json.dumps({'host': s.host, 'port': s.port, 'data_dir': str(s.data_dir)}))"
    )
    done = subprocess.run(
        [API_PYTHON, "-c", program], cwd=ROOT, env=dict(environment), capture_output=True, text=True
    )
    if done.returncode != 0:
        raise CannotStart(f"the settings are not valid:\n{done.stderr.strip()}")
    settings: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return settings


def require_free_port(address: Address) -> None:
    """CannotStart when something listens there already, or the address is not this machine's."""
    family = socket.AF_INET6 if ":" in address.host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((address.host, address.port))
        except OSError as error:
            raise CannotStart(
                f"cannot listen on {address.host}:{address.port} ({error.strerror}): another "
                f"program may be using the port. Choose one with make serve ARGS='--port 8001' "
                f"or WIDTHWISE_PORT."
            ) from error


def free_port(host: str = "127.0.0.1") -> int:
    """A port that was free a moment ago."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.bind((host, 0))
        port: int = probe.getsockname()[1]
        return port


def _die_with_parent() -> None:
    """In the child, before exec: even if this supervisor is killed with SIGKILL, they end."""
    pr_set_pdeathsig = 1
    if _LIBC is not None:
        _LIBC.prctl(pr_set_pdeathsig, signal.SIGTERM)


# Loaded here and not after the fork, where only simple calls are safe.
_LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None


class Supervisor:
    """The API and one worker as child processes.

    Used as a context manager, it stops both however the block ends. `log_dir`: where each
    service's output goes (api.log, worker.log); None lets them write to this terminal.
    """

    def __init__(
        self, *, address: Address, environment: Mapping[str, str], log_dir: Path | None = None
    ) -> None:
        self.address = address
        self._environment = {
            **environment,
            "WIDTHWISE_HOST": address.host,
            "WIDTHWISE_PORT": str(address.port),
            "PYTHONUNBUFFERED": "1",
        }
        self._log_dir = log_dir
        self._services: dict[str, subprocess.Popen[bytes]] = {}
        self.hurry = False  # set by a second signal: stop waiting, kill

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()

    def start(self) -> None:
        """Returns when the API is ready and the worker is started. ServiceDied otherwise."""
        self._spawn("api", API_PYTHON)
        self._await_ready()
        # After the API, whose start has brought the database to its newest version.
        self._spawn("worker", WORKER_PYTHON)

    def check(self) -> None:
        """ServiceDied when a service has ended."""
        for name, process in self._services.items():
            if (status := process.poll()) is not None:
                how = f"with status {status}" if status >= 0 else signal.Signals(-status).name
                where = f"; its output is in {self._log_dir / name}.log" if self._log_dir else ""
                raise ServiceDied(f"the {name} ended ({how}){where}")

    def wait(self) -> None:
        """Until a service dies: ServiceDied. A signal handler that raises ends it too."""
        while True:
            self.check()
            time.sleep(0.2)

    def stop(self) -> bool:
        """SIGTERM to both, SIGKILL after the grace. True when nothing had to be killed."""
        # The worker first: it hands its job back while the database is still in use by nobody else.
        for process in reversed(self._services.values()):
            if process.poll() is None:
                process.terminate()
        deadline = time.monotonic() + GRACE_SECONDS
        while any(p.poll() is None for p in self._services.values()):
            if self.hurry or time.monotonic() > deadline:
                break
            time.sleep(0.05)
        clean = True
        for process in self._services.values():
            if process.poll() is None:
                clean = False
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        self._services.clear()
        return clean

    def _spawn(self, name: str, python: Path) -> None:
        output = None
        if self._log_dir is not None:
            self._log_dir.mkdir(parents=True, exist_ok=True)
            output = (self._log_dir / f"{name}.log").open("ab")
        try:
            self._services[name] = subprocess.Popen(
                [python, "-m", name],
                cwd=ROOT,
                env=self._environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT if output else None,
                start_new_session=True,
                preexec_fn=_die_with_parent,
            )
        finally:
            if output is not None:
                output.close()

    def _await_ready(self) -> None:
        deadline = time.monotonic() + READY_SECONDS
        last = "no answer"
        while time.monotonic() < deadline:
            self.check()
            connection = http.client.HTTPConnection(
                self.address.reachable, self.address.port, timeout=5
            )
            try:
                connection.request("GET", "/readyz")
                response = connection.getresponse()
                body = response.read(2000).decode(errors="replace")
                if response.status == 200:
                    return
                last = f"status {response.status}: {body}"
            except (OSError, http.client.HTTPException) as error:
                last = str(error)
            finally:
                connection.close()
            time.sleep(0.1)
        raise ServiceDied(f"the API was not ready after {READY_SECONDS:.0f} s ({last})")


class Interrupted(BaseException):
    """A signal asked for a stop. Not an Exception: no handler of errors may swallow it."""


def stop_on_signals(supervisor: Supervisor) -> None:
    """The first SIGINT, SIGTERM or SIGHUP raises Interrupted here; a second stops the waiting."""
    seen = False

    def handler(number: int, frame: FrameType | None) -> None:
        nonlocal seen
        if seen:
            supervisor.hurry = True
            return
        seen = True
        raise Interrupted(signal.Signals(number).name)

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, handler)


def _announce(address: Address, data_dir: Path) -> None:
    key_file = data_dir / "api_key"
    print(
        f"""
Widthwise is ready at {address.url}   (API description: {address.url}/docs)
The data is in {data_dir}, the first API key in {key_file}.

    KEY=$(cat {shlex.quote(str(key_file))})
    curl -H "Authorization: Bearer $KEY" {address.url}/v1/jobs

Ctrl-C stops the API and the worker.
""",
        flush=True,
    )


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="serve", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--host", help="address to listen on (WIDTHWISE_HOST; 127.0.0.1)")
    parser.add_argument("--port", type=int, help="port to listen on, 0 for a free one")
    parser.add_argument("--data-dir", type=Path, help="data folder (WIDTHWISE_DATA_DIR; ./data)")
    parser.add_argument("--log-dir", type=Path, help="write api.log and worker.log there")
    options = parser.parse_args(arguments)

    environment = dict(os.environ)
    if options.data_dir is not None:
        environment["WIDTHWISE_DATA_DIR"] = str(options.data_dir.resolve())
    if options.host is not None:
        environment["WIDTHWISE_HOST"] = options.host
    if options.port is not None:
        environment["WIDTHWISE_PORT"] = str(options.port)
    try:
        settings = effective_settings(environment)
        address = Address(settings["host"], int(settings["port"]) or free_port())
        require_free_port(address)
    except CannotStart as error:
        print(f"serve: {error}", file=sys.stderr)
        return 2

    supervisor = Supervisor(address=address, environment=environment, log_dir=options.log_dir)
    stop_on_signals(supervisor)
    status = 0
    try:
        supervisor.start()
        _announce(address, Path(settings["data_dir"]))
        supervisor.wait()
    except Interrupted as stop:
        print(f"\n{stop}: stopping the API and the worker", file=sys.stderr, flush=True)
    except ServiceDied as error:
        print(f"serve: {error}; stopping", file=sys.stderr, flush=True)
        status = 1
    finally:
        try:
            clean = supervisor.stop()
        except Interrupted:  # the first signal came while a dead service's peer was being stopped
            supervisor.hurry = True
            clean = supervisor.stop()
    if not clean:
        print("serve: a service did not stop in time and was killed", file=sys.stderr)
        status = 1
    return status


if __name__ == "__main__":
    sys.exit(main())
