from __future__ import annotations

import multiprocessing
import threading
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from sqlalchemy import update
from sqlalchemy.exc import InvalidRequestError

from jobs import access, store
from jobs.db import Database, now
from jobs.devices import Device, Need
from jobs.errors import Conflict, NotFound, StaleRun
from jobs.paging import cursor_of
from jobs.records import DEFAULT_PROJECT, Event, Job, Project, Run
from jobs.states import JobState, RunState
from jobs.store import Claim
from tests.seeds import seed_job

ARTIFACT: dict[str, Any] = {
    "path": "w1/onnx/model.onnx",
    "key": "jobs/x/1/w1/onnx/model.onnx",
    "size_bytes": 3,
    "sha256": "0" * 64,
    "media_type": "application/octet-stream",
}


def claim(database: Database, job_id: str, *, lease: float = 60, max_runs: int = 3) -> Claim | None:
    with database.transaction() as session:
        return store.claim_job(session, job_id, worker="w", lease_seconds=lease, max_runs=max_runs)


def claimed(database: Database, job_id: str, *, lease: float = 60) -> Claim:
    found = claim(database, job_id, lease=lease)
    assert found is not None
    return found


def expired_claim(database: Database, job_id: str) -> Claim:
    """A claim whose lease has run out by the database's clock."""
    found = claimed(database, job_id, lease=0.001)
    time.sleep(0.01)
    return found


def job_of(database: Database, job_id: str) -> Job:
    with database.reading() as session:
        return store.get_job(session, job_id, project_id=DEFAULT_PROJECT)


def events_of(database: Database, job_id: str, **page: int) -> list[Event]:
    with database.reading() as session:
        return store.list_events(session, job_id, project_id=DEFAULT_PROJECT, **page)


def runs_of(database: Database, job_id: str) -> list[RunState]:
    with database.reading() as session:
        runs = session.query(Run).filter(Run.job_id == job_id).order_by(Run.fence)
        return [run.state for run in runs]


def settle(database: Database, job_id: str, *, max_runs: int = 3) -> JobState | None:
    with database.transaction() as session:
        return store.settle_expired(session, job_id, max_runs=max_runs)


def cancel(database: Database, job_id: str) -> None:
    with database.transaction() as session:
        store.request_cancel(session, job_id, project_id=DEFAULT_PROJECT)


def _claim_in_process(url: str, job_id: str, start: Any, wins: Any) -> None:
    database = Database(url)
    with database.reading() as session:
        now(session)  # connected before the race begins
    start.wait()
    wins.put(claim(database, job_id) is not None)
    database.close()


def test_of_many_threads_one_claims(database: Database) -> None:
    job_id = seed_job(database)
    barrier = threading.Barrier(8)
    claims: list[Claim | None] = []

    def race() -> None:
        barrier.wait()
        claims.append(claim(database, job_id))

    threads = [threading.Thread(target=race) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(claims) == 8
    assert [c.fence for c in claims if c is not None] == [1]
    assert runs_of(database, job_id) == [RunState.RUNNING]


def test_of_two_processes_one_claims(database: Database, database_url: str) -> None:
    job_id = seed_job(database)
    context = multiprocessing.get_context("spawn")
    start, wins = context.Barrier(2), context.Queue()
    racers = [
        context.Process(target=_claim_in_process, args=(database_url, job_id, start, wins))
        for _ in range(2)
    ]
    for racer in racers:
        racer.start()
    won = [wins.get(timeout=60) for _ in racers]
    for racer in racers:
        racer.join()
    assert sorted(won) == [False, True]


def test_an_expired_job_is_claimed_by_one_and_its_first_run_is_stale(database: Database) -> None:
    job_id = seed_job(database)
    first = expired_claim(database, job_id)
    second = claimed(database, job_id)
    assert second.fence == first.fence + 1
    assert claim(database, job_id) is None
    assert runs_of(database, job_id) == [RunState.LOST, RunState.RUNNING]
    with database.transaction() as session:
        assert store.renew_lease(session, second, lease_seconds=60) is False


@pytest.mark.parametrize(
    "write",
    [
        lambda s, c: store.renew_lease(s, c, lease_seconds=60),
        lambda s, c: store.append_events(s, c, [("progress", {})]),
        lambda s, c: store.add_artifact(s, c, **ARTIFACT),
        lambda s, c: store.finish_job(s, c, JobState.SUCCEEDED, report={}),
        lambda s, c: store.finish_job(s, c, JobState.FAILED, error={}),
        lambda s, c: store.release_job(s, c, reason="x"),
    ],
    ids=["renew", "append", "artifact", "succeed", "fail", "release"],
)
@pytest.mark.parametrize("after", ["another claim", "requeue", "the end"])
def test_a_stale_run_writes_nothing(
    database: Database, write: Callable[[Any, Claim], object], after: str
) -> None:
    job_id = seed_job(database)
    stale = expired_claim(database, job_id)
    if after == "another claim":
        claimed(database, job_id)
    else:
        settle(database, job_id, max_runs=3 if after == "requeue" else 1)
    before = job_of(database, job_id), len(events_of(database, job_id)), runs_of(database, job_id)
    with pytest.raises(StaleRun), database.transaction() as session:
        write(session, stale)
    job = job_of(database, job_id)
    assert (job.state, job.fence, job.attempts) == (
        before[0].state,
        before[0].fence,
        before[0].attempts,
    )
    assert (len(events_of(database, job_id)), runs_of(database, job_id)) == before[1:]


def test_a_job_that_keeps_killing_its_worker_fails_after_three_runs(database: Database) -> None:
    job_id = seed_job(database)
    for _ in range(2):
        expired_claim(database, job_id)
        assert settle(database, job_id) == JobState.QUEUED
    expired_claim(database, job_id)
    assert claim(database, job_id) is None  # not a fourth time, even before it is settled
    assert settle(database, job_id) == JobState.FAILED
    job = job_of(database, job_id)
    assert job.error["code"] == "killed-its-worker"
    assert "killing its worker" in job.error["message"]
    assert runs_of(database, job_id) == [RunState.LOST] * 3
    kinds = [event.kind for event in events_of(database, job_id)]
    assert kinds == ["queued"] + ["started", "requeued"] * 2 + ["started", "failed"]
    assert settle(database, job_id) is None


def test_a_lease_that_holds_is_not_settled(database: Database) -> None:
    job_id = seed_job(database)
    claimed(database, job_id)
    assert settle(database, job_id) is None
    with database.reading() as session:
        assert store.expired_jobs(session) == []


def test_many_settle_an_expired_job_once(database: Database) -> None:
    job_id = seed_job(database)
    expired_claim(database, job_id)
    barrier = threading.Barrier(6)
    states: list[JobState | None] = []

    def race() -> None:
        barrier.wait()
        states.append(settle(database, job_id))

    threads = [threading.Thread(target=race) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(states, key=str) == [None] * 5 + [JobState.QUEUED]
    assert [e.kind for e in events_of(database, job_id)] == ["queued", "started", "requeued"]


def test_a_released_run_is_not_counted(database: Database) -> None:
    job_id = seed_job(database)
    for _ in range(5):
        run = claimed(database, job_id)
        with database.transaction() as session:
            store.release_job(session, run, reason="its worker was told to stop")
    job = job_of(database, job_id)
    assert (job.state, job.attempts, job.fence) == (JobState.QUEUED, 0, 5)


def test_event_numbers_have_no_gaps_when_many_write(database: Database) -> None:
    """A reader that polls by cursor while runs write sees every number, in order."""
    job_id = seed_job(database)
    run = claimed(database, job_id)
    writers = 4
    finished = threading.Event()
    seen: list[int] = []

    def write() -> None:
        for step in range(10):
            with database.transaction() as session:
                store.append_events(session, run, [("progress", {"step": step})] * 2)

    def read() -> None:
        while True:
            last = finished.is_set()
            page = events_of(database, job_id, after=seen[-1] if seen else 0, limit=7)
            seen.extend(event.number for event in page)
            if last and not page:
                return

    reader = threading.Thread(target=read)
    reader.start()
    threads = [threading.Thread(target=write) for _ in range(writers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    finished.set()
    reader.join()
    assert seen == list(range(1, 2 + writers * 20 + 1))


def test_cancelling_a_queued_job_ends_it_at_once(database: Database) -> None:
    job_id = seed_job(database)
    for _ in range(2):  # asking again changes nothing
        with database.transaction() as session:
            job = store.request_cancel(session, job_id, project_id=DEFAULT_PROJECT)
        assert job.state == JobState.CANCELLED
    assert claim(database, job_id) is None
    assert [e.kind for e in events_of(database, job_id)] == ["queued", "cancelled"]


def test_cancelling_a_running_job_tells_its_run(database: Database) -> None:
    job_id = seed_job(database)
    run = claimed(database, job_id)
    with database.transaction() as session:
        job = store.request_cancel(session, job_id, project_id=DEFAULT_PROJECT)
        assert job.state == JobState.RUNNING
    with database.transaction() as session:
        assert store.renew_lease(session, run, lease_seconds=60) is True
    with database.transaction() as session:
        store.release_job(session, run, reason="x")  # instead of queueing it again
    assert job_of(database, job_id).state == JobState.CANCELLED


def test_a_cancelled_job_whose_worker_died_is_not_run_again(database: Database) -> None:
    job_id = seed_job(database)
    claimed(database, job_id)
    cancel(database, job_id)
    with database.transaction() as session:
        session.get_one(Job, job_id).lease_expires_at = job_of(database, job_id).created_at
    assert claim(database, job_id) is None
    assert settle(database, job_id) == JobState.CANCELLED


def test_an_ended_job_cannot_be_cancelled(database: Database) -> None:
    job_id = seed_job(database)
    run = claimed(database, job_id)
    with database.transaction() as session:
        store.finish_job(session, run, JobState.SUCCEEDED, report={})
    with pytest.raises(Conflict) as refused, database.transaction() as session:
        store.request_cancel(session, job_id, project_id=DEFAULT_PROJECT)
    assert refused.value.code == "job-finished"


def test_artifacts_are_seen_once_the_job_has_succeeded(database: Database) -> None:
    job_id = seed_job(database)
    run = claimed(database, job_id)
    with database.transaction() as session:
        artifact = store.add_artifact(session, run, **ARTIFACT)
    with database.reading() as session:
        assert store.list_artifacts(session, job_id, project_id=DEFAULT_PROJECT) == []
        with pytest.raises(NotFound):
            store.get_artifact(session, artifact.id, project_id=DEFAULT_PROJECT)
    with database.transaction() as session:
        store.finish_job(session, run, JobState.SUCCEEDED, report={"selection": {"a": 1}})
    with database.reading() as session:
        listed = store.list_artifacts(session, job_id, project_id=DEFAULT_PROJECT)
        assert [item.id for item in listed] == [artifact.id]
        assert store.get_artifact(session, artifact.id, project_id=DEFAULT_PROJECT)
    assert events_of(database, job_id)[-1].data["selection"] == {"a": 1}


def test_a_project_does_not_see_anothers_records(database: Database) -> None:
    with database.transaction() as session:
        session.add(Project(id="prj_other", name="Other", created_at=now(session)))
    job_id = seed_job(database)
    other = seed_job(database, project_id="prj_other")
    with database.transaction() as session:
        job = store.get_job(session, job_id, project_id=DEFAULT_PROJECT)
        listed = store.list_jobs(session, project_id="prj_other")
        assert [item.id for item in listed] == [other]
        for look in (
            lambda: store.get_job(session, job_id, project_id="prj_other"),
            lambda: store.get_model(session, job.model_id, project_id="prj_other"),
            lambda: store.get_dataset(session, job.dataset_id, project_id="prj_other"),
            lambda: store.list_events(session, job_id, project_id="prj_other"),
            lambda: store.list_artifacts(session, job_id, project_id="prj_other"),
            lambda: store.request_cancel(session, job_id, project_id="prj_other"),
            lambda: store.list_jobs(session, project_id="prj_other", after=job_id),
            lambda: store.create_job(
                session,
                project_id="prj_other",
                name="x",
                model_id=job.model_id,
                dataset_id=job.dataset_id,
                spec={},
            ),
        ):
            with pytest.raises(NotFound):
                look()


@pytest.mark.parametrize("cursor", [cursor_of, lambda job: job.id])
def test_pages_hold_every_job_once_newest_first(
    database: Database, cursor: Callable[[Job], str]
) -> None:
    made = [seed_job(database) for _ in range(7)]
    run = claimed(database, made[3])
    pages: list[str] = []
    after = None
    while True:
        with database.reading() as session:
            page = store.list_jobs(session, project_id=DEFAULT_PROJECT, after=after, limit=3)
        if not page:
            break
        pages += [job.id for job in page]
        after = cursor(page[-1])
    assert sorted(pages) == sorted(made)
    with database.reading() as session:
        times = [store.get_job(session, id, project_id=DEFAULT_PROJECT).created_at for id in pages]
        running = store.list_jobs(session, project_id=DEFAULT_PROJECT, state=JobState.RUNNING)
        queued = store.queued_jobs(session)
    assert times == sorted(times, reverse=True)
    assert [job.id for job in running] == [run.job_id]
    assert [job.id for job in queued] == [id for id in reversed(pages) if id != made[3]]


def test_a_listing_reads_what_was_chosen_and_no_documents(database: Database) -> None:
    chosen: dict[str, Any] = {}
    for selection in ({"subnetwork": "w1_2"}, {"subnetwork": None}, None):
        run = claimed(database, seed_job(database, plan={"rows": {}}))
        with database.transaction() as session:
            report = {"selection": selection, "subnetworks": []}
            store.finish_job(session, run, JobState.SUCCEEDED, report=report)
        chosen[run.job_id] = selection
    waiting = seed_job(database)
    with database.reading() as session:
        listed = store.list_jobs(session, project_id=DEFAULT_PROJECT)
        found = store.selections(session, [job.id for job in listed])
        for document in ("spec", "plan", "report", "checkpoints"):
            with pytest.raises(InvalidRequestError):
                getattr(listed[0], document)
    assert {job.id for job in listed} == {*chosen, waiting}
    assert found == {id: selection for id, selection in chosen.items() if selection is not None}


def queued_ids(database: Database, *devices: Device) -> list[str]:
    with database.reading() as session:
        return [job.id for job in store.queued_jobs(session, devices=devices or Device)]


def test_the_queue_is_by_priority_then_age(database: Database) -> None:
    plain = [seed_job(database) for _ in range(2)]
    urgent = [seed_job(database, priority=5, spec={"device": "gpu"}) for _ in range(2)]
    patient = seed_job(database, priority=-5)
    most = seed_job(database, priority=6)
    assert queued_ids(database) == [most, *urgent, *plain, patient]
    assert queued_ids(database, Device.CPU) == [most, *plain, patient]
    assert queued_ids(database, Device.GPU) == urgent
    with database.reading() as session:
        assert [job.id for job in store.queued_jobs(session, limit=2)] == [most, urgent[0]]
        (first, _) = store.queued_jobs(session, devices=[Device.GPU])
    assert first.need == Need(Device.GPU)


def test_waits_are_told_by_device_and_since_a_job_was_last_queued(database: Database) -> None:
    def figures() -> store.QueueFigures:
        with database.reading() as session:
            return store.queue_figures(session)

    assert set(figures().counts.values()) == set(figures().longest_seconds.values()) == {0}
    lost, on_gpu = seed_job(database), seed_job(database, spec={"device": "gpu"})
    with database.transaction() as session:
        for table in (Job, Event):  # all that is so far happened five hours ago
            session.execute(update(table).values(created_at=now(session) - timedelta(hours=5)))
    expired_claim(database, lost)
    assert settle(database, lost) == JobState.QUEUED
    found = figures()
    assert found.longest_seconds["cpu"] < 60
    assert found.longest_seconds["gpu"] == pytest.approx(5 * 3600, abs=60)
    claimed(database, on_gpu)
    found = figures()
    assert found.longest_seconds["gpu"] == 0
    assert found.counts == {
        ("queued", "cpu"): 1,
        ("queued", "gpu"): 0,
        ("running", "cpu"): 0,
        ("running", "gpu"): 1,
    }
    with database.transaction() as session:
        session.execute(update(Job).values(device=None))
    assert figures().counts["queued", "unrouted"] == 1
    assert figures().longest_seconds["unrouted"] < 60


def test_a_job_is_claimed_for_its_own_device_alone(database: Database) -> None:
    job_id = seed_job(database, spec={"device": "gpu:1"})

    def claim_with(*devices: Device) -> Claim | None:
        with database.transaction() as session:
            return store.claim_job(
                session, job_id, worker="w", lease_seconds=60, max_runs=3, devices=devices
            )

    assert claim_with(Device.CPU) is None
    assert claim_with() is None
    assert claim_with(Device.CPU, Device.GPU) is not None


def test_a_job_of_a_version_with_one_queue_is_routed(database: Database) -> None:
    job_id = seed_job(database, spec={"device": "gpu:1"})
    with database.transaction() as session:
        session.execute(update(Job).values(device=None))
    assert queued_ids(database) == []
    assert claim(database, job_id) is None
    with database.transaction() as session:
        assert store.unrouted_jobs(session) == [job_id]
        store.route_job(session, job_id)
    assert queued_ids(database, Device.GPU) == [job_id]
    with database.reading() as session:
        assert store.unrouted_jobs(session) == []


def retry(database: Database, job_id: str) -> Job:
    with database.transaction() as session:
        return store.retry_job(session, job_id, project_id=DEFAULT_PROJECT)


@pytest.mark.parametrize("end", [JobState.FAILED, JobState.CANCELLED])
def test_a_job_that_came_to_nothing_is_retried(database: Database, end: JobState) -> None:
    job_id = seed_job(database)
    first = claimed(database, job_id)
    with database.transaction() as session:
        store.add_checkpoint(
            session,
            first,
            name="c",
            key=f"jobs/{job_id}/1/checkpoints/c",
            size_bytes=1,
            sha256="0" * 64,
            stage="distil",
            step=7,
        )
        session.get_one(Job, job_id).attempts = 3
        store.finish_job(session, first, end, error={"code": "x", "message": "y"})
    job = retry(database, job_id)
    assert (job.state, job.attempts, job.error) == (JobState.QUEUED, 0, None)
    assert (job.started_at, job.finished_at) == (None, None)
    second = claimed(database, job_id)
    assert second.fence == 2
    assert [each["step"] for each in second.checkpoints] == [7]
    with database.transaction() as session, pytest.raises(StaleRun):
        store.renew_lease(session, first, lease_seconds=60)
    kinds = [event.kind for event in events_of(database, job_id)]
    assert kinds == ["queued", "started", "checkpoint", str(end), "queued", "started"]
    assert [event.number for event in events_of(database, job_id)] == [1, 2, 3, 4, 5, 6]


def test_a_job_that_succeeded_or_has_not_ended_is_not_retried(database: Database) -> None:
    def refusal(job_id: str) -> str:
        with pytest.raises(Conflict) as refused:
            retry(database, job_id)
        return refused.value.code

    job_id = seed_job(database)
    assert refusal(job_id) == "job-not-finished"
    run = claimed(database, job_id)
    assert refusal(job_id) == "job-not-finished"
    with database.transaction() as session:
        store.finish_job(session, run, JobState.SUCCEEDED, report={})
    assert refusal(job_id) == "job-succeeded"
    assert [e.kind for e in events_of(database, job_id)] == ["queued", "started", "succeeded"]
    with pytest.raises(NotFound):
        retry(database, "job_absent")


def test_time_that_runs_took_counts_until_the_job_is_retried(database: Database) -> None:
    job_id = seed_job(database, time_limit_seconds=100)
    assert claimed(database, seed_job(database)).seconds_left is None

    def run_for(seconds: float) -> float:
        run = claimed(database, job_id)
        assert run.seconds_left is not None
        with database.transaction() as session:
            begun = session.get_one(Run, run.run_id)
            begun.started_at -= timedelta(seconds=seconds)
            store.release_job(session, run, reason="told to stop")
        return run.seconds_left

    assert run_for(30) == 100
    assert run_for(40) == pytest.approx(70, abs=1)
    assert run_for(0) == pytest.approx(30, abs=1)
    cancel(database, job_id)
    retry(database, job_id)
    assert run_for(0) == 100


def test_a_job_whose_worker_is_gone_is_cancelled_at_once(database: Database) -> None:
    """There may be no other worker to see to it."""
    job_id = seed_job(database)
    silent = expired_claim(database, job_id)
    cancel(database, job_id)
    assert job_of(database, job_id).state == JobState.CANCELLED
    assert runs_of(database, job_id) == [RunState.LOST]
    with database.transaction() as session, pytest.raises(StaleRun):
        store.finish_job(session, silent, JobState.SUCCEEDED, report={})


def test_numbers_that_json_lacks_do_not_break_a_write(database: Database) -> None:
    job_id = seed_job(database, spec={"text": "a\x00b"})
    run = claimed(database, job_id)
    with database.transaction() as session:
        store.append_events(session, run, [("progress", {"loss": float("nan"), "t": "\x00\ud800"})])
    stored = events_of(database, job_id)[-1].data
    assert stored["loss"] == "nan"
    assert "\x00" not in stored["t"]


def test_the_clock_is_aware_and_in_utc(database: Database) -> None:
    job_id = seed_job(database)
    with database.reading() as session:
        at = now(session)
    created = job_of(database, job_id).created_at
    assert at.tzinfo is UTC and created.tzinfo is UTC
    assert created <= at
    assert abs((at - datetime.now(UTC)).total_seconds()) < 60


def test_ended_runs_are_swept_once(database: Database) -> None:
    lost, kept = seed_job(database), seed_job(database)
    expired_claim(database, lost)
    settle(database, lost)
    run = claimed(database, kept)
    with database.transaction() as session:
        store.finish_job(session, run, JobState.SUCCEEDED, report={})
    time.sleep(0.01)
    with database.transaction() as session:
        assert store.unswept_runs(session, grace_seconds=3600) == []
        found = store.unswept_runs(session, grace_seconds=0)
        assert {(item.job_id, item.state) for item in found} == {
            (lost, RunState.LOST),
            (kept, RunState.SUCCEEDED),
        }
        for item in found:
            store.mark_swept(session, item.id)
    with database.reading() as session:
        assert store.unswept_runs(session, grace_seconds=0) == []


def checkpoint(step: int) -> dict[str, Any]:
    key = f"jobs/j/1/checkpoints/{step}"
    return {
        "name": str(step),
        "key": key,
        "size_bytes": 1,
        "sha256": "a" * 64,
        "stage": "distil",
        "step": step,
    }


def test_the_next_run_gets_the_checkpoints_newest_first(database: Database) -> None:
    job_id = seed_job(database)
    run = claimed(database, job_id)
    assert run.checkpoints == ()
    with database.transaction() as session:
        store.add_checkpoint(session, run, **checkpoint(1))
        store.add_checkpoint(session, run, **checkpoint(2))
    with database.transaction() as session:
        store.release_job(session, run, reason="a test")
    again = claimed(database, job_id)
    assert [each["step"] for each in again.checkpoints] == [2, 1]
    assert again.checkpoints[0].items() >= checkpoint(2).items()
    with database.transaction() as session, pytest.raises(StaleRun):
        store.add_checkpoint(session, run, **checkpoint(3))
    with database.reading() as session:
        kept = [checkpoint(2)["key"], checkpoint(1)["key"]]
        assert store.checkpoint_keys(session, job_id) == kept


def test_checkpoints_are_spent_when_superseded_or_when_the_job_has_ended(
    database: Database,
) -> None:
    job_id = seed_job(database)
    run = claimed(database, job_id)
    with database.transaction() as session:
        for step in (1, 2, 3):
            store.add_checkpoint(session, run, **checkpoint(step))
    time.sleep(0.01)

    def spent(grace_seconds: float) -> dict[str, list[str]]:
        with database.reading() as session:
            return store.spent_checkpoints(session, kept=2, grace_seconds=grace_seconds)

    assert spent(3600) == {}
    assert spent(0) == {job_id: [checkpoint(1)["key"]]}
    with database.transaction() as session:
        store.forget_checkpoints(session, job_id, [checkpoint(1)["key"]])
    assert spent(0) == {}
    with database.transaction() as session:
        store.finish_job(session, run, JobState.FAILED, error={})
    time.sleep(0.01)
    assert spent(3600) == {}
    keys = [checkpoint(3)["key"], checkpoint(2)["key"]]
    assert spent(0) == {job_id: keys}
    with database.transaction() as session:
        store.forget_checkpoints(session, job_id, keys)
    with database.reading() as session:
        assert store.get_job(session, job_id, project_id=DEFAULT_PROJECT).checkpoints is None
    assert spent(0) == {}


def test_keys_and_passwords_never_reach_events_or_errors(database: Database) -> None:
    job_id = seed_job(database)
    run = claimed(database, job_id)
    said = {"last_lines": ["GET wwk_secret-key", {"url": "postgresql://u:secret@h/d"}]}
    with database.transaction() as session:
        store.append_events(session, run, [("progress", said)])
        store.finish_job(session, run, JobState.FAILED, error={"code": "x", "message": str(said)})
    told = [event.data for event in events_of(database, job_id)] + [job_of(database, job_id).error]
    assert "secret" not in repr(told)
    assert told[2] == {"last_lines": ["GET wwk_***", {"url": "postgresql://u:***@h/d"}]}


def test_a_claim_carries_the_content_of_the_profile_that_its_job_names(database: Database) -> None:
    content = {"tables": [{"attention": {"3": 1.5}}]}
    found = claimed(database, seed_job(database, profile=content))
    assert found.profile == content
    assert claimed(database, seed_job(database)).profile is None


def test_a_job_cannot_name_another_projects_profile(database: Database) -> None:
    with database.transaction() as session:
        other = access.add_project(session, name="another").id
        profile = store.add_profile(
            session, project_id=other, name="p", sha256="0" * 64, summary={}, content={"a": 1}
        ).id
    with database.reading() as session:
        assert store.get_profile(session, profile, project_id=other).content == {"a": 1}
        with pytest.raises(NotFound):
            store.get_profile(session, profile, project_id=DEFAULT_PROJECT)
    job = job_of(database, seed_job(database))
    with pytest.raises(NotFound), database.transaction() as session:
        store.create_job(
            session,
            project_id=DEFAULT_PROJECT,
            name="j",
            model_id=job.model_id,
            dataset_id=job.dataset_id,
            spec={},
            profile_id=profile,
        )
