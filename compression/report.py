"""What a job measured and decided. Frozen pydantic models, paddle-free."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any, ClassVar, Literal

from pydantic import Field

from compression.regression import RegressionReport
from compression.spec import (
    DepthMult,
    Format,
    Frozen,
    LatencySetting,
    Percentile,
    Spec,
    WidthMult,
)


@dataclass(frozen=True)
class Progress:
    """One sign of life of the pipeline.

    `stage` is one of STAGES. `step`/`total` count within the stage where it has
    steps; `figures` holds numbers and short strings (loss, accuracy, ...) that
    JSON can carry. A stage's first Progress has step 0 and its last one step == total.
    """

    stage: str
    step: int = 0
    total: int = 1
    message: str = ""
    figures: Mapping[str, Any] = field(default_factory=dict)


OnProgress = Callable[[Progress], None]
STAGES = (
    "load",
    "teacher",
    "importance",
    "reorder",
    "distil",
    "depth",
    "final",
    "search",
    "refine",
    "evaluate",
    "export",
    "verify",
    "measure",
    "select",
    "bundle",
)


METRIC_NAMES: Mapping[str, str] = {  # what people call them
    "accuracy": "accuracy",
    "f1": "F1",
    "matthews": "Matthews correlation",
    "micro_f1": "micro F1",
    "macro_f1": "macro F1",
    "exact_match": "exact match",
    "pearson": "Pearson correlation",
    "spearman": "Spearman correlation",
    "entity_f1": "entity F1",
    "entity_precision": "entity precision",
    "entity_recall": "entity recall",
}
MAIN_METRIC = "The report's `main_metric` on dev, whatever it is; at most 1."
METRICS = "Every metric of the task on dev, by name."


class Interval(Frozen):
    """Where a figure lies with this confidence (0.95: 95 %), by the bootstrap."""

    confidence: float
    low: float
    high: float


Intervals = tuple[Interval, ...]  # one of each of CONFIDENCES; none in reports that predate them


class LatencyReport(Frozen):
    """Milliseconds a call on the CPU, with `threads` threads, whatever trained the model.

    A call is one of `batch_size` rows of `seq_len` tokens. Intervals are over rounds.
    """

    p50_ms: float
    p95_ms: float
    p99_ms: float
    rounds: int
    batch_size: int
    seq_len: int
    threads: int
    p50_intervals: Intervals = ()
    p95_intervals: Intervals = ()
    p99_intervals: Intervals = ()
    speedup: float | None = Field(
        None, description="Teacher's p50 over this p50, same runtime, setting and rounds."
    )
    speedup_intervals: Intervals = ()

    @property
    def setting(self) -> LatencySetting:
        return LatencySetting(self.batch_size, self.seq_len, self.threads)


class Gpu(Frozen):
    name: str
    driver: str
    memory_bytes: int


class DeviceFingerprint(Frozen):
    """The machine that measured: latency figures are comparable where this is the same."""

    cpu: str
    cores: int = Field(description="Physical ones that the job may use.")
    threads: int = Field(description="Processors that the job may use, hyper-threads counted.")
    instruction_sets: tuple[str, ...] = Field(description="Those that matter, of the CPU.")
    memory_bytes: int | None
    gpus: tuple[Gpu, ...] = Field(description="In the machine, whether or not they were used.")
    platform: str
    python: str
    libraries: Mapping[str, str] = Field(description="Versions of those that measure or serve.")


class PredictionError(Frozen):
    """How far predictions for a device are off: predicted / measured - 1, on whole networks.

    None of these networks is one that predictions are made from.
    """

    networks: int = Field(description="That were timed on the device.")
    served: int = Field(
        description="Of these, exported files; the others were put together to be timed."
    )
    lowest: float = Field(description="Most below what was measured; -0.1 is 10 % below.")
    highest: float = Field(description="Most above it.")
    mean_absolute: float


class ProfiledDevice(Frozen):
    """A device that latency is predicted for, from an uploaded profile of it."""

    profile: str = Field(description="What the constraint calls it: an id, or a file's name.")
    sha256: str = Field(description="Of the profile's content.")
    device: DeviceFingerprint
    errors: Mapping[Format, PredictionError] = Field(
        description="Of each format that it was profiled in."
    )


class PredictedLatency(Frozen):
    """Milliseconds a call of an ONNX file on another device; not measured.

    The teacher's in fp32, which the speed-up is against, is predicted in the same way.
    """

    p50_ms: float
    speedup: float
    batch_size: int
    seq_len: int
    threads: int
    on: ProfiledDevice
    # It has an error, not an interval of a confidence.
    p50_intervals: ClassVar[Intervals] = ()
    speedup_intervals: ClassVar[Intervals] = ()


class FileReport(Frozen):
    """`path` is relative to the sub-network's artifact folder."""

    path: str
    size_bytes: int
    sha256: str


class FormatReport(Frozen):
    """One exported format of one sub-network: a candidate for selection if it is served."""

    format: Format
    published: bool
    parity_max_abs: float | None = Field(
        None, description="Largest |logit - supernet's logit| over the parity rows."
    )
    parity_rows: int = 0
    parity_tolerance: float | None = Field(
        1e-4, description="null for what rounds, which max_flipped bounds instead."
    )
    accuracy: float | None = Field(
        None,
        description="Where it rounds: its own main metric on dev. null: its network's in fp32.",
    )
    accuracy_drop: float | None = Field(
        None, description="Where it rounds: points that it loses against the teacher on dev."
    )
    accuracy_drop_intervals: Intervals = Field(
        (), description="Where it rounds, as the sub-network's."
    )
    flipped: float | None = Field(
        None,
        description="Where it rounds: share of dev's answers that are not its network's in fp32; "
        "of a regression, how much of the main metric is lost.",
    )
    max_flipped: float | None = None
    fp32_parts: tuple[str, ...] = Field(
        (), description="Of int8: products and tables that were left in fp32, the worst first."
    )
    error: str | None = Field(None, description="Why it is not published.")
    size_bytes: int = Field(
        0, description="Bytes of the served file(s): weights and graph, no tokenizer."
    )
    files: tuple[FileReport, ...] = ()
    latency: LatencyReport | None = Field(
        None, description="In the setting that stands for the latency."
    )
    speedup: float | None = Field(
        None, description="Teacher's p50 over this p50, same runtime and settings."
    )
    latencies: tuple[LatencyReport, ...] = Field(
        (), description="In every setting of the spec; the first one is `latency`."
    )
    predicted: PredictedLatency | None = Field(
        None, description="On the device that the job's constraints name with latency_on."
    )


class ComparisonOnTest(Frozen):
    """The selected sub-network on test, against the better (on dev) of the teacher and width 1.

    Distillation may leave width 1 better than the teacher; then that is what a narrower one
    is to be held against.
    """

    reference: str = Field(
        description='"teacher", or the name of the sub-network of width 1 at full depth.'
    )
    reference_accuracy: float = Field(description="Its main metric on test.")
    accuracy: float = Field(description="The selected one's.")
    accuracy_drop: float = Field(description="Points lost against the reference.")
    accuracy_drop_intervals: Intervals
    format: Format | None = Field(
        None, description="The file that rounds and answered test; null: the network in fp32."
    )


class SubnetworkReport(Frozen):
    """`name` is the folder-safe name: "w3_4" for width 3/4, "w3_4-d1_2" for the same at half depth.

    "p1", "p2", ... have a width for each layer, the best on the hold-out first. `heads` and `ffn`
    count per layer of the sub-network, in its order.
    """

    name: str
    width_mult: WidthMult | None = Field(
        description="null where each layer has widths of its own, as `heads` and `ffn` say."
    )
    depth_mult: DepthMult = Fraction(1)
    layers: tuple[int, ...] = Field(
        (),
        description="The supernet's that it keeps, from 0; none in reports that predate depth.",
    )
    heads: tuple[int, ...]
    ffn: tuple[int, ...]
    parameters: int
    flops: int = Field(description="Multiply-adds times two, one row of the latency spec's length.")
    accuracy: float = Field(description=MAIN_METRIC)
    accuracy_drop: float = Field(
        description="Points (hundredths) of the main metric lost against the teacher on dev; "
        "negative is a gain."
    )
    accuracy_drop_intervals: Intervals = Field(
        (), description="Over dev's rows, the teacher's and this one's resampled alike."
    )
    test_accuracy: float | None = Field(None, description="The main metric on test.")
    test: ComparisonOnTest | None = Field(None, description="Of the selected one alone.")
    metrics: Mapping[str, float] = Field({}, description=METRICS)
    formats: tuple[FormatReport, ...] = ()
    regression: RegressionReport | None = Field(
        None,
        description="Against the teacher on dev, of the network in fp32: what a file that rounds "
        "flips of its answers is the format's `flipped`.",
    )
    test_regression: RegressionReport | None = Field(
        None, description="On test, of the selected one, by the answers that `test.format` names."
    )
    pareto: bool = False
    selected: bool = False


class TeacherReport(Frozen):
    family: str
    fine_tuned_steps: int
    parameters: int
    accuracy: float = Field(description=MAIN_METRIC)
    test_accuracy: float | None = Field(None, description="The main metric on test.")
    metrics: Mapping[str, float] = Field({}, description=METRICS)
    formats: tuple[FormatReport, ...] = ()
    encoder: Mapping[str, Any] | None = Field(
        None, description="Its shape, EncoderConfig.to_dict(): what predictions need."
    )


class Candidate(Frozen):
    """A sub-network in a served format, with what the constraints look at.

    Latency and speed-up are those of the setting that the constraints mean, predicted where they
    name a device; intervals have the confidence that they ask for, else 0.95.
    """

    subnetwork: str
    format: Format
    accuracy_drop: float
    latency_ms: float
    speedup: float
    size_mb: float
    accuracy_drop_interval: Interval | None = None
    latency_interval: Interval | None = None
    speedup_interval: Interval | None = None
    misses: tuple[str, ...] = Field((), description="Constraints it does not hold, in words.")


class NearestMiss(Frozen):
    """The candidate that one constraint cut away by the least."""

    subnetwork: str
    format: Format
    by: float = Field(description="Beyond the bound: points, ms, times as fast, or MB.")


class ConstraintEffect(Frozen):
    """What one constraint did to the choice."""

    constraint: str
    limit: float
    cut: int = Field(description="Candidates that miss it.")
    cut_alone: int = Field(description="Of these, how many hold all the other constraints.")
    nearest_miss: NearestMiss | None = Field(
        description="Of those that it alone cut, if there are any; null where it cut nothing."
    )
    relaxed_by: float = Field(
        description="What the bound is moved by for `relaxed`: 1 point, ms or MB, or a speed-up "
        "of 0.1."
    )
    relaxed: Candidate | None = Field(
        description="What would be chosen then; null where that changes nothing."
    )
    implied: bool = Field(
        False,
        description="Of the drop of 1 point that is preferred where neither a drop nor an "
        "objective is named.",
    )
    words: str = Field(description="The same as a sentence.")


class Explanation(Frozen):
    """How the candidates became one, or none."""

    candidates: int = Field(description="With every figure measured.")
    holding: int = Field(description="Of these, how many hold every constraint.")
    latency: str = Field(description="Which latency was meant: percentile and setting, in words.")
    effects: tuple[ConstraintEffect, ...] = Field(
        description="Of each constraint, and of the preferred drop where that decided."
    )


class Selection(Frozen):
    subnetwork: str | None
    format: Format | None
    reason: str = Field(description="One sentence: why this one, or why none.")
    nearest: tuple[Candidate, ...] = Field(
        (), description="The three nearest, where nothing holds."
    )
    explanation: Explanation | None = None
    latency_on: ProfiledDevice | None = Field(
        None,
        description="The device that every latency and speed-up here is predicted for; null where "
        "they were measured on the worker's.",
    )


class LatencyModelReport(Frozen):
    """Milliseconds of a call as a sum over layers, fitted to sub-networks measured here."""

    percentile: Percentile
    call_ms: float
    heads_ms: Mapping[int, float] = Field(description="Of a layer's attention, by its heads.")
    ffn_ms: Mapping[int, float] = Field(description="Of a layer's FFN, by its neurons.")
    fitted: int
    held_out: int
    mean_error: float = Field(
        description="Mean of |predicted / measured - 1| over those that were not fitted."
    )
    max_error: float


class Finalist(Frozen):
    """One of the search's best, as it was predicted; what it came to is among the sub-networks."""

    subnetwork: str
    holdout_accuracy: float = Field(description="The main metric on rows held out of train.")
    predicted_ms: Mapping[int, float] = Field(description="By percentile, where fitted.")
    predicted_mb: float
    budget_share: float = Field(1.0, description="Of the budget that it was searched for under.")


class PerLayerGain(Frozen):
    """On dev, the best finalist against the best sub-network of one width, each in a format.

    Both are the best on dev of those that hold the budget: it flatters both. Where one has had a
    distillation of its own (`trainings`) and the other none, the gain is not the search's alone.
    """

    subnetwork: str
    format: Format | None = Field(None, description="null in reports that predate it.")
    reference: str
    reference_format: Format | None = None
    points: float = Field(description="Of the main metric; negative where the finalist is worse.")
    intervals: Intervals = Field(description="Paired, over dev's rows.")


class SearchReport(Frozen):
    """What the search over per-layer widths did."""

    format: Format = Field(
        description="That the budget was held in while searching: the fastest of those asked for."
    )
    setting: LatencySetting
    latency_on: ProfiledDevice | None = Field(
        None,
        description="Whose profile predicted latency; null where sub-networks were timed on the "
        "worker's device, and `latency_models` were fitted to them.",
    )
    budget: tuple[str, ...] = Field(description="In words; the widest, of several.")
    holdout_rows: int
    latency_models: tuple[LatencyModelReport, ...] = Field(
        description="Of each percentile that the budget speaks of."
    )
    scored: int = Field(description="Candidates scored on the hold-out.")
    finalists: tuple[Finalist, ...]
    gain: PerLayerGain | None = Field(
        None, description="null where no finalist, or none of one width, holds the budget."
    )
    note: str = ""


class DatasetReport(Frozen):
    rows: Mapping[str, int]
    labels: tuple[str, ...] = Field(description="The dataset's values, in the outputs' order.")
    label_names: tuple[str, ...] = Field(
        description="What the outputs are called: the model's names where its head was kept."
    )
    text: str
    text_pair: str | None = None
    label: str
    cut_rows: Mapping[str, int] = Field(
        default_factory=dict, description="Rows of each split that are longer than max_seq_len."
    )
    shared_rows: Mapping[str, int] = Field(
        default_factory=dict, description='"train/dev": rows of dev whose text stands in train.'
    )
    notes: tuple[str, ...] = ()


class VocabularyReport(Frozen):
    """What was removed of the vocabulary, and what texts look like without it. Shares are 0..1.

    The teacher's tokens are "before", the sub-networks' "after"; of whole texts, nothing cut off.
    """

    tokens_before: int = Field(description="Rows of the teacher's word embedding.")
    tokens_after: int = Field(description="Rows of the sub-networks'.")
    split: Literal["dev", "test"] = Field(description="Whose texts are told of: test, if any.")
    unk_before: float = Field(description="Share of [UNK] among the texts' tokens.")
    unk_after: float
    length_before: float = Field(description="Mean tokens of a text.")
    length_after: float = Field(description="More, where a removed token falls into pieces.")
    changed_texts: float = Field(description="Share of the texts that have a removed token.")


class TrainingReport(Frozen):
    """How one training went; the weights are those after `best_step`."""

    steps: int = Field(description="Optimizer steps done, in all runs of the job together.")
    planned_steps: int
    best_step: int
    ended: Literal["complete", "plateau", "time"] = Field(
        description='"plateau": no gain for the spec\'s patience; "time": its share of max_minutes.'
    )
    step_seconds: float = Field(description="Median of a step, of the last thousand.")
    micro_batch: int | None = Field(
        description="Rows computed at once; null where the whole batch was."
    )
    notes: tuple[str, ...] = ()


class CompressionReport(Frozen):
    spec: Spec
    main_metric: str = Field(
        "accuracy", description="What accuracy and accuracy_drop are measured in."
    )
    dataset: DatasetReport
    teacher: TeacherReport
    vocabulary: VocabularyReport | None = Field(
        None, description="What was removed of it; null where the spec asks for nothing."
    )
    reorder_max_abs: float = Field(description="Largest logit change of reordering at full width.")
    subnetworks: tuple[SubnetworkReport, ...]
    selection: Selection
    search: SearchReport | None = Field(None, description="Where the spec asks for per_layer.")
    distillation_steps: int
    depth_steps: int = Field(0, description="Steps of the depth stage.")
    final_steps: int = Field(0, description="Steps of the last fine-tuning on labels.")
    step_seconds: float = Field(description="Median seconds of a distillation step.")
    stage_seconds: Mapping[str, float] = Field(
        description="In the job's last run: a stage that a checkpoint spared it takes no time."
    )
    trainings: Mapping[str, TrainingReport] = Field(
        default_factory=dict,
        description='By stage: "teacher" where it was fine-tuned, "distil", "depth" and "final" '
        'where the spec asks for them; "refine w1_4" of a sub-network that has weights of its own.',
    )
    environment: Mapping[str, str] = Field(description="Device and library versions measured on.")
    device: DeviceFingerprint | None = Field(None, description="The machine that measured.")
    warnings: tuple[str, ...] = ()
