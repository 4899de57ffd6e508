from __future__ import annotations

import errno
import hashlib
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import IO, Any

import pytest

from compression.runtime_env import core_count, cpu_vendor, training_environment
from jobs import deletion, store, workers
from jobs.access import Actor
from jobs.artifacts import ObjectStore, run_prefix
from jobs.db import Database, now
from jobs.records import DEFAULT_PROJECT, Artifact, Job, Run
from jobs.settings import Settings
from jobs.states import JobState
from tests.seeds import seed_job
from tests.services import START_SECONDS, wait_until
from tests.worker.helpers import (
    CHILD_COMMAND,
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
from worker.process import JobProcess
from worker.reconciler import reconcile
from worker.runner import CHILD_COMMAND as REAL_CHILD_COMMAND
from worker.runner import ProgressFilter, Runner

ON_SQLITE = pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
SOME_FILE = Path(__file__)
MakeRunner = Callable[..., Runner]


@pytest.fixture
def settings(tmp_path: Path, database_url: str) -> Settings:
    return settings_for(tmp_path, database_url)


@pytest.fixture
def make_runner(
    settings: Settings, database: Database, objects: ObjectStore
) -> Iterator[MakeRunner]:
    runners = []

    def make(**changes: Any) -> Runner:
        command = changes.pop("child_command", CHILD_COMMAND)
        key = changes.pop("signing_key", None)
        gpus = changes.pop("gpus", ())
        chosen = settings.model_copy(update=changes)
        runner = Runner(
            chosen,
            database,
            objects,
            worker="w",
            child_command=command,
            gpus=gpus,
            signing_key=key,
        )
        runners.append(runner)
        return runner

    yield make
    for runner in runners:
        runner.stop()
    for runner in runners:
        assert runner.join(30)


def artifacts_of(database: Database, job_id: str) -> list[Artifact]:
    with database.reading() as session:
        return store.list_artifacts(session, job_id, project_id=DEFAULT_PROJECT)


def cancel(database: Database, job_id: str) -> None:
    with database.transaction() as session:
        store.request_cancel(session, job_id, project_id=DEFAULT_PROJECT)


def test_a_job_goes_through(
    make_runner: MakeRunner, settings: Settings, database: Database, objects: ObjectStore
) -> None:
    files = ["w1_2/onnx/model.onnx", "w1_2/bundle.tar.gz"]
    job_id = submit(database, objects, "check", "progress", *[f"artifact {f}" for f in files])
    assert make_runner().offer(job_id)
    wait_for_state(database, job_id, "succeeded")
    assert job_of(database, job_id).report == {"selection": {"subnetwork": "w1_2"}}
    assert kinds_of(database, job_id) == ["queued", "started", "progress", "succeeded"]
    artifacts = artifacts_of(database, job_id)
    assert [artifact.path for artifact in artifacts] == sorted(files)
    for artifact in artifacts:
        assert artifact.key == f"jobs/{job_id}/1/{artifact.path}"
        assert artifact.sha256 == hashlib.sha256(artifact.path.encode()).hexdigest()
        assert objects.size(artifact.key) == artifact.size_bytes == len(artifact.path)
    wait_until(lambda: not list(settings.work_dir.iterdir()), "the work folder is empty")


@ON_SQLITE
def test_a_job_is_taken_that_was_offered_while_another_offer_came_to_nothing(
    make_runner: MakeRunner,
    database: Database,
    objects: ObjectStore,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    runner = make_runner()
    job_id = submit(database, objects, "progress")
    looking, both = threading.Event(), threading.Event()
    claim_job = store.claim_job

    def told(*arguments: Any, **options: Any) -> store.Claim | None:
        if looking.is_set():
            return claim_job(*arguments, **options)
        looking.set()
        both.wait(START_SECONDS)
        return None  # as if another worker had been quicker

    monkeypatch.setattr(store, "claim_job", told)
    offers = [threading.Thread(target=runner.offer, args=(job_id,), daemon=True) for _ in range(2)]
    offers[0].start()
    assert looking.wait(START_SECONDS)
    offers[1].start()
    offers[1].join(0.5)  # time enough to be refused
    both.set()
    for offer in offers:
        offer.join(START_SECONDS)
    wait_for_state(database, job_id, "succeeded")


@ON_SQLITE
def test_a_job_process_gets_the_devices_profile_as_a_value(
    make_runner: MakeRunner, database: Database, objects: ObjectStore
) -> None:
    job_id = seed_job(
        database, objects, spec={"do": ["profile board"]}, profile={"device": "board"}
    )
    assert make_runner().offer(job_id)
    wait_for_state(database, job_id, "succeeded")


@ON_SQLITE
def test_a_failure_keeps_what_the_process_said(
    make_runner: MakeRunner, database: Database, objects: ObjectStore
) -> None:
    job_id = submit(database, objects, "artifact w1/m", "fail the column is missing")
    make_runner().offer(job_id)
    wait_for_state(database, job_id, "failed")
    error = {
        "code": "invalid-dataset",
        "message": "the column is missing",
        "pointer": "/task",
        "rows": [],
    }
    assert error_of(database, job_id) == error
    assert events_of(database, job_id)[-1].data == {"run": 1, "error": error}
    assert artifacts_of(database, job_id) == []


@ON_SQLITE
@pytest.mark.parametrize("end", ["kill", "exit 5", "unknown step"])
def test_a_child_that_dies_fails_the_job_with_its_last_lines(
    make_runner: MakeRunner, database: Database, objects: ObjectStore, end: str
) -> None:
    # What it started lives on and holds its standard output open.
    job_id = submit(database, objects, "spawn", "complain out of luck", end)
    runner = make_runner()
    runner.offer(job_id)
    wait_for_state(database, job_id, "failed")
    error = error_of(database, job_id)
    assert error["code"] == "child-died"
    assert "out of luck" in error["last_lines"]
    word = {"kill": "memory", "exit 5": "status 5", "unknown step": "status 1"}[end]
    assert word in error["message"]
    wait_for_death(*wait_for_event(database, job_id, "progress").data["figures"].values())
    after = submit(database, objects, "progress")  # and the worker lives on
    wait_until(lambda: runner.offer(after), "the slot is free")
    wait_for_state(database, after, "succeeded")


@ON_SQLITE
def test_what_a_child_said_is_heard_however_late(
    make_runner: MakeRunner,
    database: Database,
    objects: ObjectStore,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """On a busy machine the reader may get its turn long after the child has ended."""
    read_messages = JobProcess._read_messages

    def late(process: JobProcess, stream: IO[bytes]) -> None:
        time.sleep(1)
        read_messages(process, stream)

    monkeypatch.setattr(JobProcess, "_read_messages", late)
    job_id = submit(database, objects, "progress")
    make_runner().offer(job_id)
    wait_for_state(database, job_id, "succeeded")
    assert kinds_of(database, job_id) == ["queued", "started", "progress", "succeeded"]


@ON_SQLITE
def test_the_real_child_says_what_is_wrong(
    make_runner: MakeRunner, database: Database, objects: ObjectStore
) -> None:
    """`python -m worker.child` on files that are no model: it speaks the protocol."""
    job_id = submit(database, objects, "not a spec")
    make_runner(child_command=REAL_CHILD_COMMAND, cancel_poll_seconds=1.0).offer(job_id)
    wait_for_state(database, job_id, "failed")
    error = error_of(database, job_id)
    assert error["code"] == "child-died"
    assert any("Extra inputs are not permitted" in line for line in error["last_lines"])


FULL_DISK = """
import sys, types
def compress(**request):
    raise OSError({number}, "told by a test")
sys.modules["compression.pipeline"] = types.SimpleNamespace(compress=compress)
from worker.child import main
sys.exit(main())
"""


@ON_SQLITE
@pytest.mark.parametrize(
    ("number", "code"),
    [(errno.ENOSPC, "disk-full"), (errno.EDQUOT, "disk-full"), (errno.EIO, "child-died")],
)
def test_a_job_that_meets_a_full_disk_says_so(
    make_runner: MakeRunner, database: Database, objects: ObjectStore, number: int, code: str
) -> None:
    """The real `worker.child`, whose disk fills up in the middle of its work."""
    job_id = seed_job(database, objects, spec={"task": {"kind": "classification"}})
    child = (sys.executable, "-c", FULL_DISK.format(number=number))
    make_runner(child_command=child).offer(job_id)
    wait_for_state(database, job_id, "failed")
    error = error_of(database, job_id)
    assert error["code"] == code, error
    assert ("no room left" in error["message"]) is (code == "disk-full")
    assert kinds_of(database, job_id) == ["queued", "started", "failed"]


@ON_SQLITE
def test_cancel_ends_the_whole_group(
    make_runner: MakeRunner, database: Database, objects: ObjectStore
) -> None:
    job_id = submit(database, objects, "deaf", "spawn", "sleep 600")
    make_runner().offer(job_id)
    pids = wait_for_event(database, job_id, "progress").data["figures"].values()
    cancel(database, job_id)
    wait_for_state(database, job_id, "cancelled")
    wait_for_death(*pids)
    assert kinds_of(database, job_id)[-1] == "cancelled"
    assert job_of(database, job_id).error is None


def test_stopping_hands_the_job_back_uncounted(
    make_runner: MakeRunner, database: Database, objects: ObjectStore, tmp_path: Path
) -> None:
    go_on = tmp_path / "go on"
    job_id = submit(database, objects, "spawn", f"wait {go_on}")
    first = make_runner()
    first.offer(job_id)
    pids = wait_for_event(database, job_id, "progress").data["figures"].values()
    first.stop()
    assert first.join(30)
    wait_for_death(*pids)
    job = job_of(database, job_id)
    assert (job.state, job.attempts) == (JobState.QUEUED, 0)
    assert not first.offer(job_id)
    go_on.touch()
    assert make_runner().offer(job_id)
    wait_for_state(database, job_id, "succeeded")
    assert kinds_of(database, job_id).count("requeued") == 1


def test_the_next_run_goes_on_from_the_checkpoint_of_a_worker_that_was_stopped(
    make_runner: MakeRunner, database: Database, objects: ObjectStore, tmp_path: Path
) -> None:
    go_on = tmp_path / "go on"
    steps = ("resumed", "checkpoint 4", "checkpoint-at-the-end", "progress", f"wait {go_on}")
    job_id = submit(database, objects, *steps)
    first = make_runner(stop_grace_seconds=30)
    first.offer(job_id)
    assert wait_for_event(database, job_id, "progress").data["figures"] == {"found": []}
    wait_for_event(database, job_id, "progress", 2)
    first.stop()
    assert first.join(30)
    stored = job_of(database, job_id).checkpoints or []
    assert [(each["stage"], each["step"]) for each in stored] == [("distil", 99), ("distil", 4)]
    assert all(each["key"].startswith(f"jobs/{job_id}/1/checkpoints/") for each in stored)
    go_on.touch()
    assert make_runner().offer(job_id)
    wait_for_state(database, job_id, "succeeded")
    kinds = kinds_of(database, job_id)
    assert kinds[kinds.index("requeued") :][:3] == ["requeued", "started", "resumed"]
    resumed = wait_for_event(database, job_id, "resumed").data
    assert (resumed["run"], resumed["step"], resumed["passed_over"]) == (2, 99, [])
    found = wait_for_event(database, job_id, "progress", 3).data["figures"]
    assert found == {"found": [99]}


@ON_SQLITE
def test_a_checkpoint_that_is_gone_or_damaged_is_passed_over(
    make_runner: MakeRunner, database: Database, objects: ObjectStore, tmp_path: Path
) -> None:
    go_on = tmp_path / "go on"
    steps = [f"checkpoint {step}" for step in (1, 2, 3)]
    job_id = submit(database, objects, "resumed", *steps, "progress", f"wait {go_on}")
    first = make_runner()
    first.offer(job_id)
    wait_for_event(database, job_id, "progress", 2)
    first.stop()
    assert first.join(30)
    newest, second, _ = job_of(database, job_id).checkpoints or []
    objects.delete([newest["key"]])
    (tmp_path / "objects" / second["key"]).write_bytes(b"7")
    go_on.touch()
    assert make_runner().offer(job_id)
    wait_for_state(database, job_id, "succeeded")
    resumed = wait_for_event(database, job_id, "resumed").data
    assert resumed["step"] == 1
    assert newest["key"] in resumed["passed_over"][0]
    assert second["key"] in resumed["passed_over"][1]
    found = wait_for_event(database, job_id, "progress", 3).data["figures"]
    assert found == {"found": [1]}


def test_reconciling_keeps_what_a_run_may_resume_from(
    make_runner: MakeRunner, database: Database, objects: ObjectStore, settings: Settings
) -> None:
    eager = settings.model_copy(update={"orphan_grace_seconds": 0})
    steps = [f"checkpoint {step}" for step in (1, 2, 3)]
    job_id = submit(database, objects, *steps, "progress", "sleep 600")
    first = make_runner()
    first.offer(job_id)
    wait_for_event(database, job_id, "progress")
    unnamed = run_prefix(job_id, 1) + "checkpoints/never recorded"
    objects.put_file(unnamed, SOME_FILE)
    first.stop()
    assert first.join(30)
    third, second, superseded = job_of(database, job_id).checkpoints or []
    time.sleep(0.02)
    reconcile(settings, database, objects, nudge=lambda job: None)
    assert objects.exists(unnamed) and objects.exists(superseded["key"])
    reconcile(eager, database, objects, nudge=lambda job: None)
    assert not objects.exists(unnamed) and not objects.exists(superseded["key"])
    assert objects.exists(second["key"]) and objects.exists(third["key"])
    cancel(database, job_id)
    time.sleep(0.02)
    reconcile(eager, database, objects, nudge=lambda job: None)
    assert objects.keys(f"jobs/{job_id}/") == []
    assert job_of(database, job_id).checkpoints is None


def test_what_a_run_stores_after_it_was_swept_is_swept_too(
    make_runner: MakeRunner,
    database: Database,
    objects: ObjectStore,
    settings: Settings,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As a worker does that stood still beyond the grace period, on its way to the store."""
    eager = settings.model_copy(update={"orphan_grace_seconds": 0})
    on_its_way, go_on, put = threading.Event(), threading.Event(), objects.put_file

    def slow_put(key: str, path: Path) -> None:
        on_its_way.set()
        assert go_on.wait(30)
        put(key, path)

    job_id = submit(database, objects, "checkpoint 1", "sleep 600")
    monkeypatch.setattr(objects, "put_file", slow_put)
    runner = make_runner()
    runner.offer(job_id)
    assert on_its_way.wait(30)
    with database.transaction() as session:
        session.get_one(Job, job_id).lease_expires_at = now(session) - timedelta(seconds=1)
    runner.stop()  # it takes nothing else
    reconcile(eager, database, objects, nudge=lambda job: None)  # the run is lost
    time.sleep(0.02)
    reconcile(eager, database, objects, nudge=lambda job: None)  # and is swept
    with database.reading() as session:
        assert store.unswept_runs(session, grace_seconds=0) == []
    go_on.set()
    assert runner.join(30)
    assert objects.keys(run_prefix(job_id, 1)) != []
    reconcile(eager, database, objects, nudge=lambda job: None)
    assert objects.keys(run_prefix(job_id, 1)) == []


def test_two_workers_race_and_one_runs_the_job(
    make_runner: MakeRunner, database: Database, objects: ObjectStore
) -> None:
    jobs = [submit(database, objects, "progress") for _ in range(3)]
    runners = [make_runner(worker_slots=8) for _ in range(2)]
    barrier = threading.Barrier(4)
    taken: list[str] = []

    def race(runner: Runner) -> None:
        barrier.wait()
        taken.extend(job_id for job_id in jobs if runner.offer(job_id))

    threads = [threading.Thread(target=race, args=(runners[n % 2],)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for job_id in jobs:
        wait_for_state(database, job_id, "succeeded")
        assert kinds_of(database, job_id) == ["queued", "started", "progress", "succeeded"]
    assert len(taken) <= 3  # a runner whose slot freed may have taken one unasked


@ON_SQLITE
def test_a_busy_worker_refuses_and_takes_the_oldest_when_its_slot_frees(
    make_runner: MakeRunner, database: Database, objects: ObjectStore, tmp_path: Path
) -> None:
    go_on = tmp_path / "go on"
    first = submit(database, objects, "progress", f"wait {go_on}")
    older = submit(database, objects, "progress")
    newer = submit(database, objects, "progress")
    runner = make_runner()
    assert runner.offer(first)
    assert not runner.offer(newer)  # its message is gone now; the job is not
    assert job_of(database, newer).state == JobState.QUEUED
    go_on.touch()
    for job_id in (first, older, newer):
        wait_for_state(database, job_id, "succeeded")
    finished = [job_of(database, job_id).started_at for job_id in (first, older, newer)]
    assert finished == sorted(finished, key=str)


@ON_SQLITE
def test_a_job_that_cannot_be_claimed_does_not_keep_a_worker_busy(
    make_runner: MakeRunner, database: Database, objects: ObjectStore
) -> None:
    """Its runs are used up, as when the setting was lowered while it was queued."""
    used_up = [submit(database, objects, "progress") for _ in range(11)]
    with database.transaction() as session:
        for job_id in used_up:
            store.get_job(session, job_id, project_id=DEFAULT_PROJECT).attempts = 3
    younger = submit(database, objects, "progress")
    filling = threading.Thread(target=make_runner(worker_slots=2).fill, daemon=True)
    filling.start()
    wait_for_state(database, younger, "succeeded")
    filling.join(10)
    assert not filling.is_alive()
    assert {job_of(database, job_id).state for job_id in used_up} == {JobState.QUEUED}


@ON_SQLITE
def test_jobs_are_taken_by_priority_whichever_was_offered(
    make_runner: MakeRunner, database: Database, objects: ObjectStore
) -> None:
    plain = submit(database, objects, "progress")
    urgent = submit(database, objects, "progress", priority=7)
    make_runner().offer(plain)
    for job_id in (plain, urgent):
        wait_for_state(database, job_id, "succeeded")
    first, second = (job_of(database, job_id).started_at for job_id in (urgent, plain))
    assert first is not None and second is not None and first < second


@ON_SQLITE
def test_a_worker_takes_only_what_it_has_and_one_job_a_gpu(
    make_runner: MakeRunner, database: Database, objects: ObjectStore, tmp_path: Path
) -> None:
    go_on = tmp_path / "go on"
    steps = ("environment", f"wait {go_on}")
    on_cpu = submit(database, objects, *steps)
    on_gpus = [submit(database, objects, *steps, device="gpu") for _ in range(3)]
    numbered = submit(database, objects, *steps, device="gpu:2")
    too_many = submit(database, objects, "progress", device="gpu", processes=4)
    runner = make_runner(worker_slots=0, gpus=["4", "5", "6"])
    runner.fill()

    def sees(job_id: str) -> str | None:
        environment = wait_for_event(database, job_id, "progress").data["figures"]
        return environment.get("CUDA_VISIBLE_DEVICES")

    assert [sees(job_id) for job_id in on_gpus] == ["4", "5", "6"]
    assert job_of(database, numbered).state == JobState.QUEUED  # number 2 of them is busy
    go_on.touch()
    for job_id in (*on_gpus, numbered):
        wait_for_state(database, job_id, "succeeded")
    assert sees(numbered) == os.environ.get("CUDA_VISIBLE_DEVICES")
    for job_id in (on_cpu, too_many):
        assert job_of(database, job_id).state == JobState.QUEUED


@ON_SQLITE
def test_a_job_of_two_gpus_is_not_starved_by_those_of_one(
    make_runner: MakeRunner, database: Database, objects: ObjectStore, tmp_path: Path
) -> None:
    first_ends, all_end = tmp_path / "first ends", tmp_path / "all end"
    running = [
        submit(database, objects, "progress", f"wait {end}", device="gpu")
        for end in (first_ends, all_end)
    ]
    runner = make_runner(gpus=["0", "1"])
    runner.fill()
    for job_id in running:
        wait_for_event(database, job_id, "progress")
    pair = submit(database, objects, "environment", device="gpu", processes=2)
    younger = submit(database, objects, "progress", device="gpu")
    on_cpu = submit(database, objects, "progress")
    first_ends.touch()
    wait_for_state(database, running[0], "succeeded")
    wait_until(lambda: job_of(database, on_cpu).state.is_final or runner.offer(on_cpu), "room")
    wait_for_state(database, on_cpu, "succeeded")  # which waits for nobody's GPU
    assert {job_of(database, job_id).state for job_id in (pair, younger)} == {JobState.QUEUED}
    all_end.touch()
    for job_id in (pair, younger):
        wait_for_state(database, job_id, "succeeded")
    environment = wait_for_event(database, pair, "progress").data["figures"]
    assert environment["CUDA_VISIBLE_DEVICES"] == "0,1"
    before, after = (job_of(database, job_id).started_at for job_id in (pair, younger))
    assert before is not None and after is not None and before < after


@ON_SQLITE
def test_a_drained_worker_leaves_the_queue_alone(
    make_runner: MakeRunner, database: Database, objects: ObjectStore
) -> None:
    with database.transaction() as session:
        id = workers.announce(session, name="w", slots=1, gpus=0, lease_seconds=60).id
        workers.drain(session, id)
    job_id = submit(database, objects, "progress")
    runner = make_runner()
    assert not runner.offer(job_id)
    assert job_of(database, job_id).state == JobState.QUEUED
    with database.transaction() as session:
        workers.undrain(session, id)
    assert runner.offer(job_id)
    wait_for_state(database, job_id, "succeeded")


@ON_SQLITE
def test_a_job_that_runs_over_its_time_is_ended_and_can_be_retried(
    make_runner: MakeRunner, database: Database, objects: ObjectStore, tmp_path: Path
) -> None:
    go_on = tmp_path / "go on"
    steps = ("resumed", "checkpoint 4", "deaf", "spawn", f"wait {go_on}")
    job_id = submit(database, objects, *steps, time_limit_seconds=4)
    runner = make_runner()
    runner.offer(job_id)
    pids = wait_for_event(database, job_id, "progress", 2).data["figures"].values()
    wait_for_state(database, job_id, "failed")
    wait_for_death(*pids)
    assert error_of(database, job_id)["code"] == "time-limit"
    go_on.touch()
    with database.transaction() as session:
        store.retry_job(session, job_id, project_id=DEFAULT_PROJECT)
    wait_until(lambda: runner.offer(job_id), "there is room")
    wait_for_state(database, job_id, "succeeded")
    assert wait_for_event(database, job_id, "resumed").data["step"] == 4


def test_a_run_that_does_not_stop_is_handed_back_as_it_is(
    make_runner: MakeRunner, database: Database, objects: ObjectStore, tmp_path: Path
) -> None:
    """And what it then says, it says too late."""
    go_on = tmp_path / "go on"
    job_id = submit(database, objects, "progress", f"wait {go_on}")
    runner = make_runner()
    runner.offer(job_id)
    wait_for_event(database, job_id, "progress")
    runner.hand_back()
    job = job_of(database, job_id)
    assert (job.state, job.attempts) == (JobState.QUEUED, 0)
    go_on.touch()
    wait_until(lambda: runner.offer(job_id) or runner.join(0), "the run has ended")
    wait_for_state(database, job_id, "succeeded")
    kinds = kinds_of(database, job_id)
    assert kinds == [
        "queued",
        "started",
        "progress",
        "requeued",
        "started",
        "progress",
        "succeeded",
    ]


@ON_SQLITE
def test_a_redelivered_message_does_no_harm(
    make_runner: MakeRunner, database: Database, objects: ObjectStore
) -> None:
    job_id = submit(database, objects, "progress")
    runner = make_runner(worker_slots=4)
    assert [runner.offer(job_id) for _ in range(4)] == [True, False, False, False]
    wait_for_state(database, job_id, "succeeded")
    assert not runner.offer(job_id)
    assert not runner.offer("job_unknown")
    assert kinds_of(database, job_id).count("started") == 1
    with database.transaction() as session:
        deletion.delete_job(session, Actor(DEFAULT_PROJECT), job_id)
    assert not runner.offer(job_id)
    with database.reading() as session:
        assert session.query(Run).all() == []


def test_a_run_that_lost_its_job_ends_its_child_and_writes_nothing(
    make_runner: MakeRunner, database: Database, objects: ObjectStore, settings: Settings
) -> None:
    job_id = submit(database, objects, "deaf", "spawn", "sleep 600")
    make_runner().offer(job_id)
    pids = wait_for_event(database, job_id, "progress").data["figures"].values()
    with database.transaction() as session:  # as if this worker had been silent for long
        job = store.get_job(session, job_id, project_id=DEFAULT_PROJECT)
        job.lease_expires_at = job.created_at
        session.flush()
        other = store.claim_job(session, job_id, worker="other", lease_seconds=600, max_runs=3)
    assert other is not None
    wait_for_death(*pids)
    with database.transaction() as session:
        store.finish_job(session, other, JobState.SUCCEEDED, report={})
    wait_until(lambda: not list(settings.work_dir.iterdir()), "the loser has cleaned up")
    assert kinds_of(database, job_id) == ["queued", "started", "progress", "started", "succeeded"]


@ON_SQLITE
def test_a_damaged_model_file_fails_the_job(
    make_runner: MakeRunner, database: Database, objects: ObjectStore, tmp_path: Path
) -> None:
    job_id = submit(database, objects, "progress")
    key = next(key for key in objects.keys("models/"))
    (tmp_path / "objects" / key).write_bytes(b"[]")
    make_runner().offer(job_id)
    wait_for_state(database, job_id, "failed")
    error = error_of(database, job_id)
    assert error["code"] == "object-missing"
    assert key in error["message"]


@ON_SQLITE
def test_progress_is_thinned_but_keeps_firsts_and_lasts(
    make_runner: MakeRunner, database: Database, objects: ObjectStore
) -> None:
    job_id = submit(database, objects, "progress", "many 500")
    make_runner().offer(job_id)
    wait_for_state(database, job_id, "succeeded")
    stored = [event.data for event in events_of(database, job_id) if event.kind == "progress"]
    distil = [data["step"] for data in stored if data["stage"] == "distil"]
    assert distil[0] == 0 and distil[-1] == 500
    assert len(distil) < 100
    assert stored[0]["stage"] == "load"


@ON_SQLITE
def test_every_step_is_told_where_the_setting_says_so(
    make_runner: MakeRunner, database: Database, objects: ObjectStore
) -> None:
    job_id = submit(database, objects, "many 50")
    make_runner(progress_seconds=0).offer(job_id)
    wait_for_state(database, job_id, "succeeded")
    stored = [event.data for event in events_of(database, job_id) if event.kind == "progress"]
    assert [data["step"] for data in stored] == list(range(51))


def test_the_filter_lets_one_a_second_through(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 0.4, 0.8, 1.2, 1.4, 1.5, 1.6])
    monkeypatch.setattr(time, "monotonic", lambda: next(clock))
    wanted = ProgressFilter(1.0)
    steps = [("a", 0), ("a", 1), ("a", 2), ("a", 3), ("a", 4), ("b", 0), ("b", 9)]
    answers = [wanted({"stage": stage, "step": step, "total": 9}) for stage, step in steps]
    assert answers == [True, False, False, True, False, True, True]


@ON_SQLITE
def test_the_child_is_told_the_signing_key_and_no_variable_holds_it(
    make_runner: MakeRunner, database: Database, objects: ObjectStore
) -> None:
    job_id = submit(database, objects, "key PEM")
    make_runner(signing_key="PEM").offer(job_id)
    wait_for_state(database, job_id, "succeeded")


@ON_SQLITE
def test_the_child_gets_no_secrets(
    make_runner: MakeRunner,
    database: Database,
    objects: ObjectStore,
    settings: Settings,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hush")
    monkeypatch.setenv("WIDTHWISE_DATABASE_URL", "hush")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    monkeypatch.delenv("MKL_NUM_THREADS", raising=False)
    job_id = submit(database, objects, "environment")
    make_runner().offer(job_id)
    environment = wait_for_event(database, job_id, "progress").data["figures"]
    assert "hush" not in environment.values()
    assert environment["CUDA_VISIBLE_DEVICES"] == "1"
    assert Path(environment["TMPDIR"]).is_relative_to(settings.work_dir)
    assert Path(environment["HOME"]).is_relative_to(settings.work_dir)
    assert environment["PIP_NO_INDEX"] == "1"
    # What makes paddle fast has to be there before the process starts.
    fast = training_environment(cpu_count=core_count(), vendor=cpu_vendor()) | {
        "OMP_NUM_THREADS": "3"  # the user's own wins
    }
    assert fast.items() <= environment.items()


def test_reconciling_requeues_nudges_and_cleans(
    make_runner: MakeRunner, database: Database, objects: ObjectStore, settings: Settings
) -> None:
    """A dead worker's job, a lost message, orphaned objects: all set right, by many at once."""
    lost = submit(database, objects, "progress")
    unheard = submit(database, objects, "progress")
    with database.transaction() as session:
        run = store.claim_job(session, lost, worker="dead", lease_seconds=0.001, max_runs=3)
    assert run is not None
    orphan = run_prefix(lost, run.fence) + "w1/m"
    objects.put_file(orphan, SOME_FILE)
    other = run_prefix(unheard, 7) + "w1/m"  # of no run that ended: not to be touched
    objects.put_file(other, SOME_FILE)
    on_gpu = submit(database, objects, "progress", device="gpu")
    with database.transaction() as session:
        workers.announce(session, name="w", slots=1, gpus=0, lease_seconds=60)
        for each in (unheard, on_gpu):  # as a process of a version with one queue leaves them
            session.get_one(Job, each).device = None
    time.sleep(0.05)
    nudged: list[str] = []

    def nudge(job: store.QueuedJob) -> None:
        nudged.append(job.id)

    passes = [
        threading.Thread(
            target=reconcile, args=(settings, database, objects), kwargs={"nudge": nudge}
        )
        for _ in range(3)
    ]
    for thread in passes:
        thread.start()
    for thread in passes:
        thread.join()
    assert set(nudged) == {lost, unheard}  # nobody has a GPU
    assert kinds_of(database, lost) == ["queued", "started", "requeued"]
    assert objects.exists(orphan)  # the dead run might be only slow: a grace period
    eager = settings.model_copy(update={"orphan_grace_seconds": 0})
    reconcile(eager, database, objects, nudge=nudge)
    assert not objects.exists(orphan)
    assert objects.exists(other)
    make_runner(worker_slots=2, gpus=["0"]).fill()
    for job_id in (lost, unheard, on_gpu):
        wait_for_state(database, job_id, "succeeded")


@ON_SQLITE
def test_a_step_that_fails_does_not_keep_the_others_from_being_done(
    database: Database, objects: ObjectStore, settings: Settings
) -> None:
    settings.work_dir.mkdir(parents=True)
    (settings.work_dir / "run_dead").mkdir()
    (settings.work_dir / "run_dead.lock").touch()
    submit(database, objects, "progress")

    with database.transaction() as session:
        workers.announce(session, name="w", slots=1, gpus=0, lease_seconds=60)

    def broken(job: store.QueuedJob) -> None:
        raise RuntimeError("the queue is broken")

    reconcile(settings, database, objects, nudge=broken)
    assert list(settings.work_dir.iterdir()) == []
