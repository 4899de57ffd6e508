"""The stages that learn: teacher, importance, reordering, widths, depths and the last fine-tuning.

`learn` takes the job's process through them, `follow` the others that share its trainings. The
sub-networks that learn alone, after a search, are those of `compression.refinement`.
"""

from __future__ import annotations

import dataclasses
import math
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from compression.batches import Encoded, sorted_rows
from compression.checkpoint import FOLDER as CHECKPOINTS
from compression.checkpoint import Checkpoints, StageState, host_facts, resumed_replicas
from compression.device import device_model, use_device
from compression.distillation import distil, distil_depth
from compression.encoder import Encoder, build_encoder, load_weights, numpy_weights, with_new_head
from compression.evaluate import largest_difference, predict
from compression.importance import measure_importance
from compression.job import Job, identity, load
from compression.plan import deadlines
from compression.ranks import Group, join
from compression.reference import run as reference
from compression.reference.exchange import Orders, Request
from compression.reorder import descending, reorder
from compression.report import TrainingReport
from compression.sampling import Sandwich
from compression.search import space_of
from compression.search_space import SearchSpace
from compression.spec import DistillationSpec, Spec
from compression.stages import SECTIONS, Advance, Stages
from compression.supernet import FULL, Subnetwork, subnetwork_of
from compression.tasks import Predictions
from compression.teacher_states import KeptStates, states_bytes
from compression.teachers.config import EncoderConfig
from compression.training import Step, Surroundings, fine_tune

UNITS = ("heads", "neurons")
REFERENCE = "reference"
TEACHER_STATES = "teacher-states"


@dataclass(frozen=True)
class Learnt:
    """What the stages up to the last training leave."""

    teacher: Encoder
    teacher_metrics: dict[str, float]  # on dev
    teacher_dev: Predictions
    supernet: Encoder
    reorder_max_abs: float
    subnetworks: list[Subnetwork]
    trainings: dict[str, TrainingReport]


def learn(job: Job, checkpoints: Checkpoints, stages: Stages, group: Group, work: Path) -> Learnt:
    """Teacher, importance, reordering, distillation and the last fine-tuning."""
    spec, until = job.spec, deadlines(job.spec, job.plan)

    def around(stage: str) -> Surroundings:
        return surroundings_of(job, stage, checkpoints, group, until[stage], stages.stop)

    trainings: dict[str, TrainingReport] = {}
    with stages("teacher") as advance:
        teacher, trained = make_teacher(job, around("teacher"), advance)
        if trained is not None:
            trainings["teacher"] = trained
        teacher_logits = predict(teacher, job.splits["dev"], threads=job.replicas)
        teacher_metrics = job.task.metrics(teacher_logits, job.splits["dev"])
        advance(1, 1, accuracy=teacher_metrics[job.task.main_metric])
    with stages("importance") as advance:
        orders = Orders(*rank_units(job, teacher, checkpoints, work, advance))
    with stages("reorder") as advance:
        weights = numpy_weights(teacher)
        supernet = build_encoder(
            learning_config(teacher.config, spec.distillation),
            reorder(
                teacher.config, weights, head_orders=orders.heads, neuron_orders=orders.neurons
            ),
        )
        reordered = predict(supernet, job.splits["dev"], threads=job.replicas)
        reorder_max_abs = largest_difference(reordered, teacher_logits)
        advance(1, 1, max_abs=reorder_max_abs)
    subnetworks = planned_subnetworks(job, supernet)
    with stages("distil") as advance:
        trainings["distil"] = train_supernet(
            job, supernet, teacher, around("distil"), advance, orders, work
        )
    with stages("depth") as advance:
        deepened = train_depths(job, supernet, subnetworks, around("depth"), advance)
        if deepened is not None:
            trainings["depth"] = deepened
    with stages("final") as advance:
        tuned = fine_tune_subnetworks(job, supernet, subnetworks, around("final"), advance)
        if tuned is not None:
            trainings["final"] = tuned
    return Learnt(
        teacher,
        teacher_metrics,
        teacher_logits,
        supernet,
        reorder_max_abs,
        subnetworks,
        trainings,
    )


def follow(
    spec: Spec,
    model_dir: Path,
    dataset_dir: Path,
    run_dir: Path,
    *,
    rank: int,
    endpoints: Sequence[str],
    meet: Callable[[], None],
) -> None:
    """Another process's part of `learn`: its share of every training batch, and no file."""
    use_device(spec.device, processes=spec.processes, rank=rank)
    job = load(spec, model_dir, dataset_dir, resumed_replicas(run_dir / CHECKPOINTS))
    checkpoints = Checkpoints(
        run_dir / CHECKPOINTS,
        identity=identity(spec, model_dir, dataset_dir),
        host=host_facts(os.environ, replicas=job.replicas, device=device_model(spec.device)),
        every_seconds=math.inf,
    )
    group = join(rank, endpoints, meet)

    def silent(*told: Any, **figures: Any) -> None:
        pass

    def around(stage: str) -> Surroundings:
        return surroundings_of(job, stage, checkpoints, group)

    teacher, _ = make_teacher(job, around("teacher"), silent)
    # Scores and their order are the job's process's matter: the first step begins with its weights.
    supernet = build_encoder(
        learning_config(teacher.config, spec.distillation), numpy_weights(teacher)
    )
    subnetworks = planned_subnetworks(job, supernet)
    nothing = Orders([], [])
    train_supernet(job, supernet, teacher, around("distil"), silent, nothing, run_dir / "work")
    train_depths(job, supernet, subnetworks, around("depth"), silent)
    fine_tune_subnetworks(job, supernet, subnetworks, around("final"), silent)


def surroundings_of(
    job: Job,
    stage: str,
    checkpoints: Checkpoints,
    group: Group,
    deadline: float | None = None,
    stop: Callable[[], bool] = lambda: False,
) -> Surroundings:
    return Surroundings(
        stage, SECTIONS[stage], checkpoints, deadline, stop, group, job.spec.precision
    )


def planned_subnetworks(job: Job, supernet: Encoder) -> list[Subnetwork]:
    return [
        subnetwork_of(supernet.config, each.width_mult, each.depth_mult)
        for each in job.plan.subnetworks
    ]


def make_teacher(
    job: Job, surroundings: Surroundings, advance: Advance
) -> tuple[Encoder, TrainingReport | None]:
    """The uploaded model, or one fine-tuned on train's labels; and how that went."""
    config, tensors = job.checkpoint.config, job.checkpoint.tensors
    if not job.plan.fine_tune:
        teacher = build_encoder(config, tensors)
        return teacher, None
    config, tensors = with_new_head(
        config,
        tensors,
        num_labels=len(job.plan.label_names),
        head=job.spec.task.head,
        seed=job.spec.seed,
    )
    teacher = build_encoder(config, tensors)
    return teacher, finished(
        teacher,
        surroundings,
        lambda: fine_tune(
            teacher,
            job.splits["train"],
            job.spec.teacher,
            job.task,
            surroundings,
            seed=job.spec.seed,
            replicas=job.replicas,
            on_step=lambda step: advance(
                step.done, step.total, loss=sum(step.losses.values()), seconds=step.seconds
            ),
        ),
    )


def finished(
    model: Encoder,
    surroundings: Surroundings,
    training: Callable[[], TrainingReport],
    *,
    trained_further: bool = False,
) -> TrainingReport:
    """Trains the model in place and keeps it in a checkpoint, or takes it from one.

    `trained_further`: a later stage goes on with the same model, so later checkpoints need a
    copy of what it is now.
    """
    state = surroundings.state
    if state is not None and state.done:
        load_weights(model, state.tensors)
        return TrainingReport.model_validate(state.figures)
    report = training()
    if surroundings.checkpoints is not None and surroundings.group.leads:
        weights = numpy_weights(model) if trained_further else model.state_dict()
        surroundings.checkpoints.save(
            surroundings.stage, StageState(report.steps, True, report.model_dump(), weights)
        )
    return report


def rank_units(
    job: Job, teacher: Encoder, checkpoints: Checkpoints, work: Path, advance: Advance
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Each layer's heads and neurons, most important first, on a seeded sample of rows."""
    state = checkpoints["importance"]
    if state is not None:
        heads, neurons = (
            [state.tensors[f"{kind}.{i}"] for i in range(teacher.config.layers)] for kind in UNITS
        )
        return heads, neurons
    spec = job.spec.importance
    rows = job.splits[spec.split]
    sample = rows.take(
        np.random.default_rng([job.spec.seed, 2]).permutation(len(rows))[: spec.rows]
    )
    total = -(-len(sample) // spec.batch_size)
    if job.spec.engine == "paddleslim":
        importance = reference.measure_importance(
            work / REFERENCE,
            Request(job.spec, teacher.config, numpy_weights(teacher), sample),
            replicas=job.replicas,
            on_batch=lambda done: advance(done, total),
        )
    else:
        importance = measure_importance(
            teacher,
            sample,
            sorted_rows(sample, batch_size=spec.batch_size),
            job.task,
            replicas=job.replicas,
            on_batch=lambda done: advance(done, total),
        )
    heads = [descending(scores) for scores in importance.heads]
    neurons = [descending(scores) for scores in importance.neurons]
    orders = {
        f"{kind}.{i}": order
        for kind, layers in zip(UNITS, (heads, neurons), strict=True)
        for i, order in enumerate(layers)
    }
    checkpoints.save("importance", StageState(total, True, {}, orders))
    return heads, neurons


def train_supernet(
    job: Job,
    supernet: Encoder,
    teacher: Encoder,
    surroundings: Surroundings,
    advance: Advance,
    orders: Orders,
    work: Path,
) -> TrainingReport:
    """Distils the supernet in place: every width at full depth.

    The engine paddleslim reorders and trains a supernet of its own, whose weights come into ours.
    """
    rows = imitated_rows(job)
    widths = dict.fromkeys(each.width_mult for each in job.plan.subnetworks)
    subnetworks: Sequence[Subnetwork] | Sandwich = [
        subnetwork_of(supernet.config, width) for width in widths
    ]
    if (space := per_layer_space(job, supernet)) is not None:
        at_full_depth = dataclasses.replace(space, depths=(FULL,))
        subnetworks = Sandwich(subnetworks, job.spec.seed, at_full_depth)

    def on_step(step: Step) -> None:
        advance(step.done, step.total, losses=dict(step.losses), seconds=step.seconds)

    trained_further = job.spec.supernet.has_depth or job.spec.final.when != "never"
    if job.spec.engine == "paddleslim":
        request = Request(job.spec, teacher.config, numpy_weights(teacher), rows, orders)

        def learn() -> TrainingReport:
            learnt, report = reference.distil(
                work / REFERENCE, request, replicas=job.replicas, on_step=on_step
            )
            load_weights(supernet, learnt)
            return report

        return finished(supernet, surroundings, learn, trained_further=trained_further)

    def train() -> TrainingReport:
        folder = work / TEACHER_STATES
        kept, notes = kept_states(job, teacher, rows, folder)
        report = distil(
            supernet,
            teacher,
            rows,
            subnetworks,
            job.spec.distillation,
            job.task,
            surroundings,
            seed=job.spec.seed,
            replicas=job.replicas,
            kept=kept,
            on_step=on_step,
        )
        shutil.rmtree(folder, ignore_errors=True)  # exports may need the room
        return report.model_copy(update={"notes": notes})

    return finished(supernet, surroundings, train, trained_further=trained_further)


def per_layer_space(job: Job, supernet: Encoder) -> SearchSpace | None:
    """What random widths for each layer are drawn from, where the spec asks for such."""
    if job.spec.supernet.per_layer is None:
        return None
    return space_of(job.spec, supernet.config)


def imitated_rows(job: Job) -> Encoded:
    """The teacher's answers are all that is learnt of these, so rows without labels serve too."""
    rows = job.splits["train"]
    return rows.joined(job.splits["unlabelled"]) if "unlabelled" in job.splits else rows


def train_depths(
    job: Job,
    supernet: Encoder,
    subnetworks: Sequence[Subnetwork],
    surroundings: Surroundings,
    advance: Advance,
) -> TrainingReport | None:
    """DynaBERT's second stage, in place, where the spec asks for other depths than the full one.

    Full depth is trained along where it is among them, so that it is not forgotten.
    """
    if not job.spec.supernet.has_depth:
        return None

    def train() -> TrainingReport:
        frozen = build_encoder(supernet.config, numpy_weights(supernet))
        surroundings.group.take_from_the_first(frozen)
        return distil_depth(
            supernet,
            frozen,
            imitated_rows(job),
            Sandwich(subnetworks, job.spec.seed, per_layer_space(job, supernet)),
            job.spec.depth,
            job.task,
            surroundings,
            seed=job.spec.seed,
            replicas=job.replicas,
            on_step=lambda step: advance(
                step.done, step.total, losses=dict(step.losses), seconds=step.seconds
            ),
        )

    return finished(supernet, surroundings, train, trained_further=job.spec.final.when != "never")


def kept_states(
    job: Job, teacher: Encoder, rows: Encoded, folder: Path
) -> tuple[KeptStates | None, tuple[str, ...]]:
    """The teacher's answers where the spec has them kept, and why not where it cannot be done."""
    spec = job.spec.distillation
    if not spec.teacher_cache_mb:
        return None, ()
    needed = states_bytes(teacher.config, rows) / 1e6
    if needed > spec.teacher_cache_mb:
        why = f"they take {needed:,.0f} MB, more than teacher_cache_mb ({spec.teacher_cache_mb:,})"
    else:
        try:
            return KeptStates.compute(teacher, rows, folder, threads=job.replicas), ()
        except OSError as error:
            why = f"{needed:,.0f} MB could not be written: {error.strerror}"
    return None, (f"the teacher's answers were not kept but computed in each step: {why}",)


def fine_tune_subnetworks(
    job: Job,
    supernet: Encoder,
    subnetworks: Sequence[Subnetwork],
    surroundings: Surroundings,
    advance: Advance,
) -> TrainingReport | None:
    """The optional last training, on train's labels, of all sub-networks in place."""
    if job.spec.final.when == "never":
        return None
    space = per_layer_space(job, supernet)
    return finished(
        supernet,
        surroundings,
        lambda: fine_tune(
            supernet,
            job.splits["train"],
            job.spec.final,
            job.task,
            surroundings,
            subnetworks=Sandwich(subnetworks, job.spec.seed, space)
            if space is not None or job.spec.supernet.has_depth
            else subnetworks,
            seed=job.spec.seed,
            replicas=job.replicas,
            on_step=lambda step: advance(
                step.done, step.total, losses=dict(step.losses), seconds=step.seconds
            ),
        ),
    )


def learning_config(config: EncoderConfig, spec: DistillationSpec) -> EncoderConfig:
    """The supernet's config: the teacher's, with the dropout that it is to learn with."""
    if spec.dropout is None:
        return config
    return dataclasses.replace(config, hidden_dropout=spec.dropout, attention_dropout=spec.dropout)


def training_warnings(spec: Spec, trainings: Mapping[str, TrainingReport]) -> Iterator[str]:
    told: set[str] = set()
    for stage, training in trainings.items():
        if training.ended == "time":
            yield (
                f"the time budget of {spec.max_minutes:g} minutes ended {stage} after "
                f"{training.steps} of {training.planned_steps} steps; the weights are those after "
                f"step {training.best_step}"
            )
        yield from (note for note in training.notes if note not in told)  # of all refinements
        told.update(training.notes)
        section = getattr(spec, SECTIONS[stage.split()[0]])
        if training.micro_batch is not None and section.micro_batch == "auto":
            yield (
                f"the memory was too small for a whole batch in {stage}: {training.micro_batch} "
                "rows were computed at once"
            )
