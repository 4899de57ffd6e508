"""A user who wants jobs done: submits them, looks after them, asks again where something failed.

Nothing waits for an answer: what cannot be done now is done at the next `tick`.
"""

from __future__ import annotations

import io
import tarfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from tests.builders import tiny_bert, tiny_dataset
from tests.chaos.evidence import Answer

STEPS = 40
JOBS_ALIKE = 10  # with one dataset, whose results must be the same
AT_ONCE = 5  # jobs that have not ended: some wait in the queue
# As small as a real job can be: every stage is there, and each has little to do.
SPEC: dict[str, Any] = {
    "task": {"text": "text", "label": "label", "max_seq_len": 16},
    "importance": {"rows": 8},
    "supernet": {"width_mults": ["1/2"]},
    "distillation": {"max_steps": STEPS, "epochs": 100, "batch_size": 4, "dropout": 0.1},
    "latency": {"rounds": 5, "baselines": []},
    "export": {"formats": ["onnx"]},
}
ROWS = {"train": 32, "dev": 8}


@dataclass
class _Wanted:
    """A job that the user wants; `id` once the service has told of it. One that was asked for may
    be there without: the answer got lost."""

    number: int
    was_asked_for: bool = False
    id: str | None = None
    state: str = "wanted"


class User:
    """`jobs`: how many are wanted in all."""

    def __init__(self, url: str, key: str, *, seed: int, jobs: int, folder: Path) -> None:
        self.answers: list[Answer] = []
        self.retries = 0
        self._http = httpx.Client(
            base_url=url, headers={"Authorization": f"Bearer {key}"}, timeout=5
        )
        self._seed = seed
        self._folder = folder
        self._wanted = [_Wanted(number) for number in range(jobs)]
        self._model: str | None = None
        self._datasets: dict[int, str] = {}

    @property
    def asked(self) -> list[str]:
        return [job.id for job in self._wanted if job.id is not None]

    @property
    def succeeded(self) -> int:
        return sum(job.state == "succeeded" for job in self._wanted)

    @property
    def has_all(self) -> bool:
        """Whether every job that was asked for has succeeded."""
        return all(job.state == "succeeded" for job in self._wanted if job.was_asked_for)

    @property
    def wants_more(self) -> bool:
        return any(job.id is None for job in self._wanted)

    def want_no_more(self) -> None:
        """Jobs that the service cannot have heard of are given up."""
        self._wanted = [job for job in self._wanted if job.was_asked_for]

    def tick(self, *, most: int) -> None:
        """One look at every job; new ones are asked for, up to `most` in all. Those that were, and
        that nothing was heard of, are asked for again in any case."""
        for job in self._wanted:
            if job.id is not None and job.state != "succeeded":
                self._look_after(job.id, job)
        open_jobs = sum(job.id is not None and job.state != "succeeded" for job in self._wanted)
        for job in self._wanted:
            is_due = job.was_asked_for or job.number < most
            if job.id is None and is_due and open_jobs < AT_ONCE:
                self._submit(job)  # one that is not taken now does not keep the next from it
                open_jobs += 1

    def _look_after(self, id: str, job: _Wanted) -> None:
        found = self._ask("GET", f"/v1/jobs/{id}")
        if found is None:
            return
        job.state = found["state"]
        if job.state in ("failed", "cancelled"):
            # What a fault has ended is asked for again. 409 says that it was heard the first time.
            heard = self._ask("POST", f"/v1/jobs/{id}/retry", expected=(202, 409))
            self.retries += heard is not None

    def _submit(self, job: _Wanted) -> None:
        if self._model is None:
            self._model = self._upload("models", tiny_model(self._folder / "model"))
        alike = job.number // JOBS_ALIKE
        if alike not in self._datasets:
            rows = tiny_dataset(self._folder / f"dataset-{alike}", rows=ROWS, seed=alike)
            dataset = self._upload("datasets", rows)
            if dataset is not None:
                self._datasets[alike] = dataset
        if self._model is None or alike not in self._datasets:
            return
        job.was_asked_for = True
        body = {"model": self._model, "dataset": self._datasets[alike], "spec": SPEC}
        created = self._ask(
            "POST",
            "/v1/jobs",
            json=body,
            # The same request once more, whatever became of it: it makes one job.
            headers={"Idempotency-Key": f"job-{self._seed}-{job.number}"},
        )
        if created is not None:
            job.id, job.state = created["id"], created["state"]

    def _upload(self, noun: str, folder: Path) -> str | None:
        content = io.BytesIO()
        with tarfile.open(fileobj=content, mode="w:gz") as tar:
            tar.add(folder, arcname=folder.name)
        created = self._ask(
            "POST",
            f"/v1/{noun}?filename={folder.name}.tar.gz",
            content=content.getvalue(),
            headers={"Content-Type": "application/octet-stream"},
        )
        return None if created is None else str(created["id"])

    def _ask(
        self, method: str, path: str, *, expected: tuple[int, ...] = (200, 201, 202), **more: Any
    ) -> dict[str, Any] | None:
        """None where there is no answer, or not the one that is hoped for: that is noted."""
        asked = time.time()
        try:
            answer = self._http.request(method, path, **more)
        except httpx.TransportError:
            return None  # the API was killed, or the database keeps it waiting
        if answer.status_code in expected:
            return dict(answer.json())
        if answer.status_code == 409 and answer.json().get("type", "").endswith(
            "request-in-progress"
        ):
            return None  # the API died over it; its hold on the key ends after a while
        words = f"{method} {path}: {answer.text[:300]}"
        self.answers.append(Answer(asked, time.time(), answer.status_code, words))
        return None


def tiny_model(folder: Path) -> Path:
    return tiny_bert(folder, layers=1, heads=2, hidden=16, ffn=32, max_positions=16)
