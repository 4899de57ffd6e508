"""What a worker tells Prometheus: its runs, stages and steps, lost leases, bytes, webhooks. A
scheduler tells the same of what it settles, and of the rest that it has none."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from prometheus_client import Counter, Gauge, Histogram

from compression.report import STAGES
from jobs.devices import Device
from jobs.metrics import OTHER, new_registry
from jobs.states import JobState
from jobs.webhooks import Outcome

_WAITS = (0.1, 0.5, 1, 5, 15, 60, 300, 900, 3600, 4 * 3600, 24 * 3600)
_STEPS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
_STAGES = frozenset(STAGES)
_ENDS = tuple(state.value for state in JobState if state.is_final)


class WorkerMetrics:
    """Figures of one worker. Every method may be called from any thread."""

    def __init__(self) -> None:
        self.registry = registry = new_registry()
        self._waits = Histogram(
            "widthwise_queue_wait_seconds",
            "How long a job lay in the queue before this worker took it.",
            ("device",),
            buckets=_WAITS,
            registry=registry,
        )
        for device in Device:
            self._waits.labels(device)
        self._ended = Counter(
            "widthwise_runs_ended",
            "Runs of this worker: succeeded, failed, cancelled, released or lost.",
            ("outcome",),
            registry=registry,
        )
        for outcome in ("succeeded", "failed", "cancelled", "released", "lost"):
            self._ended.labels(outcome)
        self._jobs_ended = Counter(
            "widthwise_jobs_ended",
            "Jobs that ended with a run of this worker, or with a lease that it found run out.",
            ("outcome",),
            registry=registry,
        )
        for outcome in _ENDS:
            self._jobs_ended.labels(outcome)
        self._in_stage = Gauge(
            "widthwise_runs_in_stage",
            "Runs of this worker by stage.",
            ("stage",),
            registry=registry,
        )
        self._steps = Histogram(
            "widthwise_step_seconds",
            "Time of a step, by stage.",
            ("stage",),
            buckets=_STEPS,
            registry=registry,
        )
        self._lost = Counter(
            "widthwise_lease_losses",
            "Leases that ran out: of runs of this worker, and those it found to have run out.",
            ("noticed_by",),
            registry=registry,
        )
        for who in ("run", "reconciler"):
            self._lost.labels(who)
        self._bytes = Counter(
            "widthwise_staged_bytes",
            "Files that runs took from the object store (in) and put there (out).",
            ("direction",),
            registry=registry,
        )
        self._slots = Gauge(
            "widthwise_slots", "Jobs that may run at once here.", ("device",), registry=registry
        )
        for device in Device:
            self._slots.labels(device)
        self._attempts = Counter(
            "widthwise_webhook_attempts",
            "Messages sent to webhooks: received (2xx), refused (another status), unanswered.",
            ("outcome",),
            registry=registry,
        )
        self._disabled = Counter(
            "widthwise_webhooks_disabled", "Webhooks that were given up.", registry=registry
        )

    def has_slots(self, *, cpu: int, gpu: int) -> None:
        self._slots.labels(Device.CPU).set(cpu)
        self._slots.labels(Device.GPU).set(gpu)

    def claimed(self, device: Device, *, waited_seconds: float) -> None:
        self._waits.labels(device).observe(max(0.0, waited_seconds))

    def run_ended(self, outcome: str) -> None:
        self._ended.labels(outcome).inc()
        if outcome in _ENDS:
            self._jobs_ended.labels(outcome).inc()
        if outcome == "lost":
            self._lost.labels("run").inc()

    def lease_expired(self, now: JobState) -> None:
        """`now`: what became of the job whose lease had run out."""
        self._lost.labels("reconciler").inc()
        if now.is_final:
            self._jobs_ended.labels(now).inc()

    def staged(self, direction: str, size_bytes: int) -> None:
        self._bytes.labels(direction).inc(size_bytes)

    def webhook_called(self, outcome: Outcome, *, disabled: bool) -> None:
        answered = "refused" if outcome.status is not None else "unanswered"
        self._attempts.labels("received" if outcome.is_success else answered).inc()
        if disabled:
            self._disabled.inc()

    @contextmanager
    def stages(self) -> Iterator[Stages]:
        """Of one run, which is in none of them afterwards."""
        stages = Stages(self._in_stage, self._steps)
        try:
            yield stages
        finally:
            stages.end()


class Stages:
    """Follows one run's progress."""

    def __init__(self, in_stage: Gauge, steps: Histogram) -> None:
        self._in_stage = in_stage
        self._steps = steps
        self._stage: str | None = None
        self._step = 0
        self._at = 0.0

    def progress(self, message: Mapping[str, Any]) -> None:
        """As a job's process tells it: see worker.child."""
        told = message.get("stage")
        stage = str(told) if told in _STAGES else OTHER
        step, at = int(message.get("step", 0)), time.monotonic()
        if stage != self._stage:
            self.end()
            self._in_stage.labels(stage).inc()
        elif step > self._step:
            self._steps.labels(stage).observe((at - self._at) / (step - self._step))
        self._stage, self._step, self._at = stage, step, at

    def end(self) -> None:
        if self._stage is not None:
            self._in_stage.labels(self._stage).dec()
            self._stage = None
