"""`make serve` as a test drives it: real processes, a data folder of their own, REST."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tools.rest import Client

ROOT = Path(__file__).resolve().parent.parent.parent
WAIT_SECONDS = 120


# The tests' jobs are too short to be worth a measurement of the machine.
QUICK = {"WIDTHWISE_MEASURE_TRAINING": "false"}


@dataclass
class Service:
    """A running supervisor with its API and worker."""

    process: subprocess.Popen[str]
    url: str
    data_dir: Path

    @property
    def client(self) -> Client:
        return Client(self.url, (self.data_dir / "api_key").read_text().strip())

    def stop(self, number: int = signal.SIGTERM) -> int:
        self.process.send_signal(number)
        return self.process.wait(WAIT_SECONDS)


def service_environment(data_dir: Path, **settings: str) -> dict[str, str]:
    """This environment with these settings of Widthwise and no others."""
    inherited = {k: v for k, v in os.environ.items() if not k.startswith("WIDTHWISE_")}
    return {**inherited, "WIDTHWISE_DATA_DIR": str(data_dir), **QUICK, **settings}


@contextmanager
def serving(data_dir: Path, **settings: str) -> Iterator[Service]:
    """tools/serve.py on a free port; on leaving, stopped and nothing of it left running."""
    logs = data_dir.with_name(data_dir.name + "-logs")
    process = subprocess.Popen(
        [sys.executable, "-m", "tools.serve", "--port", "0", "--log-dir", str(logs)],
        cwd=ROOT,
        env=service_environment(data_dir, **settings),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        yield Service(process, _ready_url(process, logs), data_dir)
    finally:
        if process.poll() is None:
            process.terminate()
            try:
                process.wait(WAIT_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        if process.stdout is not None:
            process.stdout.close()
    left = processes_of(data_dir)
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    assert not left, f"still running after the stop: {left}\n{_logs(logs)}"


def processes_of(data_dir: Path) -> dict[int, str]:
    """Running processes of this data folder: pid -> command line.

    The services have the folder in their environment; a job's process, whose environment is
    scrubbed, has its temporary files and its working folder below it.
    """
    marks = (f"{data_dir}\0".encode(), f"{data_dir}/".encode())
    found = {}
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit() or int(entry.name) == os.getpid():
            continue
        try:
            environment = (entry / "environ").read_bytes()
            inside = (entry / "cwd").readlink().is_relative_to(data_dir)
            if inside or any(mark in environment for mark in marks):
                line = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode()
                state = (entry / "stat").read_text().rpartition(")")[2].split()[0]
                if state != "Z":
                    found[int(entry.name)] = line.strip()
        except OSError:
            continue  # it ended meanwhile
    return found


def pid_of(data_dir: Path, *, command: str) -> int:
    """The one process of this data folder that runs this, and not on another's behalf."""
    found = processes_of(data_dir).items()
    (pid,) = [pid for pid, line in found if line.endswith(command) and " -- " not in line]
    return pid


def upload_folder(client: Client, path: str, folder: Path) -> str:
    """The folder as a .tar.gz with one top-level folder; the new record's id."""
    archive = folder.with_name(f"{folder.name}.tar.gz")
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(folder, arcname=folder.name)
    uploaded: str = client.upload(path, archive, name=folder.name)["id"]
    return uploaded


def wait_for_event(client: Client, job_id: str, *, stage: str) -> None:
    """Until the job has told of this stage. AssertionError when it ends or stays silent."""
    deadline = time.monotonic() + WAIT_SECONDS
    while time.monotonic() < deadline:
        page = client.get(f"/v1/jobs/{job_id}/events", after=0, limit=100)
        if any(event["data"].get("stage") == stage for event in page["items"]):
            return
        assert not page["ended"], page["items"][-1]
        time.sleep(0.1)
    raise AssertionError(f"{job_id} never reached the stage {stage}")


def events_so_far(client: Client, job_id: str) -> list[dict[str, Any]]:
    events: list[dict[str, Any]] = []
    while True:
        after = events[-1]["number"] if events else 0
        page = client.get(f"/v1/jobs/{job_id}/events", after=after, limit=100)
        if not page["items"]:
            return events
        events += page["items"]


def events_until_the_end(client: Client, job_id: str) -> list[dict[str, Any]]:
    """All events, from the first to the last; the job must end in time."""
    deadline = time.monotonic() + 2 * WAIT_SECONDS

    def alive() -> None:
        assert time.monotonic() < deadline, f"{job_id} did not end"

    return list(client.follow(job_id, alive=alive, pause=0.2))


def _ready_url(process: subprocess.Popen[str], logs: Path) -> str:
    assert process.stdout is not None
    told = ""
    for line in process.stdout:
        told += line
        if found := re.search(r"ready at (\S+)", line):
            return found[1]
    raise AssertionError(f"serve ended with {process.wait()}:\n{told}\n{_logs(logs)}")


def _logs(folder: Path) -> str:
    paths: Mapping[str, Path] = {path.name: path for path in sorted(folder.glob("*.log"))}
    return "\n".join(f"--- {name}\n{path.read_text()[-3000:]}" for name, path in paths.items())
