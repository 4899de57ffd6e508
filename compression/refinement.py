"""The last stage that learns: sub-networks that are cut out of the supernet and distilled alone."""

from __future__ import annotations

import functools
import shutil
from collections.abc import Callable
from pathlib import Path

from compression.batches import Encoded
from compression.checkpoint import Checkpoints, digest
from compression.distillation import distil_alone
from compression.encoder import Encoder
from compression.job import Job
from compression.learning import (
    TEACHER_STATES,
    Learnt,
    finished,
    imitated_rows,
    kept_states,
)
from compression.networks import Networks
from compression.plan import deadlines
from compression.report import TrainingReport
from compression.search import Found
from compression.spec import FINALISTS
from compression.stages import SECTIONS, Advance
from compression.supernet import Subnetwork
from compression.teacher_states import KeptStates
from compression.training import Step, Surroundings


def refine(
    job: Job,
    learnt: Learnt,
    found: Found | None,
    checkpoints: Checkpoints,
    work: Path,
    stop: Callable[[], bool],
    advance: Advance,
) -> tuple[dict[str, Encoder], dict[str, TrainingReport]]:
    """The networks that the spec names, with weights of their own; and how each training went.

    In this process alone: they are small, and their trainings short.
    """
    named = set(job.spec.refinement.subnetworks)
    chosen = [each for each in learnt.subnetworks if each.name in named]
    if FINALISTS in named and found is not None:
        chosen += found.subnetworks
    # Checkpoints know it by its shape: on another machine p1 may be another one, and what an
    # earlier run there began of its own is then nobody's.
    keys = {each.name: f"refine {each.name} {digest(str(each.shape))[:8]}" for each in chosen}
    checkpoints.forget(
        {stage for stage in checkpoints.known if stage.startswith("refine ")} - {*keys.values()}
    )
    until = deadlines(job.spec, job.plan)["refine"]
    rows = imitated_rows(job)
    folder = work / TEACHER_STATES
    # For all of them, and only where one still has to learn.
    kept = functools.cache(lambda: kept_states(job, learnt.teacher, rows, folder))
    networks: dict[str, Encoder] = {}
    trainings: dict[str, TrainingReport] = {}
    for i, subnetwork in enumerate(chosen):
        left, now = len(chosen) - i, checkpoints.seconds
        around = Surroundings(
            keys[subnetwork.name],
            SECTIONS["refine"],
            checkpoints,
            None if until is None else now + max(0.0, until - now) / left,
            stop,
            precision=job.spec.precision,
        )

        def on_step(step: Step, before: int = i, name: str = subnetwork.name) -> None:
            advance(
                before * step.total + step.done,
                len(chosen) * step.total,
                subnetwork=name,
                losses=dict(step.losses),
            )

        network, training = refined(job, learnt, subnetwork, rows, kept, around, on_step)
        networks[subnetwork.name] = network
        trainings[f"refine {subnetwork.name}"] = training
    shutil.rmtree(folder, ignore_errors=True)  # exports may need the room
    return networks, trainings


def refined(
    job: Job,
    learnt: Learnt,
    subnetwork: Subnetwork,
    rows: Encoded,
    kept: Callable[[], tuple[KeptStates | None, tuple[str, ...]]],
    surroundings: Surroundings,
    on_step: Callable[[Step], None],
) -> tuple[Encoder, TrainingReport]:
    """One of them, cut out of the supernet with the dropout that that learns with."""
    network = Networks(learnt.supernet).extracted(subnetwork, learnt.supernet.config)

    def train() -> TrainingReport:
        answers, notes = kept()
        report = distil_alone(
            network,
            learnt.teacher,
            subnetwork,
            rows,
            job.spec.refinement,
            job.task,
            surroundings,
            seed=job.spec.seed,
            replicas=job.replicas,
            kept=answers,
            on_step=on_step,
        )
        return report.model_copy(update={"notes": notes})

    return network, finished(network, surroundings, train)
