"""Delivers what webhooks are due, a few at once, beside the jobs and never in their way."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable

import structlog

from jobs import access, webhooks
from jobs.access import Actor
from jobs.db import Database
from jobs.settings import Settings
from jobs.webhooks import Attempt, Outcome
from worker.metrics import WorkerMetrics

SLOTS = 8
PER_WEBHOOK = 2  # so that a slow endpoint is not sent everything at once
PER_PROJECT = 4  # and a project's slow endpoints leave room for others
MIN_PAUSE_SECONDS = 0.5

log = structlog.get_logger(__name__)


class Deliverer:
    """One thread looks for what is due whenever it is told to, and when the next is; others send.
    The database decides who sends what: see jobs.webhooks."""

    def __init__(
        self,
        settings: Settings,
        database: Database,
        send: Callable[[Attempt], Outcome],
        metrics: WorkerMetrics | None = None,
    ) -> None:
        self._metrics = metrics or WorkerMetrics()
        self._settings = settings
        self._database = database
        self._send = send
        self._look = threading.Event()
        self._stopping = threading.Event()
        self._lock = threading.Lock()
        self._busy_webhooks: Counter[str] = Counter()
        self._busy_projects: Counter[str] = Counter()
        self._senders: set[threading.Thread] = set()
        self._finder = threading.Thread(target=self._find, name="webhooks", daemon=True)

    def start(self) -> None:
        self._finder.start()

    def offer(self, delivery_id: str | None = None) -> None:
        """Something is due, perhaps this. Returns at once."""
        self._look.set()

    def stop(self) -> None:
        """Nothing more is begun. Safe in signal handlers."""
        self._stopping.set()
        self._look.set()

    def join(self, timeout: float) -> None:
        """Waits for what is being sent. What does not end in time is sent again by another worker,
        once its claim has ended."""
        if self._finder.ident is not None:
            self._finder.join(timeout)
        for sender in list(self._senders):
            sender.join(timeout)

    def _find(self) -> None:
        while not self._stopping.is_set():
            self._look.clear()
            pause: float | None = None
            try:
                while (attempt := self._claim()) is not None:
                    self._begin(attempt)
                with self._database.reading() as session:
                    pause = webhooks.seconds_until_due(session)
            except Exception:
                log.exception("due webhooks could not be looked for")
            most = self._settings.reconcile_seconds
            self._look.wait(most if pause is None else max(MIN_PAUSE_SECONDS, min(pause, most)))

    def _claim(self) -> Attempt | None:
        with self._lock:
            if self._stopping.is_set() or self._busy_webhooks.total() >= SLOTS:
                return None
            busy_webhooks = [id for id, n in self._busy_webhooks.items() if n >= PER_WEBHOOK]
            busy_projects = [id for id, n in self._busy_projects.items() if n >= PER_PROJECT]
        # Looking first costs SQLite's other writers nothing.
        with self._database.reading() as session:
            if webhooks.seconds_until_due(session) != 0:
                return None
        with self._database.transaction() as session:
            return webhooks.claim_delivery(
                session, busy_webhooks=busy_webhooks, busy_projects=busy_projects
            )

    def _begin(self, attempt: Attempt) -> None:
        sender = threading.Thread(
            target=self._deliver, args=(attempt,), name=attempt.delivery_id, daemon=True
        )
        with self._lock:
            self._busy_webhooks[attempt.webhook_id] += 1
            self._busy_projects[attempt.project_id] += 1
            self._senders.add(sender)
        sender.start()

    def _deliver(self, attempt: Attempt) -> None:
        told = log.bind(
            delivery=attempt.delivery_id, webhook=attempt.webhook_id, attempt=attempt.number
        )
        try:
            outcome = self._send(attempt)
            with self._database.transaction() as session:
                disabled = webhooks.record_attempt(
                    session,
                    attempt,
                    outcome,
                    disable_seconds=self._settings.webhook_disable_seconds,
                )
                if disabled is not None:
                    actor = Actor(attempt.project_id)
                    access.record_action(
                        session, actor, "webhook.disabled", attempt.webhook_id, reason=disabled
                    )
            self._metrics.webhook_called(outcome, disabled=disabled is not None)
            told.info("webhook called", status=outcome.status, error=outcome.error)
            if disabled is not None:
                told.warning("webhook disabled", reason=disabled)
        except Exception:
            told.exception("a webhook's delivery failed here")
        finally:
            with self._lock:
                for counter, id in (
                    (self._busy_webhooks, attempt.webhook_id),
                    (self._busy_projects, attempt.project_id),
                ):
                    counter[id] -= 1
                    if not counter[id]:
                        del counter[id]
                self._senders.discard(threading.current_thread())
            self._look.set()
