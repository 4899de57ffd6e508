"""Distillation of the supernet: DynaBERT (arXiv:2004.04037), width stage and depth stage; and of
a sub-network that has been cut out.

Left out: data augmentation. Letters: B rows, T tokens, H hidden size, C classes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import paddle
from paddle import Tensor

from compression.batches import Batch, Encoded
from compression.encoder import Encoder, EncoderStates
from compression.layout import Layout, Packed, Padded
from compression.noise import Noise
from compression.report import TrainingReport
from compression.sampling import Sandwich, taken
from compression.spec import DepthSpec, DistillationSpec, RefinementSpec
from compression.supernet import Subnetwork, deepened, replaced_states
from compression.tasks.base import Count, Task
from compression.teacher_states import KeptStates
from compression.training import Step, Surroundings, train

DISTILLATION = Surroundings("distil", "distillation")  # with nothing to go on from, and no limit
DEPTH = Surroundings("depth", "depth")  # the same
REFINEMENT = Surroundings("refine", "refinement")


class LossWeights(Protocol):
    """What a spec section says of the loss."""

    @property
    def lambda_rep(self) -> float: ...
    @property
    def lambda_logit(self) -> float: ...
    @property
    def padded_mean(self) -> bool: ...


def representation_loss(
    *,
    student: Sequence[Tensor],
    teacher: Sequence[Tensor],
    layout: Layout,
    total: Count,
) -> Tensor:
    """Sum over states of the mean squared difference over tokens; states [..., H] in the layout.

    `total` are the tokens to divide by: the layout's, or a larger batch's that it is a part of.
    """
    units = total * student[0].shape[-1]
    return sum(
        layout.squared_distance(own, other) / units
        for own, other in zip(student, teacher, strict=True)
    )


def distillation_loss(
    student: EncoderStates,
    teacher: EncoderStates,
    batch: Batch,
    layout: Layout,
    spec: LossWeights,
    task: Task,
    *,
    share_of: Batch | None = None,
) -> Tensor:
    """lambda_rep * representation loss + lambda_logit * logit loss of one sub-network.

    States are in the layout. Of a part of a batch, with `share_of` that batch: the part's share,
    so that the parts' add up.
    """
    whole = batch if share_of is None else share_of
    loss = spec.lambda_logit * task.logit_loss(
        student=student.logits, teacher=teacher.logits, batch=batch, total=task.count(whole)
    )
    if spec.lambda_rep:
        tokens = int(whole.input_ids.size if spec.padded_mean else whole.lengths.sum())
        loss = loss + spec.lambda_rep * representation_loss(
            student=student.hidden, teacher=teacher.hidden, layout=layout, total=tokens
        )
    return loss


def layout_of(batch: Batch, spec: LossWeights) -> Layout:
    """Packed, but where the mean of a loss is to be over padding too."""
    if spec.padded_mean:
        return Padded(batch.attention_mask, counts_padding=True)
    return Packed(batch.lengths, batch.input_ids.shape[1])


def teachers_answers(
    teacher: Encoder, kept: KeptStates | None, share: Batch, layout: Layout
) -> EncoderStates:
    """Without gradients: what was kept of them, else computed now."""
    if kept is not None:
        return kept(share, layout)
    with paddle.no_grad():
        return teacher.encode(*share.inputs, layout=layout)


@dataclass(frozen=True)
class SupernetLosses:
    """Every sub-network's loss against the teacher, which runs once, without gradients."""

    teacher: Encoder
    subnetworks: Sequence[Subnetwork] | Sandwich
    spec: DistillationSpec
    task: Task
    kept: KeptStates | None = None  # the teacher's answers about all rows

    def __call__(
        self,
        supernet: Encoder,
        share: Batch,
        whole: Batch,
        noise: Noise | None,
        step: int | None = None,
    ) -> Iterator[tuple[str, Tensor]]:
        layout = layout_of(share, self.spec)
        targets = teachers_answers(self.teacher, self.kept, share, layout)

        def loss(student: EncoderStates, subnetwork: Subnetwork) -> Tensor:
            return distillation_loss(
                student, targets, share, layout, self.spec, self.task, share_of=whole
            )

        chosen = taken(self.subnetworks, step)
        yield from losses_of_each(supernet, chosen, share, layout, noise, loss)


@dataclass(frozen=True)
class DepthLosses:
    """Each sampled sub-network's loss against the frozen supernet of the width stage.

    That runs at full depth and the same width, once for each width of the step.
    """

    frozen: Encoder
    sampled: Sandwich
    spec: DepthSpec
    task: Task

    def __call__(
        self,
        supernet: Encoder,
        share: Batch,
        whole: Batch,
        noise: Noise | None,
        step: int | None = None,
    ) -> Iterator[tuple[str, Tensor]]:
        layout = layout_of(share, self.spec)
        with paddle.no_grad():
            ids, types, _ = share.inputs
            embedded = layout.states(self.frozen.embeddings(ids, types))
        known: dict[Subnetwork, EncoderStates] = {}

        def loss(student: EncoderStates, subnetwork: Subnetwork) -> Tensor:
            config = self.frozen.config
            deep = deepened(config, subnetwork)
            if deep not in known:
                known.clear()  # the step's sub-networks come width by width
                with paddle.no_grad():
                    known[deep] = self.frozen.encode_embedded(embedded, layout, subnetwork=deep)
            states = replaced_states(config.layers, subnetwork.depth_mult)
            targets = EncoderStates(
                [known[deep].hidden[state] for state in states], known[deep].logits
            )
            return distillation_loss(
                student, targets, share, layout, self.spec, self.task, share_of=whole
            )

        yield from losses_of_each(supernet, self.sampled.at(step), share, layout, noise, loss)


@dataclass(frozen=True)
class AloneLosses:
    """The loss against the teacher of a network that shares its weights with no other.

    `states` are the teacher's that its own stand for, the embedding output first.
    """

    teacher: Encoder
    name: str
    states: Sequence[int]
    spec: RefinementSpec
    task: Task
    kept: KeptStates | None = None  # the teacher's answers about all rows

    def __call__(
        self,
        network: Encoder,
        share: Batch,
        whole: Batch,
        noise: Noise | None,
        step: int | None = None,
    ) -> Iterator[tuple[str, Tensor]]:
        layout = layout_of(share, self.spec)
        found = teachers_answers(self.teacher, self.kept, share, layout)
        targets = EncoderStates([found.hidden[state] for state in self.states], found.logits)
        yield (
            self.name,
            distillation_loss(
                network.encode(*share.inputs, layout=layout, noise=noise),
                targets,
                share,
                layout,
                self.spec,
                self.task,
                share_of=whole,
            ),
        )


def losses_of_each(
    supernet: Encoder,
    subnetworks: Sequence[Subnetwork],
    share: Batch,
    layout: Layout,
    noise: Noise | None,
    loss: Callable[[EncoderStates, Subnetwork], Tensor],
) -> Iterator[tuple[str, Tensor]]:
    """Name and loss of each sub-network on a share of a batch, one after the other.

    The embedding output is computed once and shared by all of them (and so is its dropout), and
    the gradients that it gets from all of them go back together.
    """
    embedded = layout.states(
        supernet.embeddings(share.input_ids, share.token_type_ids, noise=noise)
    )
    shared = embedded.detach()
    shared.stop_gradient = embedded.stop_gradient
    for subnetwork in subnetworks:
        # No name for the states: they would keep one pass's memory through the next.
        yield (
            subnetwork.name,
            loss(
                supernet.encode_embedded(shared, layout, subnetwork=subnetwork, noise=noise),
                subnetwork,
            ),
        )
    if shared.grad is not None:
        embedded.backward(shared.grad)


def distil(
    supernet: Encoder,
    teacher: Encoder,
    data: Encoded,
    subnetworks: Sequence[Subnetwork] | Sandwich,
    spec: DistillationSpec,
    task: Task,
    surroundings: Surroundings = DISTILLATION,
    *,
    seed: int,
    on_step: Callable[[Step], None],
    replicas: int = 1,
    kept: KeptStates | None = None,
) -> TrainingReport:
    """Trains the supernet in place.

    Each batch: the teacher once, without gradients, or what was `kept` of it; every sub-network
    (of a sandwich those of the step) forward and backward; one optimizer step. `replicas` threads
    share each batch.
    """
    return train(
        supernet,
        data,
        spec,
        surroundings,
        SupernetLosses(teacher, subnetworks, spec, task, kept),
        seed=seed,
        replicas=replicas,
        keep_length=spec.padded_mean,
        on_step=on_step,
    )


def distil_depth(
    supernet: Encoder,
    frozen: Encoder,
    data: Encoded,
    sampled: Sandwich,
    spec: DepthSpec,
    task: Task,
    surroundings: Surroundings = DEPTH,
    *,
    seed: int,
    on_step: Callable[[Step], None],
    replicas: int = 1,
) -> TrainingReport:
    """Trains the supernet in place at the sampled widths and depths: DynaBERT's second stage.

    `frozen` is what the width stage made of it. `replicas` threads share each batch.
    """
    return train(
        supernet,
        data,
        spec,
        surroundings,
        DepthLosses(frozen, sampled, spec, task),
        seed=seed,
        replicas=replicas,
        on_step=on_step,
    )


def distil_alone(
    network: Encoder,
    teacher: Encoder,
    subnetwork: Subnetwork,
    data: Encoded,
    spec: RefinementSpec,
    task: Task,
    surroundings: Surroundings = REFINEMENT,
    *,
    seed: int,
    on_step: Callable[[Step], None],
    replicas: int = 1,
    kept: KeptStates | None = None,
) -> TrainingReport:
    """Trains a cut-out network in place, `subnetwork` of a supernet of the teacher's shape.

    Each batch: the teacher once, without gradients, or what was `kept` of it. Where layers are left
    out, the network's states learn those of the teacher that they stand for.
    """
    states = replaced_states(teacher.config.layers, subnetwork.depth_mult)
    return train(
        network,
        data,
        spec,
        surroundings,
        AloneLosses(teacher, subnetwork.name, states, spec, task, kept),
        seed=seed,
        replicas=replicas,
        keep_length=spec.padded_mean,
        on_step=on_step,
    )
