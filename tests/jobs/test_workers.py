"""Workers as the database knows them."""

from __future__ import annotations

from datetime import timedelta

import pytest
from sqlalchemy import update

from jobs import store, workers
from jobs.db import Database, now
from jobs.devices import Device
from jobs.errors import NotFound
from jobs.records import Worker
from jobs.states import JobState
from jobs.workers import Announced, WorkerState
from tests.seeds import seed_job


def announce(database: Database, name: str, *, slots: int = 1, gpus: int = 0) -> str:
    with database.transaction() as session:
        return workers.announce(session, name=name, slots=slots, gpus=gpus, lease_seconds=60).id


def silence(database: Database, name: str, seconds: float) -> None:
    """Its lease ended that long ago."""
    with database.transaction() as session:
        at = now(session) - timedelta(seconds=seconds)
        session.execute(update(Worker).where(Worker.name == name).values(lease_expires_at=at))


def claim(database: Database, job_id: str, worker: str) -> store.Claim | None:
    with database.transaction() as session:
        return store.claim_job(session, job_id, worker=worker, lease_seconds=60, max_runs=3)


def states(database: Database) -> dict[str, WorkerState]:
    with database.reading() as session:
        found = workers.list_workers(session)
        loads, at = workers.loads(session, found), now(session)
    return {each.name: workers.state_of(each, loads[each.name], at=at) for each in found}


def test_what_all_announce_is_added_up(database: Database) -> None:
    with database.reading() as session:
        assert workers.announced(session) == Announced({Device.CPU: 0, Device.GPU: 0}, 0)
    announce(database, "a", slots=2)
    announce(database, "b", slots=0, gpus=4)
    announce(database, "e", slots=0, gpus=1)
    lost, drained = announce(database, "c", slots=8, gpus=8), announce(database, "d", gpus=8)
    assert lost
    silence(database, "c", 1)
    with database.transaction() as session:
        workers.drain(session, drained)
    with database.reading() as session:
        assert workers.announced(session) == Announced({Device.CPU: 2, Device.GPU: 5}, 4)


def test_a_silent_worker_is_lost_comes_back_and_is_forgotten_after_a_day(
    database: Database,
) -> None:
    announce(database, "a")
    silence(database, "a", 1)
    assert states(database) == {"a": WorkerState.LOST}
    with database.transaction() as session:
        assert workers.renew(session, "a", lease_seconds=60)
    assert states(database) == {"a": WorkerState.ACTIVE}
    announce(database, "b")
    silence(database, "a", workers.KEPT_LOST.total_seconds() + 1)
    silence(database, "b", workers.KEPT_LOST.total_seconds() - 60)
    with database.transaction() as session:
        assert workers.forget_lost(session) == 1
        assert not workers.renew(session, "a", lease_seconds=60)
        workers.leave(session, "b")
    assert states(database) == {}


def test_a_drained_worker_finishes_and_takes_no_more(database: Database) -> None:
    first, second = seed_job(database), seed_job(database)
    id = announce(database, "a", slots=2)
    running = claim(database, first, "a")
    assert running is not None
    for is_news in (True, False):
        with database.transaction() as session:
            worker, changed = workers.drain(session, id)
            assert changed is is_news
            assert worker.drain_requested_at is not None
            assert store.takes_no_more(session, "a")
            assert not store.takes_no_more(session, "b")
    assert states(database) == {"a": WorkerState.DRAINING}
    assert claim(database, second, "a") is None
    with database.transaction() as session:
        assert store.renew_lease(session, running, lease_seconds=60) is False
        store.finish_job(session, running, JobState.SUCCEEDED, report={})
    assert states(database) == {"a": WorkerState.DRAINED}
    with database.transaction() as session:
        assert workers.renew(session, "a", lease_seconds=60)  # which does not undo it
    assert claim(database, second, "a") is None
    for is_news in (True, False):
        with database.transaction() as session:
            assert workers.undrain(session, id)[1] is is_news
    assert claim(database, second, "a") is not None
    assert states(database) == {"a": WorkerState.ACTIVE}


def test_a_load_is_what_runs_now(database: Database) -> None:
    announce(database, "a", slots=2, gpus=4)
    announce(database, "b")
    on_cpu = seed_job(database)
    on_gpus = seed_job(database, spec={"device": "gpu", "processes": 3})
    for job_id in (on_cpu, on_gpus):
        assert claim(database, job_id, "a") is not None
    ended = claim(database, seed_job(database), "b")
    assert ended is not None
    with database.transaction() as session:
        store.release_job(session, ended, reason="x")
    with database.reading() as session:
        loads = workers.loads(session, workers.list_workers(session))
        assert [job_id for job_id, _ in loads["a"].jobs] == [on_cpu, on_gpus]
        assert loads["a"].busy == {Device.CPU: 1, Device.GPU: 3}
        assert loads["b"].jobs == []


def test_a_worker_that_there_is_not(database: Database) -> None:
    for change in (workers.drain, workers.undrain):
        with pytest.raises(NotFound), database.transaction() as session:
            change(session, "wrk_absent")
