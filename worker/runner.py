"""Claims jobs and runs them: claim, stage in, child process, stage out, record.

There is no Celery in here. A run ends in one of these ways: the job succeeded, failed or
was cancelled, each as the run's last write; the worker was told to stop and handed the job
back; or the job was lost to another run, and then nothing is written at all.
"""

from __future__ import annotations

import hashlib
import math
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

import structlog
from obstore.exceptions import BaseError
from sqlalchemy.exc import InterfaceError, OperationalError, SQLAlchemyError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from sqlalchemy.orm import Session
from structlog.contextvars import bind_contextvars, unbind_contextvars

from compression.checkpoint import FOLDER as CHECKPOINTS
from compression.checkpoint import resumed_variables
from jobs import store
from jobs.artifacts import ObjectStore, run_prefix
from jobs.db import Database
from jobs.devices import Device
from jobs.errors import JobsError, ObjectMissing, StaleRun, as_json
from jobs.settings import Settings
from jobs.states import JobState
from jobs.store import Claim, QueuedJob
from worker import environment
from worker.capacity import Capacity, Grant
from worker.metrics import Stages, WorkerMetrics
from worker.process import JobProcess, exit_in_words
from worker.workspace import workspace

REPOSITORY = Path(__file__).resolve().parent.parent
CHILD_COMMAND = (sys.executable, "-m", "worker.child")
_POLL_SECONDS = 0.2
_HEARTBEAT_JOIN_SECONDS = 3.0  # it may be waiting for a silent database
_MOST_REFUSED = 200  # jobs at the head of the queue that a look passes over
_TOLD_TO_STOP = "its worker was told to stop"
_OUT_OF_TIME = {
    "code": "time-limit",
    "message": "The job has run for as long as its time limit allows, all its runs together, and "
    "was ended. Retry it to go on from its last checkpoint with the same time once more, or clone "
    "it with another time_limit_minutes.",
    "pointer": None,
    "rows": [],
}
_MEDIA_TYPES = {
    ".json": "application/json",
    ".gz": "application/gzip",
    ".md": "text/markdown; charset=utf-8",
    ".txt": "text/plain; charset=utf-8",
    ".py": "text/x-python; charset=utf-8",
}
# A job's process gets these variables of ours and no others: no keys, no addresses.
_PASSED_ON = ("PATH", "LANG", "LC_ALL", "LC_CTYPE", "LD_LIBRARY_PATH", "TZ", "SSL_CERT_FILE")
_PASSED_ON_PREFIXES = ("CUDA_", "NVIDIA_", "NCCL_", "CUDNN_", "FLAGS_")

T = TypeVar("T")
log = structlog.get_logger(__name__)


class _Interrupted(Exception):
    """The run must stop before its end."""


class _Lost(_Interrupted):
    pass


class _Cancelled(_Interrupted):
    pass


class _Stopping(_Interrupted):
    pass


class JobFailed(JobsError):
    """The job's own fault, as its process told it."""

    def __init__(self, error: Mapping[str, Any]) -> None:
        super().__init__(str(error.get("message", "")), code=str(error.get("code", "failed")))
        self.error = dict(error)


class Runner:
    """The slots of one worker. Every method may be called from any thread."""

    def __init__(
        self,
        settings: Settings,
        database: Database,
        objects: ObjectStore,
        *,
        worker: str,
        child_command: Sequence[str] = CHILD_COMMAND,
        gpus: Sequence[str] = (),
        training: environment.Variables | None = None,
        signing_key: str | None = None,
        metrics: WorkerMetrics | None = None,
    ) -> None:
        """`gpus`: those that it may give to jobs, as CUDA_VISIBLE_DEVICES names them.

        `training`: what makes a job's process train fast; None: the expected variables.

        `signing_key`: the PEM of the private key that bundles are signed with.
        """
        self._signing_key = signing_key
        self._metrics = metrics or WorkerMetrics()
        self._metrics.has_slots(cpu=settings.worker_slots, gpu=len(gpus))
        self._settings = settings
        self._database = database
        self._objects = objects
        self._worker = worker
        self._child_command = tuple(child_command)
        self._training = environment.expected() if training is None else training
        self._capacity = Capacity(settings.worker_slots, gpus)
        self._looking = threading.Lock()
        self._stopping = threading.Event()
        self._runs: dict[threading.Thread, Claim] = {}
        self._lock = threading.Lock()

    @property
    def devices(self) -> frozenset[Device]:
        """What its jobs may be trained on."""
        return self._capacity.devices

    def offer(self, job_id: str) -> bool:
        """Starts the job whose turn it is, if there is room for one; does not wait for its end.

        The job that was offered says only that there is something to do: priority and age say
        what. One for which there is no room stays queued in the database: this worker takes it
        when it has some again, or another does when it is nudged.
        """
        return self._start()

    def fill(self) -> None:
        """Takes queued jobs in their order until there is no room or none is left."""
        while self._start():
            pass

    def stop(self) -> None:
        """Tells the runs to hand their jobs back. Returns at once; safe in signal handlers."""
        self._stopping.set()

    def join(self, timeout: float | None = None) -> bool:
        """Waits until no run is left. False if `timeout` seconds were not enough."""
        deadline = None if timeout is None else time.monotonic() + timeout
        while True:
            with self._lock:
                threads = list(self._runs)
            if not threads:
                return True
            for thread in threads:
                thread.join(None if deadline is None else max(0, deadline - time.monotonic()))
            if deadline is not None and time.monotonic() >= deadline:
                with self._lock:
                    return not self._runs

    def hand_back(self) -> None:
        """Hands all jobs back at once, whatever their runs are busy with: for a process that ends
        right afterwards. The runs' own last writes are then refused, as any stale one's."""
        with self._lock:
            claims = list(self._runs.values())
        for claim in claims:
            try:
                with self._database.transaction() as session:
                    store.release_job(session, claim, reason=_TOLD_TO_STOP)
                log.warning("handed back as it was", job=claim.job_id, run=claim.run_id)
            except (StaleRun, SQLAlchemyError) as error:
                log.warning("not handed back", job=claim.job_id, error=str(error))

    # --- slots --------------------------------------------------------------------------

    def _start(self) -> bool:
        # One look at a time: a slot that is held only until a claim comes to nothing would
        # have another offer refused, and nobody would look for that job afterwards.
        with self._looking:
            if self._stopping.is_set():
                return False
            taken = self._claim_next()
            if taken is None:
                return False
            claim, grant = taken
            thread = threading.Thread(target=self._work, args=(claim, grant), name=claim.run_id)
            with self._lock:
                self._runs[thread] = claim
            thread.start()
        return True

    def _work(self, claim: Claim, grant: Grant) -> None:
        try:
            self._run(claim, grant)
        except Exception:
            log.exception("the run's thread failed", job=claim.job_id, run=claim.run_id)
        finally:
            self._capacity.give_back(grant)
        # Also what was offered while there was no room.
        try:
            self.fill()
        except SQLAlchemyError:
            log.exception("the queue could not be looked at")
        finally:
            with self._lock:
                del self._runs[threading.current_thread()]

    def _claim_next(self) -> tuple[Claim, Grant] | None:
        """The first queued job for which there is room. One that waits for several GPUs keeps those
        that free up from the jobs behind it, or it would never get them together."""
        devices = set(self._capacity.free())
        # Others' claims make room for younger jobs; one that stays queued and is still refused
        # (its runs are used up under our setting) must not keep us asking for ever.
        refused: set[str] = set()
        while devices and len(refused) < _MOST_REFUSED:
            with self._database.reading() as session:
                if store.takes_no_more(session, self._worker):
                    return None
                limit = len(refused) + 10
                queued = store.queued_jobs(session, devices=devices, limit=limit)
            new = [job for job in queued if job.id not in refused]
            if not new:
                return None
            for job in new:
                if job.need.device not in devices:
                    continue
                grant = self._capacity.take(job.need)
                if grant is None:
                    if job.need.count > 1 and self._capacity.can_ever_hold(job.need):
                        devices.remove(job.need.device)
                    continue
                try:
                    claim = self._claim(job)
                except BaseException:
                    self._capacity.give_back(grant)
                    raise
                if claim is not None:
                    return claim, grant
                self._capacity.give_back(grant)
            refused.update(job.id for job in new)
        return None

    def _claim(self, job: QueuedJob) -> Claim | None:
        with self._database.transaction() as session:
            claim = store.claim_job(
                session,
                job.id,
                worker=self._worker,
                lease_seconds=self._settings.lease_seconds,
                max_runs=self._settings.max_runs,
                devices=self._capacity.devices,
            )
            if claim is not None:
                waited = store.seconds_in_queue(session, job.id, claim.fence)
        if claim is not None:
            self._metrics.claimed(job.need.device, waited_seconds=waited)
            log.info("claimed", job=job.id, run=claim.run_id, fence=claim.fence)
        return claim

    # --- one run ------------------------------------------------------------------------

    def _run(self, claim: Claim, grant: Grant) -> None:
        # Every line that this thread writes, also the libraries', says for which run.
        bind_contextvars(job=claim.job_id, run=claim.run_id, fence=claim.fence)
        seconds_left = math.inf if claim.seconds_left is None else claim.seconds_left
        deadline = time.monotonic() + seconds_left
        heartbeat = _Heartbeat(self._settings, self._database, claim)
        heartbeat.start()

        def check() -> None:
            if heartbeat.lost:
                raise _Lost
            if heartbeat.cancelled:
                raise _Cancelled
            if self._stopping.is_set():
                raise _Stopping
            if time.monotonic() > deadline:
                raise JobFailed(_OUT_OF_TIME)

        def last_write(write: Callable[[Session], None]) -> None:
            self._write(write, heartbeat)

        try:
            try:
                with workspace(self._settings.work_dir, claim.run_id) as folder:
                    report, artifacts = self._compress(claim, grant, folder, check)
                if heartbeat.cancelled:
                    raise _Cancelled
                last_write(lambda session: _succeed(session, claim, report, artifacts))
                self._metrics.run_ended("succeeded")
                log.info("succeeded", artifacts=len(artifacts))
            except _Cancelled:
                last_write(lambda s: store.finish_job(s, claim, JobState.CANCELLED))
                self._metrics.run_ended("cancelled")
                log.info("cancelled")
            except _Stopping:
                last_write(lambda s: store.release_job(s, claim, reason=_TOLD_TO_STOP))
                self._metrics.run_ended("released")
                log.info("handed back")
            except (_Lost, StaleRun):
                raise
            except Exception as failure:
                error = _error(failure)
                if error["code"] == "internal-error":
                    log.exception("the run failed")
                else:
                    log.warning("failed", code=error["code"], error=error["message"])
                last_write(lambda s: store.finish_job(s, claim, JobState.FAILED, error=error))
                self._metrics.run_ended("failed")
        except (_Lost, StaleRun):
            self._metrics.run_ended("lost")
            log.warning("lost to another run, or to silence: nothing more is written")
            self._have_swept(claim)
        finally:
            heartbeat.stop()
            unbind_contextvars("job", "run", "fence")

    def _compress(
        self, claim: Claim, grant: Grant, folder: Path, check: Callable[[], None]
    ) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        """The report, and the artifacts that are stored but not yet named by a record."""
        for part in ("model", "dataset", "run", "scratch"):
            (folder / part).mkdir()
        self._stage_in(claim.model_files, folder / "model", check)
        self._stage_in(claim.dataset_files, folder / "dataset", check)
        checkpoints = folder / "run" / CHECKPOINTS
        self._stage_in_checkpoint(claim, checkpoints, check)
        request = {
            "spec": claim.spec,
            "model_dir": str(folder / "model"),
            "dataset_dir": str(folder / "dataset"),
            "run_dir": str(folder / "run"),
            "checkpoint_seconds": self._settings.checkpoint_seconds,
            "signing_key": self._signing_key,
            "profile": claim.profile,
        }
        process = JobProcess(
            self._child_command,
            request,
            folder=folder / "scratch",
            environment=child_environment(folder / "scratch", self._training)
            | resumed_variables(checkpoints)
            | self._capacity.variables(grant),
        )
        try:
            with self._metrics.stages() as stages:
                report = self._converse(claim, process, checkpoints, check, stages)
        except _Stopping:
            self._await_last_checkpoint(claim, process, checkpoints)
            raise
        finally:
            process.end()
        return report, self._stage_out(claim, folder / "run" / "artifacts", check)

    def _stage_in(
        self, files: Sequence[Mapping[str, Any]], folder: Path, check: Callable[[], None]
    ) -> None:
        for file in files:
            check()
            name = PurePosixPath(file["name"])
            if name.is_absolute() or ".." in name.parts:
                raise ValueError(f"a record names a file outside its folder: {file['name']!r}")
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            self._objects.get_to_file(file["key"], path, sha256=file["sha256"])
            self._metrics.staged("in", path.stat().st_size)

    def _stage_in_checkpoint(self, claim: Claim, folder: Path, check: Callable[[], None]) -> None:
        """The newest good checkpoint of the runs before, if any; an event says which."""
        folder.mkdir()
        passed_over = []
        for file in claim.checkpoints:
            try:
                self._stage_in([file], folder, check)
            except ObjectMissing as error:
                log.warning("a checkpoint cannot be used", job=claim.job_id, error=error.message)
                (folder / file["name"]).unlink(missing_ok=True)
                passed_over.append(error.message)
                continue
            told = {name: file[name] for name in ("stage", "step", "name")}
            self._append(claim, "resumed", {"run": claim.fence, **told, "passed_over": passed_over})
            return

    def _converse(
        self,
        claim: Claim,
        process: JobProcess,
        checkpoints: Path,
        check: Callable[[], None],
        stages: Stages,
    ) -> dict[str, Any]:
        """Stores the child's progress until it is done; its report. JobFailed if it fails."""
        wanted = ProgressFilter(self._settings.progress_seconds)
        while True:
            check()
            try:
                message = process.message(_POLL_SECONDS)
            except EOFError:
                break
            if message is None:
                if process.has_exited():
                    # Its last words may still be on their way, and whatever it has started may
                    # hold its standard output open: without that, they come to an end.
                    process.kill_rest()
                continue
            kind = message.pop("kind")
            if kind == "progress":
                stages.progress(message)
                if wanted(message):
                    self._append(claim, kind, message)
            elif kind == "checkpoint":
                self._store_checkpoint(claim, checkpoints, message)
            elif kind == "done":
                report = message["report"]
                # It has said all; it may take its time to end, as large processes do.
                process.end(grace_seconds=self._settings.stop_grace_seconds)
                return dict(report)
            elif kind == "failed":
                process.end(grace_seconds=self._settings.stop_grace_seconds)
                raise JobFailed(message)
        code = process.end(grace_seconds=self._settings.stop_grace_seconds)
        raise JobFailed(
            {
                "code": "child-died",
                "message": f"The job's process {exit_in_words(code)} before it was done.",
                "pointer": None,
                "rows": [],
                "last_lines": process.last_lines(),
            }
        )

    def _await_last_checkpoint(self, claim: Claim, process: JobProcess, checkpoints: Path) -> None:
        """Asks the child to end and stores what it writes before it does, within the grace."""
        process.ask_to_end()
        deadline = time.monotonic() + self._settings.stop_grace_seconds
        with suppress(EOFError):
            while (left := deadline - time.monotonic()) > 0:
                message = process.message(min(left, _POLL_SECONDS))
                if message is not None and message["kind"] == "checkpoint":
                    self._store_checkpoint(claim, checkpoints, message)

    def _store_checkpoint(self, claim: Claim, folder: Path, message: Mapping[str, Any]) -> None:
        """Uploads a checkpoint and names it in the job's record. One that cannot be stored is
        not worth the run: the one before stays the newest."""
        path = folder / PurePosixPath(message["name"]).name
        key = f"{run_prefix(claim.job_id, claim.fence)}{CHECKPOINTS}/{path.name}"
        try:
            size_bytes = path.stat().st_size
            self._objects.put_file(key, path)
            self._metrics.staged("out", size_bytes)
            with self._database.transaction() as session:
                store.add_checkpoint(
                    session,
                    claim,
                    name=path.name,
                    key=key,
                    size_bytes=size_bytes,
                    sha256=message["sha256"],
                    stage=message["stage"],
                    step=message["step"],
                )
        except StaleRun:
            raise
        except (SQLAlchemyError, JobsError, BaseError, OSError) as error:
            log.warning("a checkpoint was not stored", job=claim.job_id, error=str(error))

    def _append(self, claim: Claim, kind: str, data: Mapping[str, Any]) -> None:
        try:
            with self._database.transaction() as session:
                store.append_events(session, claim, [(kind, data)])
        except SQLAlchemyError as error:  # progress is not worth the run
            log.warning("an event was not stored", job=claim.job_id, error=str(error))

    def _have_swept(self, claim: Claim) -> None:
        """Has the reconciler look once more for objects of a run that has just ended as a stale
        one: it may have stood still for long, and have put one after it was swept."""
        try:
            with self._database.transaction() as session:
                store.sweep_again(session, claim)
        except SQLAlchemyError as error:
            log.warning("the run's objects may stay in the store", error=str(error))

    def _stage_out(
        self, claim: Claim, folder: Path, check: Callable[[], None]
    ) -> list[dict[str, Any]]:
        artifacts = []
        for path in sorted(folder.rglob("*")):
            if not path.is_file() or path.is_symlink():
                continue
            check()
            name = path.relative_to(folder).as_posix()
            key = run_prefix(claim.job_id, claim.fence) + name
            with path.open("rb") as file:
                sha256 = hashlib.file_digest(file, "sha256").hexdigest()
            self._objects.put_file(key, path)
            self._metrics.staged("out", path.stat().st_size)
            artifacts.append(
                {
                    "path": name,
                    "key": key,
                    "size_bytes": path.stat().st_size,
                    "sha256": sha256,
                    "media_type": _MEDIA_TYPES.get(path.suffix, "application/octet-stream"),
                }
            )
        return artifacts

    def _write(self, write: Callable[[Session], None], heartbeat: _Heartbeat) -> None:
        """A run's last write, tried again until the database takes it or the lease is lost."""
        while True:
            if heartbeat.lost:
                raise _Lost
            try:
                with self._database.transaction() as session:
                    write(session)
                return
            except (OperationalError, InterfaceError, PoolTimeout) as error:
                log.warning("the database does not take the run's end", error=str(error))
                time.sleep(self._settings.cancel_poll_seconds)


class _Heartbeat(threading.Thread):
    """Renews the lease, and learns that the job was cancelled or lost, whatever else the
    run is busy with."""

    def __init__(self, settings: Settings, database: Database, claim: Claim) -> None:
        super().__init__(name=f"heartbeat-{claim.run_id}", daemon=True)
        self._lease_seconds = settings.lease_seconds
        # Three tries in a lease, however short it is set.
        self._pause = min(settings.cancel_poll_seconds, settings.lease_seconds / 3)
        self._database = database
        self._claim = claim
        self._renewed = time.monotonic()
        self._stale = False
        self._end = threading.Event()
        self.cancelled = False

    @property
    def lost(self) -> bool:
        """Another run has the job, or may have it: we could not say for a whole lease that
        we live. Then the child must not run on beside its successor."""
        return self._stale or time.monotonic() - self._renewed > self._lease_seconds

    def run(self) -> None:
        claim = self._claim
        bind_contextvars(job=claim.job_id, run=claim.run_id, fence=claim.fence)
        while not self._end.wait(self._pause):
            at = time.monotonic()
            try:
                with self._database.transaction() as session:
                    cancelled = store.renew_lease(
                        session, self._claim, lease_seconds=self._lease_seconds
                    )
                self._renewed = at
                self.cancelled = cancelled
            except StaleRun:
                # Also after the run's own last write, just before `stop`.
                self._stale = True
                return
            except SQLAlchemyError as error:
                log.warning("the lease was not renewed", error=str(error))

    def stop(self) -> None:
        self._end.set()
        self.join(_HEARTBEAT_JOIN_SECONDS)


class ProgressFilter:
    """Which progress to store: the first and last of each stage, else one in `seconds`."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._stage: str | None = None
        self._stored = 0.0

    def __call__(self, progress: Mapping[str, Any]) -> bool:
        at = time.monotonic()
        is_first = progress.get("stage") != self._stage
        is_last = progress.get("step", 0) >= progress.get("total", 1)
        if not is_first and not is_last and at - self._stored < self._seconds:
            return False
        self._stage = progress.get("stage")
        self._stored = at
        return True


def child_environment(scratch: Path, training: environment.Variables) -> dict[str, str]:
    """Of a job's process: no secrets of ours, and all temporary files in its own folder."""
    passed_on = {
        name: value
        for name, value in os.environ.items()
        if name in _PASSED_ON or name.startswith(_PASSED_ON_PREFIXES)
    }
    return (
        dict(training)
        | passed_on
        | {
            "HOME": str(scratch),
            "TMPDIR": str(scratch),
            "XDG_CACHE_HOME": str(scratch),
            "PYTHONPATH": str(REPOSITORY),
            "PYTHONSAFEPATH": "1",  # or files in its folder could shadow modules
            "PYTHONUNBUFFERED": "1",
            "PYTHONDONTWRITEBYTECODE": "1",
        }
    )


def _succeed(
    session: Session,
    claim: Claim,
    report: Mapping[str, Any],
    artifacts: Sequence[Mapping[str, Any]],
) -> None:
    for artifact in artifacts:
        store.add_artifact(session, claim, **artifact)
    store.finish_job(session, claim, JobState.SUCCEEDED, report=report)


def _error(failure: Exception) -> dict[str, Any]:
    """What the job keeps of a failure."""
    if isinstance(failure, JobFailed):
        return failure.error
    if isinstance(failure, JobsError):
        return as_json(failure)
    return {
        "code": "internal-error",
        "message": "The worker failed while it prepared the job or stored its results: "
        + "".join(traceback.format_exception_only(failure)).strip(),
        "pointer": None,
        "rows": [],
    }
