"""An injector for each kind of fault."""

from __future__ import annotations

import os
import re
import signal
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

import redis

from jobs.queue import QUEUES
from tests.chaos.evidence import Injected
from tests.chaos.plan import Fault, Kind
from tests.chaos.site import LEASE_SECONDS, Kept, Site
from tests.e2e.service import processes_of

WAIT_SECONDS = 60.0  # for something that the fault could hit
CHILD = "-m worker.child"
REDIS_IS_AWAY = (redis.ConnectionError, redis.TimeoutError)
_SUPERVISOR = re.compile(r"supervise\.py (\d+) -- ")

T = TypeVar("T")


class Injector:
    """Carries out one fault at a time; `stopping` ends what takes its time."""

    def __init__(self, site: Site, stopping: threading.Event) -> None:
        self._site = site
        self._stopping = stopping
        self._by_kind: Mapping[Kind, Callable[[Fault], int | bool | None]] = {
            Kind.CHILD_KILLED: self._kill_child,
            Kind.WORKER_KILLED: self._kill_worker,
            Kind.API_KILLED: self._kill_api,
            Kind.WORKER_FROZEN: self._freeze_worker,
            Kind.REDIS_LOST: self._lose_redis,
            Kind.POSTGRESQL_RESTARTED: self._restart_postgresql,
            Kind.DISK_FILLED: self._fill_disk,
            Kind.MESSAGE_DOUBLED: self._double_message,
            Kind.MESSAGE_DROPPED: self._drop_message,
        }

    def inject(self, fault: Fault) -> Injected | None:
        """None where there was nothing that it could hit."""
        self._started = time.time()
        hit = self._by_kind[fault.kind](fault)
        if hit is None:
            return None
        worker = hit if not isinstance(hit, bool) else None
        return Injected(fault.kind, self._started, time.time(), worker)

    # --- processes ----------------------------------------------------------------------

    def _kill_child(self, fault: Fault) -> int | None:
        """SIGKILL to the process that trains; its worker's id."""

        def kill() -> int | None:
            for kept in self._in_turn(fault):
                for pid in processes_of(kept.host.data_dir):
                    self._started = time.time()
                    if (worker := _kill_child(pid)) is not None:
                        return worker
            return None

        return self._await(kill)

    def _kill_worker(self, fault: Fault) -> int | None:
        kept = self._await(lambda: self._busy(fault), seconds=5) or self._in_turn(fault)[0]
        return self._kill(kept)

    def _kill_api(self, fault: Fault) -> bool:
        self._kill(self._site.api)
        return True

    def _kill(self, kept: Kept) -> int:
        with self._site.lock:  # or the keeper might take it for a death by itself
            self._started = time.time()
            kept.process.kill()
            kept.was_killed = True
            return kept.pid

    def _freeze_worker(self, fault: Fault) -> int | None:
        """SIGSTOP to a worker that runs a job, SIGCONT once its lease has been over for a while.
        Its job's process goes on."""
        kept = self._await(lambda: self._busy(fault))
        if kept is None:
            return None
        process = kept.process
        self._started = time.time()
        process.send_signal(signal.SIGSTOP)
        try:
            self._stopping.wait(LEASE_SECONDS + fault.lasts)
        finally:
            process.send_signal(signal.SIGCONT)
        return process.pid

    def _in_turn(self, fault: Fault) -> list[Kept]:
        """The worker that is meant, then the other."""
        workers = self._site.workers
        return [workers[fault.worker], workers[1 - fault.worker]]

    def _busy(self, fault: Fault) -> Kept | None:
        """The worker that is meant, if it runs a job, or the other."""
        for kept in self._in_turn(fault):
            lines = processes_of(kept.host.data_dir)
            if any(f"supervise.py {kept.pid} -- " in line for line in lines.values()):
                return kept
        return None

    # --- servers ------------------------------------------------------------------------

    def _lose_redis(self, fault: Fault) -> bool:
        self._site.redis.stop()
        self._stopping.wait(fault.lasts)
        self._site.redis.start()
        return True

    def _restart_postgresql(self, fault: Fault) -> bool:
        self._site.postgresql.stop()
        self._stopping.wait(fault.lasts)
        self._site.postgresql.start()
        return True

    def _fill_disk(self, fault: Fault) -> bool:
        try:
            self._site.disk.fill()
            self._stopping.wait(fault.lasts)
        finally:
            self._site.disk.free()
        return True

    # --- messages -----------------------------------------------------------------------

    def _double_message(self, fault: Fault) -> bool | None:
        """A message that was on its way to a worker comes twice."""
        with redis.Redis.from_url(self._site.redis.url) as client:
            if (found := self._await(lambda: _take(client))) is None:
                return None
            queue, message = found
            try:
                client.lpush(queue, message, message)
            except REDIS_IS_AWAY:
                return None  # Redis is lost, and this message with all others
        return True

    def _drop_message(self, fault: Fault) -> bool | None:
        with redis.Redis.from_url(self._site.redis.url) as client:
            return None if self._await(lambda: _take(client)) is None else True

    def _await(self, find: Callable[[], T | None], *, seconds: float = WAIT_SECONDS) -> T | None:
        deadline = time.monotonic() + seconds
        while True:
            found = find()
            if found is not None or time.monotonic() > deadline or self._stopping.wait(0.1):
                return found


def _take(client: redis.Redis) -> tuple[bytes, bytes] | None:
    """The next message, before a worker has it: Redis gives it to whoever has waited longest, and
    workers ask anew each second. None where none comes, or Redis is away."""
    with suppress(*REDIS_IS_AWAY):
        taken: tuple[bytes, bytes] | None = client.brpop(list(QUEUES), timeout=2)  # type: ignore
        return taken
    return None


def _kill_child(pid: int) -> int | None:
    """Kills the process if it is a job's; the id of its worker. The descriptor holds on to the very
    process that was looked at."""
    with suppress(OSError):
        descriptor = os.pidfd_open(pid)
        try:
            line = _command(pid)
            if not line.endswith(CHILD) or _SUPERVISOR.search(line):
                return None
            supervisor = _SUPERVISOR.search(_command(_parent(pid)))
            if supervisor is None:
                return None
            signal.pidfd_send_signal(descriptor, signal.SIGKILL)
            return int(supervisor[1])
        finally:
            os.close(descriptor)
    return None


def _command(pid: int) -> str:
    return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode().strip()


def _parent(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
