"""The production profile: hosts that share a real Redis, PostgreSQL and S3, and no folder."""

from __future__ import annotations

import os
import secrets
import signal
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from obstore.store import S3Store

from tests.builders import tiny_bert, tiny_dataset
from tests.documents import commands_below
from tests.e2e.hosts import Host
from tests.e2e.service import (
    events_so_far,
    events_until_the_end,
    pid_of,
    processes_of,
    upload_folder,
    wait_for_event,
)
from tests.services import new_database, postgresql_program, redis_server, wait_until
from tools.rest import Client

QUICK: dict[str, Any] = {
    "task": {"text": "text", "text_pair": "text_pair", "label": "label", "max_seq_len": 64},
    "teacher": {"epochs": 100, "max_steps": 300},
    "importance": {"rows": 32},
    "supernet": {"width_mults": ["1/2"]},
    "distillation": {"max_steps": 4},
    "latency": {"rounds": 5, "baselines": []},
    "export": {"formats": ["onnx"]},
}
STEPS = 300
LONG: dict[str, Any] = {
    **QUICK,
    "teacher": {"max_steps": 5},
    "distillation": {"max_steps": STEPS, "epochs": 100, "batch_size": 4, "dropout": 0.1},
}


class Stack:
    """The servers, a host with the API and two with a worker each."""

    def __init__(self, folder: Path, servers: dict[str, str], hosts: ExitStack) -> None:
        self.folder = folder
        self.servers = servers
        self._hosts = hosts
        self.api = self.host("api")
        url = self.api.start_api()
        self.client = self.api.client(url)
        self.workers = [self.host(f"worker-{number}") for number in (1, 2)]
        self.pids = {host.start_worker(): host for host in self.workers}

    def host(self, name: str, **settings: str) -> Host:
        host = Host(self.folder / name, **self.servers | settings)
        self._hosts.callback(lambda: print(f"--- {name}\n{host.logs()}"))
        self._hosts.callback(host.lose)
        return host

    def host_of(self, job_id: str, *, run: int = 1) -> Host:
        """The host whose worker claimed that run of the job."""

        def started() -> list[str]:
            found = events_so_far(self.client, job_id)
            return [event["data"]["worker"] for event in found if event["kind"] == "started"]

        wait_until(lambda: len(started()) >= run, f"{job_id} has started", seconds=60)
        _, pid, _ = started()[run - 1].rsplit("-", 2)
        return self.pids[int(pid)]


@pytest.fixture(scope="module")
def stack(
    tmp_path_factory: pytest.TempPathFactory, postgresql_url: str, s3_variables: dict[str, str]
) -> Iterator[Stack]:
    folder = tmp_path_factory.mktemp("production")
    (folder / "password").write_text("p@ss/w:rd\n")
    with (
        redis_server(["--requirepass", "p@ss/w:rd", "--save", ""]) as redis_url,
        ExitStack() as hosts,
    ):
        yield Stack(
            folder,
            {
                **s3_variables,
                "WIDTHWISE_DATABASE_URL": new_database(postgresql_url, "production"),
                "WIDTHWISE_BROKER_URL": redis_url,
                "WIDTHWISE_BROKER_PASSWORD_FILE": str(folder / "password"),
                "WIDTHWISE_STORE_URL": f"s3://bucket/{secrets.token_hex(8)}",
                "WIDTHWISE_LEASE_SECONDS": "5",
                "WIDTHWISE_RECONCILE_SECONDS": "0.5",
                "WIDTHWISE_CHECKPOINT_SECONDS": "0.5",
            },
            hosts,
        )


@pytest.fixture(scope="module")
def uploads(stack: Stack, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("uploads")
    rows = {"train": 120, "dev": 40, "test": 40}
    return {
        "model": upload_folder(
            stack.client, "/v1/models", tiny_bert(folder / "model", num_labels=None)
        ),
        "dataset": upload_folder(
            stack.client, "/v1/datasets", tiny_dataset(folder / "dataset", rows=rows, pair=True)
        ),
    }


def test_a_killed_process_fails_its_job_and_not_the_worker(
    stack: Stack, uploads: dict[str, str]
) -> None:
    client = stack.client
    killed = client.post("/v1/jobs", {**uploads, "spec": QUICK})["id"]
    wait_for_event(client, killed, stage="teacher")
    host = stack.host_of(killed)
    os.kill(pid_of(host.data_dir, command="-m worker.child"), signal.SIGKILL)
    kinds = [event["kind"] for event in events_until_the_end(client, killed)]
    assert kinds[-1] == "failed"
    assert client.get(f"/v1/jobs/{killed}")["error"]["code"] == "child-died"
    for worker in stack.workers:
        assert any(line.endswith("-m worker") for line in processes_of(worker.data_dir).values())


@pytest.fixture(scope="module")
def survived(stack: Stack, uploads: dict[str, str]) -> dict[str, Any]:
    """A job whose host is lost in mid-distillation, followed to its end."""
    client = stack.client
    job_id = client.post("/v1/jobs", {**uploads, "spec": LONG})["id"]

    def saved() -> list[int]:
        events = events_so_far(client, job_id)
        assert events[-1]["kind"] not in ("succeeded", "failed"), events[-1]
        found = [event["data"] for event in events if event["kind"] == "checkpoint"]
        return [data["step"] for data in found if data["stage"] == "distil"]

    wait_until(lambda: len(saved()) >= 2, "checkpoints", seconds=120)
    stack.host_of(job_id).lose()
    killed_at = saved()[-1]
    events = events_until_the_end(client, job_id)
    job = client.get(f"/v1/jobs/{job_id}")
    assert job["state"] == "succeeded", job["error"]
    artifacts = client.get(f"/v1/jobs/{job_id}/artifacts")["items"]
    bundle = next(item for item in artifacts if item["path"] == "w1_2/bundle.tar.gz")
    return {"job": job, "killed_at": killed_at, "events": events, "bundle": bundle}


def test_a_job_whose_host_is_lost_goes_on_from_its_checkpoint_on_another(
    stack: Stack, survived: dict[str, Any], tmp_path: Path
) -> None:
    events = survived["events"]
    first, second = (stack.host_of(survived["job"]["id"], run=run) for run in (1, 2))
    assert first is not second
    (resumed,) = [event["data"] for event in events if event["kind"] == "resumed"]
    assert (resumed["run"], resumed["stage"]) == (2, "distil")
    assert resumed["step"] == survived["killed_at"] < STEPS
    assert survived["job"]["report"]["distillation_steps"] == STEPS
    # The client holds the bytes, which come out of the bucket, against their digests.
    bundle = survived["bundle"]
    downloaded = stack.client.download(bundle["content_url"], tmp_path / "bundle")
    assert downloaded.sha256 == bundle["sha256"]


def test_nothing_passes_from_host_to_host_but_through_the_servers(
    stack: Stack, survived: dict[str, Any]
) -> None:
    assert {path.name for path in stack.api.data_dir.iterdir()} == {"api_key", "spool"}
    files = [path for path in (stack.api.data_dir / "spool").rglob("*") if path.is_file()]
    assert {path.name for path in files} == {".lock"}
    for worker in stack.workers:
        assert not (worker.data_dir / "objects").exists()
    # No record says where a host keeps its files, for another to read them there.
    command = [postgresql_program("pg_dump"), "--dbname", _address(stack.servers)]
    records = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert survived["bundle"]["id"] in records
    assert str(stack.folder) not in records


def test_a_backup_becomes_a_service_with_its_downloads_keys_and_queued_jobs(
    stack: Stack,
    survived: dict[str, Any],
    uploads: dict[str, str],
    postgresql_url: str,
    tmp_path: Path,
) -> None:
    """By the commands of docs/operations.md; a queue that starts empty stands for a lost Redis."""
    key = (stack.api.data_dir / "api_key").read_text().strip()
    for worker in stack.workers:
        worker.stop()
    spec = {**QUICK, "teacher": {"max_steps": 5}}
    waiting = stack.client.post("/v1/jobs", {**uploads, "spec": spec})["id"]
    _run_documented("Backup of the production profile", tmp_path, stack.servers)
    restored = {
        **stack.servers,
        "WIDTHWISE_DATABASE_URL": new_database(postgresql_url, "restored"),
        "WIDTHWISE_STORE_URL": f"s3://bucket/{secrets.token_hex(8)}",
        "WIDTHWISE_BROKER_URL": stack.servers["WIDTHWISE_BROKER_URL"].replace("/0", "/1"),
    }
    _copy_objects(stack.servers, restored)
    stack.api.stop()

    _run_documented("Restore of the production profile", tmp_path, restored)
    api = stack.host("restored-api", **restored)
    client = Client(api.start_api(), key)
    stack.host("restored-worker", **restored).start_worker()
    assert not (api.data_dir / "api_key").exists()  # the restored keys go on
    bundle = survived["bundle"]
    assert client.download(bundle["content_url"], tmp_path / "bundle").sha256 == bundle["sha256"]
    events_until_the_end(client, waiting)
    job = client.get(f"/v1/jobs/{waiting}")
    assert job["state"] == "succeeded", job["error"]


def _address(servers: dict[str, str]) -> str:
    """Of the database, as PostgreSQL's own programs take it."""
    return servers["WIDTHWISE_DATABASE_URL"].replace("+psycopg", "")


def _run_documented(heading: str, folder: Path, servers: dict[str, str]) -> None:
    """PostgreSQL's part; the copy of a bucket is left to its store's own tool."""
    (records,) = commands_below("docs/operations.md", heading)
    programs = Path(postgresql_program("pg_restore")).parent
    environment = os.environ | {
        "DATABASE": _address(servers),
        "PATH": f"{programs}:{os.environ['PATH']}",
    }
    command = ["bash", "-euo", "pipefail", "-c", records]
    subprocess.run(command, cwd=folder, env=environment, check=True)


def _copy_objects(servers: dict[str, str], restored: dict[str, str]) -> None:
    """Every object, byte for byte, as such tools do."""
    options: dict[str, Any] = {
        "endpoint": servers["AWS_ENDPOINT_URL"],
        "access_key_id": servers["AWS_ACCESS_KEY_ID"],
        "secret_access_key": servers["AWS_SECRET_ACCESS_KEY"],
        "region": servers["AWS_REGION"],
        "client_options": {"allow_http": True},
    }
    source = S3Store.from_url(servers["WIDTHWISE_STORE_URL"], **options)
    target = S3Store.from_url(restored["WIDTHWISE_STORE_URL"], **options)
    paths = [entry["path"] for batch in source.list() for entry in batch]
    assert paths
    for path in paths:
        target.put(path, source.get(path).bytes())
