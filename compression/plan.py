"""What a job will do, worked out before anything is trained: every cross-check of a spec.

`make_plan` holds a spec against a model and a dataset and answers with the sub-networks
and their cost, or with an error that points at the field or row to mend. `resolve_rows`
then turns the dataset's tables into texts and label numbers, as the plan says.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np
import numpy.typing as npt
from pydantic import Field
from tokenizers import Tokenizer

from compression import cost
from compression.alignment import longest_overlap
from compression.device_profile import DeviceProfile, plan_warnings
from compression.engines import check_paddleslim
from compression.errors import InvalidDataset, InvalidSpec
from compression.examples import (
    AskedExamples,
    SequenceColumns,
    TaggedExamples,
    mark_entities,
    read_sequences,
    refuse_defects,
    sequence_columns,
)
from compression.intervals import fewest_rounds
from compression.latency_model import HELD_OUT_SHARE
from compression.report import METRIC_NAMES
from compression.sampling import RANDOM
from compression.selection import SHOWN_CONFIDENCE, check_latency_at
from compression.spec import (
    FINALISTS,
    ROUNDED_FORMATS,
    SERVED_FORMATS,
    DepthMult,
    Format,
    Frozen,
    LatencyAt,
    LatencySpec,
    Spec,
    TrainingSpec,
    WidthMult,
    fp32_format,
)
from compression.supernet import Subnetwork, kept_layers, subnetwork_of
from compression.tables import (
    LABELLED_SPLITS,
    MAX_LABELS,
    SPLITS,
    Columns,
    DatasetProfile,
    DistinctValue,
    Table,
    column_warnings,
    guess_columns,
    label_candidates,
    plain_text,
    shared_warnings,
    whole_number,
)
from compression.targets import (
    check_scores,
    labelled_columns,
    multi_label_values,
    read_targets,
    refuse_empty,
    refuse_unseen,
)
from compression.teachers import Checkpoint, EncoderConfig, legal_widths
from compression.tokenization import vocabulary_kind
from compression.vocabulary import check_removable

SEQUENCE_KINDS = ("token_classification", "question_answering")
ANSWER_OUTPUTS = ("start", "end")  # of question answering
DEV_SHARE = 10  # one row in ten of train becomes dev where there is none
FEW_DEV_ROWS = 100
HOLDOUT_SHARE = 5  # one row in so many of train scores candidates, at most
FEW_HOLDOUT_ROWS = 8

# Assumptions of predicted_seconds. Effective, not peak: a distillation step of MiniLM-L6 on
# two CPU cores is 150 GFLOP and takes 2.4 seconds.
FLOPS_PER_SECOND = 60e9
CHARACTERS_PER_TOKEN = 4.0  # of English text in a vocabulary of 30,000 word pieces
START_SECONDS = 20.0
SECONDS_PER_EXPORT = 6.0  # writing one format, and a fresh process that reads it back
BACKWARD_AND_FORWARD = 3  # a training step costs this many forward passes

# Beside the weights: the graph, the configuration, names. Generous, in bytes.
_FIXED_BYTES: Mapping[Format, int] = {
    "safetensors": 10_000,
    "paddle": 100_000,
    "onnx": 100_000,
    "onnx-int8-dynamic": 400_000,  # with what stays in fp32: norms, biases, scales
    "onnx-int8-static": 400_000,
    "onnx-fp16": 100_000,
    "paddle-bf16": 100_000,
}
_PARAMETER_BYTES: Mapping[Format, int] = {  # of one, where it is not in fp32
    "onnx-int8-dynamic": 1,
    "onnx-int8-static": 1,
    "onnx-fp16": 2,
}


class ModelInfo(Frozen):
    """An uploaded model as inspection saw it; `encoder` is EncoderConfig.to_dict()."""

    family: str
    layers: int
    heads: int = Field(description="Attention heads of the widest layer.")
    head_dim: int
    hidden: int
    ffn: int = Field(description="FFN neurons of the widest layer.")
    vocab_size: int
    max_positions: int = Field(description="Tokens of the longest row that it takes.")
    parameters: int
    num_labels: int | None = Field(description="Outputs of the classifier; null without one.")
    labels: tuple[str, ...] | None = Field(description="Names of the outputs, where it has any.")
    head_task: str | None = Field(
        None,
        description="The kind of task that the classifier says it is for; null: any that fits.",
    )
    legal_widths: tuple[WidthMult, ...]
    layout: str
    encoder: Mapping[str, Any]
    tokenizer: str | None = Field(
        None, description='How it splits words ("WordPiece", "BPE"); null in older records.'
    )


class PlannedSubnetwork(Frozen):
    """`heads` and `ffn` count per layer; `flops` are of one row of the plan's `seq_len` tokens."""

    name: str
    width_mult: WidthMult
    depth_mult: DepthMult = Fraction(1)
    layers: tuple[int, ...] = Field((), description="The supernet's that it keeps, from 0.")
    heads: tuple[int, ...]
    ffn: tuple[int, ...]
    parameters: int
    flops: int
    predicted_bytes: Mapping[Format, int] = Field(
        description="Of each exported format: its weights and an allowance for the graph."
    )


class Plan(Frozen):
    """What a job will do. `labels[i]` is the dataset's value for the classifier's output i.

    A regression has no labels; `label_names` names its one output. Question answering has
    none either, and the outputs "start" and "end".
    """

    subnetworks: tuple[PlannedSubnetwork, ...]
    text: str
    text_pair: str | None
    label: str
    answer_start: str | None = Field(None, description="Of question answering alone.")
    labels: tuple[str, ...]
    label_names: tuple[str, ...] = Field(
        description="What output i is called: the model's own name where it keeps its head and "
        "has names, else the dataset's value."
    )
    fine_tune: bool
    rows: Mapping[str, int] = Field(
        description="Rows of each split; where dev is taken from train, as close as equal texts "
        "that stay together allow."
    )
    dev_from_train: bool
    seq_len: int = Field(
        description="Tokens that flops are stated for: the latency spec's, else an estimate of "
        "the 95th percentile of dev from its characters."
    )
    predicted_seconds: float = Field(
        description="Rough: FLOPs at 60 GFLOP/s (two CPU cores), four characters a token, six "
        "seconds an export. Half or double is no surprise."
    )
    predicted_stage_seconds: Mapping[str, float] = Field(
        description='The same, apart: "teacher" (its fine-tuning), "importance", "distil", '
        '"depth", "final", "search", "refine" (sub-networks alone), and "finish" for all '
        "after them. A time budget is shared out by these.",
    )
    warnings: tuple[str, ...]


@dataclass(frozen=True)
class Examples:
    """Rows as the training takes them. `labels` as `read_targets` says; None in "unlabelled".

    `lines[i]` is the line of row i in the uploaded file, `pairs` the second sentences.
    """

    texts: list[str]
    pairs: list[str] | None
    labels: npt.NDArray[Any] | None
    lines: list[int]

    def __len__(self) -> int:
        return len(self.texts)

    @property
    def groups(self) -> list[tuple[str, str]]:
        """What rows that stay together have in common: their texts."""
        return list(zip(self.texts, self.pairs or [""] * len(self), strict=True))

    def take(self, rows: Sequence[int]) -> Examples:
        """These rows, in this order."""
        return Examples(
            texts=[self.texts[i] for i in rows],
            pairs=None if self.pairs is None else [self.pairs[i] for i in rows],
            labels=None if self.labels is None else self.labels[np.asarray(rows, np.int64)],
            lines=[self.lines[i] for i in rows],
        )


AnyExamples = Examples | TaggedExamples | AskedExamples


def model_info(checkpoint: Checkpoint, tokenizer: Tokenizer | None = None) -> ModelInfo:
    config = checkpoint.config
    return ModelInfo(
        family=config.family,
        layers=config.layers,
        heads=max(config.heads),
        head_dim=config.head_dim,
        hidden=config.hidden,
        ffn=max(config.ffn),
        vocab_size=config.vocab_size,
        max_positions=config.max_tokens,
        parameters=cost.parameters(config),
        num_labels=config.num_labels,
        labels=checkpoint.labels,
        head_task=checkpoint.head_task,
        legal_widths=legal_widths(config),
        layout=checkpoint.layout,
        encoder=config.to_dict(),
        tokenizer=vocabulary_kind(tokenizer) if tokenizer is not None else None,
    )


def make_plan(
    spec: Spec, model: ModelInfo, dataset: DatasetProfile, profile: DeviceProfile | None = None
) -> Plan:
    """Resolves columns, labels and sub-networks, and predicts their cost.

    `profile`: the device's that latency_on names; None where that is not to be checked.
    InvalidSpec points at the spec's field that model or dataset contradict;
    InvalidDataset names the rows whose labels cannot be used.
    """
    encoder = EncoderConfig.from_dict(model.encoder)
    columns = _columns(spec, dataset)
    values = _label_values(spec, columns.label, dataset)
    fine_tune = _fine_tune(spec, model)
    if spec.task.kind == "regression":
        labels: tuple[str, ...] = ()
        label_names = (columns.label,) if fine_tune or model.labels is None else model.labels
    elif spec.task.kind == "question_answering":
        labels, label_names = (), ANSWER_OUTPUTS
    else:
        labels, label_names = _label_order(
            spec, model, [v.value for v in values], fine_tune=fine_tune
        )
    if spec.task.main_metric.startswith("entity") and not mark_entities(label_names):
        raise InvalidSpec(
            f"the tags ({_listed(label_names)}) do not mark entities as O, B-..., I-...: name the "
            'metric "accuracy", or tags that do',
            pointer="/task/metric",
        )
    _check_slices(spec, dataset)
    check_removable(spec.vocabulary, model.tokenizer)
    _check_lengths(spec, encoder, pair=columns.text_pair is not None)
    full = dataclasses.replace(encoder, num_labels=len(label_names), head=spec.task.head)
    networks = _subnetworks(spec, model, full)
    configs = [network.config(full) for network in networks]
    alone = _refined(spec, networks)
    if spec.engine == "paddleslim":
        check_paddleslim(spec, encoder)
    rows = {split: dataset.splits[split].rows for split in SPLITS if split in dataset.splits}
    dev_from_train = "dev" not in rows
    if dev_from_train:
        counts = {value.value: value.count for value in values}
        dev = sum(
            _dev_quotas([counts.get(label, 0) for label in labels])
            if spec.task.kind == "classification"
            else _dev_quotas([rows["train"]])
        )
        if dev == 0:
            raise InvalidDataset(
                f"there is no dev split, and the {rows['train']} rows of train are too few to "
                "take one from",
                pointer=dataset.splits["train"].file,
            )
        rows |= {"train": rows["train"] - dev, "dev": dev}
        rows = {split: rows[split] for split in SPLITS if split in rows}
    _check_per_layer(spec, rows["train"])
    seq_len = spec.latency.seq_len or _tokens(spec, dataset, columns, percentile_95=True)
    subnetworks = tuple(
        PlannedSubnetwork(
            name=network.name,
            width_mult=network.width_mult,
            depth_mult=network.depth_mult,
            layers=network.layers,
            heads=config.heads,
            ffn=config.ffn,
            parameters=cost.parameters(config),
            flops=cost.flops(config, seq_len),
            predicted_bytes={fmt: file_bytes(fmt, config) for fmt in spec.export.formats},
        )
        for network, config in zip(networks, configs, strict=True)
    )
    windows = _windows(spec, dataset, columns)
    seconds = _predicted_stage_seconds(
        spec,
        full,
        configs,
        [network.config(full) for network in alone],
        {split: math.ceil(count * windows) for split, count in rows.items()},
        tokens=_tokens(spec, dataset, columns, percentile_95=False),
        seq_len=seq_len,
        fine_tune=fine_tune,
    )
    return Plan(
        subnetworks=subnetworks,
        text=columns.text,
        text_pair=columns.text_pair,
        label=columns.label,
        answer_start=columns.answer_start,
        labels=labels,
        label_names=label_names,
        fine_tune=fine_tune,
        rows=rows,
        dev_from_train=dev_from_train,
        seq_len=seq_len,
        # More digits would claim to know more.
        predicted_seconds=float(f"{START_SECONDS + sum(seconds.values()):.2g}"),
        predicted_stage_seconds=seconds,
        warnings=(
            *_warnings(spec, dataset, columns, values, labels, rows, subnetworks),
            *_budget_warnings(spec, seconds),
            *_percentile_warnings(spec),
            *plan_warnings(spec, profile, encoder, subnetworks, seq_len=seq_len),
        ),
    )


def _budget_warnings(spec: Spec, seconds: Mapping[str, float]) -> Iterator[str]:
    if spec.max_minutes is None:
        return
    needed = (START_SECONDS + sum(seconds.values())) / 60
    if needed > spec.max_minutes:
        kept = (seconds["search"] + seconds["finish"]) / 60
        after = "the search and what comes" if seconds["search"] else "what comes"
        yield (
            f"max_minutes is {spec.max_minutes:g}, and the job is predicted to take {needed:.2g}: "
            f"training will stop early ({kept:.2g} are set aside for {after} after it)"
        )


def _percentile_warnings(spec: Spec) -> Iterator[str]:
    constraints, rounds = spec.constraints, spec.latency.rounds
    at = constraints.latency_at
    if constraints.max_latency_ms is None or at is None or constraints.latency_on is not None:
        return
    confidence = constraints.confidence or SHOWN_CONFIDENCE
    needed = fewest_rounds(at.percentile, confidence)
    if rounds < needed:
        yield (
            f"max_latency_ms is of p{at.percentile}, and the slowest of {rounds} timed calls may "
            f"still be below that: with latency.rounds {needed} one of them is beyond it with "
            f"{100 * confidence:g} % confidence"
        )


# --- columns and labels ---------------------------------------------------------------------


@dataclass(frozen=True)
class _TaskColumns:
    text: str
    text_pair: str | None
    label: str
    answer_start: str | None = None


def _columns(spec: Spec, dataset: DatasetProfile) -> _TaskColumns:
    """The spec's columns, the others guessed; all of them stand in the splits that need them."""
    task = spec.task
    if task.kind in SEQUENCE_KINDS:
        columns = sequence_columns(task, dataset)
        refuse_defects(task.kind, columns, dataset)
        return _TaskColumns(columns.text, columns.text_pair, columns.label, columns.answer_start)
    if task.answer_start is not None:
        raise InvalidSpec(f"a {task.kind} task has no answer_start", pointer="/task/answer_start")
    for field, name in (("text", task.text), ("text_pair", task.text_pair), ("label", task.label)):
        if name is not None:
            _require_column(dataset, field, name)
    guess = guess_columns(
        dataset.splits, task.kind, text=task.text, text_pair=task.text_pair, label=task.label
    )
    if guess.text is None:
        raise InvalidSpec(
            f"which column holds the text? {_columns_of(dataset, 'train')}", pointer="/task/text"
        )
    if guess.label is None:
        raise InvalidSpec(
            f"which column holds the label of a {task.kind} task? These could: "
            + (", ".join(label_candidates(dataset.splits, task.kind)) or "none"),
            pointer="/task/label",
        )
    resolved = _TaskColumns(guess.text, guess.text_pair, guess.label)
    if resolved.label in (resolved.text, resolved.text_pair):
        raise InvalidSpec(
            f"{resolved.label!r} is named as text and as label", pointer="/task/label"
        )
    for field, name in (("text", resolved.text), ("text_pair", resolved.text_pair)):
        for found in dataset.splits.values():
            column = found.column(name) if name is not None else None
            if column is not None and column.kind == "list":
                raise InvalidSpec(
                    f"the column {name!r} of {found.file} holds lists, not texts",
                    pointer=f"/task/{field}",
                )
    if resolved.text == resolved.text_pair:
        raise InvalidSpec(
            f"{resolved.text!r} is named as both sentences", pointer="/task/text_pair"
        )
    _require_column(dataset, "text", resolved.text)
    if resolved.text_pair is not None:
        _require_column(dataset, "text_pair", resolved.text_pair)
    _require_column(dataset, "label", resolved.label)
    return resolved


def _require_column(dataset: DatasetProfile, field: str, name: str) -> None:
    for split, found in dataset.splits.items():
        if field == "label" and split not in LABELLED_SPLITS:
            continue
        if found.column(name) is None:
            raise InvalidSpec(
                f"{found.file} has no column {name!r}; {_columns_of(dataset, split)}",
                pointer=f"/task/{field}",
            )


def _check_slices(spec: Spec, dataset: DatasetProfile) -> None:
    """InvalidSpec where a split that the models are compared on lacks one of the columns."""
    compared = ("dev" if "dev" in dataset.splits else "train", "test")
    for i, name in enumerate(spec.report.slices):
        for split in compared:
            found = dataset.splits.get(split)
            column = found.column(name) if found is not None else None
            if found is not None and column is None:
                raise InvalidSpec(
                    f"{found.file} has no column {name!r} to group rows by; "
                    f"{_columns_of(dataset, split)}",
                    pointer=f"/report/slices/{i}",
                )
            if found is not None and column is not None and column.kind == "list":
                raise InvalidSpec(
                    f"the column {name!r} of {found.file} holds lists: name one whose values "
                    "group rows",
                    pointer=f"/report/slices/{i}",
                )


def _columns_of(dataset: DatasetProfile, split: str) -> str:
    names = [column.name for column in dataset.splits[split].columns]
    more = ", ..." if len(names) > 20 else ""
    return f"its columns are {', '.join(names[:20])}{more}"


def _label_values(spec: Spec, name: str, dataset: DatasetProfile) -> tuple[DistinctValue, ...]:
    """Train's labels, none of a regression. InvalidDataset names rows that have no usable one."""
    if spec.task.kind in ("classification", "regression") and any(
        column.kind == "list" for column in labelled_columns(name, dataset).values()
    ):
        raise InvalidSpec(
            f"the column {name!r} holds lists: a {spec.task.kind} task reads none, but multi_label",
            pointer="/task/label",
        )
    match spec.task.kind:
        case "multi_label":
            return multi_label_values(spec.task, name, dataset)
        case "regression":
            if spec.task.labels is not None:
                raise InvalidSpec("a regression has no labels to list", pointer="/task/labels")
            check_scores(name, dataset)
            return ()
        case "question_answering":
            if spec.task.labels is not None:
                raise InvalidSpec("answers are no labels to list", pointer="/task/labels")
            return ()
        case "classification" | "token_classification":
            return _class_values(name, dataset)


def _class_values(name: str, dataset: DatasetProfile) -> tuple[DistinctValue, ...]:
    columns = labelled_columns(name, dataset)
    refuse_empty(name, columns)
    (train, column), *_ = columns.items()
    if column.distinct < 2:
        raise InvalidDataset(
            f"{train}: the column {name!r} has one class only; a classifier needs two",
            pointer=train,
        )
    found = {}
    for file, each in columns.items():
        if each.values is None:
            raise InvalidSpec(
                f"the column {name!r} of {file} holds no labels: it has {each.distinct} "
                f"distinct values in {dataset.splits['train'].rows} rows; a label has at most "
                f"{MAX_LABELS}, short ones, that repeat"
                if file == train
                else f"the column {name!r} of {file} holds no labels: it has {each.distinct} "
                "distinct values, or long ones",
                pointer="/task/label",
            )
        found[file] = each.values
    refuse_unseen(found)
    return found[train]


def _fine_tune(spec: Spec, model: ModelInfo) -> bool:
    if spec.teacher.when == "never" and model.num_labels is None:
        raise InvalidSpec(
            'the model has no classifier head: let the job fine-tune one (when: "auto")',
            pointer="/teacher/when",
        )
    if spec.teacher.when == "always" or model.num_labels is None:
        return True
    one_output = model.num_labels == 1
    made_for = model.head_task or ("regression" if one_output else None)
    outputs_wanted = {"regression": 1, "question_answering": len(ANSWER_OUTPUTS)}
    if (
        made_for not in (None, spec.task.kind)
        or model.encoder.get("head", "sequence") != spec.task.head
        or outputs_wanted.get(spec.task.kind, model.num_labels) != model.num_labels
    ):
        outputs = "one output" if one_output else f"{model.num_labels} outputs"
        raise InvalidSpec(
            f"the model's head has {outputs}{f' for {made_for}' if made_for else ''}, and the task "
            f"is {spec.task.kind}: name the task that the model was made for, or let the job "
            'fine-tune a new head (teacher.when: "always")',
            pointer="/task/kind",
        )
    return False


def _label_order(
    spec: Spec, model: ModelInfo, found: Sequence[str], *, fine_tune: bool
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The dataset's labels in the order of the classifier's outputs, and the outputs' names."""
    outputs = None if fine_tune else model.num_labels
    names = None if fine_tune else model.labels
    absent = sorted(set(spec.task.labels or ()) - set(found))
    if fine_tune and absent:
        raise InvalidSpec(
            f"no row of train has the label {_listed(absent)}: a new head cannot learn it",
            pointer="/task/labels",
        )
    if spec.task.labels is not None:
        labels = _given_order(spec.task.labels, found, outputs)
        return labels, names or labels
    if outputs is None:
        return _sorted_labels(found), _sorted_labels(found)
    if names is not None and set(found) <= set(names):
        return names, names
    numbers = {label: whole_number(label) for label in found}
    by_number = {number: label for label, number in numbers.items() if number is not None}
    if len(by_number) == len(found) and all(0 <= number < outputs for number in by_number):
        labels = tuple(by_number.get(i, str(i)) for i in range(outputs))
        return labels, names or labels
    called = f" ({_listed(names)})" if names is not None else ""
    if len(found) > outputs:
        raise InvalidSpec(
            f"the dataset has {len(found)} labels ({_listed(_sorted_labels(found))}) and the model "
            f'{outputs} outputs{called}: fine-tune a new head (when: "always") or drop rows',
            pointer="/task/labels",
        )
    raise InvalidSpec(
        f"which output means which label? The model has {outputs} outputs{called}; list the "
        f"dataset's labels ({_listed(_sorted_labels(found))}) in the order of the outputs",
        pointer="/task/labels",
    )


def _given_order(
    given: tuple[str, ...], found: Sequence[str], outputs: int | None
) -> tuple[str, ...]:
    pointer = "/task/labels"
    if len(set(given)) != len(given):
        raise InvalidSpec("a label is listed twice", pointer=pointer)
    missing = [label for label in _sorted_labels(found) if label not in given]
    if missing:
        raise InvalidSpec(
            f"the dataset has labels that are not listed: {_listed(missing)}", pointer=pointer
        )
    if outputs is not None and len(given) != outputs:
        raise InvalidSpec(
            f"{len(given)} labels are listed, and the model has {outputs} outputs", pointer=pointer
        )
    return given


def _sorted_labels(labels: Sequence[str]) -> tuple[str, ...]:
    """By number where all are whole numbers ("10" after "9"), else by code point."""
    numbers = {label: whole_number(label) for label in labels}
    if all(number is not None for number in numbers.values()):
        return tuple(sorted(labels, key=lambda label: (numbers[label] or 0, label)))
    return tuple(sorted(labels))


def _listed(labels: Sequence[str]) -> str:
    shown = [label if len(label) <= 40 else f"{label[:37]}..." for label in labels[:8]]
    return ", ".join(shown) + (", ..." if len(labels) > 8 else "")


# --- sub-networks and cost ------------------------------------------------------------------


def _check_lengths(spec: Spec, encoder: EncoderConfig, *, pair: bool) -> None:
    lengths = (
        ("/task/max_seq_len", spec.task.max_seq_len),
        ("/latency/seq_len", spec.latency.seq_len or 0),
        *((f"/latency/seq_lens/{i}", length) for i, length in enumerate(spec.latency.seq_lens)),
    )
    for pointer, length in lengths:
        if length > encoder.max_tokens:
            raise InvalidSpec(
                f"{length} tokens are more than the model's {encoder.max_tokens} positions",
                pointer=pointer,
            )
    if spec.constraints.latency_at is not None and spec.constraints.latency_on is None:
        check_latency_at(spec.constraints.latency_at, _measured_settings(spec.latency))
    if spec.task.kind == "question_answering":
        room = longest_overlap(spec.task.max_seq_len)
        if spec.task.overlap > room:
            raise InvalidSpec(
                f"windows of {spec.task.max_seq_len} tokens can share at most {max(0, room)}, "
                f"not {spec.task.overlap}",
                pointer="/task/max_seq_len" if room < 0 else "/task/doc_stride",
            )


def _measured_settings(latency: LatencySpec) -> dict[str, list[int]]:
    """What a constraint may name: lengths alone that the spec does, not what dev will come to."""
    return {
        "batch_size": [latency.batch_size, *latency.batch_sizes],
        "seq_len": [*filter(None, (latency.seq_len,)), *latency.seq_lens],
        "threads": [latency.threads, *latency.thread_counts],
    }


def file_bytes(fmt: Format, config: EncoderConfig) -> int:
    """What a file of the format will have, about."""
    return _PARAMETER_BYTES.get(fmt, 4) * cost.parameters(config) + _FIXED_BYTES[fmt]


def held_out_rows(spec: Spec, train: int) -> int:
    """How many rows of train, where it has so many, only score the search's candidates."""
    asked = spec.supernet.per_layer
    return 0 if asked is None else min(asked.holdout_rows, train // HOLDOUT_SHARE)


def _times_samples(spec: Spec) -> bool:
    """Whether a search measures sub-networks for a latency model."""
    return spec.constraints.bounds_latency and spec.constraints.latency_on is None


def _check_per_layer(spec: Spec, train: int) -> None:
    pointer = "/supernet/per_layer"
    constraints = spec.constraints
    if spec.supernet.per_layer is None:
        return
    if len(spec.supernet.width_mults) < 2:
        raise InvalidSpec(
            "of one width alone every layer has the same: name at least two width_mults, or leave "
            "per_layer out",
            pointer=pointer,
        )
    budget = (constraints.max_latency_ms, constraints.min_speedup, constraints.max_size_mb)
    if all(each is None for each in budget):
        raise InvalidSpec(
            "widths for each layer are searched for under a budget: set "
            "constraints.max_latency_ms, min_speedup or max_size_mb, or leave per_layer out",
            pointer=pointer,
        )
    count = spec.supernet.per_layer.latency_samples
    fitted = count - count // HELD_OUT_SHARE
    if _times_samples(spec) and fitted <= len(spec.supernet.width_mults):
        raise InvalidSpec(
            f"three quarters of the {count} measured sub-networks are too few to fit a latency "
            f"model of {len(spec.supernet.width_mults)} widths: name more",
            pointer=f"{pointer}/latency_samples",
        )
    if held_out_rows(spec, train) < FEW_HOLDOUT_ROWS:
        raise InvalidSpec(
            f"a fifth of the {train} rows of train are too few to score candidates on (at least "
            f"{FEW_HOLDOUT_ROWS}): leave per_layer out",
            pointer=pointer,
        )


def _subnetworks(spec: Spec, model: ModelInfo, encoder: EncoderConfig) -> list[Subnetwork]:
    """Every width at every depth, the largest first and the smallest last."""
    for i, width in enumerate(spec.supernet.width_mults):
        try:
            encoder.narrowed(width)
        except InvalidSpec as error:
            legal = ", ".join(str(each) for each in model.legal_widths)
            raise InvalidSpec(
                f"{error.message}; this model can have the widths {legal}",
                pointer=f"/supernet/width_mults/{i}",
            ) from error
    for i, depth in enumerate(spec.supernet.depth_mults):
        try:
            kept_layers(encoder.layers, depth)
        except InvalidSpec as error:
            counts = range(encoder.layers, 0, -1)
            legal = ", ".join(str(Fraction(count, encoder.layers)) for count in counts)
            raise InvalidSpec(
                f"{error.message}; this model can have the depths {legal}",
                pointer=f"/supernet/depth_mults/{i}",
            ) from error
    return [  # whatever the spec's order
        subnetwork_of(encoder, width, depth)
        for width in sorted(spec.supernet.width_mults, reverse=True)
        for depth in sorted(spec.supernet.depth_mults, reverse=True)
    ]


def _refined(spec: Spec, networks: Sequence[Subnetwork]) -> list[Subnetwork]:
    """Those that are to be distilled alone, without what a search will find."""
    by_name = {network.name: network for network in networks}
    for i, name in enumerate(spec.refinement.subnetworks):
        pointer = f"/refinement/subnetworks/{i}"
        if name == FINALISTS:
            if spec.supernet.per_layer is None:
                raise InvalidSpec(
                    "finalists are what a search for widths of each layer finds, and the spec "
                    "asks for none: add supernet.per_layer, or leave them out",
                    pointer=pointer,
                )
        elif name not in by_name:
            known = ", ".join(by_name)
            if spec.supernet.per_layer is not None:
                known += f", and {FINALISTS} for all that the search finds"
            raise InvalidSpec(
                f"{name!r} is no sub-network of this job: there are {known}", pointer=pointer
            )
    return [by_name[name] for name in spec.refinement.subnetworks if name != FINALISTS]


def _tokens(
    spec: Spec, dataset: DatasetProfile, columns: _TaskColumns, *, percentile_95: bool
) -> int:
    """Tokens of a row, or of a window of it."""
    tokens = _row_tokens(dataset, columns, percentile_95=percentile_95)
    return max(3, min(spec.task.max_seq_len, math.ceil(tokens)))


def _windows(spec: Spec, dataset: DatasetProfile, columns: _TaskColumns) -> float:
    """How many windows a question's context is read in, on average."""
    if spec.task.kind != "question_answering":
        return 1.0
    beyond = _row_tokens(dataset, columns, percentile_95=False) - spec.task.max_seq_len
    return 1 + max(0.0, beyond) / (spec.task.max_seq_len - spec.task.overlap)


def _row_tokens(dataset: DatasetProfile, columns: _TaskColumns, *, percentile_95: bool) -> float:
    """Estimated from characters: the tokenizer is not at hand in a dry run."""
    split = dataset.splits["dev" if percentile_95 and "dev" in dataset.splits else "train"]
    tokens = 2.0  # [CLS] and [SEP]
    for name in (columns.text, columns.text_pair):
        column = split.column(name) if name is not None else None
        if column is not None:
            characters = column.p95_characters if percentile_95 else column.mean_characters
            tokens += characters / CHARACTERS_PER_TOKEN
    if columns.text_pair is not None:
        tokens += 1
    return tokens


def _predicted_stage_seconds(
    spec: Spec,
    full: EncoderConfig,
    subnetworks: Sequence[EncoderConfig],
    refined: Sequence[EncoderConfig],
    rows: Mapping[str, int],
    *,
    tokens: int,
    seq_len: int,
    fine_tune: bool,
) -> dict[str, float]:
    teacher = cost.flops(full, tokens)
    all_students = [cost.flops(config, tokens) for config in subnetworks]
    students = sum(all_students)
    widths = [
        cost.flops(full.narrowed(width), tokens)
        for width in sorted(spec.supernet.width_mults, reverse=True)
    ]
    has_depth, per_layer = spec.supernet.has_depth, spec.supernet.per_layer is not None
    deepened = _trained_rows(spec.depth, rows["train"] + rows.get("unlabelled", 0)) * has_depth
    sampled: float = students
    if has_depth or per_layer:
        sampled = _of_a_step(all_students, per_layer=per_layer)
    narrowed = _of_a_step(widths, per_layer=True) if per_layer else sum(widths)
    fine_tuned = _trained_rows(spec.teacher, rows["train"]) if fine_tune else 0
    distilled = _trained_rows(spec.distillation, rows["train"] + rows.get("unlabelled", 0))
    tuned = _trained_rows(spec.final, rows["train"]) if spec.final.when == "always" else 0
    served = set(spec.export.formats) & set(SERVED_FORMATS)
    rounded = served & set(ROUNDED_FORMATS)
    baselines = {*map(fp32_format, served), *spec.baselines}
    teacher_rounded = baselines & set(ROUNDED_FORMATS)
    asked = spec.supernet.per_layer
    finalists = 0 if asked is None else len(asked.budget_shares) * asked.finalists
    # Which are judged, written and measured as the named ones, and taken to be of their mean size.
    judged = 1 + finalists / len(subnetworks)
    timed = sum(  # a round in each setting, each timed call after an untimed one
        2
        * setting.batch_size
        * (
            len(baselines) * cost.flops(full, setting.seq_len)
            + len(served) * judged * _mean_flops(subnetworks, setting.seq_len) * len(subnetworks)
        )
        for setting in spec.latency.settings(seq_len)
    )
    flops: dict[str, float] = {
        "teacher": fine_tuned * BACKWARD_AND_FORWARD * teacher,
        "importance": min(spec.importance.rows, rows["train"]) * BACKWARD_AND_FORWARD * teacher,
        "distil": distilled * (teacher + BACKWARD_AND_FORWARD * narrowed),
        # Teachers: at most, where the four sub-networks of a step are of four widths.
        "depth": deepened
        * (_of_a_step(widths, per_layer=per_layer) + BACKWARD_AND_FORWARD * sampled),
        "final": tuned * BACKWARD_AND_FORWARD * sampled,
        "finish": (rows["dev"] + rows.get("test", 0)) * (teacher + judged * students)
        # The least: once, without parts back in fp32.
        + rows["dev"] * (len(rounded) * judged * students + len(teacher_rounded) * teacher)
        + spec.latency.rounds * timed,
    }
    # What rounds answers dev in one more process a file.
    exports = (len(subnetworks) + finalists) * (len(spec.export.formats) + len(rounded))
    exports += len(baselines) + len(teacher_rounded)
    learnt = _trained_rows(spec.refinement, rows["train"] + rows.get("unlabelled", 0))
    alone = [float(cost.flops(config, tokens)) for config in refined]
    flops["search"] = 0.0
    samples = 0
    if asked is not None:
        mean = students / len(subnetworks)
        # The named ones begin the first generation, however many they are.
        scored = max(asked.population, len(subnetworks)) + asked.population * asked.generations
        scored *= len(asked.budget_shares)
        flops["search"] += scored * held_out_rows(spec, rows["train"]) * mean
        if _times_samples(spec):
            at = spec.constraints.latency_at or LatencyAt()
            length = at.seq_len or seq_len
            whole = 1 + (len(served) if len(served) > 1 else 0)  # and in each format, to choose one
            once = asked.latency_samples * _mean_flops(subnetworks, length)
            once += whole * cost.flops(full, length)
            calls = 2 * spec.latency.rounds * (at.batch_size or spec.latency.batch_size)
            flops["search"] += calls * once
            samples = asked.latency_samples * (2 if rounded else 1) + len(served)
        if FINALISTS in spec.refinement.subnetworks:
            alone += finalists * [mean]
    flops["refine"] = learnt * sum(teacher + BACKWARD_AND_FORWARD * each for each in alone)
    seconds = {stage: count / FLOPS_PER_SECOND for stage, count in flops.items()}
    seconds["search"] += samples * SECONDS_PER_EXPORT
    seconds["finish"] += exports * SECONDS_PER_EXPORT
    return seconds


def deadlines(spec: Spec, plan: Plan) -> dict[str, float | None]:
    """When each training must stop, in seconds of the job; None without a time budget.

    What the stages between and after the trainings are predicted to take is set aside; of the
    rest, each training may take the share that it is predicted to need.
    """
    trainings = ("teacher", "distil", "depth", "final", "refine")
    if spec.max_minutes is None:
        return dict.fromkeys(trainings)
    predicted = plan.predicted_stage_seconds
    left = max(0.0, 60 * spec.max_minutes - predicted["search"] - predicted["finish"])
    distilled = predicted["teacher"] + predicted["importance"] + predicted["distil"]
    deepened = distilled + predicted["depth"]
    tuned = deepened + predicted["final"]
    share = left / (tuned + predicted["refine"])
    return {
        "teacher": predicted["teacher"] * share,
        "distil": distilled * share,
        "depth": deepened * share,
        "final": tuned * share,
        "refine": max(0.0, 60 * spec.max_minutes - predicted["finish"]),
    }


def _mean_flops(configs: Sequence[EncoderConfig], tokens: int) -> float:
    return sum(cost.flops(config, tokens) for config in configs) / len(configs)


def _of_a_step(flops: Sequence[int], *, per_layer: bool) -> float:
    """What the sub-networks cost that the sandwich rule takes: the largest first, the smallest
    last, and of those between as many as it draws, which cost their mean.

    `per_layer`: one of the drawn has widths of its own for each layer, or both, where there is
    nothing between.
    """
    if len(flops) <= RANDOM + 2 and not per_layer:
        return sum(flops)
    between = flops[1:-1] or flops
    return flops[0] + flops[-1] + RANDOM * sum(between) / len(between)


def _trained_rows(training: TrainingSpec, rows: int) -> int:
    steps = math.ceil(rows / training.batch_size * training.epochs)
    if training.max_steps is not None:
        steps = min(steps, training.max_steps)
    return steps * min(training.batch_size, rows)


def _warnings(
    spec: Spec,
    dataset: DatasetProfile,
    columns: _TaskColumns,
    values: Sequence[DistinctValue],
    labels: Sequence[str],
    rows: Mapping[str, int],
    subnetworks: Sequence[PlannedSubnetwork],
) -> Iterator[str]:
    task = Columns(columns.text, columns.text_pair, columns.label)
    yield from column_warnings(dataset.splits, task, spec.task.kind)
    if (dataset.text, dataset.text_pair) == (task.text, task.text_pair):
        yield from shared_warnings(dataset.splits, dataset.shared_rows)
    if "dev" not in dataset.splits:
        yield (
            f"there is no dev split: about {rows['dev']} rows of train become dev, "
            f"{'by label and ' if spec.task.kind == 'classification' else ''}with equal texts "
            "together"
        )
    if rows["dev"] < FEW_DEV_ROWS:
        yield (
            f"dev has {rows['dev']} rows: a single one is {100 / rows['dev']:.1f} points of "
            "accuracy"
            if spec.task.main_metric == "accuracy"
            else f"dev has {rows['dev']} rows: few to tell points of "
            f"{METRIC_NAMES[spec.task.main_metric]} from noise"
        )
    single = [value.value for value in values if value.count == 1]
    if single:
        yield f"labels with a single row in train: {_listed(single)}"
    found = {value.value for value in values}
    absent = [label for label in labels if label not in found]
    if absent:
        yield f"no row of train has the label {_listed(absent)}"
    if spec.importance.split == "dev":
        yield "importance is computed on dev, which also judges the sub-networks: it flatters them"
    if spec.device != "cpu":
        yield "the predicted time is that of two CPU cores"
        yield "latency and speed-up are measured on the worker's CPU, not on its GPU"
    removes = spec.vocabulary.remove_unused
    if removes:
        yield (
            "parameters and bytes are predicted with the whole vocabulary: the tokens that are to "
            "be removed are counted when the job starts"
        )
    limit = spec.constraints.max_size_mb
    sizes = [
        size
        for subnetwork in subnetworks
        for fmt, size in subnetwork.predicted_bytes.items()
        if fmt != "safetensors"
    ]
    if limit is not None and min(sizes) > limit * 1e6 and not removes:
        yield (
            f"the smallest file will have about {min(sizes) / 1e6:.1f} MB: nothing will hold "
            f"max_size_mb {limit:g}, and the job will name the nearest"
        )


# --- rows -----------------------------------------------------------------------------------


def resolve_rows(
    spec: Spec, plan: Plan, splits: Mapping[str, Table], seed: int
) -> dict[str, AnyExamples]:
    """The plan's splits as texts and targets; a missing dev is taken from train.

    Columns and labels are the plan's. The same seed and tables give the same dev.
    InvalidDataset where a row has no label of the plan.
    """
    examples = {split: _examples(spec, plan, split, table) for split, table in splits.items()}
    if plan.dev_from_train:
        rest, dev = _dev_rows(
            examples["train"], seed, stratified=spec.task.kind == "classification"
        )
        train = examples.pop("train")
        examples |= {"train": train.take(rest), "dev": train.take(dev)}
    return {split: examples[split] for split in SPLITS if split in examples}


def _examples(spec: Spec, plan: Plan, split: str, table: Table) -> AnyExamples:
    if spec.task.kind in SEQUENCE_KINDS:
        columns = SequenceColumns(plan.text, plan.text_pair, plan.label, plan.answer_start)
        numbers = {label: i for i, label in enumerate(plan.labels)}
        return read_sequences(columns, table, split, numbers=numbers)
    pair = plan.text_pair
    labels = None
    if split in LABELLED_SPLITS:
        cells = [row[plan.label] for row in table.rows]
        labels = read_targets(spec.task, cells, plan.labels, file=table.file, lines=table.lines)
    return Examples(
        texts=[plain_text(row[plan.text]) for row in table.rows],
        pairs=None if pair is None else [plain_text(row[pair]) for row in table.rows],
        labels=labels,
        lines=list(table.lines),
    )


def _dev_quotas(counts: Sequence[int]) -> list[int]:
    """Rows of dev for each label: a tenth of each, the rest to the largest remainders.

    A label of a single row stays in train, where a model can learn it.
    """
    quotas = [count // DEV_SHARE for count in counts]
    total = max(1, round(sum(counts) / DEV_SHARE))
    by_remainder = sorted(
        (i for i, count in enumerate(counts) if count > 1),
        key=lambda i: (-(counts[i] % DEV_SHARE), -counts[i], i),
    )
    for i in by_remainder[: max(0, total - sum(quotas))]:
        quotas[i] += 1
    return quotas


def _dev_rows(train: AnyExamples, seed: int, *, stratified: bool) -> tuple[list[int], list[int]]:
    """Row numbers that stay in train, and those that become dev, both in their order.

    Stratified by label where a row has one of a few; rows of equal texts stay together,
    and those that contradict each other (equal texts, several labels) stay in train.
    """
    labels = train.labels if isinstance(train, Examples) else None
    stratum = labels if stratified and labels is not None else np.zeros(len(train), np.int64)
    groups: dict[Any, list[int]] = {}
    for i, group in enumerate(train.groups):
        groups.setdefault(group, []).append(i)
    strata: dict[int, list[list[int]]] = {}
    for members in groups.values():
        if labels is None or len({labels[i].tobytes() for i in members}) == 1:
            strata.setdefault(int(stratum[members[0]]), []).append(members)
    counts = np.bincount(stratum)
    rng = np.random.default_rng(seed)
    dev: list[int] = []
    for label, quota in enumerate(_dev_quotas(counts.tolist())):
        candidates = strata.get(label, [])
        left = quota
        for j in rng.permutation(len(candidates)):
            if len(candidates[j]) <= left:
                dev.extend(candidates[j])
                left -= len(candidates[j])
            if left == 0:
                break
    if not dev:
        raise InvalidDataset("there is no dev split, and train has too few texts to take one from")
    chosen = set(dev)
    return [i for i in range(len(train)) if i not in chosen], sorted(dev)
