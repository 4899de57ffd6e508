"""The API as a process: what it imports, what it writes, how it stops."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import structlog
from structlog.testing import capture_logs

from api import __main__ as program
from jobs import store
from jobs.db import Database
from jobs.records import DEFAULT_PROJECT
from jobs.sandbox import Confinement
from jobs.settings import Settings
from tests.api.conftest import archive, wait_for
from tests.builders import tiny_bert
from tests.services import free_port, new_database, postgresql_folder, running_postgresql

ROOT = Path(__file__).resolve().parents[2]

WITHOUT_PADDLE = """
import sys

class NoPaddle:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0].startswith("paddle"):
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, NoPaddle())
import api.main, api.__main__
from jobs.settings import Settings
api.main.create_app(Settings(data_dir=sys.argv[1]))
print([name for name in sys.modules if "paddle" in name or name.startswith("worker")])
"""


def test_the_api_imports_without_paddle(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", WITHOUT_PADDLE, str(tmp_path / "data")],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout.strip()) == (0, "[]"), done.stderr
    assert not (tmp_path / "data").exists()  # an import, and even an application, has no effect


def test_a_process_starts_serves_and_stops_on_a_signal(tmp_path: Path) -> None:
    data_dir = tmp_path / "data"
    log = tmp_path / "log"
    settings = {"WIDTHWISE_DATA_DIR": str(data_dir), "WIDTHWISE_PORT": "0"}
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "api"],
            cwd=ROOT,
            env={**os.environ, **settings},
            stdout=output,
            stderr=output,
            umask=0,
        )
    try:
        wait_for(lambda: re.search(r"http://127\.0\.0\.1:(\d+)", log.read_text()), seconds=60)
        found = re.search(r"http://127\.0\.0\.1:(\d+)", log.read_text())
        assert found is not None
        url = found[0]
        key = (data_dir / "api_key").read_text().strip()
        headers = {"Authorization": f"Bearer {key}"}
        with httpx.Client(base_url=url, headers=headers, trust_env=False) as client:
            assert client.get("/readyz").status_code == 200
            refused = client.get(f"/v1/jobs?oops={key}")
            assert refused.status_code == 422
            assert key not in refused.text
            assert client.get(f"/v1/{key}").status_code == 404
            body = {"name": f"for {key}", "role": "viewer"}
            made = client.post("/v1/keys", json=body, headers={"X-Request-ID": key}).json()["key"]
            wrong = {"Authorization": f"Bearer {made}x"}
            assert client.get("/v1/jobs", headers=wrong).status_code == 401
            assert client.post(f"/v1/jobs/{made}/cancel").status_code == 404
            assert key not in client.get("/v1/audit").text
        assert (data_dir / "api_key").stat().st_mode & 0o777 == 0o600
        assert data_dir.stat().st_mode & 0o777 == 0o700
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(30)
    told = log.read_text()
    assert str(data_dir / "api_key") in told  # where the key lies
    assert key not in told  # and never the key itself
    assert made not in told
    assert "Traceback" not in told
    assert "sandbox.confined" in told or "sandbox.weakened" in told  # as this kernel has it
    assert list((data_dir / "spool").glob("*/")) == []


def test_a_database_that_is_away_at_the_start_is_waited_for(tmp_path: Path) -> None:
    """And a process that is told to stop meanwhile does so at once."""
    port = free_port()
    settings = {
        "WIDTHWISE_DATA_DIR": str(tmp_path / "data"),
        "WIDTHWISE_PORT": "0",
        "WIDTHWISE_DATABASE_URL": f"postgresql+psycopg://widthwise@127.0.0.1:{port}/late",
    }
    processes = []
    for name in ("patient", "stopped"):
        with (tmp_path / name).open("wb") as output:
            processes.append(
                subprocess.Popen(
                    [sys.executable, "-m", "api"],
                    cwd=ROOT,
                    env={**os.environ, **settings},
                    stdout=output,
                    stderr=output,
                )
            )
    patient, stopped = processes
    try:
        for name in ("patient", "stopped"):
            log = tmp_path / name
            wait_for(
                lambda log=log: "the database cannot be reached" in log.read_text(), seconds=60
            )
        stopped.send_signal(signal.SIGTERM)
        # Not by what the system does of itself: that spares the first process of a container.
        assert stopped.wait(5) == 0
        log = tmp_path / "patient"
        with postgresql_folder() as folder, running_postgresql(folder, port=port) as server:
            new_database(server, "late")
            wait_for(lambda: "http://127.0.0.1:" in log.read_text(), seconds=60)
            patient.send_signal(signal.SIGTERM)
            patient.wait(30)
    finally:
        for process in processes:
            process.kill()
            process.wait()
    for name in ("patient", "stopped"):
        assert "Traceback" not in (tmp_path / name).read_text()


def test_a_stop_lets_requests_end_and_ends_streams(tmp_path: Path) -> None:
    """An upload that is half in is taken to its end; a watcher of events is let go."""
    upload = archive(tiny_bert(tmp_path / "model"))
    data_dir, log = tmp_path / "data", tmp_path / "log"
    settings = {"WIDTHWISE_DATA_DIR": str(data_dir), "WIDTHWISE_PORT": "0"}
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "api"],
            cwd=ROOT,
            env={**os.environ, **settings},
            stdout=output,
            stderr=output,
        )
    try:
        wait_for(lambda: re.search(r"http://127\.0\.0\.1:(\d+)", log.read_text()), seconds=60)
        found = re.search(r"http://127\.0\.0\.1:(\d+)", log.read_text())
        assert found is not None
        headers = {"Authorization": f"Bearer {(data_dir / 'api_key').read_text().strip()}"}
        begun, go_on = threading.Event(), threading.Event()
        answers: list[httpx.Response] = []

        def slowly() -> Iterator[bytes]:
            yield upload[:1000]
            begun.set()
            assert go_on.wait(30)
            yield upload[1000:]

        def send() -> None:
            with httpx.Client(base_url=found[0], headers=headers, trust_env=False) as client:
                path = "/v1/models?filename=tiny.tar.gz"
                answers.append(client.post(path, content=slowly(), timeout=60))

        with httpx.Client(base_url=found[0], headers=headers, trust_env=False) as client:
            whole = client.post("/v1/models?filename=t.tar.gz", content=upload, timeout=60).json()
            job_id = a_job(data_dir, whole["id"])
            uploading = threading.Thread(target=send)
            uploading.start()
            assert begun.wait(30)
            accept = {"Accept": "text/event-stream"}
            with client.stream("GET", f"/v1/jobs/{job_id}/events", headers=accept) as events:
                lines = events.iter_lines()
                while not next(lines).startswith("data:"):
                    pass
                process.send_signal(signal.SIGTERM)
                rest = list(lines)  # it ends, though the job has not
            assert not any(line.startswith("data:") for line in rest)
            with pytest.raises(httpx.ConnectError):
                httpx.get(f"{found[0]}/healthz", trust_env=False)
            assert process.poll() is None
            go_on.set()
            uploading.join(60)
        (answer,) = answers
        assert answer.status_code == 201, answer.text
        assert process.wait(30) == -signal.SIGTERM, log.read_text()  # as Uvicorn ends
        assert "Traceback" not in log.read_text()
    finally:
        process.kill()
        process.wait()
    database = Database(Settings(data_dir=data_dir).database_url)
    with database.reading() as session:
        assert store.get_model(session, answer.json()["id"], project_id=DEFAULT_PROJECT)
    database.close()


def a_job(data_dir: Path, model_id: str) -> str:
    """A queued one, past the API: it is only watched."""
    database = Database(Settings(data_dir=data_dir).database_url)
    with database.transaction() as session:
        dataset = store.add_dataset(
            session, id="dst_x", project_id=DEFAULT_PROJECT, name="d", size_bytes=1, uploads=[],
            files=[], profile={},
        )  # fmt: skip
        job = store.create_job(
            session, project_id=DEFAULT_PROJECT, name="j", model_id=model_id,
            dataset_id=dataset.id, spec={},
        )  # fmt: skip
    database.close()
    return job.id


def test_a_kernel_that_refuses_to_confine_is_warned_of(monkeypatch: pytest.MonkeyPatch) -> None:
    for granted, level, said in (
        (Confinement(namespaces=True, landlock=4), "info", ""),
        (Confinement(namespaces=False, landlock=4), "warning", "could reach the network"),
        (Confinement(namespaces=True, landlock=0), "warning", "without Landlock"),
    ):
        monkeypatch.setattr(program, "confinement", lambda granted=granted: granted)
        monkeypatch.setattr(program, "_log", structlog.get_logger())
        with capture_logs() as lines:
            program.tell_confinement()
        (line,) = lines
        assert line["log_level"] == level
        assert said in line.get("detail", "")
