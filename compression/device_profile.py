"""Another device's latency: its profile, as `python -m compression profile` writes it there and
anybody may upload it, and what is predicted from it for the sub-networks of a job.

A profile claims nothing of itself. Whoever reads it computes the error of its predictions anew,
from the whole networks that were timed on the device.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Protocol, get_args

from pydantic import ConfigDict, Field, ValidationError, field_validator, model_validator

from compression.errors import InvalidSpec
from compression.prediction import (
    AXES,
    MAX_COUNT,
    MAX_COUNTS,
    MAX_LAYERS,
    MAX_NETWORKS,
    MAX_TABLES,
    LatencyModel,
    OutsideProfile,
)
from compression.report import (
    DeviceFingerprint,
    FormatReport,
    PredictedLatency,
    PredictionError,
    ProfiledDevice,
    SubnetworkReport,
)
from compression.spec import (
    BatchSize,
    ConstraintSpec,
    Format,
    Frozen,
    Head,
    LatencyAt,
    LatencySetting,
    SeqLen,
    Spec,
    Threads,
)
from compression.teachers.config import EncoderConfig

FULL: Format = "onnx"  # in fp32: what every profile has, and what speed-ups are against
PredictedFormat = Literal["onnx", "onnx-int8-dynamic"]
MAX_BYTES = 1 << 20  # of a file; a body of the API may have as many
MAX_DEVICE_CHARACTERS = 4096
Version = Literal[3]  # of the format: compression/profile.py writes it
ON = "/constraints/latency_on"
AT = "/constraints/latency_at"

Count = Annotated[int, Field(ge=1, le=MAX_COUNT)]
Ms = Annotated[float, Field(ge=0, le=1e9)]
Taken = Annotated[float, Field(ge=1e-6, le=1e9)]  # no ratio of two runs out of the numbers
Costs = Annotated[dict[Count, Ms], Field(min_length=1, max_length=MAX_COUNTS)]
Counts = Annotated[tuple[Count, ...], Field(min_length=1, max_length=MAX_LAYERS)]


class _Measured(Frozen):
    model_config = ConfigDict(allow_inf_nan=False)

    batch_size: BatchSize
    seq_len: SeqLen
    threads: Threads
    format: PredictedFormat

    @property
    def setting(self) -> LatencySetting:
        return LatencySetting(self.batch_size, self.seq_len, self.threads)


class BlockTable(_Measured):
    """Milliseconds in one setting; `attention` and `ffn` of one layer, by its heads or neurons."""

    call: Taken = Field(description="Of the runtime, with nothing to do; all others are beside it.")
    embeddings: Ms
    pooled_head: Ms
    token_head: Ms
    attention: Costs
    ffn: Costs


class TimedNetwork(_Measured):
    """A whole network: `heads[i]` and `ffn[i]` in layer i."""

    heads: Counts
    ffn: Counts
    head: Head = Field("sequence", description="Which classifier it has.")
    measured_ms: Taken
    served: bool = Field(description="Whether it is an exported file.")

    @model_validator(mode="after")
    def _layers(self) -> TimedNetwork:
        if len(self.heads) != len(self.ffn):
            raise ValueError("heads and ffn are not of as many layers")
        return self


class ProfiledShape(Frozen):
    """blocks.Shape: what all sub-networks of a model share."""

    hidden: Count
    head_dim: Count
    vocab_size: Count
    labels: Count
    embedding_size: Count | None = None
    activation: Literal["gelu", "gelu_new", "relu"]


class DeviceProfile(Frozen):
    """What a device was measured to take. Every size is bounded: it may come from anywhere."""

    widthwise_profile: Version = Field(
        description="Version of this format; `python -m compression profile` writes this one."
    )
    device: DeviceFingerprint
    shape: ProfiledShape
    layers: Annotated[int, Field(ge=1, le=MAX_LAYERS)]
    rounds: Count
    tables: Annotated[tuple[BlockTable, ...], Field(min_length=1, max_length=MAX_TABLES)]
    networks: Annotated[tuple[TimedNetwork, ...], Field(min_length=1, max_length=MAX_NETWORKS)] = (
        Field(description="What predictions are held against, some of each format.")
    )

    @field_validator("widthwise_profile", mode="before")
    @classmethod
    def _of_this_version(cls, version: Any) -> Any:
        if isinstance(version, int) and version not in get_args(Version):
            raise ValueError(
                f"a profile of version {get_args(Version)[0]} is needed: measure the device again "
                "with this installation's `python -m compression profile`"
            )
        return version

    @model_validator(mode="after")
    def _whole(self) -> DeviceProfile:
        described = json.dumps(self.device.model_dump(mode="json"), ensure_ascii=False)
        escaped = "\\" in described  # a line's end in it, say
        if len(described) > MAX_DEVICE_CHARACTERS or escaped or not described.isprintable():
            raise ValueError(
                f"the device is not described in at most {MAX_DEVICE_CHARACTERS} printable "
                "characters, without quotes and backslashes"
            )
        formats = {table.format for table in self.tables}
        if FULL not in formats or {network.format for network in self.networks} != formats:
            raise ValueError(
                f"there are no tables of {FULL}, or not of the same formats as the networks"
            )
        found = {(table.format, table.setting) for table in self.tables}
        combinations = len(formats) * math.prod(len(each) for each in self.measured.values())
        if not len(found) == len(self.tables) == combinations:
            raise ValueError(
                "the tables are not one for every combination of their batch sizes, lengths, "
                "threads and formats"
            )
        first = self.tables[0]
        for table in self.tables:
            if (table.attention.keys(), table.ffn.keys()) != (
                first.attention.keys(),
                first.ffn.keys(),
            ):
                raise ValueError("the tables are not all of the same heads and neurons")
        try:
            self.errors  # noqa: B018  (that they can be computed is what is checked)
        except OutsideProfile as error:
            raise ValueError(f"a network is not one to hold predictions against: {error}") from None
        return self

    @property
    def measured(self) -> dict[str, list[int]]:
        """The values on each of AXES."""
        return {axis: sorted({getattr(table, axis) for table in self.tables}) for axis in AXES}

    @property
    def models(self) -> dict[Format, LatencyModel]:
        """The one of fp32 first."""
        by_format: dict[Format, list[Mapping[str, Any]]] = {FULL: []}
        for table in self.tables:
            by_format.setdefault(table.format, []).append(dict(table))
        return {fmt: LatencyModel(tables) for fmt, tables in by_format.items()}

    @property
    def errors(self) -> dict[Format, PredictionError]:
        """Computed from the networks, whatever the file may say elsewhere."""
        found = {}
        for fmt, model in self.models.items():
            own = [network for network in self.networks if network.format == fmt]
            off = model.errors([dict(network) for network in own])
            found[fmt] = PredictionError(
                networks=len(off),
                served=sum(network.served for network in own),
                lowest=min(off),
                highest=max(off),
                mean_absolute=statistics.mean(map(abs, off)),
            )
        return found

    @property
    def sha256(self) -> str:
        """Of the content, whatever spaces and order a file has it in."""
        content = json.dumps(self.model_dump(mode="json"), sort_keys=True, ensure_ascii=False)
        return hashlib.sha256(content.encode()).hexdigest()


def read_profile(path: Path) -> DeviceProfile:
    """InvalidSpec where the file holds no profile; OSError where it cannot be read."""
    with path.open("rb") as file:
        content = file.read(MAX_BYTES + 1)
    if len(content) > MAX_BYTES:
        raise InvalidSpec(f"{path.name} has more than {MAX_BYTES} bytes: no profile", pointer=ON)
    try:
        return DeviceProfile.model_validate_json(content)
    except ValidationError as error:
        first = error.errors()[0]
        # A key may be anything: told in print.
        where = ".".join(str(part) for part in first["loc"]).encode("unicode_escape").decode()
        told = first["msg"].removeprefix("Value error, ")
        said = f"{where}: {told}" if where else told
        raise InvalidSpec(f"{path.name} is no device profile: {said}", pointer=ON) from None


class Layered(Protocol):
    """A planned or finished sub-network."""

    @property
    def name(self) -> str: ...
    @property
    def heads(self) -> Sequence[int]: ...
    @property
    def ffn(self) -> Sequence[int]: ...


@dataclass(frozen=True)
class Predictor:
    """Latency of a teacher's sub-networks on one device and in one setting."""

    on: ProfiledDevice
    setting: LatencySetting
    head: Head
    models: Mapping[Format, LatencyModel]
    teacher_ms: float

    def latency(
        self, heads: Sequence[int], ffn: Sequence[int], fmt: Format = FULL
    ) -> PredictedLatency:
        """OutsideProfile where a count lies beyond what was measured."""
        model, setting = self.models[fmt], self.setting._asdict()
        ms = model.predict(setting, heads=heads, ffn=ffn, head=self.head)
        return PredictedLatency(p50_ms=ms, speedup=self.teacher_ms / ms, **setting, on=self.on)

    def told(self, subnetwork: Layered, report: FormatReport) -> FormatReport:
        """The format's report with its prediction, where it has one.

        An int8 file with parts left in fp32 has none: which blocks they are part of was not timed.
        """
        if report.format not in self.models or report.fp32_parts:
            return report
        found = self.latency(subnetwork.heads, subnetwork.ffn, report.format)
        return report.model_copy(update={"predicted": found})

    def all_told(self, subnetworks: Sequence[SubnetworkReport]) -> list[SubnetworkReport]:
        """InvalidSpec for the first one that the profile says nothing of."""
        self.check(subnetworks)
        return [
            each.model_copy(
                update={"formats": tuple(self.told(each, report) for report in each.formats)}
            )
            for each in subnetworks
        ]

    def check(self, subnetworks: Sequence[Layered]) -> None:
        """InvalidSpec for the first one that the profile says nothing of."""
        for each in subnetworks:
            try:
                self.latency(each.heads, each.ffn)
            except OutsideProfile as error:
                raise InvalidSpec(
                    f"{each.name} cannot be predicted: {error}; profile the device with more "
                    "--heads and --ffn",
                    pointer=ON,
                ) from None


def make_predictor(
    profile: DeviceProfile,
    constraints: ConstraintSpec,
    teacher: EncoderConfig,
    default: LatencySetting,
) -> Predictor:
    """What `constraints` mean by latency; `default` is the setting where they name none.

    `teacher` has the task's head. InvalidSpec points at what the profile cannot answer.
    """
    _check_shape(profile, teacher)
    at = constraints.latency_at or LatencyAt()
    if at.percentile != 50:
        raise InvalidSpec(
            "a profile holds medians: of a predicted latency there is no percentile but 50",
            pointer=f"{AT}/percentile",
        )
    if constraints.confidence is not None and constraints.bounds_latency:
        raise InvalidSpec(
            "a predicted latency has an error, and no interval of a confidence: leave confidence "
            "out, and set the bounds on latency and speed-up with the profile's error in mind",
            pointer="/constraints/confidence",
        )
    setting = LatencySetting(*(getattr(at, axis) or getattr(default, axis) for axis in AXES))
    if setting.seq_len > teacher.max_tokens:
        raise InvalidSpec(
            f"{setting.seq_len} tokens are more than the model's {teacher.max_tokens} positions",
            pointer=f"{AT}/seq_len",
        )
    models = profile.models
    try:
        teacher_ms = models[FULL].predict(
            setting._asdict(), heads=teacher.heads, ffn=teacher.ffn, head=teacher.head
        )
    except OutsideProfile as error:
        if error.field in AXES:
            raise InvalidSpec(
                f"{error}; name another in latency_at, or profile the device with it",
                pointer=f"{AT}/{error.field}",
            ) from None
        raise InvalidSpec(
            f"the model cannot be predicted: {error}; profile the device with more --heads and "
            "--ffn",
            pointer=ON,
        ) from None
    on = ProfiledDevice(
        profile=constraints.latency_on or "",
        sha256=profile.sha256,
        device=profile.device,
        errors=profile.errors,
    )
    return Predictor(on, setting, teacher.head, models, teacher_ms)


def job_predictor(
    spec: Spec, profile: DeviceProfile, encoder: EncoderConfig, *, seq_len: int
) -> Predictor:
    """Of a job on a model; `seq_len`: the length that its latency stands for."""
    predicted = list(profile.models)
    if set(predicted).isdisjoint(spec.export.formats):
        raise InvalidSpec(
            f"by this profile, latency is predicted for files in {' and '.join(predicted)}: name "
            "one among the formats",
            pointer="/export/formats",
        )
    teacher = dataclasses.replace(encoder, head=spec.task.head)
    default = LatencySetting(spec.latency.batch_size, seq_len, spec.latency.threads)
    return make_predictor(profile, spec.constraints, teacher, default)


def report_predictor(
    profile: DeviceProfile,
    constraints: ConstraintSpec,
    subnetworks: Sequence[SubnetworkReport],
    encoder: Mapping[str, Any] | None,
) -> Predictor:
    """Of a finished job, in the setting that its own latency has; `encoder`: its teacher's."""
    if encoder is None:
        raise InvalidSpec(
            "this job's report lacks the shape of its teacher: run the job again", pointer=ON
        )
    measured = next(
        (
            report.latency
            for each in subnetworks
            for report in each.formats
            if report.format in profile.models and report.latency is not None
        ),
        None,
    )
    if measured is None:
        raise InvalidSpec(
            f"by this profile, latency is predicted for files in {' and '.join(profile.models)}, "
            "and this job measured none",
            pointer=ON,
        )
    teacher = EncoderConfig.from_dict(encoder)
    return make_predictor(profile, constraints, teacher, measured.setting)


def plan_warnings(
    spec: Spec,
    profile: DeviceProfile | None,
    encoder: EncoderConfig,
    subnetworks: Sequence[Layered],
    *,
    seq_len: int,
) -> Iterator[str]:
    """The dry run's: InvalidSpec for what cannot be predicted, warnings for what may not be.

    `seq_len` is an estimate where the spec names none: then the job itself sees at its start.
    """
    if profile is None or spec.constraints.latency_on is None:
        return
    at = spec.constraints.latency_at or LatencyAt()
    lengths = profile.measured["seq_len"]
    is_estimate = at.seq_len is None and spec.latency.seq_len is None
    if is_estimate and not lengths[0] <= seq_len <= lengths[-1]:
        yield (
            f"the profile of latency_on has lengths from {lengths[0]} to {lengths[-1]} tokens, and "
            f"the 95th percentile of dev is estimated as {seq_len}: where it lies outside, the job "
            "will fail as it starts; name a length in latency_at"
        )
        seq_len = min(max(seq_len, lengths[0]), lengths[-1])
    predictor = job_predictor(spec, profile, encoder, seq_len=seq_len)
    predictor.check(subnetworks)
    yield f"latency and speed-up are not measured but {in_words(predictor.on)}"


def in_words(on: ProfiledDevice) -> str:
    """For the middle of a sentence: "predicted for ..., where predictions were ... off"."""
    runtime = on.device.libraries.get("onnxruntime")
    device = (
        f"{on.device.cpu} ({on.device.cores} core{'' if on.device.cores == 1 else 's'}"
        f"{f', ONNX Runtime {runtime}' if runtime else ''})"
    )
    off = " and ".join(_off_words(fmt, error) for fmt, error in on.errors.items())
    return f"predicted for {device}, where predictions were {off}"


def _off_words(fmt: Format, error: PredictionError) -> str:
    networks = f"{error.networks} whole network{'' if error.networks == 1 else 's'}"
    served = f" ({error.served} of them exported files)" if error.served else ""
    where = "" if fmt == FULL else " in int8"
    span = f"{100 * error.lowest:+.0f} to {100 * error.highest:+.0f} % off"
    return f"{span} on {networks}{served}{where}"


def _check_shape(profile: DeviceProfile, teacher: EncoderConfig) -> None:
    for name in ("hidden", "head_dim", "embedding_size", "activation"):
        own, profiled = getattr(teacher, name), getattr(profile.shape, name)
        if own != profiled:
            raise InvalidSpec(
                f"the profile is of models with {name} {profiled}, and this one has {own}: profile "
                f"the device with --{name.replace('_', '-')} {own}"
                if own is not None
                else f"the profile is of models with {name} {profiled}, and this one has none",
                pointer=ON,
            )
    if teacher.layers > profile.layers:
        raise InvalidSpec(
            f"the profile is of models with up to {profile.layers} layers, and this one has "
            f"{teacher.layers}: profile the device with --layers {teacher.layers}",
            pointer=ON,
        )
