"""The reconciler in a process of its own."""

from __future__ import annotations

import json
import os
import re
import subprocess
import time
from pathlib import Path

import httpx
import pytest

from jobs import store, workers
from jobs.artifacts import ObjectStore
from jobs.db import Database
from jobs.devices import Device
from jobs.queue import make_celery, queue_of
from tests.seeds import seed_job
from tests.services import free_port, wait_until
from tests.worker.helpers import kinds_of, settings_for, wait_for_state
from tests.worker.worker_process import REPOSITORY, Worker


@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
def test_it_requeues_and_nudges_takes_no_job_and_shows_that_it_lives(
    database_url: str, database: Database, objects: ObjectStore, redis_url: str, tmp_path: Path
) -> None:
    port = free_port()
    settings = settings_for(tmp_path, database_url, broker_url=redis_url, worker_metrics_port=port)
    job_id = seed_job(database, objects)
    with database.transaction() as session:
        assert store.claim_job(session, job_id, worker="dead", lease_seconds=0.1, max_runs=3)
        # Somebody to be nudged: jobs of a device that nobody has wait without.
        workers.announce(session, name="there", slots=1, gpus=0, lease_seconds=600)
    scheduler = Worker(settings, tmp_path / "scheduler", program=["-m", "worker.scheduler"])
    try:
        wait_for_state(database, job_id, "queued")
        app = make_celery(settings)
        with app.connection_for_read() as connection:
            queue = connection.SimpleQueue(queue_of(Device.CPU))
            try:
                message = queue.get(timeout=20)
            finally:
                queue.close()
        app.close()
        assert message.payload[0] == [job_id]

        alive = settings.data_dir / "alive"
        wait_until(alive.exists, "the scheduler shows that it lives")
        assert _is_healthy(settings.data_dir)
        told = httpx.get(f"http://127.0.0.1:{port}/metrics", trust_env=False).text
        assert 'widthwise_lease_losses_total{noticed_by="reconciler"} 1.0' in told
        assert 'widthwise_jobs_ended_total{outcome="failed"} 0.0' in told
        assert scheduler.stop() == 0
        assert list(scheduler.folder.iterdir()) == []  # nothing outside the data folder
        long_ago = time.time() - 240
        os.utime(alive, (long_ago, long_ago))
        assert not _is_healthy(settings.data_dir)
        assert kinds_of(database, job_id) == ["queued", "started", "requeued"]
    finally:
        if scheduler.process.poll() is None:
            scheduler.process.kill()
            scheduler.process.wait()
        print(scheduler.log.read_text())


def _is_healthy(data_dir: Path) -> bool:
    """What the image's health check says of this data folder."""
    dockerfile = (REPOSITORY / "docker/worker.Dockerfile").read_text()
    (check,) = re.findall(r"^HEALTHCHECK .*\\\n +CMD (.*)$", dockerfile, re.MULTILINE)
    command = [word.replace("/data", str(data_dir)) for word in json.loads(check)]
    return subprocess.run(command, check=False).returncode == 0
