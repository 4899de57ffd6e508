"""The checker finds nothing in a sound history, and each violation in one that was spoilt."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from tests.chaos.checker import Findings, Promises, check, orphans
from tests.chaos.evidence import Answer, Death, Event, Evidence, File, Injected, Job, Run, Stored
from tests.chaos.plan import Kind

PROMISES = Promises(steps=4, interval_seconds=1.5, kept_seconds=60)
DIGEST = "a" * 64


def sound() -> Evidence:
    """One job whose first run lost its worker after step 3, whose second lost its process in step
    4, and which succeeded after a retry."""
    told: list[tuple[int, str, dict[str, Any]]] = [
        (0, "queued", {}),
        (1, "started", {"run": 1, "worker": "host-11-ab"}),
        (1, "progress", {"stage": "distil", "step": 0, "figures": {}}),
        *(pair for step in (1, 2) for pair in trained(1, step)),
        trained(1, 3)[0],
        (1, "requeued", {"run": 1, "reason": "its worker went silent"}),
        (2, "started", {"run": 2, "worker": "host-12-cd"}),
        (2, "resumed", {"run": 2, "stage": "distil", "step": 2, "passed_over": []}),
        *trained(2, 3),
        trained(2, 4)[0],
        (2, "failed", {"run": 2, "error": {"code": "child-died"}}),
        (2, "queued", {"retry": True}),
        (3, "started", {"run": 3, "worker": "host-11-ab"}),
        (3, "resumed", {"run": 3, "stage": "distil", "step": 3, "passed_over": []}),
        *trained(3, 4),
        (3, "progress", {"stage": "distil", "step": 4, "figures": {}}),
        (3, "succeeded", {"run": 3}),
    ]
    events = [
        Event(i, fence, kind, data, float(i)) for i, (fence, kind, data) in enumerate(told, 1)
    ]
    at = {(event.fence, event.kind): event.at for event in events}
    artifacts = [
        File("art_1", "jobs/job_1/3/w1_2/bundle.tar.gz", 9, DIGEST, 3, "w1_2/bundle.tar.gz"),
        File("art_2", "jobs/job_1/3/w1_2/onnx/model.onnx", 5, DIGEST, 3, "w1_2/onnx/model.onnx"),
    ]
    held = frozenset({("onnx/model.onnx", DIGEST)})
    job = Job(
        id="job_1",
        state="succeeded",
        fence=3,
        last_event=len(events),
        alike="spec",
        report={"distillation_steps": 4},
        events=events,
        runs=[
            Run(1, "host-11-ab", "lost", at[1, "started"], at[1, "requeued"]),
            Run(2, "host-12-cd", "failed", at[2, "started"], at[2, "failed"]),
            Run(3, "host-11-ab", "succeeded", at[3, "started"], at[3, "succeeded"]),
        ],
        artifacts=artifacts,
    )
    model = File("mdl_1", "blobs/one", 3, DIGEST)
    return Evidence(
        asked=["job_1"],
        jobs=[job],
        inputs=[model],
        checkpoints=[],
        pending=[],
        stored={
            model.key: Stored(3, DIGEST),
            artifacts[0].key: Stored(9, DIGEST, held, held),
            artifacts[1].key: Stored(5, DIGEST),
        },
        injected=[
            Injected(Kind.WORKER_KILLED, 8.0, 8.1, 11),
            Injected(Kind.CHILD_KILLED, at[2, "failed"] - 1, at[2, "failed"] - 0.5, 12),
        ],
    )


def trained(fence: int, step: int) -> list[tuple[int, str, dict[str, Any]]]:
    figures = {"losses": {"w1_2": 0.5}, "seconds": 1.0}
    return [
        (fence, "progress", {"stage": "distil", "step": step, "figures": figures}),
        (fence, "checkpoint", {"stage": "distil", "step": step}),
    ]


def with_job(evidence: Evidence, **changes: Any) -> Evidence:
    return replace(evidence, jobs=[replace(evidence.jobs[0], **changes)])


def with_events(
    change: Callable[[list[Event]], list[Event]], *, last: int | None = None
) -> Evidence:
    """The history changed, and its events numbered anew."""
    evidence = sound()
    events = [replace(e, number=i) for i, e in enumerate(change(list(evidence.jobs[0].events)), 1)]
    return with_job(evidence, events=events, last_event=last or len(events))


def stored(key: str, what: Stored | None) -> Evidence:
    evidence = sound()
    files = dict(evidence.stored)
    if what is None:
        del files[key]
    else:
        files[key] = what
    return replace(evidence, stored=files)


def index(events: list[Event], fence: int, kind: str, step: int | None = None) -> int:
    return next(
        i
        for i, event in enumerate(events)
        if (event.fence, event.kind) == (fence, kind) and step in (None, event.data.get("step"))
    )


def test_a_sound_history_has_no_violation() -> None:
    assert check(sound(), PROMISES) == Findings(
        jobs=1,
        runs=3,
        ended_once=1,
        lost=0,
        duplicated=0,
        steps_repeated=2,
        orphans=0,
        violations=(),
    )


def ended_twice(events: list[Event]) -> list[Event]:
    return [*events, events[-1]]


def wrote_after_its_end(events: list[Event]) -> list[Event]:
    return [*events, events[index(events, 3, "progress")]]


def never_ended(events: list[Event]) -> list[Event]:
    return events[:-1]


def stale_event(events: list[Event]) -> list[Event]:
    at = index(events, 3, "resumed")
    return [*events[: at + 1], events[index(events, 2, "progress", 4)], *events[at + 1 :]]


def foreign_step(events: list[Event]) -> list[Event]:
    """A stale run's write that went in under the number of the run that holds the job."""
    at = index(events, 3, "checkpoint", 4)
    late = replace(events[index(events, 1, "progress", 1)], fence=3)
    return [*events[: at + 1], late, *events[at + 1 :]]


def from_the_beginning(events: list[Event]) -> list[Event]:
    """The last run passes its checkpoint over, and trains everything again."""
    at = index(events, 3, "resumed")
    steps = [events[index(events, 1, "progress", step)] for step in (1, 2)]
    steps.append(events[index(events, 2, "progress", 3)])
    again = [replace(event, fence=3) for event in steps]
    return [*events[:at], *again, *events[at + 1 :]]


def from_the_beginning_twice(events: list[Event]) -> list[Event]:
    """The last run's worker dies when it has trained steps 1 and 2 again, and another goes on."""
    at = index(events, 3, "resumed")
    first, second = (events[index(events, 1, "progress", step)] for step in (1, 2))
    stored = events[index(events, 1, "checkpoint", 2)]
    third = events[index(events, 2, "progress", 3)]
    lost = Event(0, 3, "requeued", {"run": 3}, first.at)
    started = replace(events[at - 1], fence=4, data={"run": 4, "worker": "host-12-cd"})
    own = [replace(each, fence=3) for each in (first, second, stored)]
    more = [replace(each, fence=4) for each in (third, *events[at + 1 :])]
    return [*events[:at], *own, lost, started, *more]


def again_though_it_is_stored(events: list[Event]) -> list[Event]:
    """Step 3, which run 2 had stored: so little that it would fit into an interval."""
    at = index(events, 3, "resumed")
    again = replace(events[index(events, 2, "progress", 3)], fence=3)
    return [*events[: at + 1], again, *events[at + 1 :]]


def cancelled(events: list[Event]) -> list[Event]:
    at = index(events, 2, "failed")
    events[at] = replace(events[at], kind="cancelled", data={"run": 2})
    return events


def damaged_checkpoint(events: list[Event]) -> list[Event]:
    at = index(events, 3, "resumed")
    events[at] = replace(events[at], data={**events[at].data, "passed_over": ["it is gone"]})
    return events


def unexplained_failure(events: list[Event]) -> list[Event]:
    at = index(events, 2, "failed")
    events[at] = replace(events[at], data={"run": 2, "error": {"code": "internal-error"}})
    return events


def test_steps_whose_checkpoints_could_not_be_stored_may_be_trained_again() -> None:
    evidence = with_events(
        lambda events: [each for each in from_the_beginning(events) if each.kind != "checkpoint"]
    )
    full = Injected(Kind.DISK_FILLED, 3.0, 20.0)
    excused = replace(evidence, injected=[*evidence.injected, full])
    assert check(excused, PROMISES).violations == ()
    assert check(excused, PROMISES).steps_repeated == 5


def test_checkpoints_that_a_late_retry_no_longer_finds_are_no_violation() -> None:
    late = replace(PROMISES, kept_seconds=0.5)
    assert check(with_events(from_the_beginning), late).violations == ()
    passed_over = check(with_events(damaged_checkpoint), late).violations
    assert passed_over == ()  # it may have come while they were being deleted


def test_what_a_late_retry_trained_anew_may_be_gone_on_from() -> None:
    """It starts anew and loses its worker after step 2; the next run goes on from there, and does
    again what the runs before the retry had done."""
    evidence = with_events(from_the_beginning_twice)
    runs = [*evidence.jobs[0].runs, replace(evidence.jobs[0].runs[2], fence=4)]
    runs[2] = replace(runs[2], state="lost", ended=runs[3].started)
    artifacts = [
        replace(each, fence=4, key=each.key.replace("/3/", "/4/"))
        for each in evidence.jobs[0].artifacts
    ]
    renamed = {key.replace("/3/", "/4/"): value for key, value in evidence.stored.items()}
    evidence = replace(with_job(evidence, runs=runs, fence=4, artifacts=artifacts), stored=renamed)
    assert check(evidence, replace(PROMISES, kept_seconds=0.5)).violations == ()
    (words, *_) = check(evidence, replace(PROMISES, kept_seconds=60)).violations
    assert "a checkpoint after step 3 of distil had been stored" in words


def test_a_retry_is_late_when_it_is_asked_for_and_not_when_its_turn_comes() -> None:
    """Once it is queued again, its checkpoints are kept for it."""

    def waits(events: list[Event]) -> list[Event]:
        at = index(events, 3, "started")
        events = from_the_beginning(events)
        return [*events[:at], *(replace(each, at=each.at + 100) for each in events[at:])]

    evidence = with_events(waits)
    runs = [replace(run, ended=run.ended and run.ended + 100) for run in evidence.jobs[0].runs[2:]]
    evidence = with_job(evidence, runs=[*evidence.jobs[0].runs[:2], *runs])
    assert any("had been stored" in each for each in check(evidence, PROMISES).violations)


def test_errors_are_no_violation_while_the_database_is_away() -> None:
    away = Injected(Kind.POSTGRESQL_RESTARTED, 1.0, 2.0)
    evidence = replace(
        sound(),
        injected=[*sound().injected, away],
        answers=[Answer(0.5, 1.5, 503, "GET /v1/jobs")],
        deaths=[Death(2.5, "worker-1", 1, "Traceback")],
    )
    assert check(evidence, PROMISES).violations == ()
    error = replace(evidence, answers=[Answer(0.5, 1.5, 500, "GET /v1/jobs")])
    assert check(error, PROMISES).violations != ()
    late = replace(evidence, answers=[Answer(8.0, 9.0, 503, "GET /v1/jobs")])
    assert check(late, PROMISES).violations != ()


BUNDLE = "jobs/job_1/3/w1_2/bundle.tar.gz"
SPOILT: dict[str, tuple[Evidence, str]] = {
    "a job is lost": (replace(sound(), jobs=[]), "and it is not there"),
    "a job that nobody asked for": (replace(sound(), asked=[]), "nobody asked for it"),
    "a job that stays queued": (with_job(sound(), state="queued"), "it is queued in the end"),
    "an end that comes twice": (with_events(ended_twice), "comes after its end"),
    "a write after the end": (with_events(wrote_after_its_end), "comes after its end"),
    "no end": (with_events(never_ended), "its state is succeeded, its last event progress"),
    "a gap in the events": (with_events(lambda events: events, last=99), "are numbered"),
    "a stale run's event": (with_events(stale_event), "a stale run has written"),
    "a stale run's step": (with_events(foreign_step), "another run has written"),
    "too many steps again": (with_events(from_the_beginning), "trained again 3 steps of run 1"),
    "a stored step again": (
        with_events(again_though_it_is_stored),
        "run 3 trained 1 steps again though a checkpoint after step 3 of distil had been stored",
    ),
    "a job that nobody cancelled": (with_events(cancelled), "nobody asked for that"),
    "one job for two requests": (replace(sound(), asked=["job_1"] * 2), "made for 2 requests"),
    "a damaged checkpoint": (with_events(damaged_checkpoint), "found checkpoints damaged"),
    "an unexplained failure": (with_events(unexplained_failure), "no fault explains it"),
    "a process that nobody killed": (replace(sound(), injected=[]), "no fault explains it"),
    "a run that never ended": (
        with_job(sound(), runs=[*sound().jobs[0].runs[:2], Run(3, "w", "running", 30, None)]),
        "run 3 is still running",
    ),
    "runs at the same time": (
        with_job(sound(), runs=[replace(run, ended=99.0) for run in sound().jobs[0].runs]),
        "began before run 1 had ended",
    ),
    "a run without a record": (with_job(sound(), runs=sound().jobs[0].runs[1:]), "its runs are"),
    "a success of a lost run": (
        with_job(sound(), runs=[replace(run, state="succeeded") for run in sound().jobs[0].runs]),
        "runs [1, 2, 3] succeeded",
    ),
    "no report": (with_job(sound(), report=None), "without a report"),
    "a training cut short": (with_job(sound(), report={"distillation_steps": 3}), "tells of 3"),
    "a missing artifact": (
        with_job(sound(), artifacts=sound().jobs[0].artifacts[:1]),
        "there is no onnx/model.onnx",
    ),
    "an artifact of a stale run": (
        with_job(sound(), artifacts=[replace(a, fence=2) for a in sound().jobs[0].artifacts]),
        "was written by run 2",
    ),
    "an object that is gone": (stored(BUNDLE, None), "which is not there"),
    "an object with other bytes": (stored("blobs/one", Stored(3, "b" * 64)), "with SHA-256"),
    "half an object": (stored("blobs/one", Stored(2, DIGEST)), "has 2 bytes"),
    "a bundle that is none": (stored(BUNDLE, Stored(9, DIGEST)), "is no bundle"),
    "a bundle that lacks a file": (
        stored(BUNDLE, Stored(9, DIGEST, frozenset({("x", DIGEST)}), frozenset())),
        "does not hold what its manifest says: ['x']",
    ),
    "an orphan": (stored("jobs/job_1/1/checkpoints/1", Stored(1, DIGEST)), "nothing names"),
    "an upload's blob": (replace(sound(), pending=["blobs/two"]), "a blob waits"),
    "a run's folder": (replace(sound(), left=["work/run_1"]), "is left on a worker's disk"),
    "an error of the API": (
        replace(sound(), answers=[Answer(0.5, 1.0, 500, "GET /v1/jobs")]),
        "the API answered 500 to GET /v1/jobs",
    ),
    "a refusal": (replace(sound(), answers=[Answer(0.5, 1.0, 404, "GET /")]), "answered 404"),
    "a process that ended by itself": (
        replace(sound(), deaths=[Death(1.0, "worker-1", 1, "Traceback")]),
        "worker-1 ended by itself with 1: Traceback",
    ),
    "two results of one spec": (
        replace(
            sound(),
            asked=["job_1", "job_2"],
            jobs=[
                sound().jobs[0],
                replace(
                    sound().jobs[0],
                    id="job_2",
                    artifacts=[replace(a, sha256="c" * 64) for a in sound().jobs[0].artifacts],
                ),
            ],
        ),
        "ended with 2 different w1_2/onnx/model.onnx",
    ),
}


@pytest.mark.parametrize("name", SPOILT)
def test_the_checker_finds(name: str) -> None:
    evidence, words = SPOILT[name]
    assert any(words in violation for violation in check(evidence, PROMISES).violations)


def test_the_counts_are_of_what_was_found() -> None:
    assert check(SPOILT["a job is lost"][0], PROMISES).lost == 1
    assert check(SPOILT["a job that nobody asked for"][0], PROMISES).duplicated == 1
    twice = check(SPOILT["an end that comes twice"][0], PROMISES)
    assert (twice.ended_once, twice.duplicated) == (0, 2)
    assert check(SPOILT["a job that stays queued"][0], PROMISES).lost == 1
    assert orphans(SPOILT["an orphan"][0]) == ["jobs/job_1/1/checkpoints/1"]
