"""What commits leave to be told, and who is told."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
import redis

from jobs import store
from jobs.db import Database
from jobs.devices import Device
from jobs.nudges import EVENTS_CHANNEL, EventPublisher, Notes, Teller
from jobs.records import DEFAULT_PROJECT
from tests.seeds import seed_job
from tests.services import free_port, wait_until


@pytest.fixture
def url(migrated_sqlite: Path, tmp_path: Path) -> str:
    path = tmp_path / "widthwise.db"
    path.write_bytes(migrated_sqlite.read_bytes())
    return f"sqlite:///{path}"


def test_events_are_told_after_their_commit_and_not_without_it(url: str) -> None:
    told: list[Notes] = []
    database = Database(url, after_commit=told.append)
    job_id = seed_job(database)
    queued = Notes(jobs=frozenset({job_id}), queued=frozenset({(job_id, Device.CPU)}))
    assert told == [queued]
    with pytest.raises(ZeroDivisionError), database.transaction() as session:
        store.request_cancel(session, job_id, project_id=DEFAULT_PROJECT)
        raise ZeroDivisionError
    with database.transaction():
        pass
    assert len(told) == 1
    with database.transaction() as session:
        store.request_cancel(session, job_id, project_id=DEFAULT_PROJECT)
        assert len(told) == 1
    assert told[1:] == [Notes(jobs=frozenset({job_id}))]
    with database.transaction() as session:
        store.retry_job(session, job_id, project_id=DEFAULT_PROJECT)
    assert told[2:] == [queued]
    database.close()


def test_a_teller_tells_in_order_and_outlives_what_fails() -> None:
    told: list[Notes] = []
    go_on = threading.Event()

    def fails(_: Notes) -> None:
        go_on.wait(30)
        raise OSError

    teller = Teller(fails, told.append)
    sent = [Notes(jobs=frozenset({str(number)})) for number in range(5)]
    for notes in sent:
        teller(notes)  # returns, whatever the first one waits for
    assert told == []
    go_on.set()
    teller.close(30)
    assert told == sent


def test_the_publisher_reaches_subscribers(redis_url: str) -> None:
    with redis.Redis.from_url(redis_url) as client, client.pubsub() as subscription:
        subscription.subscribe(EVENTS_CHANNEL)
        assert subscription.get_message(timeout=10)["type"] == "subscribe"
        publisher = EventPublisher(redis_url)
        publisher(Notes(jobs=frozenset({"job_a"})))
        publisher(Notes(deliveries=frozenset({"dlv_a"})))
        publisher(Notes(jobs=frozenset({"job_b"})))
        heard = [subscription.get_message(timeout=10)["data"] for _ in range(2)]
        assert heard == [b"job_a", b"job_b"]
        publisher.close()


def test_a_publisher_whose_redis_is_away_neither_fails_nor_asks_each_time() -> None:
    publisher = EventPublisher(f"redis://127.0.0.1:{free_port()}/0")
    for _ in range(3):
        publisher(Notes(jobs=frozenset({"job_a"})))
    publisher.close()


def test_a_teller_that_was_never_used_closes() -> None:
    threads = threading.active_count()
    Teller().close()
    wait_until(lambda: threading.active_count() <= threads, "no thread is left")
