"""A job whose worker dies, or is told to stop, in mid-distillation is ended by the next ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from jobs import store
from jobs.artifacts import ObjectStore
from jobs.db import Database
from jobs.records import DEFAULT_PROJECT
from jobs.settings import Settings
from jobs.states import JobState
from tests.builders import tiny_bert, tiny_dataset
from tests.seeds import seed_job
from tests.services import wait_until
from tests.worker.helpers import (
    events_of,
    job_of,
    kinds_of,
    settings_for,
    wait_for_event,
    wait_for_state,
)
from tests.worker.worker_process import Worker
from worker.runner import Runner

STEPS = 300
HANDED_BACK_SECONDS = 30.0  # what a worker promises that is told to stop
SPEC: dict[str, Any] = {
    "task": {"max_seq_len": 32},
    "importance": {"rows": 16},
    "supernet": {"width_mults": ["1/2"]},
    "distillation": {"max_steps": STEPS, "epochs": 100, "batch_size": 4, "dropout": 0.1},
    "latency": {"rounds": 5, "baselines": []},
    "export": {"formats": ["onnx"]},
}


@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
@pytest.mark.parametrize("processes", [1, 2])
def test_killed_then_stopped_then_complete(
    database_url: str, database: Database, objects: ObjectStore, tmp_path: Path, processes: int
) -> None:
    job_id = seed_job(
        database,
        objects,
        spec=SPEC | {"processes": processes},
        model=tiny_bert(tmp_path / "model", num_labels=2, seed=1),
        dataset=tiny_dataset(tmp_path / "dataset", rows={"train": 40, "dev": 20}, seed=1),
    )
    settings = settings_for(
        tmp_path, database_url, lease_seconds=5, checkpoint_seconds=0.2, worker_slots=2
    )
    # As installed: a signal is all that makes this one write a checkpoint before its end.
    of_long = settings_for(
        tmp_path,
        database_url,
        lease_seconds=5,
        worker_slots=2,
        stop_grace_seconds=Settings.model_fields["stop_grace_seconds"].default,
    )

    def distillation_checkpoints() -> list[int]:
        return [
            event.data["step"]
            for event in events_of(database, job_id)
            if event.kind == "checkpoint" and event.data["stage"] == "distil"
        ]

    def wait_for_checkpoints(count: int) -> None:
        def written() -> bool:
            job = job_of(database, job_id)
            assert not job.state.is_final, job.error
            return len(distillation_checkpoints()) >= count

        wait_until(written, "checkpoints", seconds=120)

    # Run 1: a real worker, killed; the kernel ends what it started.
    worker = Worker(settings, tmp_path / "worker", program=["-m", "worker"])
    wait_for_checkpoints(2)
    worker.process.kill()
    worker.process.wait()
    killed_at = distillation_checkpoints()[-1]

    # Run 2: a real worker, told to stop: its job has a checkpoint and is handed back in time.
    worker = Worker(of_long, tmp_path / "second", program=["-m", "worker"])

    def trains() -> bool:
        own = [event for event in events_of(database, job_id) if event.fence == 2]
        assert "checkpoint" not in [event.kind for event in own]
        steps = [
            e.data["step"] for e in own if e.data.get("stage") == "distil" and "step" in e.data
        ]
        return any(step > killed_at for step in steps)

    wait_until(trains, "the second worker trains", seconds=120)
    assert worker.stop(seconds=HANDED_BACK_SECONDS) == 0
    stopped_at = distillation_checkpoints()[-1]
    assert job_of(database, job_id).state == JobState.QUEUED

    # Run 3: to the end.
    runner = Runner(settings, database, objects, worker="third")
    assert runner.offer(job_id)
    wait_until(lambda: job_of(database, job_id).state.is_final, "the job has ended", seconds=240)
    wait_for_state(database, job_id, "succeeded")
    runner.stop()
    assert runner.join(30)

    resumed = [wait_for_event(database, job_id, "resumed", count).data for count in (1, 2)]
    assert [(each["run"], each["stage"], each["step"]) for each in resumed] == [
        (2, "distil", killed_at),
        (3, "distil", stopped_at),
    ]
    assert 0 < killed_at < stopped_at < STEPS
    # What the child itself said, in each run: where it went on, and its first checkpoint.
    events = events_of(database, job_id)
    for run, step in ((2, killed_at), (3, stopped_at)):
        own = [(event.kind, event.data) for event in events if event.fence == run]
        load = [data for kind, data in own if kind == "progress" and data["stage"] == "load"][-1]
        assert load["message"] == f"goes on from step {step} of distil"
        assert next(data["step"] for kind, data in own if kind == "checkpoint") > step
    assert kinds_of(database, job_id)[-1] == "succeeded"
    report = job_of(database, job_id).report
    assert report is not None
    assert report["distillation_steps"] == STEPS
    assert report["warnings"] == []  # the same kind of host throughout
    with database.reading() as session:
        artifacts = store.list_artifacts(session, job_id, project_id=DEFAULT_PROJECT)
    assert {artifact.path for artifact in artifacts} >= {"w1_2/bundle.tar.gz"}
