"""What the API tells Prometheus: its requests, its streams, and what the database says of the
queue when it is asked."""

from __future__ import annotations

import time
from collections.abc import Iterator

import structlog
from prometheus_client import Counter, Histogram
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector
from sqlalchemy.exc import SQLAlchemyError
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from api.live import LiveEvents
from jobs import store, webhooks
from jobs.db import Database
from jobs.metrics import OTHER, FewWords, new_registry

_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)
_MOST_CODES = 100

log = structlog.get_logger(__name__)


class ApiMetrics:
    """Figures of one process of the API."""

    def __init__(self, database: Database, live: LiveEvents) -> None:
        self.registry = new_registry()
        self._requests = Counter(
            "widthwise_http_requests",
            "Requests answered; status 0: the client left before.",
            ("method", "route", "status"),
            registry=self.registry,
        )
        self._seconds = Histogram(
            "widthwise_http_answer_seconds",
            "From a request's headers to those of its answer, the reading of its body included.",
            ("method", "route"),
            buckets=_SECONDS,
            registry=self.registry,
        )
        self._received = Counter(
            "widthwise_http_received_bytes",
            "Bodies of requests.",
            ("route",),
            registry=self.registry,
        )
        self._sent = Counter(
            "widthwise_http_sent_bytes", "Bodies of answers.", ("route",), registry=self.registry
        )
        self._refused = Counter(
            "widthwise_uploads_refused",
            "Uploads that the sandboxed inspection, or what is around it, refused.",
            ("code",),
            registry=self.registry,
        )
        self._codes = FewWords(most=_MOST_CODES)
        # Of its own, as a counter without labels is there from the start: a series that is born
        # with its first request has not increased by it.
        self._no_room = Counter(
            "widthwise_refused_for_room",
            "Requests answered 507: a quota is used up, or a disk or bucket is full.",
            registry=self.registry,
        )
        self.registry.register(_Streams(live))
        self.registry.register(_Queue(database))

    def upload_refused(self, code: str) -> None:
        self._refused.labels(self._codes(code)).inc()

    def answered(
        self, scope: Scope, *, status: int, seconds: float | None, received: int, sent: int
    ) -> None:
        method = scope["method"] if scope["method"] in _METHODS else OTHER
        # Absent where no route was reached: an unknown path, a refused key.
        route = getattr(scope.get("route"), "path", "none")
        self._requests.labels(method, route, str(status)).inc()
        if status == 507:
            self._no_room.inc()
        if seconds is not None:
            self._seconds.labels(method, route).observe(seconds)
        self._received.labels(route).inc(received)
        self._sent.labels(route).inc(sent)


class Measure:
    """Counts every request, also the one that another middleware answers."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        metrics: ApiMetrics = scope["app"].state.services.metrics
        started = time.perf_counter()
        status = received = sent = 0
        seconds: float | None = None

        async def measured_receive() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            return message

        async def measured_send(message: Message) -> None:
            nonlocal status, sent, seconds
            if message["type"] == "http.response.start":
                status = message["status"]
                seconds = time.perf_counter() - started
            else:
                sent += len(message.get("body", b""))
            await send(message)

        try:
            await self.app(scope, measured_receive, measured_send)
        finally:
            metrics.answered(scope, status=status, seconds=seconds, received=received, sent=sent)


class _Streams(Collector):
    def __init__(self, live: LiveEvents) -> None:
        self._live = live

    def collect(self) -> Iterator[GaugeMetricFamily]:
        yield GaugeMetricFamily(
            "widthwise_event_streams", "Watchers of jobs' events.", self._live.open_streams
        )
        if self._live.uses_redis:
            yield GaugeMetricFamily(
                "widthwise_event_streams_redis_up",
                "Whether Redis tells what happens; without it the database is asked.",
                float(self._live.redis_answers),
            )


class _Queue(Collector):
    """Reads what is queued and running, and no more: ended jobs are many."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def describe(self) -> Iterator[GaugeMetricFamily]:
        """Nothing: else a registration would ask the database."""
        return iter(())

    def collect(self) -> Iterator[GaugeMetricFamily]:
        up = GaugeMetricFamily("widthwise_database_up", "Whether the database answered just now.")
        try:
            found = self._look()
        except SQLAlchemyError as error:
            log.warning("metrics without the database", error=str(error))
            found = []
        up.add_metric((), float(bool(found)))
        yield up
        yield from found

    def _look(self) -> list[GaugeMetricFamily]:
        with self._database.reading() as session:
            figures = store.queue_figures(session)
            overdue = webhooks.seconds_overdue(session)
        jobs = GaugeMetricFamily(
            "widthwise_jobs", "Jobs that have not ended.", labels=("state", "device")
        )
        for labels, count in figures.counts.items():
            jobs.add_metric(labels, count)
        oldest = GaugeMetricFamily(
            "widthwise_queue_oldest_seconds",
            "For how long a job has waited at most since it was last queued; 0 without one.",
            labels=("device",),
        )
        for device, seconds in figures.longest_seconds.items():
            oldest.add_metric((device,), seconds)
        return [
            jobs,
            oldest,
            GaugeMetricFamily(
                "widthwise_webhooks_overdue_seconds",
                "For how long the most overdue message to a webhook has been due.",
                overdue,
            ),
        ]
