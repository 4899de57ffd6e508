"""What the worker's tests share."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from jobs import store
from jobs.artifacts import ObjectStore
from jobs.db import Database
from jobs.records import DEFAULT_PROJECT, Event, Job
from jobs.settings import Settings
from jobs.states import JobState
from tests.seeds import seed_job
from tests.services import wait_until

JOB_PROCESS = Path(__file__).with_name("job_process.py")
CHILD_COMMAND = (sys.executable, "-S", str(JOB_PROCESS))


def settings_for(tmp_path: Path, database_url: str | None = None, **more: Any) -> Settings:
    """Quick ones: no test waits for a lease of a minute, or for the machine to be measured."""
    chosen: dict[str, Any] = {
        "data_dir": tmp_path / "data",
        "store_url": (tmp_path / "objects").as_uri(),
        "lease_seconds": 30,
        "reconcile_seconds": 0.5,
        "cancel_poll_seconds": 0.1,
        "stop_grace_seconds": 0.5,
        "measure_training": False,
    }
    if database_url is not None:
        chosen["database_url"] = database_url
    return Settings(**chosen | more)


def submit(
    database: Database, objects: ObjectStore, *steps: str, device: str = "cpu", **details: Any
) -> str:
    """`details` as of store.create_job, and `processes` as in a spec."""
    spec = {"do": list(steps), "device": device, "processes": details.pop("processes", 1)}
    return seed_job(database, objects, spec=spec, **details)


def job_of(database: Database, job_id: str) -> Job:
    with database.reading() as session:
        return store.get_job(session, job_id, project_id=DEFAULT_PROJECT)


def error_of(database: Database, job_id: str) -> dict[str, Any]:
    error = job_of(database, job_id).error
    assert error is not None
    return dict(error)


def events_of(database: Database, job_id: str) -> list[Event]:
    with database.reading() as session:
        return store.list_events(session, job_id, project_id=DEFAULT_PROJECT, limit=1000)


def kinds_of(database: Database, job_id: str) -> list[str]:
    return [event.kind for event in events_of(database, job_id)]


def wait_for_state(database: Database, job_id: str, state: str) -> None:
    """AssertionError if the job ends in another one, or does not get there in time."""

    def reached() -> bool:
        job = job_of(database, job_id)
        told = [(event.kind, event.data) for event in events_of(database, job_id)]
        assert job.state == state or not JobState(job.state).is_final, (job.state, told)
        return bool(job.state == state)

    wait_until(reached, f"{job_id} is {state}")


def wait_for_event(database: Database, job_id: str, kind: str, count: int = 1) -> Event:
    """The `count`th event of a kind."""

    def found() -> list[Event]:
        return [event for event in events_of(database, job_id) if event.kind == kind]

    wait_until(lambda: len(found()) >= count, f"{job_id} has {count} {kind} event(s)")
    return found()[count - 1]


def is_alive(pid: int) -> bool:
    """Whether a process runs; one that is dead but not reaped does not."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state != "Z"


def wait_for_death(*pids: int) -> None:
    wait_until(lambda: not any(is_alive(pid) for pid in pids), f"processes {pids} are dead")
