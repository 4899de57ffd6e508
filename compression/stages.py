"""A job's stages as they run: their times and signs of life, and where a job can be stopped."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from compression.errors import Interrupted, OutOfMemory
from compression.report import STAGES, OnProgress, Progress

SECTIONS = {  # of trainings
    "teacher": "teacher",
    "distil": "distillation",
    "depth": "depth",
    "final": "final",
    "refine": "refinement",
}
NOTHING_TO_DO = "nothing to do"
Advance = Callable[..., None]


@dataclass
class Stages:
    """Times each stage, reports its first and last sign of life, and ends the job when told to.

    A stage that the spec does not ask for, or that is in a checkpoint, says that it had nothing
    to do.
    """

    on_progress: OnProgress
    stop: Callable[[], bool]
    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def __call__(self, name: str) -> Iterator[Advance]:
        if name not in STAGES:
            raise ValueError(f"{name!r} is no stage of the report")
        started = time.perf_counter()
        last: list[int] = []

        def advance(step: int = 0, total: int = 1, message: str = "", **figures: object) -> None:
            last[:] = [step, total]
            self.on_progress(Progress(name, step, total, message, figures))
            if name not in SECTIONS:  # they write a checkpoint first
                self.end_if_told(name)

        self.end_if_told(name)
        self.on_progress(Progress(name))
        try:
            yield advance
        except MemoryError as error:
            raise OutOfMemory(
                f"the memory is too small in stage {name}: run the job where there is more, or "
                "lower the batch sizes and task.max_seq_len"
            ) from error
        self.seconds[name] = time.perf_counter() - started
        if not last:
            self.on_progress(Progress(name, 1, 1, NOTHING_TO_DO))
        elif last[0] != last[1]:
            self.on_progress(Progress(name, last[1], last[1]))

    def end_if_told(self, name: str) -> None:
        if self.stop():
            raise Interrupted(f"stopped in stage {name}")
