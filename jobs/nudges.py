"""What a commit leaves to be told: that a job waits for a worker or has new events, that a webhook
is to be called.

`store` notes it in the session, `Database.transaction` hands the notes over once they are
committed, and a thread tells them, so that neither a run nor an answer waits for a queue that is
away. Telling is a nudge: the database is the truth, and whoever was not told looks for himself.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import redis
import structlog
from redis.backoff import NoBackoff
from redis.retry import Retry
from sqlalchemy.orm import Session

from jobs.devices import Device

EVENTS_CHANNEL = "widthwise:events"
_NOTES = "notes"
_MAX_WAITING = 10_000
_REDIS_PAUSE_SECONDS = 1.0  # without asking a Redis that has just not answered

log = structlog.get_logger(__name__)


@dataclass(frozen=True)
class Notes:
    """Ids of one transaction: of jobs that have new events, of webhook deliveries that are due, and
    of jobs that a user has queued, with whose queue they wait in."""

    jobs: frozenset[str] = frozenset()
    deliveries: frozenset[str] = frozenset()
    queued: frozenset[tuple[str, Device]] = frozenset()


def note_event(session: Session, job_id: str) -> None:
    notes = notes_of(session) or Notes()
    session.info[_NOTES] = replace(notes, jobs=notes.jobs | {job_id})


def note_delivery(session: Session, delivery_id: str) -> None:
    notes = notes_of(session) or Notes()
    session.info[_NOTES] = replace(notes, deliveries=notes.deliveries | {delivery_id})


def note_queued(session: Session, job_id: str, device: Device) -> None:
    notes = notes_of(session) or Notes()
    session.info[_NOTES] = replace(notes, queued=notes.queued | {(job_id, device)})


def notes_of(session: Session) -> Notes | None:
    """None where nothing is to be told."""
    notes = session.info.get(_NOTES)
    assert notes is None or isinstance(notes, Notes)
    return notes


class Teller:
    """Calls each of `tell` with every transaction's notes, one after the other, in a thread that
    the first notes start. What comes while too much waits is dropped."""

    def __init__(self, *tell: Callable[[Notes], object]) -> None:
        self._tell = tell
        self._waiting: queue.Queue[Notes | None] = queue.Queue(_MAX_WAITING)
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None

    def __call__(self, notes: Notes) -> None:
        """What `Database` calls after a commit. Returns at once and never fails."""
        with self._lock:
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="teller", daemon=True)
                self._thread.start()
        try:
            self._waiting.put_nowait(notes)
        except queue.Full:
            log.warning("a nudge was dropped: too many wait")

    def close(self, timeout: float = 1.0) -> None:
        """Tells what still waits, for as long as `timeout` seconds."""
        if self._thread is not None:
            try:
                self._waiting.put_nowait(None)
            except queue.Full:
                return
            self._thread.join(timeout)

    def _run(self) -> None:
        while (notes := self._waiting.get()) is not None:
            for tell in self._tell:
                try:
                    tell(notes)
                except Exception:
                    log.exception("a nudge failed")


class EventPublisher:
    """Publishes in Redis which jobs have new events, to the watchers of every API process."""

    def __init__(self, url: str) -> None:
        self._redis = redis.Redis.from_url(
            url, socket_timeout=0.5, socket_connect_timeout=0.5, retry=Retry(NoBackoff(), 1)
        )
        self._asks_again_at = 0.0

    def __call__(self, notes: Notes) -> None:
        if not notes.jobs or time.monotonic() < self._asks_again_at:
            return
        try:
            for job_id in notes.jobs:
                self._redis.publish(EVENTS_CHANNEL, job_id)
        except (redis.RedisError, OSError) as error:
            self._asks_again_at = time.monotonic() + _REDIS_PAUSE_SECONDS
            log.warning("watchers of events are not nudged", error=str(error))

    def close(self) -> None:
        self._redis.close()
