"""What must hold after any faults, and does it: each `violation` is a sentence.

It knows the service's promises and nothing of how they are kept: it is told what was asked, what
was done to the service, and what was found afterwards.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from tests.chaos.evidence import Event, Evidence, File, Injected, Job
from tests.chaos.plan import Kind

ENDS = frozenset({"succeeded", "failed", "cancelled"})
TRAININGS = ("teacher", "distil", "depth", "final")
RESULT = "onnx/model.onnx"
BUNDLE = "bundle.tar.gz"
ALLOWED_ANSWERS = {507: Kind.DISK_FILLED, 503: Kind.POSTGRESQL_RESTARTED}
# Once a disk has room or a database answers again, its users need a moment to notice.
LATE_SECONDS = 3.0


@dataclass(frozen=True)
class Promises:
    """`steps`: of the training that every job asked for. `interval_seconds`: between two of its
    checkpoints. `kept_seconds`: how long those of a job that ended are kept for a retry."""

    steps: int
    interval_seconds: float
    kept_seconds: float


@dataclass(frozen=True)
class Findings:
    """`lost`: jobs that were asked for and did not succeed in the end. `duplicated`: jobs that
    nobody asked for, ends that came twice and successes beyond the first. `steps_repeated`:
    training steps told of by more than one run of a job."""

    jobs: int
    runs: int
    ended_once: int
    lost: int
    duplicated: int
    steps_repeated: int
    orphans: int
    violations: tuple[str, ...]


def check(evidence: Evidence, promises: Promises) -> Findings:
    violations = [*_asked(evidence), *_store(evidence), *_results(evidence), *_service(evidence)]
    violations += [f"a run's folder is left on a worker's disk: {each}" for each in evidence.left]
    repeated = 0
    for job in evidence.jobs:
        told, more = _steps(job, evidence.injected, promises)
        repeated += told
        parts = (_ends(job), _numbers(job), _runs(job), _failures(job, evidence.injected), more)
        violations += [f"{job.id}: {words}" for part in parts for words in part]
        if job.state == "succeeded":
            violations += [f"{job.id}: {words}" for words in _complete(job, evidence, promises)]
    asked = set(evidence.asked)
    return Findings(
        jobs=len(evidence.jobs),
        runs=sum(len(job.runs) for job in evidence.jobs),
        ended_once=sum(not list(_ends(job)) for job in evidence.jobs),
        lost=len(asked - {job.id for job in evidence.jobs if job.state == "succeeded"}),
        duplicated=sum(_duplicates(job) for job in evidence.jobs)
        + sum(job.id not in asked for job in evidence.jobs),
        steps_repeated=repeated,
        orphans=len(orphans(evidence)),
        violations=tuple(violations),
    )


# --- the service -------------------------------------------------------------------------


def _service(evidence: Evidence) -> Iterator[str]:
    """It refuses and falls for the faults' sake alone."""
    for answer in evidence.answers:
        reason = ALLOWED_ANSWERS.get(answer.status)
        if not any(
            each.kind == reason and _overlap(each, answer.asked, answer.at)
            for each in evidence.injected
        ):
            yield f"the API answered {answer.status} to {answer.request}, and no fault explains it"
    for death in evidence.deaths:
        if not _is_during(Kind.POSTGRESQL_RESTARTED, death.at, evidence.injected):
            yield f"{death.process} ended by itself with {death.status}: {death.last_words}"


# --- jobs and their ends ----------------------------------------------------------------


def _asked(evidence: Evidence) -> Iterator[str]:
    there = {job.id: job for job in evidence.jobs}
    for id in sorted(set(evidence.asked) - there.keys()):
        yield f"{id}: the user was told of it, and it is not there"
    for id in sorted(there.keys() - set(evidence.asked)):
        yield f"{id}: nobody asked for it"
    for id, times in sorted(Counter(evidence.asked).items()):
        if times > 1:
            yield f"{id}: it was made for {times} requests, each of which wanted a job of its own"
    for job in evidence.jobs:
        if job.state != "succeeded":
            yield f"{job.id}: it is {job.state} in the end"


def _ends(job: Job) -> Iterator[str]:
    """Each time that it was asked for (created, retried), it ends once, and nothing follows."""
    ended = False
    for number, event in enumerate(job.events):
        if event.kind == "queued":
            if number > 0 and not ended:
                yield f"event {event.number} queues it again, and it had not ended"
            ended = False
        elif ended:
            yield f"event {event.number} ({event.kind}) comes after its end"
        elif event.kind in ENDS:
            ended = True
    if job.events and job.events[0].kind != "queued":
        yield f"its history begins with {job.events[0].kind!r}"
    last = job.events[-1].kind if job.events else "nothing"
    if not ended or last != job.state:
        yield f"its state is {job.state}, its last event {last}"


def _duplicates(job: Job) -> int:
    """Ends that nobody asked for, and successes beyond the first."""
    asked = sum(event.kind == "queued" for event in job.events)
    ends = sum(event.kind in ENDS for event in job.events)
    successes = sum(event.kind == "succeeded" for event in job.events)
    return max(0, ends - asked) + max(0, successes - 1)


def _failures(job: Job, injected: Sequence[Injected]) -> Iterator[str]:
    """A failure is one that a fault explains: a killed process, a full disk. Nobody cancels."""
    workers = {event.fence: str(event.data["worker"]) for event in _of(job, "started")}
    started = {event.fence: event.at for event in _of(job, "started")}
    for event in _of(job, "failed"):
        error = event.data.get("error") or {}
        code, since = error.get("code"), started.get(event.fence, event.at)
        if code == "child-died":
            pid = _pid(workers.get(event.fence, ""))
            explained = any(
                each.kind == Kind.CHILD_KILLED
                and each.worker == pid
                and since - 1 <= each.ended
                and each.started <= event.at
                for each in injected
            )
        elif code in ("store-full", "disk-full"):
            explained = any(
                each.kind == Kind.DISK_FILLED and _overlap(each, since, event.at)
                for each in injected
            )
        else:
            explained = False
        if not explained:
            yield f"run {event.fence} failed, and no fault explains it: {error}"
    for event in _of(job, "cancelled"):
        yield f"event {event.number} cancels it, and nobody asked for that"


# --- runs and fencing -------------------------------------------------------------------


def _numbers(job: Job) -> Iterator[str]:
    numbers = [event.number for event in job.events]
    if numbers != list(range(1, job.last_event + 1)):
        yield f"its events are numbered {numbers}, and the last one is said to be {job.last_event}"
    for before, after in pairwise(job.events):
        if after.fence < before.fence:
            yield (
                f"event {after.number} is of run {after.fence}, after one of run {before.fence}: "
                "a stale run has written"
            )


def _runs(job: Job) -> Iterator[str]:
    fences = list(range(1, job.fence + 1))
    if [run.fence for run in job.runs] != fences:
        yield f"its runs are {[run.fence for run in job.runs]}, and its fence is {job.fence}"
    if (begun := [event.data.get("run") for event in _of(job, "started")]) != fences:
        yield f"its history says that runs {begun} started, and its fence is {job.fence}"
    for run in job.runs:
        if run.ended is None or run.state == "running":
            yield f"run {run.fence} is still {run.state}"
    for before, after in pairwise(job.runs):
        if before.ended is not None and before.ended > after.started:
            yield f"run {after.fence} began before run {before.fence} had ended"
    succeeded = [run.fence for run in job.runs if run.state == "succeeded"]
    if succeeded != ([job.fence] if job.state == "succeeded" else []):
        yield f"it is {job.state} at run {job.fence}, and runs {succeeded} succeeded"


def _steps(job: Job, injected: Sequence[Injected], promises: Promises) -> tuple[int, list[str]]:
    """How many steps were trained again, and what is wrong with that.

    A run goes on from the newest checkpoint: no step that one holds is done again. So of what a
    run before it trained it may do one interval again: as many steps as take no longer, and the
    one after which a checkpoint would have been written. Beyond that, only steps whose checkpoints
    could not be stored, as the disk was full or the database away. What was trained before a job
    was retried after its checkpoints' time does not count.
    """
    wrong: list[str] = []
    trained: dict[int, dict[tuple[int, int], Event]] = {}  # by run, then by stage and step
    forgotten = _forgotten(job, promises)
    repeated = 0
    for fence, events in _by_run(job).items():
        steps = [event for event in events if _is_step(event)]
        for before, after in pairwise(steps):
            if _place(after) <= _place(before):
                wrong.append(
                    f"event {after.number} of run {fence} is step {after.data['step']} of "
                    f"{after.data['stage']}, after step {before.data['step']} of "
                    f"{before.data['stage']}: another run has written"
                )
        own = {_place(event): event for event in steps}
        earlier = set().union(*trained.values())
        repeated += len(own.keys() & earlier)
        lost = max((each for each in forgotten if each < fence), default=0)
        held = [_place(event) for event in _checkpoints(job) if lost < event.fence < fence]
        if held and (known := [place for place in sorted(own) if place <= max(held)]):
            stage, last = max(held)
            wrong.append(
                f"run {fence} trained {len(known)} steps again though a checkpoint after step "
                f"{last} of {TRAININGS[stage]} had been stored"
            )
        for other, told in trained.items():
            again = [told[place] for place in sorted(own.keys() & told.keys())]
            counted = [event for event in again if not _is_away(event.at, injected)]
            seconds = sum(event.data["figures"]["seconds"] for event in counted[:-1])
            if seconds > promises.interval_seconds and other > lost:
                wrong.append(
                    f"run {fence} trained again {len(counted)} steps of run {other}, which took "
                    f"{seconds:.2f} s without the last one, and a checkpoint is due after "
                    f"{promises.interval_seconds:g} s"
                )
        trained[fence] = own
        for event in events:
            is_late = fence - 1 in forgotten  # it may have come while they were being deleted
            if event.kind == "resumed" and event.data.get("passed_over") and not is_late:
                wrong.append(f"run {fence} found checkpoints damaged: {event.data['passed_over']}")
    return repeated, wrong


def _place(step: Event) -> tuple[int, int]:
    return TRAININGS.index(step.data["stage"]), int(step.data["step"])


def _checkpoints(job: Job) -> list[Event]:
    """Those of trainings that were stored: each tells after which step."""
    return [event for event in _of(job, "checkpoint") if event.data["stage"] in TRAININGS]


def _is_step(event: Event) -> bool:
    """Of a training; its first and last sign of life have no loss."""
    figures = event.data.get("figures") or {}
    return (
        event.kind == "progress"
        and event.data.get("stage") in TRAININGS
        and ("loss" in figures or "losses" in figures)
    )


def _is_away(at: float, injected: Sequence[Injected]) -> bool:
    """Whether a checkpoint could not be stored then."""
    away = (Kind.DISK_FILLED, Kind.POSTGRESQL_RESTARTED)
    return any(_is_during(kind, at, injected) for kind in away)


def _forgotten(job: Job, promises: Promises) -> list[int]:
    """The runs whose failure was retried so late that no checkpoint was kept any more, neither
    theirs nor those before."""
    found = []
    ended: Event | None = None
    for event in job.events:
        if event.kind in ENDS:
            ended = event
        elif event.kind == "queued" and ended is not None:
            # From here on they are kept for it, however long it waits in the queue.
            if event.at - ended.at > promises.kept_seconds:
                found.append(ended.fence)
            ended = None
    return found


# --- results ----------------------------------------------------------------------------


def _complete(job: Job, evidence: Evidence, promises: Promises) -> Iterator[str]:
    if job.report is None:
        yield "it has succeeded without a report"
    elif (steps := job.report.get("distillation_steps")) != promises.steps:
        yield f"its report tells of {steps} steps, and {promises.steps} were asked for"
    paths = [each.path or "" for each in job.artifacts]
    for wanted in (BUNDLE, RESULT):
        if not any(path.endswith(f"/{wanted}") for path in paths):
            yield f"there is no {wanted} among its artifacts: {paths}"
    for each in job.artifacts:
        if each.fence != job.fence or not each.key.startswith(f"jobs/{job.id}/{job.fence}/"):
            yield f"{each.path} was written by run {each.fence}, and run {job.fence} succeeded"
        there = evidence.stored.get(each.key)
        if there is None or BUNDLE not in each.key:
            continue  # what is missing is told by _store
        if there.manifest is None:
            yield f"{each.path} is no bundle"
        elif there.manifest != there.content:
            differing = sorted(path for path, _ in there.manifest ^ (there.content or frozenset()))
            yield f"{each.path} does not hold what its manifest says: {differing}"


def _results(evidence: Evidence) -> Iterator[str]:
    """Whatever was done to them, jobs that are alike have the same network in the end."""
    found: defaultdict[tuple[str, str], Counter[str]] = defaultdict(Counter)
    for job in evidence.jobs:
        for each in job.artifacts:
            if job.state == "succeeded" and each.path and each.path.endswith(RESULT):
                found[job.alike, each.path][each.sha256] += 1
    for (_, path), digests in found.items():
        if len(digests) > 1:
            yield f"jobs that are alike ended with {len(digests)} different {path}: {digests}"


# --- the store --------------------------------------------------------------------------


def orphans(evidence: Evidence) -> list[str]:
    """Files that no record names."""
    artifacts = [each for job in evidence.jobs for each in job.artifacts]
    named = {each.key for each in (*evidence.inputs, *evidence.checkpoints, *artifacts)}
    return sorted(evidence.stored.keys() - named)


def _store(evidence: Evidence) -> Iterator[str]:
    for key in orphans(evidence):
        yield f"nothing names {key}"
    for key in evidence.pending:
        yield f"a blob waits for an upload that has long ended: {key}"
    artifacts = [each for job in evidence.jobs for each in job.artifacts]
    for file in (*evidence.inputs, *evidence.checkpoints, *artifacts):
        yield from _held(file, evidence)


def _held(file: File, evidence: Evidence) -> Iterator[str]:
    there = evidence.stored.get(file.key)
    if there is None:
        yield f"{file.owner} names {file.key}, which is not there"
    elif (there.size_bytes, there.sha256) != (file.size_bytes, file.sha256):
        yield (
            f"{file.key} has {there.size_bytes} bytes with SHA-256 {there.sha256}, and "
            f"{file.owner} says {file.size_bytes} with {file.sha256}"
        )


# --- what both sides say ----------------------------------------------------------------


def _of(job: Job, kind: str) -> list[Event]:
    return [event for event in job.events if event.kind == kind]


def _by_run(job: Job) -> Mapping[int, list[Event]]:
    found: defaultdict[int, list[Event]] = defaultdict(list)
    for event in job.events:
        found[event.fence].append(event)
    return found


def _pid(worker: str) -> int | None:
    """Of a worker's name, which is host-pid-suffix."""
    parts = worker.rsplit("-", 2)
    return int(parts[1]) if len(parts) == 3 and parts[1].isdigit() else None


def _is_during(kind: Kind, at: float, injected: Sequence[Injected]) -> bool:
    return any(each.kind == kind and _overlap(each, at, at) for each in injected)


def _overlap(fault: Injected, start: float, end: float) -> bool:
    """Whether the fault, or what it may still do a little later, falls into that time."""
    return fault.started <= end and start <= fault.ended + LATE_SECONDS
