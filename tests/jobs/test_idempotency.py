"""One key, one request: over time, between processes that die, and in a race."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest
from sqlalchemy import select
from sqlalchemy.exc import IntegrityError

from jobs import access, idempotency
from jobs.access import Actor
from jobs.artifacts import ObjectStore
from jobs.db import Database
from jobs.errors import Conflict, KeyReused
from jobs.idempotency import Done, Hold
from jobs.records import DEFAULT_PROJECT, AuditEntry, IdempotencyKey
from jobs.settings import Settings
from worker.reconciler import reconcile


@dataclass(frozen=True)
class Sent:
    digest: str = "a" * 64
    size_bytes: int = 2

    def sha256(self) -> str:
        return self.digest


def take(
    database: Database,
    *,
    key: str = "k",
    request: str = "r",
    hold_seconds: float = 60,
    kept_seconds: float = 60,
    project_id: str = DEFAULT_PROJECT,
) -> Hold | Done:
    with database.transaction() as session:
        return idempotency.take_hold(
            session,
            project_id=project_id,
            key=key,
            request=request,
            body=Sent(),
            hold_seconds=hold_seconds,
            kept_seconds=kept_seconds,
        )


def held(database: Database, *, hold_seconds: float = 60, kept_seconds: float = 60) -> Hold:
    taken = take(database, hold_seconds=hold_seconds, kept_seconds=kept_seconds)
    assert isinstance(taken, Hold)
    return taken


def act(database: Database, hold: Hold) -> None:
    """What a handler does: something, and its line in the audit log, in one transaction."""
    with database.transaction() as session:
        access.record_action(session, Actor(DEFAULT_PROJECT, hold=hold), "job.created", "job_1")


def actions(database: Database) -> int:
    with database.reading() as session:
        return session.query(AuditEntry).count()


def keep(database: Database, hold: Hold) -> None:
    with database.transaction() as session:
        idempotency.keep_answer(
            session, hold, status=202, headers=[("location", "/v1/jobs/job_1")], content=b"{}"
        )


def test_an_answer_is_given_again_to_the_same_request_alone(database: Database) -> None:
    hold = held(database)
    act(database, hold)
    keep(database, hold)
    again = take(database)
    assert again == Done(
        body_sha256="a" * 64,
        body_bytes=2,
        action="job.created",
        target="job_1",
        status=202,
        headers=(("location", "/v1/jobs/job_1"),),
        content=b"{}",
    )
    with pytest.raises(KeyReused):
        take(database, request="another")
    assert isinstance(take(database, key="another"), Hold)


def test_a_key_is_of_one_project(database: Database) -> None:
    keep(database, held(database))
    with database.transaction() as session:
        other = access.add_project(session, name="another").id
    assert isinstance(take(database, project_id=other), Hold)


def test_while_it_is_held_nobody_else_gets_it(database: Database) -> None:
    hold = held(database, hold_seconds=0.2)
    with database.transaction() as session:
        idempotency.extend(session, hold, hold_seconds=60)
    time.sleep(0.25)
    with pytest.raises(Conflict, match="still being carried out"):
        take(database)


def test_of_many_that_come_at_once_one_is_carried_out(database: Database) -> None:
    barrier = threading.Barrier(6)
    came_to: list[str] = []

    def race() -> None:
        barrier.wait()
        try:
            came_to.append(type(take(database)).__name__)
        except (Conflict, IntegrityError):
            came_to.append("in progress")

    threads = [threading.Thread(target=race) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(came_to) == ["Hold", *["in progress"] * 5]


def test_what_failed_leaves_the_key_free(database: Database) -> None:
    hold = held(database)
    with database.transaction() as session:
        idempotency.let_go(session, hold)
    assert isinstance(take(database, request="mended"), Hold)


def test_what_was_done_before_its_process_died_is_not_done_again(database: Database) -> None:
    hold = held(database, hold_seconds=0.05)
    act(database, hold)
    time.sleep(0.06)
    done = take(database)
    assert isinstance(done, Done)
    assert (done.status, done.action, done.target) == (None, "job.created", "job_1")


def test_what_was_not_done_before_its_process_died_is_done_by_the_next(database: Database) -> None:
    stood_still = held(database, hold_seconds=0.05)
    time.sleep(0.06)
    second = held(database)
    with pytest.raises(Conflict, match="stood still"):  # it wakes up, and changes nothing
        act(database, stood_still)
    assert actions(database) == 0
    keep(database, stood_still)
    with database.transaction() as session:
        idempotency.let_go(session, stood_still)
    act(database, second)
    assert actions(database) == 1
    keep(database, second)
    assert isinstance(take(database), Done)


def test_keys_have_a_time_and_are_then_forgotten(database: Database) -> None:
    keep(database, held(database, kept_seconds=0.05))
    time.sleep(0.06)
    with database.transaction() as session:
        assert idempotency.delete_expired(session) == 1
        assert idempotency.delete_expired(session) == 0
    keep(database, held(database, kept_seconds=0.05))
    time.sleep(0.06)
    held(database, kept_seconds=0.05)  # unswept, it is free all the same
    time.sleep(0.06)
    with database.transaction() as session:
        assert idempotency.delete_expired(session) == 0  # in progress


def test_a_pass_forgets_all_that_have_expired(
    database: Database, objects: ObjectStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In as many transactions as it takes: keys may come faster than one of them a pass deletes."""
    for number in range(5):
        hold = take(database, key=f"key {number}", kept_seconds=0.01)
        assert isinstance(hold, Hold)
        keep(database, hold)
    time.sleep(0.05)
    delete = partial(idempotency.delete_expired, limit=2)
    monkeypatch.setattr(idempotency, "delete_expired", delete)
    settings = Settings(data_dir=tmp_path / "data")
    reconcile(settings, database, objects, nudge=lambda job: None)
    with database.reading() as session:
        assert session.scalars(select(IdempotencyKey)).all() == []
