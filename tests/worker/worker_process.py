"""A real worker in a process of its own."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

from jobs.settings import Settings

REPOSITORY = Path(__file__).resolve().parents[2]
STOP_SECONDS = 15.0


class Worker:
    """A worker's process. `folder` is its working directory, home and temporary folder."""

    def __init__(self, settings: Settings, folder: Path, *, program: list[str]) -> None:
        folder.mkdir()
        self.folder = folder
        self.log = folder.with_suffix(".log")
        environment = {
            "PATH": os.environ["PATH"],
            "PYTHONPATH": str(REPOSITORY),
            "PYTHONDONTWRITEBYTECODE": "1",
            "HOME": str(folder),
            "TMPDIR": str(folder),
            "WIDTHWISE_DATABASE_URL": settings.database_url,
            "WIDTHWISE_BROKER_URL": settings.broker_url,
            "WIDTHWISE_DATA_DIR": str(settings.data_dir),
            "WIDTHWISE_STORE_URL": settings.store_url,
            "WIDTHWISE_LEASE_SECONDS": str(settings.lease_seconds),
            "WIDTHWISE_RECONCILE_SECONDS": str(settings.reconcile_seconds),
            "WIDTHWISE_CANCEL_POLL_SECONDS": str(settings.cancel_poll_seconds),
            "WIDTHWISE_STOP_GRACE_SECONDS": str(settings.stop_grace_seconds),
            "WIDTHWISE_CHECKPOINT_SECONDS": str(settings.checkpoint_seconds),
            "WIDTHWISE_MAX_RUNS": str(settings.max_runs),
            "WIDTHWISE_WORKER_SLOTS": str(settings.worker_slots),
            "WIDTHWISE_WORKER_GPUS": str(settings.worker_gpus or 0),
            "WIDTHWISE_WORKER_STOP_SECONDS": str(settings.worker_stop_seconds),
            "WIDTHWISE_WEBHOOK_ALLOWED_NETWORKS": ",".join(
                str(network) for network in settings.webhook_allowed_networks
            ),
            "WIDTHWISE_WORKER_METRICS_PORT": str(settings.worker_metrics_port),
            "WIDTHWISE_LOG_FORMAT": settings.log_format,
            "WIDTHWISE_MEASURE_TRAINING": str(settings.measure_training),
        }
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, *program], cwd=folder, env=environment, stdout=log, stderr=log
            )

    @property
    def pid(self) -> int:
        return self.process.pid

    def has_logged(self, words: str) -> bool:
        assert self.process.poll() is None, self.log.read_text()
        return words in self.log.read_text()

    def stop(
        self, number: signal.Signals = signal.SIGTERM, *, seconds: float = STOP_SECONDS
    ) -> int:
        """Its exit status; AssertionError if it takes too long."""
        self.process.send_signal(number)
        try:
            return self.process.wait(timeout=seconds)
        except subprocess.TimeoutExpired as error:
            raise AssertionError(self.log.read_text()) from error
