"""The job specification: what a user may ask for. Frozen, validated once, paddle-free."""

from __future__ import annotations

import re
from collections.abc import Mapping
from fractions import Fraction
from types import MappingProxyType
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    ValidationInfo,
    WithJsonSchema,
    field_validator,
    model_validator,
)

_FRACTION = re.compile(r"\s*([0-9]{1,4})\s*/\s*([0-9]{1,4})\s*")
_DECIMAL = re.compile(r"\s*([0-9]{1,4}|[0-9]{0,4}\.[0-9]{1,9})\s*")


def parse_width_mult(value: Any) -> Fraction:
    """An exact fraction from "3/4", "0.5", 0.5 or 1; never evaluated. ValueError else."""
    return _parse_mult(value, "width")


def parse_depth_mult(value: Any) -> Fraction:
    """The same of a depth."""
    return _parse_mult(value, "depth")


def _parse_mult(value: Any, what: str) -> Fraction:
    if isinstance(value, Fraction):
        mult = value
    elif isinstance(value, (int, float)) and not isinstance(value, bool):
        # repr gives the decimal that a reader wrote: 0.1 is 1/10, not its binary neighbour.
        if not 0 < value <= 1:
            raise ValueError(f"a {what} must be greater than 0 and at most 1")
        mult = Fraction(repr(value))
    elif isinstance(value, str) and (match := _FRACTION.fullmatch(value)):
        if int(match[2]) == 0:
            raise ValueError(f"a {what} cannot have the denominator 0")
        mult = Fraction(int(match[1]), int(match[2]))
    elif isinstance(value, str) and (match := _DECIMAL.fullmatch(value)):
        mult = Fraction(match[1])
    else:
        raise ValueError(f'write a {what} as a fraction or decimal, for example "3/4" or 0.5')
    if not 0 < mult <= 1:
        raise ValueError(f"a {what} must be greater than 0 and at most 1")
    return mult


WidthMult = Annotated[
    Fraction,
    BeforeValidator(parse_width_mult),
    PlainSerializer(str, return_type=str),
    WithJsonSchema(
        {"anyOf": [{"type": "string"}, {"type": "number"}], "examples": ["3/4", 0.5, 1]}
    ),
]
DepthMult = Annotated[
    Fraction,
    BeforeValidator(parse_depth_mult),
    PlainSerializer(str, return_type=str),
    WithJsonSchema(
        {"anyOf": [{"type": "string"}, {"type": "number"}], "examples": ["2/3", 0.5, 1]}
    ),
]


def _unicode(value: str) -> str:
    """JSON can spell half a surrogate pair, which no file and no answer can hold."""
    try:
        value.encode()
    except UnicodeEncodeError:
        raise ValueError("this holds half a surrogate pair: not Unicode text") from None
    return value


Text = Annotated[str, AfterValidator(_unicode)]
Format = Literal[
    "safetensors",
    "paddle",
    "onnx",
    "onnx-int8-dynamic",
    "onnx-int8-static",
    "onnx-fp16",
    "paddle-bf16",
]
Head = Literal["sequence", "token"]  # classifies the pooled first token, or every token
INT8_FORMATS: tuple[Format, ...] = ("onnx-int8-dynamic", "onnx-int8-static")
HALF_FORMATS: Mapping[Format, str] = MappingProxyType(  # what they compute in
    {"onnx-fp16": "fp16", "paddle-bf16": "bf16"}
)
ROUNDED_FORMATS: tuple[Format, ...] = (*INT8_FORMATS, *HALF_FORMATS)  # judged by their own answers
SERVED_FORMATS: tuple[Format, ...] = ("paddle", "onnx", *ROUNDED_FORMATS)  # a runtime serves them
Percentile = Literal[50, 95, 99]  # of latency
CONFIDENCES = (0.9, 0.95, 0.99)  # of the intervals that a report keeps


class Frozen(BaseModel):
    """Base of every model of the spec and the report: unknown fields are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())


class _Asked(Frozen):
    """Base of the spec's models: infinity, which JSON cannot say, is no number to ask for."""

    model_config = ConfigDict(allow_inf_nan=False)


class TaskKind(NamedTuple):
    """`head`: what the classifier reads. `metrics`: what is reported, the default main one first.

    Every metric is better when larger and lies in [-1, 1]; a point is a hundredth of it.
    """

    head: Head
    metrics: tuple[str, ...]


TASK_KINDS: Mapping[str, TaskKind] = {
    "classification": TaskKind("sequence", ("accuracy", "f1", "matthews")),
    "multi_label": TaskKind("sequence", ("micro_f1", "macro_f1", "exact_match")),
    "regression": TaskKind("sequence", ("pearson", "spearman")),
    "token_classification": TaskKind(
        "token", ("entity_f1", "entity_precision", "entity_recall", "accuracy")
    ),
    "question_answering": TaskKind("token", ("f1", "exact_match")),
}


class TaskSpec(_Asked):
    """What the model predicts, and which columns hold it. Columns not named are guessed."""

    kind: Literal[
        "classification", "multi_label", "regression", "token_classification", "question_answering"
    ] = "classification"
    metric: Text | None = Field(
        None,
        description="The main metric, which the accuracy drop is measured in; by default the "
        "first of the task's.",
    )
    text: Text | None = Field(
        None, description="Column of the (first) sentence, the list of words or the question."
    )
    text_pair: Text | None = Field(
        None, description="Column of the second sentence, for pairs, or of the context."
    )
    label: Text | None = Field(
        None,
        description="Column of the label, the list of tags or the answers' texts. Fields of an "
        'object are columns: "answers.text".',
    )
    labels: tuple[Text, ...] | None = Field(
        None,
        description="Label values in the order of the classifier's outputs. Needed where the "
        "dataset's labels are neither the model's label names nor their numbers.",
    )
    separator: Text = Field(
        ",",
        min_length=1,
        description="Between the labels of one row, where a multi-label column holds texts.",
    )
    answer_start: Text | None = Field(
        None, description="Column of the character of the context that each answer starts at."
    )
    max_seq_len: int = Field(
        128,
        ge=8,
        le=512,
        description="Tokens; longer rows are cut, longer contexts read in windows.",
    )
    doc_stride: int | None = Field(
        None,
        ge=0,
        le=512,
        description="Tokens of a context that neighbouring windows share; by default a quarter of "
        "max_seq_len.",
    )
    max_answer_length: int = Field(30, ge=1, le=512, description="Tokens of an answer.")

    @property
    def overlap(self) -> int:
        return self.max_seq_len // 4 if self.doc_stride is None else self.doc_stride

    @property
    def main_metric(self) -> str:
        return self.metric or TASK_KINDS[self.kind].metrics[0]

    @property
    def head(self) -> Head:
        return TASK_KINDS[self.kind].head

    @field_validator("metric")
    @classmethod
    def _known_metric(cls, value: str | None, info: ValidationInfo) -> str | None:
        kind = info.data.get("kind")  # absent where it was refused itself
        if value is not None and kind is not None and value not in TASK_KINDS[kind].metrics:
            raise ValueError(f"a {kind} task has the metrics {', '.join(TASK_KINDS[kind].metrics)}")
        return value


class TrainingSpec(_Asked):
    """What every training is told."""

    epochs: float = Field(3.0, gt=0, le=100)
    max_steps: int | None = Field(None, ge=1)
    batch_size: int = Field(32, ge=1, le=1024)
    learning_rate: float = Field(1e-4, gt=0, lt=1)
    warmup_fraction: float = Field(0.1, ge=0, lt=1)
    weight_decay: float = Field(0.01, ge=0, lt=1)
    max_grad_norm: float = Field(1.0, gt=0)
    patience: int | None = Field(
        None,
        ge=1,
        description="Evaluations without gain after which the training stops; it is judged by the "
        "loss on a seeded tenth of train (1,024 rows at most), which is then not trained on, and "
        "the best weights are kept. null: trains to its end on all rows.",
    )
    evaluate_every: int | None = Field(
        None, ge=1, description="Steps between evaluations for patience; null: an epoch."
    )
    micro_batch: Annotated[int, Field(ge=1)] | Literal["auto"] | None = Field(
        "auto",
        description="Rows computed at once; gradients are summed to the whole batch's, within "
        'rounding. "auto": the whole batch, halved each time the memory is too small. null: the '
        "whole batch, and an error where it does not fit. Of several processes each counts its "
        "own share, and nothing is halved.",
    )


class FineTuneSpec(TrainingSpec):
    """Training of the teacher on the dataset's labels, before compression.

    `when`: "auto" fine-tunes only where the model has no classifier head; "always"
    starts from the uploaded encoder and trains a new head; "never" refuses a headless model.
    """

    when: Literal["auto", "always", "never"] = "auto"


class ImportanceSpec(_Asked):
    """Rows on which head and neuron importance are computed (DynaBERT, section 2.1)."""

    split: Literal["train", "dev"] = "train"
    rows: int = Field(1024, ge=1)
    batch_size: int = Field(32, ge=1, le=1024)


class PerLayerSpec(_Asked):
    """A width for each layer: some such sub-networks are searched for, at the depths of the spec.

    The budget is the constraints' (max_latency_ms, min_speedup, max_size_mb): in it, those that
    are most accurate on rows held out of train are looked for, by evolution. The supernet then
    also learns random widths for each layer. Latency is predicted in the fastest served format of
    the export; accuracy is scored in fp32.
    """

    holdout_rows: int = Field(
        512,
        ge=8,
        le=100_000,
        description="Drawn from train, seeded, a fifth of it at most. Nothing is trained on them.",
    )
    latency_samples: int = Field(
        24,
        ge=4,
        le=200,
        description="Sub-networks that are measured for the latency model; a quarter of them are "
        "not fitted and say how wrong it is. The others must be more than there are widths.",
    )
    population: int = Field(
        32, ge=4, le=1000, description="Candidates that a generation scores, at most."
    )
    generations: int = Field(8, ge=0, le=1000, description="After the first.")
    finalists: int = Field(
        3,
        ge=1,
        le=16,
        description="The best of each budget: exported, measured and judged on dev as any other.",
    )
    budget_shares: tuple[Annotated[float, Field(gt=0, le=1)], ...] = Field(
        (1.0,),
        min_length=1,
        max_length=8,
        description="Of the latency and the size that the constraints allow: each is a budget, "
        "searched for by itself. Smaller ones serve a finished job that is asked again under "
        "tighter constraints.",
    )

    @field_validator("budget_shares")
    @classmethod
    def _distinct(cls, value: tuple[float, ...]) -> tuple[float, ...]:
        if len(set(value)) != len(value):
            raise ValueError("each share may be named once")
        return value


class SupernetSpec(_Asked):
    width_mults: tuple[WidthMult, ...] = Field(
        (Fraction(1), Fraction(3, 4), Fraction(1, 2), Fraction(1, 4)),
        min_length=1,
        max_length=16,
        description="Each must leave whole heads and whole neurons in every layer.",
    )
    depth_mults: tuple[DepthMult, ...] = Field(
        (Fraction(1),),
        min_length=1,
        max_length=16,
        description="Each must leave whole layers. Every width is had at every depth; name 1 to "
        "keep the full depth among them.",
    )
    per_layer: PerLayerSpec | None = Field(
        None, description="Also widths of their own for each layer; null: none."
    )

    @property
    def has_depth(self) -> bool:
        """Whether there is anything for the depth stage to train."""
        return self.depth_mults != (Fraction(1),)

    @field_validator("width_mults", "depth_mults")
    @classmethod
    def _distinct(cls, value: tuple[Fraction, ...], info: ValidationInfo) -> tuple[Fraction, ...]:
        if len(set(value)) != len(value):
            kind = "width" if info.field_name == "width_mults" else "depth"
            raise ValueError(f"each {kind} may be named once")
        return value


class ImitationSpec(TrainingSpec):
    """A training on the answers of another network, with DynaBERT's loss (equation 3): the sum of
    both parts, each weighted by its `lambda`."""

    lambda_rep: float = Field(1.0, ge=0)
    lambda_logit: float = Field(1.0, ge=0)

    @model_validator(mode="after")
    def _some_loss(self) -> ImitationSpec:
        if self.lambda_rep == 0 and self.lambda_logit == 0:
            raise ValueError("lambda_rep and lambda_logit are both 0: nothing would be learnt")
        return self


class DistillationSpec(ImitationSpec):
    """DynaBERT's width stage."""

    dropout: float | None = Field(
        0.0, ge=0, lt=1, description="Of the supernet while it learns; null: the model's own."
    )
    lambda_rep: float = Field(0.1, ge=0)
    padded_mean: bool = Field(
        False,
        description="The mean of lambda_rep is over padding too, as PaddleSlim takes it: for "
        "comparisons with it alone, because a row's loss then depends on its batch-mates.",
    )

    teacher_cache_mb: int = Field(
        0,
        ge=0,
        le=10**6,
        description="Disk (10^6 bytes) for the teacher's answers, which are then computed once and "
        "not in each epoch, for refinement too; 0: in each step. Where all of train needs more, in "
        "each step too.",
    )

    @model_validator(mode="after")
    def _keeps_what_it_needs(self) -> DistillationSpec:
        if self.teacher_cache_mb and self.padded_mean:
            raise ValueError("teacher_cache_mb keeps no states of padding, which padded_mean needs")
        return self


class LaterDistillationSpec(ImitationSpec):
    """One after the width stage."""

    @property
    def padded_mean(self) -> bool:
        """As in DistillationSpec, but there is nothing to compare these with."""
        return False


class DepthSpec(LaterDistillationSpec):
    """DynaBERT's second stage, with its defaults; only where `supernet.depth_mults` asks for it.

    The teacher is the supernet of the width stage, frozen, at full depth and the same width. Each
    step trains the largest sub-network, the smallest and two others drawn by seed and step, with
    distillation's dropout.
    """

    learning_rate: float = Field(2e-5, gt=0, lt=1)


FINALISTS = "finalists"


class RefinementSpec(LaterDistillationSpec):
    """A distillation of its own, from the teacher, of each sub-network that is named here.

    After all that the supernet learns, and after the search. Such a sub-network is cut out and
    trained alone, which takes a fraction of the supernet's step; its weights are then no longer
    the supernet's. With distillation's dropout.
    """

    subnetworks: tuple[Text, ...] = Field(
        (),
        max_length=64,
        description=f'By name, as "w1_4" or "w1_2-d2_3"; "{FINALISTS}": all that the search for '
        "widths of each layer finds. None: there is no such training.",
    )

    @field_validator("subnetworks")
    @classmethod
    def _distinct(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if len(set(value)) != len(value):
            raise ValueError("each sub-network may be named once")
        return value


class FinalSpec(TrainingSpec):
    """DynaBERT's optional last stage: all sub-networks are fine-tuned on train's labels.

    One optimizer step after all widths (with depth: the four of a step, as in the depth stage),
    and with distillation's dropout.
    """

    when: Literal["never", "always"] = "never"
    epochs: float = Field(1.0, gt=0, le=100)
    learning_rate: float = Field(2e-5, gt=0, lt=1)


BatchSize = Annotated[int, Field(ge=1, le=256)]
SeqLen = Annotated[int, Field(ge=2, le=512)]
Threads = Annotated[int, Field(ge=1, le=256)]
MAX_SETTINGS = 32  # of one latency measurement: each is timed for all candidates and rounds


class LatencySetting(NamedTuple):
    """What latency depends on beside the file: rows of a call, tokens of a row, threads."""

    batch_size: int
    seq_len: int
    threads: int

    def __str__(self) -> str:
        threads = f"{self.threads} thread{'' if self.threads == 1 else 's'}"
        return f"batch {self.batch_size}, {self.seq_len} tokens, {threads}"


class LatencySpec(_Asked):
    """How latency is measured on the worker's own device.

    `batch_size`, `seq_len` and `threads` are the setting that a candidate's latency stands for;
    the lists add to it, and every combination of all is measured.
    """

    batch_size: BatchSize = 1
    seq_len: SeqLen | None = Field(
        None, description="Tokens; by default the 95th percentile of dev."
    )
    threads: Threads = 1
    batch_sizes: tuple[BatchSize, ...] = Field((), description="Measured beside batch_size.")
    seq_lens: tuple[SeqLen, ...] = Field((), description="Measured beside seq_len.")
    thread_counts: tuple[Threads, ...] = Field((), description="Measured beside threads.")
    baselines: tuple[Format, ...] | None = Field(
        None,
        description="Served formats that the teacher is measured and judged in, beside fp32 in "
        "every runtime that the sub-networks are served in: what one would do instead of "
        "compressing. null: onnx-int8-dynamic where a sub-network is served as ONNX.",
    )
    rounds: int = Field(
        50, ge=5, le=10000, description="Timed calls of each candidate in each setting."
    )

    def settings(self, seq_len: int) -> tuple[LatencySetting, ...]:
        """Every setting once, the one that stands for the latency first, by threads.

        `seq_len`: what the spec's own, or its absence, comes to.
        """
        return tuple(
            LatencySetting(batch_size, length, threads)
            for threads in dict.fromkeys((self.threads, *self.thread_counts))
            for length in dict.fromkeys((seq_len, *self.seq_lens))
            for batch_size in dict.fromkeys((self.batch_size, *self.batch_sizes))
        )

    @field_validator("baselines")
    @classmethod
    def _served(cls, value: tuple[Format, ...] | None) -> tuple[Format, ...] | None:
        unserved = sorted(set(value or ()) - set(SERVED_FORMATS))
        if unserved:
            raise ValueError(f"no runtime serves {', '.join(unserved)}: nothing can be measured")
        return value

    @model_validator(mode="after")
    def _few_settings(self) -> LatencySpec:
        count = len(self.settings(self.seq_len or 0))
        if count > MAX_SETTINGS:
            raise ValueError(
                f"these are {count} combinations of batch size, length and threads; name at most "
                f"{MAX_SETTINGS}"
            )
        return self


class LatencyAt(_Asked):
    """Which measured latency a constraint means; what is absent is as in the latency spec."""

    percentile: Percentile = 50
    batch_size: BatchSize | None = None
    seq_len: SeqLen | None = None
    threads: Threads | None = None


class ConstraintSpec(_Asked):
    """What the selected sub-network must hold. Absent fields constrain nothing."""

    max_accuracy_drop: float | None = Field(
        None,
        ge=-100,
        le=100,
        description="Points (1.0 = 0.01) of the main metric on dev against the teacher.",
    )
    max_latency_ms: float | None = Field(
        None,
        gt=0,
        description="Of the served file: p50 in the latency spec's own setting, or "
        "what latency_at says.",
    )
    min_speedup: float | None = Field(
        None,
        gt=0,
        description="Of p50 against the teacher's in the same runtime and setting, that of "
        "latency_at where it is given.",
    )
    max_size_mb: float | None = Field(None, gt=0, description="10^6 bytes of the served file.")
    latency_at: LatencyAt | None = Field(
        None, description="The percentile and the measured setting that latency means here."
    )
    latency_on: Text | None = Field(
        None,
        min_length=1,
        max_length=200,
        pattern=r"^[^\x00-\x1f\x7f]+$",
        description="A device's profile: the id of an uploaded one. Latency and speed-up are then "
        "predicted for that device: p50 of ONNX files in the formats that it was profiled in, in "
        "any setting that lies within the profile. null: as measured on the worker.",
    )
    objective: Literal["latency", "size", "accuracy"] | None = Field(
        None,
        description="What is best among those that hold everything: the smallest latency, the "
        "smallest file, the best main metric on dev. null: the smallest latency, but where "
        "max_accuracy_drop is absent of those alone that lose at most 1 point.",
    )
    confidence: float | None = Field(
        None,
        description="0.9, 0.95 or 0.99: accuracy drop, latency and speed-up must hold their bound "
        "up to the worse end of the interval that has this confidence. null: as measured.",
        json_schema_extra={"enum": [*CONFIDENCES, None]},
    )

    @property
    def bounds_latency(self) -> bool:
        return self.max_latency_ms is not None or self.min_speedup is not None

    @field_validator("confidence")
    @classmethod
    def _kept_confidence(cls, value: float | None) -> float | None:
        if value is not None and value not in CONFIDENCES:
            raise ValueError(f"name one of {', '.join(map(str, CONFIDENCES))}")
        return value


def fp32_format(fmt: Format) -> Format:
    """The format in fp32 that the same runtime serves: what the teacher is measured in."""
    if fmt == "paddle-bf16":
        return "paddle"
    return "onnx" if fmt in ROUNDED_FORMATS else fmt


class Int8Spec(_Asked):
    """How int8 formats are made, and what they must hold to be published."""

    calibration_rows: int = Field(
        128,
        ge=1,
        le=100_000,
        description="Drawn from train, seeded. They fix the scales of static int8's activations, "
        "and say which parts int8 harms most.",
    )
    max_flipped: float = Field(
        0.05,
        ge=0,
        le=1,
        description="Share of dev's answers (labels, sets of labels, words' tags, answers to "
        "questions) that may differ from the sub-network's in fp32. Of a regression, which "
        "answers with numbers: how much of the main metric may be lost.",
    )
    max_fp32_share: float = Field(
        0.5,
        ge=0,
        le=1,
        description="Share of the parts (products with a weight, embedding tables) that may stay "
        "in fp32, the worst first, where int8 would lose more than max_flipped or "
        "max_accuracy_drop allow. 0: none, and none are looked for.",
    )


# What fp16 and bf16 must hold. They are far nearer to fp32 than int8, with no parts to put back.
HALF_GATE = Int8Spec(max_flipped=0.005, max_fp32_share=0.0)


def gate_of(fmt: Format, int8: Int8Spec) -> Int8Spec:
    """What a format that rounds must hold to be published."""
    return int8 if fmt in INT8_FORMATS else HALF_GATE


class ExportSpec(_Asked):
    formats: tuple[Format, ...] = Field(
        ("safetensors", "paddle", "onnx"),
        min_length=1,
        description="onnx-int8-dynamic finds the scales of activations at each call, "
        "onnx-int8-static has them fixed by calibration rows. onnx-fp16 is for GPUs: a CPU "
        "computes most of it in fp32. paddle-bf16 is for processors with bf16 instructions.",
    )
    int8: Int8Spec = Int8Spec()

    @field_validator("formats")
    @classmethod
    def _served(cls, value: tuple[Format, ...]) -> tuple[Format, ...]:
        if len(set(value)) != len(value):
            raise ValueError("each format may be named once")
        if not set(value) & set(SERVED_FORMATS):
            raise ValueError(
                f"name at least one served format ({', '.join(SERVED_FORMATS)}): candidates are "
                "measured in it"
            )
        return value


MAX_KEPT_CHARACTERS = 1_000_000  # of a keep-list, which stands in every manifest
# In this order: behind the validator of Text, lengths would be told as those of a list.
KeptText = Annotated[str, Field(min_length=1, max_length=1000), AfterValidator(_unicode)]


class VocabularySpec(_Asked):
    """Removal of tokens that a deployment does not need; the embedding is half of a small model."""

    remove_unused: bool = Field(
        False,
        description="The sub-networks lose the tokens that no row of train and no unlabelled row "
        "has, as they are read. Special and added tokens and all single characters stay. "
        "WordPiece vocabularies only; the teacher keeps its own.",
    )
    keep: tuple[KeptText, ...] = Field(
        (),
        max_length=10_000,
        description='What stays beside them: tokens ("##ing"), or texts with all of their tokens.',
    )

    @model_validator(mode="after")
    def _keeps_from_removal(self) -> VocabularySpec:
        if self.keep and not self.remove_unused:
            raise ValueError("keep is for remove_unused: set it to true, or leave keep out")
        if sum(map(len, self.keep)) > MAX_KEPT_CHARACTERS:
            raise ValueError(f"keep may have {MAX_KEPT_CHARACTERS:,} characters in all")
        return self


class ReportSpec(_Asked):
    """What the regression report, a sub-network's answers against the teacher's, tells of rows.

    Reports and bundles travel further than a dataset: texts are quoted only where asked for.
    """

    slices: tuple[Text, ...] = Field(
        (),
        max_length=8,
        description="Columns by whose values the answers are grouped; the values are reported.",
    )
    excerpt_chars: int = Field(
        0,
        ge=0,
        le=200,
        description="Characters of each worst row's text, and of its answers, that are quoted; 0: "
        "none, the row's file and line alone.",
    )

    @field_validator("slices")
    @classmethod
    def _distinct(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if len(set(value)) != len(value):
            raise ValueError("each column may be named once")
        return value


class Spec(_Asked):
    """One compression job. Every field has a default; `{}` is a complete spec."""

    task: TaskSpec = TaskSpec()
    engine: Literal["widthwise", "paddleslim"] = Field(
        "widthwise",
        description="Who scores, reorders and distils. paddleslim: its own OFA-BERT recipe, "
        "mended, in a process of its own, to compare with: BERT classifiers only, gradients are "
        "not clipped; patience, time budgets, micro-batches and resuming in the middle of its "
        "training are not for it. Everything before and after is the same for both.",
    )
    teacher: FineTuneSpec = FineTuneSpec()
    importance: ImportanceSpec = ImportanceSpec()
    supernet: SupernetSpec = SupernetSpec()
    distillation: DistillationSpec = DistillationSpec()
    depth: DepthSpec = DepthSpec()
    final: FinalSpec = FinalSpec()
    refinement: RefinementSpec = RefinementSpec()
    latency: LatencySpec = LatencySpec()
    constraints: ConstraintSpec = ConstraintSpec()
    export: ExportSpec = ExportSpec()
    vocabulary: VocabularySpec = VocabularySpec()
    report: ReportSpec = ReportSpec()
    device: str = Field(
        "cpu",
        pattern=r"^(cpu|gpu|gpu:[0-9]{1,2})$",
        description="Where the networks are trained: cpu, gpu (the first one), or gpu:N, from 0.",
    )
    processes: int = Field(
        1,
        ge=1,
        le=16,
        description="That share each training batch, all on one host: with a GPU each, from the "
        "device's number on. One does best on a CPU, where threads share the batch already. "
        "With dropout another number draws other masks, and so trains otherwise.",
    )
    precision: Literal["fp32", "mixed"] = Field(
        "fp32",
        description="Of training. mixed, on a GPU alone: products in bfloat16 where the GPU has "
        "it, else in float16 with the loss scaled; weights stay in fp32.",
    )
    max_minutes: float | None = Field(
        None,
        gt=0,
        description="Of the whole job, all its runs together. Training stops early enough to "
        "evaluate, export and measure what was learnt by then.",
    )
    seed: int = Field(0, ge=0, lt=2**31)

    @property
    def baselines(self) -> tuple[Format, ...]:
        """The latency spec's, or what its null stands for."""
        if self.latency.baselines is not None:
            return self.latency.baselines
        served_as_onnx = "onnx" in map(fp32_format, self.export.formats)
        return ("onnx-int8-dynamic",) if served_as_onnx else ()

    @model_validator(mode="after")
    def _trainable(self) -> Spec:
        if self.precision == "mixed" and self.device == "cpu":
            raise ValueError('precision "mixed" needs device "gpu"; a CPU trains in fp32')
        if self.engine != "widthwise" and (self.processes > 1 or self.precision != "fp32"):
            raise ValueError(
                f"engine {self.engine} trains in one process and in fp32: set processes to 1 and "
                'precision to "fp32"'
            )
        is_plain = self.engine == "widthwise" and self.processes == 1
        if self.distillation.teacher_cache_mb and not is_plain:
            raise ValueError(
                'distillation.teacher_cache_mb is for engine "widthwise" in one process: set it '
                "to 0"
            )
        return self
