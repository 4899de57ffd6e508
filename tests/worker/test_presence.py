"""A worker tells that it is there, and that it goes."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from sqlalchemy.orm import Session

from jobs import workers
from jobs.db import Database
from tests.services import wait_until
from worker.presence import Presence


def names(database: Database) -> list[str]:
    with database.reading() as session:
        return [worker.name for worker in workers.list_workers(session)]


class SlowFor:
    """The database, which has one thread wait until it is let through."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self.slow: threading.Thread | None = None
        self.met, self.let_through = threading.Event(), threading.Event()

    @contextmanager
    def transaction(self) -> Iterator[Session]:
        if threading.current_thread() is self.slow:
            self.met.set()
            self.let_through.wait(30)
        with self._database.transaction() as session:
            yield session


def test_a_worker_that_leaves_is_not_announced_by_its_last_sign_of_life(
    database: Database,
) -> None:
    slow: Any = SlowFor(database)
    presence = Presence(slow, name="w", slots=1, gpus=0, lease_seconds=0.04)
    assert names(database) == ["w"]
    slow.slow = presence
    presence.start()
    wait_until(slow.met.is_set, "another sign of life is on its way")
    threading.Timer(0.2, slow.let_through.set).start()
    presence.end()
    presence.join()
    assert names(database) == []


def test_a_worker_whose_row_was_given_up_is_announced_again(database: Database) -> None:
    presence = Presence(database, name="w", slots=1, gpus=0, lease_seconds=0.04)
    presence.start()
    with database.transaction() as session:
        workers.leave(session, "w")
    wait_until(lambda: names(database) == ["w"], "it is announced again")
    presence.end()
    assert names(database) == []
