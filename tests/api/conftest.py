"""A real server for the API's tests: Uvicorn in a thread, SQLite, a local store, real sandboxes."""

from __future__ import annotations

import hashlib
import io
import os
import re
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any
from uuid import uuid4

import httpx
import pytest
import structlog
from sqlalchemy import select

from api.__main__ import Server, prepare
from api.deps import Services
from jobs import access, store, workers
from jobs.artifacts import run_prefix
from jobs.db import now
from jobs.records import DEFAULT_PROJECT, Blob
from jobs.roles import Role
from jobs.settings import Settings
from jobs.states import JobState
from jobs.store import Claim
from tests.builders import device_profile, tiny_bert, tiny_dataset

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Key:
    id: str
    secret: str


@dataclass
class Service:
    """A running API, what it runs on, and a client that has its key."""

    url: str
    settings: Settings
    services: Services
    client: httpx.Client
    _uploaded: dict[str, str] = field(default_factory=dict)
    _clients: dict[str, httpx.Client] = field(default_factory=dict)

    @property
    def key(self) -> str:
        return (self.settings.data_dir / "api_key").read_text().strip()

    @property
    def port(self) -> int:
        return int(self.url.rpartition(":")[2])

    @property
    def model_id(self) -> str:
        """A tiny BERT with two labels, uploaded once."""
        if "model" not in self._uploaded:
            with tempfile.TemporaryDirectory() as folder:
                content = archive(tiny_bert(Path(folder) / "model"))
            answer = self.client.post("/v1/models?filename=tiny.tar.gz", content=content)
            assert answer.status_code == 201, answer.text
            self._uploaded["model"] = answer.json()["id"]
        return self._uploaded["model"]

    @property
    def dataset_id(self) -> str:
        if "dataset" not in self._uploaded:
            with tempfile.TemporaryDirectory() as folder:
                files = sorted(tiny_dataset(Path(folder) / "dataset").iterdir())
                parts = [("file", (path.name, path.read_bytes())) for path in files]
            answer = self.client.post("/v1/datasets", files=parts)
            assert answer.status_code == 201, answer.text
            self._uploaded["dataset"] = answer.json()["id"]
        return self._uploaded["dataset"]

    def job_body(self, **spec: Any) -> dict[str, Any]:
        spec = {"task": {"max_seq_len": 32}, **spec}
        return {"model": self.model_id, "dataset": self.dataset_id, "spec": spec}

    def new_profile(self, **changes: Any) -> str:
        answer = self.client.post("/v1/profiles", json=device_profile(**changes))
        assert answer.status_code == 201, answer.text
        return str(answer.json()["id"])

    def new_job(self) -> str:
        answer = self.client.post("/v1/jobs", json=self.job_body())
        assert answer.status_code == 202, answer.text
        return str(answer.json()["id"])

    def as_key(self, secret: str) -> httpx.Client:
        """The client that has this key in place of the first; open as long as the service."""
        if secret not in self._clients:
            headers = {"Authorization": f"Bearer {secret}"}
            self._clients[secret] = httpx.Client(
                base_url=self.url, headers=headers, timeout=60, trust_env=False
            )
        return self._clients[secret]

    def close(self) -> None:
        for client in self._clients.values():
            client.close()

    def new_key(
        self, role: Role, *, project_id: str = DEFAULT_PROJECT, seconds: float | None = None
    ) -> Key:
        """A key past the API, which would make none that has expired already."""
        secret = access.new_key()
        with self.services.database.transaction() as session:
            expires_at = None if seconds is None else now(session) + timedelta(seconds=seconds)
            record = access.add_api_key(
                session,
                project_id=project_id,
                name=f"a {role}'s",
                hash=access.hash_key(secret),
                role=role,
                expires_at=expires_at,
            )
        return Key(record.id, secret)

    def new_project(self) -> str:
        with self.services.database.transaction() as session:
            return access.add_project(session, name="another").id

    # What a worker would do, through the same store.

    @contextmanager
    def worker(self, *, slots: int = 1, gpus: int = 0) -> Iterator[str]:
        """The id of one that is announced, and does nothing."""
        name = f"w{uuid4()}"
        with self.services.database.transaction() as session:
            id = workers.announce(session, name=name, slots=slots, gpus=gpus, lease_seconds=600).id
        yield id
        with self.services.database.transaction() as session:
            workers.leave(session, name)

    def claim(self, job_id: str, *, worker: str = "test") -> Claim:
        with self.services.database.transaction() as session:
            claim = store.claim_job(session, job_id, worker=worker, lease_seconds=600, max_runs=3)
        assert claim is not None
        return claim

    def add_events(self, claim: Claim, *events: tuple[str, dict[str, Any]]) -> None:
        with self.services.database.transaction() as session:
            store.append_events(session, claim, events)

    def finish(self, claim: Claim, state: JobState = JobState.SUCCEEDED, **result: Any) -> None:
        with self.services.database.transaction() as session:
            store.finish_job(session, claim, state, **result)

    def publish(self, claim: Claim, path: str, content: bytes) -> str:
        """Stores a file as a run does; the artifact's id."""
        key = run_prefix(claim.job_id, claim.fence) + path
        with tempfile.NamedTemporaryFile() as file:
            file.write(content)
            file.flush()
            self.services.store.put_file(key, Path(file.name))
        with self.services.database.transaction() as session:
            return store.add_artifact(
                session,
                claim,
                path=path,
                key=key,
                size_bytes=len(content),
                sha256=hashlib.sha256(content).hexdigest(),
                media_type="application/octet-stream",
            ).id

    def kept(self) -> dict[str, Any]:
        """All that uploads leave behind: records, objects, spooled files."""
        with self.services.database.reading() as session:
            models = store.list_models(session, project_id=DEFAULT_PROJECT, limit=1000)
            datasets = store.list_datasets(session, project_id=DEFAULT_PROJECT, limit=1000)
            records = [model.id for model in models] + [dataset.id for dataset in datasets]
            records += session.scalars(select(Blob.id))
        return {
            "records": sorted(records),
            "objects": sorted(
                key
                for prefix in ("models/", "datasets/", "blobs/")
                for key in self.services.store.keys(prefix)
            ),
            "spool": self.spooled(),
        }

    def spooled(self) -> list[str]:
        spool = self.services.spool.folder
        return sorted(  # os.walk takes it that folders vanish under it
            os.path.relpath(os.path.join(folder, name), spool)
            for folder, folders, files in os.walk(spool)
            for name in (*folders, *files)
            if name != ".lock"
        )


def archive(folder: Path) -> bytes:
    """The folder as .tar.gz."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        tar.add(folder, arcname=folder.name)
    return buffer.getvalue()


@contextmanager
def serving(data_dir: Path, **settings: Any) -> Iterator[Service]:
    """The API as `python -m api` starts it, on a free port."""
    configured = Settings(data_dir=data_dir, port=0, **settings)
    prepare(configured)
    server = Server(configured)
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        wait_for(lambda: server.started or not thread.is_alive())
        assert server.started
        port = server.servers[0].sockets[0].getsockname()[1]
        url = f"http://127.0.0.1:{port}"
        key = (data_dir / "api_key").read_text().strip()
        headers = {"Authorization": f"Bearer {key}"}
        with httpx.Client(base_url=url, headers=headers, timeout=60, trust_env=False) as client:
            running = Service(url, configured, server.app.state.services, client)
            try:
                yield running
            finally:
                running.close()
    finally:
        server.should_exit = True
        thread.join(60)
        assert not thread.is_alive()


@contextmanager
def api_process(
    data_dir: Path, log: Path, *, inside: Sequence[str] = ()
) -> Iterator[tuple[subprocess.Popen[bytes], httpx.Client]]:
    """`python -m api` as a process, which a test may kill, and a client that has its key.
    `inside`: a command that ends by running the one it is given."""
    settings = {"WIDTHWISE_DATA_DIR": str(data_dir), "WIDTHWISE_PORT": "0"}
    with log.open("wb") as output:
        process = subprocess.Popen(
            [*inside, sys.executable, "-m", "api"],
            cwd=ROOT,
            env={**os.environ, **settings},
            stdout=output,
            stderr=output,
        )
    try:
        address = re.compile(r"http://127\.0\.0\.1:\d+")
        wait_for(lambda: address.search(log.read_text()) or process.poll() is not None, seconds=60)
        found = address.search(log.read_text())
        assert found is not None, log.read_text()
        # As the process sees it, which may have mounts of its own.
        key = Path(f"/proc/{process.pid}/root{data_dir}/api_key").read_text().strip()
        headers = {"Authorization": f"Bearer {key}"}
        with httpx.Client(
            base_url=found[0], headers=headers, timeout=60, trust_env=False
        ) as client:
            yield process, client
    finally:
        process.terminate()
        process.wait(30)
    assert "Traceback" not in log.read_text()


def wait_for(condition: Callable[[], Any], *, seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.01)


@pytest.fixture(scope="session", autouse=True)
def plain_logs() -> None:
    """Without the renderer for terminals, which shows the variables of each frame."""
    structlog.configure(
        processors=[
            structlog.processors.format_exc_info,
            structlog.processors.KeyValueRenderer(key_order=["event"]),
        ]
    )


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    with serving(tmp_path_factory.mktemp("api") / "data") as running:
        yield running


@pytest.fixture
def client(service: Service) -> httpx.Client:
    return service.client


def assert_problem(answer: httpx.Response, status: int, code: str) -> dict[str, Any]:
    """The answer is RFC 9457's, complete and consistent; its body."""
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/problem+json"
    body = answer.json()
    assert body["type"] == f"urn:widthwise:problem:{code}"
    assert body["status"] == status
    assert body["title"]
    assert body["detail"]
    assert body["instance"] == answer.request.url.path
    return dict(body)
