"""The last stage that learns: sub-networks that are cut out of the supernet and distilled alone."""

from __future__ import annotations

from collections.abc import Callable

from compression.checkpoint import Checkpoints, digest
from compression.distillation import distil_alone
from compression.encoder import Encoder
from compression.job import Job
from compression.learning import Learnt, finished, imitated_rows
from compression.networks import Networks
from compression.plan import deadlines
from compression.report import TrainingReport
from compression.search import Found
from compression.spec import FINALISTS
from compression.stages import SECTIONS, Advance
from compression.supernet import Subnetwork
from compression.training import Step, Surroundings


def refine(
    job: Job,
    learnt: Learnt,
    found: Found | None,
    checkpoints: Checkpoints,
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

        network, training = refined(job, learnt, subnetwork, around, on_step)
        networks[subnetwork.name] = network
        trainings[f"refine {subnetwork.name}"] = training
    return networks, trainings


def refined(
    job: Job,
    learnt: Learnt,
    subnetwork: Subnetwork,
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
            job.spec.refinement,
            job.task,
            surroundings,
            seed=job.spec.seed,
            replicas=job.replicas,
            on_step=on_step,
        ),
    )
