"""`make serve`: starting, refusing to start, and stopping, with nothing left behind."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.builders import tiny_bert, tiny_dataset
from tests.e2e.service import (
    ROOT,
    WAIT_SECONDS,
    events_until_the_end,
    pid_of,
    processes_of,
    service_environment,
    serving,
    upload_folder,
    wait_for_event,
)


def test_a_taken_port_is_said_and_nothing_is_started(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        done = subprocess.run(
            [sys.executable, "-m", "tools.serve", "--port", str(port)],
            cwd=ROOT,
            env=service_environment(tmp_path / "data"),
            capture_output=True,
            text=True,
            check=False,
        )
    assert done.returncode == 2
    assert f"127.0.0.1:{port}" in done.stderr
    assert not (tmp_path / "data").exists()


def test_an_invalid_setting_is_said_and_nothing_is_started(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tools.serve"],
        cwd=ROOT,
        env=service_environment(tmp_path / "data", WIDTHWISE_MAX_RUNS="none"),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert "max_runs" in done.stderr


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_both(tmp_path: Path, number: signal.Signals) -> None:
    with serving(tmp_path / "data") as service:
        assert len(processes_of(tmp_path / "data")) >= 3  # the supervisor, the API, the worker
        assert service.client.get("/v1/jobs")["items"] == []
        assert service.stop(number) == 0
        assert processes_of(tmp_path / "data") == {}


@pytest.mark.parametrize("victim", ["api", "worker"])
def test_the_death_of_either_stops_the_other(tmp_path: Path, victim: str) -> None:
    with serving(tmp_path / "data") as service:
        os.kill(pid_of(tmp_path / "data", command=f"-m {victim}"), signal.SIGKILL)
        assert service.process.wait(WAIT_SECONDS) == 1
        assert processes_of(tmp_path / "data") == {}


def test_a_killed_supervisor_leaves_nothing_running(tmp_path: Path) -> None:
    with serving(tmp_path / "data") as service:
        service.process.kill()
        service.process.wait(WAIT_SECONDS)
        deadline = time.monotonic() + WAIT_SECONDS
        while processes_of(tmp_path / "data") and time.monotonic() < deadline:
            time.sleep(0.1)
        assert processes_of(tmp_path / "data") == {}


def test_a_job_interrupted_by_a_stop_is_done_after_the_next_start(tmp_path: Path) -> None:
    model = tiny_bert(tmp_path / "model", num_labels=None)
    dataset = tiny_dataset(tmp_path / "dataset", rows={"train": 200, "dev": 40, "test": 40})
    spec = {
        "task": {"max_seq_len": 64},
        "teacher": {"max_steps": 2000, "epochs": 100},
        "supernet": {"width_mults": [1, "1/2"]},
        "distillation": {"max_steps": 5},
        "importance": {"rows": 32},
        "latency": {"rounds": 5, "baselines": []},
        "export": {"formats": ["onnx"]},
    }
    with serving(tmp_path / "data") as service:
        client = service.client
        job = client.post(
            "/v1/jobs",
            {
                "model": upload_folder(client, "/v1/models", model),
                "dataset": upload_folder(client, "/v1/datasets", dataset),
                "spec": spec,
            },
        )
        wait_for_event(client, job["id"], stage="teacher")
        assert service.stop(signal.SIGTERM) == 0
        assert processes_of(tmp_path / "data") == {}
    with serving(tmp_path / "data") as service:
        events = events_until_the_end(service.client, job["id"])
        # Whether a checkpoint was written before the stop depends on when it came.
        passing = ("progress", "checkpoint", "resumed")
        kinds = [event["kind"] for event in events if event["kind"] not in passing]
        assert kinds == ["queued", "started", "requeued", "started", "succeeded"]
        assert [event["number"] for event in events] == list(range(1, len(events) + 1))
        # A stop by request is not the job's fault: it does not count as an attempt.
        assert service.client.get(f"/v1/jobs/{job['id']}")["runs"] == 1
