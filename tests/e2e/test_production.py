"""The production profile: the same service on a real Redis and a real PostgreSQL."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import psycopg

from tests.builders import tiny_bert, tiny_dataset
from tests.e2e.service import (
    events_until_the_end,
    pid_of,
    processes_of,
    serving,
    upload_folder,
    wait_for_event,
)
from tests.services import new_database, wait_until

SPEC = {
    "task": {"text": "text", "text_pair": "text_pair", "label": "label", "max_seq_len": 64},
    "teacher": {"epochs": 100, "max_steps": 300},
    "importance": {"rows": 32},
    "supernet": {"width_mults": ["1/2"]},
    "distillation": {"max_steps": 4},
    "latency": {"rounds": 5, "baselines": []},
    "export": {"formats": ["onnx"]},
}


def test_a_job_of_sentence_pairs_survives_the_death_of_its_process(
    tmp_path: Path, redis_url: str, postgresql_url: str
) -> None:
    """Redis and PostgreSQL carry it; a killed child process fails one job and not the worker."""
    database = new_database(postgresql_url, "end_to_end")
    model = tiny_bert(tmp_path / "model", num_labels=None)
    dataset = tiny_dataset(
        tmp_path / "dataset", rows={"train": 120, "dev": 40, "test": 40}, pair=True
    )
    data_dir = tmp_path / "data"
    settings = {"WIDTHWISE_BROKER_URL": redis_url, "WIDTHWISE_DATABASE_URL": database}
    with serving(data_dir, **settings) as service:
        client = service.client
        request = {
            "model": upload_folder(client, "/v1/models", model),
            "dataset": upload_folder(client, "/v1/datasets", dataset),
            "spec": SPEC,
        }
        killed = client.post("/v1/jobs", request)["id"]
        wait_for_event(client, killed, stage="teacher")
        os.kill(pid_of(data_dir, command="-m worker.child"), signal.SIGKILL)
        kinds = [event["kind"] for event in events_until_the_end(client, killed)]
        assert kinds[-1] == "failed"
        assert client.get(f"/v1/jobs/{killed}")["error"]["code"]

        job = client.post("/v1/jobs", request)["id"]
        events_until_the_end(client, job)
        found = client.get(f"/v1/jobs/{job}")
        assert found["state"] == "succeeded", found["error"]
        assert found["plan"]["text_pair"] == "text_pair"
        assert found["report"]["subnetworks"][0]["formats"][0]["published"]
        wait_until(
            lambda: not [line for line in processes_of(data_dir).values() if "child" in line],
            "the job's process has ended",
        )
    # Neither SQLite nor the folder queue was used.
    assert not list(data_dir.rglob("*.db"))
    assert not (data_dir / "broker").exists()
    with psycopg.connect(database.replace("+psycopg", "")) as connection:
        states = connection.execute("SELECT state FROM jobs ORDER BY created_at").fetchall()
    assert states == [("failed",), ("succeeded",)]
