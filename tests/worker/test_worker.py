"""Real workers: processes with Celery in them, on the folder queue and on Redis."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest
import redis
from sqlalchemy import text

from jobs import store, workers
from jobs.artifacts import ObjectStore
from jobs.db import Database, now
from jobs.devices import Device
from jobs.nudges import EVENTS_CHANNEL
from jobs.queue import enqueue_job, make_celery
from jobs.records import DEFAULT_PROJECT, Run
from jobs.settings import Settings
from jobs.states import JobState
from jobs.workers import WorkerState
from tests.services import (
    free_port,
    new_database,
    postgresql_folder,
    running_postgresql,
    wait_until,
)
from tests.worker.helpers import (
    error_of,
    events_of,
    job_of,
    kinds_of,
    settings_for,
    submit,
    wait_for_death,
    wait_for_event,
    wait_for_state,
)
from tests.worker.worker_process import STOP_SECONDS, Worker

ON_SQLITE = pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
ON_POSTGRESQL = pytest.mark.parametrize("database_url", ["postgresql"], indirect=True)
StartWorker = Callable[[Settings], Worker]


@pytest.fixture
def start_worker(tmp_path: Path) -> Iterator[StartWorker]:
    started: list[Worker] = []

    def start(settings: Settings) -> Worker:
        program = ["-m", "tests.worker.run_worker"]
        started.append(Worker(settings, tmp_path / f"worker{len(started)}", program=program))
        return started[-1]

    yield start
    for worker in started:
        if worker.process.poll() is None:
            worker.process.kill()
            worker.process.wait()
        print(f"{worker.log.name}:\n{worker.log.read_text()}")  # pytest shows it on a failure


@pytest.fixture
def settings(database_url: str, tmp_path: Path, request: pytest.FixtureRequest) -> Settings:
    """The two profiles: SQLite with the folder queue, PostgreSQL with Redis."""
    broker = "filesystem://"
    if database_url.startswith("postgresql"):
        broker = str(request.getfixturevalue("redis_url"))
    return settings_for(tmp_path, database_url, broker_url=broker, reconcile_seconds=600)


def worker_of(database: Database, job_id: str, among: list[Worker], run: int = 1) -> Worker:
    """The one whose process runs the job."""
    name = wait_for_event(database, job_id, "started", run).data["worker"]
    found = re.search(r"-(\d+)-", name)
    assert found is not None
    return next(worker for worker in among if worker.pid == int(found[1]))


def child_pids(database: Database, job_id: str) -> list[int]:
    return list(wait_for_event(database, job_id, "progress").data["figures"].values())


def test_one_of_two_workers_runs_a_job_whose_message_came_often(
    settings: Settings, database: Database, objects: ObjectStore, start_worker: StartWorker
) -> None:
    started = [start_worker(settings) for _ in range(2)]
    app = make_celery(settings)
    job_id = submit(database, objects, "check", "progress", "artifact w1/onnx/model.onnx")
    for _ in range(10):
        enqueue_job(app, job_id)
    wait_for_state(database, job_id, "succeeded")
    # All ten messages have been taken before the next job's, which comes last.
    last = submit(database, objects, "progress")
    enqueue_job(app, last)
    wait_for_state(database, last, "succeeded")
    for worker in started:
        worker.process.send_signal(signal.SIGTERM)
    for worker in started:
        assert worker.process.wait(STOP_SECONDS) == 0, worker.log.read_text()
        assert list(worker.folder.iterdir()) == []  # nothing outside the data folder
        assert "rror" not in worker.log.read_text()
    assert kinds_of(database, job_id) == ["queued", "started", "progress", "succeeded"]
    with database.reading() as session:
        (artifact,) = store.list_artifacts(session, job_id, project_id=DEFAULT_PROJECT)
    assert objects.size(artifact.key) == artifact.size_bytes
    assert list(settings.work_dir.iterdir()) == []
    app.close()


def test_a_job_whose_worker_is_killed_ends_once_on_another(
    settings: Settings,
    database: Database,
    objects: ObjectStore,
    start_worker: StartWorker,
    tmp_path: Path,
) -> None:
    settings = settings.model_copy(update={"lease_seconds": 3.0, "reconcile_seconds": 0.5})
    started = [start_worker(settings) for _ in range(2)]
    go_on = tmp_path / "go on"
    job_id = submit(database, objects, "deaf", "spawn", f"wait {go_on}")  # and no message
    killed = worker_of(database, job_id, started)
    pids = child_pids(database, job_id)
    killed.process.kill()
    killed.process.wait()
    wait_for_death(*pids)
    wait_for_event(database, job_id, "started", 2)
    go_on.touch()
    wait_for_state(database, job_id, "succeeded")
    kinds = [kind for kind in kinds_of(database, job_id) if kind != "progress"]
    assert kinds == ["queued", "started", "requeued", "started", "succeeded"]
    assert job_of(database, job_id).attempts == 2
    assert worker_of(database, job_id, started, run=2) is not killed
    wait_until(lambda: not list(settings.work_dir.iterdir()), "the dead run's folder is gone")


def stop_between_transactions(worker: Worker, database: Database) -> None:
    """SIGSTOP, at a moment when the worker holds no lock in PostgreSQL."""
    query = "SELECT count(*) FROM pg_stat_activity WHERE state LIKE 'idle in transaction%'"

    def stopped() -> bool:
        worker.process.send_signal(signal.SIGSTOP)
        with database.engine.connect() as connection:
            if connection.scalar(text(query)) == 0:
                return True
        worker.process.send_signal(signal.SIGCONT)
        return False

    wait_until(stopped, "the worker stands still")


@ON_POSTGRESQL
def test_a_worker_that_stood_still_does_not_disturb_its_successor(
    settings: Settings,
    database: Database,
    objects: ObjectStore,
    start_worker: StartWorker,
    tmp_path: Path,
) -> None:
    settings = settings.model_copy(update={"lease_seconds": 2.0, "reconcile_seconds": 0.5})
    started = [start_worker(settings) for _ in range(2)]
    go_on = tmp_path / "go on"
    job_id = submit(database, objects, "progress", f"wait {go_on}", "artifact w1/m")
    still = worker_of(database, job_id, started)
    stop_between_transactions(still, database)
    wait_for_event(database, job_id, "started", 2)
    go_on.touch()  # both children go on, and both make the artifact
    wait_for_state(database, job_id, "succeeded")
    history = kinds_of(database, job_id)
    still.process.send_signal(signal.SIGCONT)
    wait_until(lambda: still.has_logged("nothing more is written"), "the first run gives up")
    assert kinds_of(database, job_id) == history
    assert history.count("succeeded") == 1
    with database.reading() as session:
        (artifact,) = store.list_artifacts(session, job_id, project_id=DEFAULT_PROJECT)
    assert artifact.key == f"jobs/{job_id}/2/w1/m"
    wait_until(lambda: not list(settings.work_dir.iterdir()), "both have cleaned up")


@ON_POSTGRESQL
def test_a_job_that_kills_its_last_worker_fails(
    settings: Settings, database: Database, objects: ObjectStore, start_worker: StartWorker
) -> None:
    changes = {"lease_seconds": 2.0, "reconcile_seconds": 0.5, "max_runs": 1}
    settings = settings.model_copy(update=changes)
    job_id = submit(database, objects, "spawn", "sleep 600")
    first = start_worker(settings)
    pids = child_pids(database, job_id)
    first.process.kill()
    start_worker(settings)
    wait_for_state(database, job_id, "failed")
    wait_for_death(*pids)
    assert error_of(database, job_id)["code"] == "killed-its-worker"
    assert "killing its worker" in error_of(database, job_id)["message"]


@pytest.mark.parametrize(
    ("database_url", "number"),
    [("sqlite", signal.SIGTERM), ("postgresql", signal.SIGINT)],
    indirect=["database_url"],
)
def test_a_worker_that_is_stopped_leaves_nothing_and_hands_its_job_back(
    settings: Settings,
    database: Database,
    objects: ObjectStore,
    start_worker: StartWorker,
    number: signal.Signals,
) -> None:
    worker = start_worker(settings)
    job_id = submit(database, objects, "deaf", "spawn", "sleep 600")
    app = make_celery(settings)
    enqueue_job(app, job_id)
    pids = child_pids(database, job_id)
    assert worker.stop(number) == 0, worker.log.read_text()
    wait_for_death(*pids)
    job = job_of(database, job_id)
    assert (job.state, job.attempts) == (JobState.QUEUED, 0)
    assert events_of(database, job_id)[-1].data["reason"] == "its worker was told to stop"
    assert list(settings.work_dir.iterdir()) == []
    assert list(worker.folder.iterdir()) == []
    app.close()


def test_a_worker_that_cannot_stop_its_job_in_time_hands_it_back_all_the_same(
    settings: Settings, database: Database, objects: ObjectStore, start_worker: StartWorker
) -> None:
    """The child is deaf, and the grace that it has is longer than the worker's own."""
    changes = {"stop_grace_seconds": 600.0, "worker_stop_seconds": 1.0}
    worker = start_worker(settings.model_copy(update=changes))
    job_id = submit(database, objects, "deaf", "spawn", "sleep 600")
    app = make_celery(settings)
    enqueue_job(app, job_id)
    pids = child_pids(database, job_id)
    assert worker.stop() == 1
    wait_for_death(*pids)
    job = job_of(database, job_id)
    assert (job.state, job.attempts) == (JobState.QUEUED, 0)
    assert events_of(database, job_id)[-1].data["reason"] == "its worker was told to stop"
    assert listed(database) == {}
    app.close()


def listed(database: Database) -> dict[int, WorkerState]:
    """The state of each worker, by its process."""
    with database.reading() as session:
        found = workers.list_workers(session)
        loads, at = workers.loads(session, found), now(session)
    return {
        int(each.name.rsplit("-", 2)[1]): workers.state_of(each, loads[each.name], at=at)
        for each in found
    }


def test_workers_announce_themselves_leave_and_are_missed(
    settings: Settings, database: Database, start_worker: StartWorker
) -> None:
    settings = settings.model_copy(update={"lease_seconds": 1.5})
    first, second = start_worker(settings), start_worker(settings)
    everybody = {first.pid: WorkerState.ACTIVE, second.pid: WorkerState.ACTIVE}
    wait_until(lambda: listed(database) == everybody, "both are listed")
    first.process.kill()
    missed = {first.pid: WorkerState.LOST, second.pid: WorkerState.ACTIVE}
    wait_until(lambda: listed(database) == missed, "one is missed")
    assert second.stop() == 0
    assert listed(database) == {first.pid: WorkerState.LOST}


def test_a_drained_worker_finishes_its_job_and_takes_no_other_until_it_may(
    settings: Settings,
    database: Database,
    objects: ObjectStore,
    start_worker: StartWorker,
    tmp_path: Path,
) -> None:
    settings = settings.model_copy(update={"reconcile_seconds": 0.3})
    worker = start_worker(settings)
    go_on = tmp_path / "go on"
    running = submit(database, objects, "progress", f"wait {go_on}")
    wait_for_event(database, running, "progress")
    with database.transaction() as session:
        (record,) = workers.list_workers(session)
        workers.drain(session, record.id)
    waiting = submit(database, objects, "progress")
    assert listed(database) == {worker.pid: WorkerState.DRAINING}
    go_on.touch()
    wait_for_state(database, running, "succeeded")
    app = make_celery(settings)
    enqueue_job(app, waiting)
    drained = {worker.pid: WorkerState.DRAINED}
    wait_until(lambda: listed(database) == drained, "it runs nothing")
    time.sleep(1)  # three looks at the queue
    assert job_of(database, waiting).state == JobState.QUEUED
    with database.transaction() as session:
        workers.undrain(session, record.id)
    wait_for_state(database, waiting, "succeeded")
    app.close()


def test_messages_reach_the_workers_that_have_the_device(
    settings: Settings, database: Database, objects: ObjectStore, start_worker: StartWorker
) -> None:
    """Neither looks by itself: the reconciler is hours away."""
    on_cpu = start_worker(settings)
    on_gpu = start_worker(settings.model_copy(update={"worker_slots": 0, "worker_gpus": 1}))
    for worker in (on_cpu, on_gpu):
        wait_until(lambda worker=worker: worker.has_logged("worker started"), "it is up")
    app = make_celery(settings)
    for device, wanted in ((Device.GPU, on_gpu), (Device.CPU, on_cpu)):
        for _ in range(3):
            job_id = submit(database, objects, "environment", device=device)
            enqueue_job(app, job_id, device)
            wait_for_state(database, job_id, "succeeded")
            assert worker_of(database, job_id, [on_cpu, on_gpu]) is wanted
            environment = wait_for_event(database, job_id, "progress").data["figures"]
            visible = environment.get("CUDA_VISIBLE_DEVICES")
            assert visible == ("0" if device == Device.GPU else None)
    app.close()


@ON_SQLITE
def test_a_running_job_is_cancelled_within_ten_seconds(
    settings: Settings, database: Database, objects: ObjectStore, start_worker: StartWorker
) -> None:
    """With the times that a real service has, and a child that will not listen."""
    real = Settings()
    settings = settings.model_copy(
        update={
            "cancel_poll_seconds": real.cancel_poll_seconds,
            "stop_grace_seconds": real.stop_grace_seconds,
            "reconcile_seconds": 0.5,
        }
    )
    start_worker(settings)
    job_id = submit(database, objects, "deaf", "spawn", "sleep 600")
    pids = child_pids(database, job_id)
    with database.transaction() as session:
        store.request_cancel(session, job_id, project_id=DEFAULT_PROJECT)
    wait_until(
        lambda: job_of(database, job_id).state == JobState.CANCELLED, "cancelled", seconds=10
    )
    wait_for_death(*pids)
    started, cancelled = events_of(database, job_id)[1], events_of(database, job_id)[-1]
    assert (started.kind, cancelled.kind) == ("started", "cancelled")


def test_without_its_queue_a_worker_runs_jobs_and_can_be_stopped(
    tmp_path: Path, migrated_sqlite: Path, objects: ObjectStore, start_worker: StartWorker
) -> None:
    url = f"sqlite:///{tmp_path / 'widthwise.db'}"
    away = f"redis://:hush@127.0.0.1:{free_port()}/0"
    settings = settings_for(tmp_path, url, broker_url=away)
    worker = start_worker(settings)
    wait_until(lambda: worker.has_logged("worker started"), "the worker is up")
    database = Database(url)
    job_id = submit(database, objects, "progress")
    wait_for_state(database, job_id, "succeeded")
    assert worker.stop() == 0, worker.log.read_text()
    assert "hush" not in worker.log.read_text()
    database.close()


@ON_POSTGRESQL
def test_a_worker_tells_watchers_prometheus_and_its_log_what_it_runs(
    settings: Settings, database: Database, objects: ObjectStore, start_worker: StartWorker
) -> None:
    port = free_port()
    settings = settings.model_copy(update={"worker_metrics_port": port, "log_format": "json"})
    with redis.Redis.from_url(settings.broker_url) as client, client.pubsub() as heard:
        heard.subscribe(EVENTS_CHANNEL)
        assert heard.get_message(timeout=10)["type"] == "subscribe"
        job_id = submit(database, objects, "progress")
        worker = start_worker(settings)
        wait_for_state(database, job_id, "succeeded")
        for _ in range(3):  # started, progress, succeeded
            message = heard.get_message(timeout=10)
            assert message is not None
            assert message["data"].decode() == job_id
    wait_until(lambda: worker.has_logged('"event": "succeeded"'), "the run's last line")
    told = httpx.get(f"http://127.0.0.1:{port}/metrics", trust_env=False).text
    assert 'widthwise_runs_ended_total{outcome="succeeded"} 1.0' in told
    assert 'widthwise_queue_wait_seconds_count{device="cpu"} 1.0' in told
    assert 'widthwise_runs_in_stage{stage="load"} 0.0' in told
    (size,) = re.findall(r'widthwise_staged_bytes_total{direction="in"} (\S+)', told)
    assert float(size) == 4  # {} and []
    with database.reading() as session:
        (run,) = session.query(Run).filter(Run.job_id == job_id)
    lines = [json.loads(line) for line in worker.log.read_text().splitlines()]
    assert [line["event"] for line in lines if line.get("run") == run.id][-1] == "succeeded"
    assert all(line["job"] == job_id for line in lines if "run" in line)


def test_a_worker_whose_signing_key_is_none_says_so_and_takes_no_job(tmp_path: Path) -> None:
    (tmp_path / "key.pem").write_text("-----BEGIN PRIVATE KEY-----\n")
    settings = settings_for(tmp_path)
    done = subprocess.run(
        [sys.executable, "-m", "worker"],
        cwd=Path(__file__).resolve().parents[2],
        env={
            **os.environ,
            "WIDTHWISE_DATA_DIR": str(settings.data_dir),
            "WIDTHWISE_SIGNING_KEY": str(tmp_path / "key.pem"),
            "WIDTHWISE_MEASURE_TRAINING": "false",
        },
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 1
    assert "WIDTHWISE_SIGNING_KEY cannot be used" in done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    assert not settings.data_dir.exists()


@pytest.mark.parametrize(
    ("module", "started"), [("worker", "worker started"), ("worker.scheduler", "scheduler started")]
)
def test_a_database_that_is_away_at_the_start_is_waited_for(
    tmp_path: Path, module: str, started: str
) -> None:
    """In one line each time; a process that is told to stop meanwhile does so at once."""
    port = free_port()
    url = f"postgresql+psycopg://widthwise:a-password@127.0.0.1:{port}/late"
    settings = settings_for(tmp_path, url)
    processes = []
    try:
        for name in ("patient", "stopped"):
            processes.append(Worker(settings, tmp_path / name, program=["-m", module]))
        patient, stopped = processes
        away = "the database cannot be reached"
        for process in processes:
            wait_until(lambda told=process: told.has_logged(away), "it says what it waits for")
        told_at = time.monotonic()
        assert stopped.stop() == 0
        assert time.monotonic() - told_at < 5
        with postgresql_folder() as folder, running_postgresql(folder, port=port) as server:
            new_database(server, "late")
            wait_until(lambda: patient.has_logged(started), "it has started", seconds=60)
            assert patient.stop() == 0, patient.log.read_text()
        for process in processes:
            log = process.log.read_text()
            assert "Traceback" not in log
            assert "a-password" not in log
            (line, *_) = [line for line in log.splitlines() if away in line]
            assert f"127.0.0.1:{port}/late" in line
    finally:
        for process in processes:
            process.process.kill()
            process.process.wait()


def test_python_m_worker_starts_and_stops(tmp_path: Path) -> None:
    """The real command, with nothing but its defaults below a fresh data folder."""
    settings = settings_for(tmp_path)
    worker = Worker(settings, tmp_path / "worker", program=["-m", "worker"])
    try:
        wait_until(lambda: worker.has_logged("worker started"), "the worker is up")
        assert worker.stop() == 0, worker.log.read_text()
    finally:
        worker.process.kill()
        worker.process.wait()
    assert list(worker.folder.iterdir()) == []
