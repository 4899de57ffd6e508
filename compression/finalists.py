"""The stages of sub-networks with a width for each layer: the search, and trainings of their own.

One that the spec does not ask for passes with nothing done.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

from compression.checkpoint import Checkpoints, digest
from compression.device_profile import Predictor
from compression.distillation import distil_alone
from compression.encoder import Encoder
from compression.errors import ExportFailed, Interrupted
from compression.fingerprint import fingerprint, libraries
from compression.job import Job
from compression.learning import Learnt, finished, imitated_rows
from compression.networks import Networks
from compression.plan import deadlines
from compression.report import TrainingReport
from compression.search import Found, Memory, search
from compression.spec import DistillationSpec
from compression.stages import SECTIONS, Advance
from compression.supernet import Subnetwork
from compression.training import Step, Surroundings

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
    memory = Memory.restored(checkpoints[SEARCH], fingerprint(libraries(job.spec)))

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
    keep(done=True)
    return found, ()


def distil_finalists(
    job: Job,
    learnt: Learnt,
    found: Found | None,
    checkpoints: Checkpoints,
    stop: Callable[[], bool],
    advance: Advance,
) -> tuple[dict[str, Encoder], dict[str, TrainingReport]]:
    """The finalists with weights of their own, where the spec gives them steps; and how it went.

    In this process alone: they are small, and their trainings short.
    """
    asked = job.spec.supernet.per_layer
    if found is None or asked is None or asked.finalist_steps == 0:
        return {}, {}
    spec = job.spec.distillation.model_copy(update={"max_steps": asked.finalist_steps})
    until = deadlines(job.spec, job.plan)["finalists"]
    networks: dict[str, Encoder] = {}
    trainings: dict[str, TrainingReport] = {}
    for i, subnetwork in enumerate(found.subnetworks):
        left = len(found.subnetworks) - i
        now, training = checkpoints.seconds, f"finalists {subnetwork.name}"
        around = Surroundings(
            # Checkpoints know it by its shape: on another machine p1 may be another one.
            f"{training} {digest(str(subnetwork.shape))[:8]}",
            SECTIONS["finalists"],
            checkpoints,
            None if until is None else now + max(0.0, until - now) / left,
            stop,
            precision=job.spec.precision,
        )

        def on_step(step: Step, before: int = i) -> None:
            total = len(found.subnetworks) * step.total
            advance(before * step.total + step.done, total, losses=dict(step.losses))

        network, trainings[training] = distil_finalist(
            job, learnt, subnetwork, spec, around, on_step
        )
        networks[subnetwork.name] = network
    return networks, trainings


def distil_finalist(
    job: Job,
    learnt: Learnt,
    subnetwork: Subnetwork,
    spec: DistillationSpec,
    surroundings: Surroundings,
    on_step: Callable[[Step], None],
) -> tuple[Encoder, TrainingReport]:
    """One of them, cut out of the supernet with the dropout that that learns with."""
    network = Networks(learnt.supernet).extracted(subnetwork, learnt.supernet.config)
    return network, finished(
        network,
        surroundings,
        lambda: distil_alone(
            network,
            learnt.teacher,
            subnetwork,
            imitated_rows(job),
            spec,
            job.task,
            surroundings,
            seed=job.spec.seed,
            replicas=job.replicas,
            on_step=on_step,
        ),
    )
