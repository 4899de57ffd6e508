"""Places in the queue, and when a job may start."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest
from sqlalchemy import update

from jobs import schedule, store, workers
from jobs.db import Database, now
from jobs.devices import Device, Need
from jobs.records import DEFAULT_PROJECT, Job, Run
from jobs.schedule import Outlook, outlook, wait_seconds
from jobs.states import JobState
from tests.seeds import seed_job


def job(database: Database, *, predicted: float | None = 100, **details: Any) -> str:
    plan = None if predicted is None else {"predicted_seconds": predicted}
    return seed_job(database, plan=plan, **details)


def look(database: Database, job_id: str) -> Outlook | None:
    with database.reading() as session:
        return outlook(session, store.get_job(session, job_id, project_id=DEFAULT_PROJECT))


def starts_in(database: Database, job_id: str) -> float | None:
    """Seconds until its estimated start."""
    found = look(database, job_id)
    assert found is not None
    if found.estimated_start is None:
        return None
    with database.reading() as session:
        return (found.estimated_start - now(session)).total_seconds()


def announce(database: Database, *, slots: int = 1, gpus: int = 0) -> None:
    with database.transaction() as session:
        workers.announce(session, name="w", slots=slots, gpus=gpus, lease_seconds=60)


def start(database: Database, job_id: str, *, ago: float = 0) -> store.Claim:
    with database.transaction() as session:
        claim = store.claim_job(session, job_id, worker="w", lease_seconds=60, max_runs=3)
        assert claim is not None
        begun = now(session) - timedelta(seconds=ago)
        for record in (session.get_one(Job, job_id), session.get_one(Run, claim.run_id)):
            record.started_at = begun
    return claim


def measure(database: Database, seconds: float, *, predicted: float = 100, **more: Any) -> None:
    """A job that took so long, against what was predicted."""
    claim = start(database, job(database, predicted=predicted, **more), ago=seconds)
    with database.transaction() as session:
        store.finish_job(session, claim, JobState.SUCCEEDED, report={})


@pytest.mark.parametrize(
    ("slots", "running", "ahead", "wait"),
    [
        (1, [], [], 0),
        (1, [5], [], 5),
        (1, [5], [10, 20], 35),
        (2, [5], [], 0),
        (2, [5], [10], 5),
        (2, [5, 9], [10, 20], 15),
        (1, [5, 9], [], 9),  # one of two is drained: the other must end first
        (3, [], [7, 8], 0),
    ],
)
def test_each_job_goes_to_the_slot_that_is_free_first(
    slots: int, running: list[float], ahead: list[float], wait: float
) -> None:
    assert wait_seconds(slots, running, ahead) == wait


def test_a_place_counts_those_before_it_on_its_device(database: Database) -> None:
    made = [job(database) for _ in range(3)]
    urgent = job(database, priority=1)
    on_gpu = job(database, spec={"device": "gpu"})
    places = {id: look(database, id) for id in (urgent, *made, on_gpu)}
    assert [place and place.position for place in places.values()] == [1, 2, 3, 4, 1]
    assert places[on_gpu] == Outlook(
        device=Device.GPU,
        position=1,
        estimated_start=None,
        warning="No worker has announced the device gpu. The job waits until one does.",
    )
    start(database, urgent)
    assert look(database, urgent) is None
    last = look(database, made[2])
    assert last is not None and last.position == 3


def test_jobs_of_the_same_moment_have_places_too(database: Database) -> None:
    made = sorted(job(database) for _ in range(3))
    with database.transaction() as session:
        session.execute(update(Job).values(created_at=now(session)))
    places = [look(database, id) for id in made]
    assert [place and place.position for place in places] == [1, 2, 3]


def test_far_back_there_is_no_place(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(schedule, "COUNTED", 2)
    made = [job(database) for _ in range(4)]
    places = [look(database, id) for id in made]
    assert [place and place.position for place in places] == [1, 2, 3, None]


def test_a_start_is_estimated_from_what_jobs_took(database: Database) -> None:
    first, second = job(database, predicted=10), job(database, predicted=40)
    assert starts_in(database, first) is None  # no worker
    announce(database)
    assert starts_in(database, first) == pytest.approx(0, abs=1)
    assert starts_in(database, second) is None  # nothing was measured
    for seconds in (200, 300, 10_000):  # the median: three times what was predicted
        measure(database, seconds)
    measure(database, 7, spec={"device": "gpu"})
    assert starts_in(database, second) == pytest.approx(30, abs=1)
    start(database, first, ago=12)
    assert starts_in(database, second) == pytest.approx(18, abs=1)
    third = job(database)
    assert starts_in(database, third) == pytest.approx(18 + 120, abs=1)
    with database.transaction() as session:
        session.execute(update(Job).where(Job.id == second).values(predicted_seconds=None))
    assert starts_in(database, third) is None  # as of a version that did not write it down
    assert starts_in(database, second) == pytest.approx(18, abs=1)


def test_a_job_without_an_end_hides_no_start_but_those_behind_it(database: Database) -> None:
    """What a plan predicts is bounded by the job's time limit, and a date by the calendar."""
    announce(database)
    measure(database, 100)
    endless = job(database, predicted=1e300, time_limit_seconds=60)
    behind = job(database)
    assert starts_in(database, endless) == pytest.approx(0, abs=1)
    assert starts_in(database, behind) == pytest.approx(60, abs=1)
    start(database, endless, ago=20)
    assert starts_in(database, behind) == pytest.approx(40, abs=1)
    with database.transaction() as session:
        session.execute(update(Job).values(time_limit_seconds=None))  # as of older versions
    assert starts_in(database, behind) is None
    place = look(database, behind)
    assert place is not None and place.position == 1


@pytest.mark.parametrize(
    ("need", "missing"),
    [
        (Need(Device.CPU), "the device cpu"),
        (Need(Device.GPU), None),
        (Need(Device.GPU, count=2), None),
        (Need(Device.GPU, count=2, first=1), "3 GPUs"),
    ],
)
def test_what_no_worker_has_is_told(database: Database, need: Need, missing: str | None) -> None:
    announce(database, slots=0, gpus=2)
    with database.reading() as session:
        told = workers.announced(session).missing(need)
    assert (told is None) if missing is None else (told is not None and missing in told)
