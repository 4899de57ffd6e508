"""The stage that looks for widths of each layer, within a job: its checkpoints and its folder.

Where the spec asks for none it passes with nothing done. What it looks by is `compression.search`.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from compression.checkpoint import Checkpoints
from compression.device_profile import Predictor
from compression.errors import ExportFailed, Interrupted
from compression.fingerprint import fingerprint, libraries
from compression.job import Job
from compression.learning import Learnt
from compression.search import Found, Memory, search
from compression.stages import Advance

SEARCH = "search"


def search_widths(
    job: Job,
    learnt: Learnt,
    predictor: Predictor | None,
    checkpoints: Checkpoints,
    work: Path,
    advance: Advance,
) -> tuple[Found | None, tuple[str, ...]]:
    """Sub-networks with a width for each layer, where the spec asks for them; and why none.

    What was timed and scored is kept in checkpoints: as often as in trainings, and at the end.
    """
    asked = job.spec.supernet.per_layer
    if asked is None or job.holdout is None:
        return None, ()
    folder = work / SEARCH
    state = checkpoints[SEARCH]
    memory = Memory.restored(state, fingerprint(libraries(job.spec)))
    known, timed = len(memory.accuracies), memory.timings

    def keep(*, done: bool = False) -> None:
        checkpoints.save(SEARCH, memory.state(learnt.supernet.config.layers, done=done))

    def on_progress(step: int, total: int, what: str) -> None:
        try:
            advance(step, total, what)
        except Interrupted:
            keep()
            raise
        if checkpoints.is_due:
            keep()

    try:
        found = search(
            job.spec,
            asked,
            learnt.supernet,
            job.own_config(learnt.teacher.config),  # its megabytes are those that are exported
            job.task,
            job.holdout,
            learnt.subnetworks,
            memory,
            predictor=predictor,
            seq_len=job.seq_len,
            threads=job.replicas,
            folder=folder,
            on_progress=on_progress,
            on_timed=keep,
        )
    except ExportFailed as failure:
        return None, (f"widths for each layer were not searched for: {failure.message}",)
    finally:
        shutil.rmtree(folder, ignore_errors=True)  # exports may need the room
    # Where it was done before, a checkpoint of a stage after it has all that it knew.
    is_new = memory.timings is not timed or len(memory.accuracies) > known
    if state is None or not state.done or is_new:
        keep(done=True)
    return found, ()
