"""What requests and answers look like. Stored documents pass through as they were stored."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from typing import Annotated, Any, Generic, Self, TypeVar

from pydantic import (
    AfterValidator,
    AwareDatetime,
    BaseModel,
    ConfigDict,
    Field,
    GetJsonSchemaHandler,
    RootModel,
    StringConstraints,
)
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema

from compression.device_profile import DeviceProfile
from compression.plan import ModelInfo, Plan
from compression.report import (
    CompressionReport,
    DeviceFingerprint,
    PredictionError,
    Selection,
    SubnetworkReport,
    TeacherReport,
)
from compression.spec import ConstraintSpec, Spec
from compression.tables import DatasetProfile
from jobs import records
from jobs.deletion import Expired
from jobs.devices import Device
from jobs.paging import cursor_of
from jobs.quotas import MAX_BYTES, MAX_COUNT
from jobs.roles import Role
from jobs.schedule import Outlook
from jobs.states import DeliveryState, JobState
from jobs.webhook_targets import MAX_URL
from jobs.webhooks import JOB_ENDS, WebhookEvent
from jobs.workers import Load, WorkerState, state_of

T = TypeVar("T")


class _SchemaOf:
    """Documents a stored JSON document as `model` without validating it again: what an older
    version stored must stay readable."""

    def __init__(self, model: type[BaseModel]) -> None:
        self.model = model

    def __get_pydantic_json_schema__(
        self, _: CoreSchema, handler: GetJsonSchemaHandler
    ) -> JsonSchemaValue:
        return handler(self.model.__pydantic_core_schema__)


Document = dict[str, Any]
StoredSpec = Annotated[Document, _SchemaOf(Spec)]
StoredPlan = Annotated[Document, _SchemaOf(Plan)]
StoredReport = Annotated[Document, _SchemaOf(CompressionReport)]
StoredInfo = Annotated[Document, _SchemaOf(ModelInfo)]
StoredProfile = Annotated[Document, _SchemaOf(DatasetProfile)]
StoredDeviceProfile = Annotated[Document, _SchemaOf(DeviceProfile)]
StoredDevice = Annotated[Document, _SchemaOf(DeviceFingerprint)]
StoredError = Annotated[Document, _SchemaOf(PredictionError)]
StoredSelection = Annotated[Document, _SchemaOf(Selection)]
StoredSubnetwork = Annotated[Document, _SchemaOf(SubnetworkReport)]
StoredTeacher = Annotated[Document, _SchemaOf(TeacherReport)]
# What no record can have as its id is not looked for: PostgreSQL's text takes no NUL.
Id = Annotated[str, StringConstraints(max_length=64, pattern=r"^[^\x00]*$")]
Name = Annotated[
    str,
    StringConstraints(
        strip_whitespace=True, min_length=1, max_length=200, pattern=r"^[^\x00-\x1f\x7f]+$"
    ),
]


def _in_utc(time: datetime) -> datetime:
    try:
        return time.astimezone(UTC)
    except OverflowError:
        raise ValueError("This time lies outside the years 1 to 9999 in UTC.") from None


Time = Annotated[AwareDatetime, AfterValidator(_in_utc)]


class Out(BaseModel):
    model_config = ConfigDict(protected_namespaces=())


class Shown(Out):
    """A record as it is: fields are its attributes, or name the one that they show."""

    model_config = ConfigDict(from_attributes=True, protected_namespaces=())

    @classmethod
    def of(cls, record: object) -> Self:
        return cls.model_validate(record)


class Page(Out, Generic[T]):
    items: list[T]
    next: str | None = Field(description="Cursor of the next page; null on the last.")

    @classmethod
    def of(cls, found: Sequence[Any], limit: int, convert: Callable[[Any], T]) -> Page[T]:
        """A page from up to `limit` + 1 records: the one too many says that there are more."""
        shown = found[:limit]
        return cls(
            items=[convert(record) for record in shown],
            next=cursor_of(shown[-1]) if len(found) > limit else None,
        )


class UploadedFileOut(Out):
    """A file as it was uploaded."""

    name: str
    size_bytes: int
    sha256: str = Field(description="Hex, of the bytes as they arrived.")


class _UploadOut(Out):
    id: str
    name: str
    size_bytes: int = Field(description="Of all uploaded files.")
    sha256: str | None = Field(description="Of the upload; null where it had several files.")
    files: list[UploadedFileOut]
    warnings: list[str]
    created_at: datetime

    @staticmethod
    def _shared(record: records.Model | records.Dataset) -> dict[str, Any]:
        return {
            "id": record.id,
            "name": record.name,
            "size_bytes": record.size_bytes,
            "sha256": record.uploads[0]["sha256"] if len(record.uploads) == 1 else None,
            "files": record.uploads,
            "warnings": record.warnings,
            "created_at": record.created_at,
        }


class ModelOut(_UploadOut):
    info: StoredInfo

    @classmethod
    def of(cls, record: records.Model) -> Self:
        return cls(**cls._shared(record), info=record.info)


class DatasetOut(_UploadOut):
    profile: StoredProfile

    @classmethod
    def of(cls, record: records.Dataset) -> Self:
        return cls(**cls._shared(record), profile=record.profile)


class ProfileSummary(Out):
    """What a profile is of, and where it can be predicted from."""

    id: str
    name: str
    sha256: str = Field(description="Hex, of the content; reports name it.")
    device: StoredDevice
    shape: Document = Field(description="Of the models that it is for.")
    layers: int = Field(description="Of the deepest.")
    heads: list[int] = Field(description="Heads of a layer that were measured.")
    ffn: list[int] = Field(description="Neurons of a layer that were measured.")
    batch_size: list[int]
    seq_len: list[int]
    threads: list[int]
    errors: dict[str, StoredError] = Field(description="By format; they say which there are.")
    created_at: datetime

    @classmethod
    def of(cls, record: records.Profile) -> Self:
        return cls(**cls._fields(record))

    @classmethod
    def _fields(cls, record: records.Profile) -> dict[str, Any]:
        return {
            **record.summary,
            "id": record.id,
            "name": record.name,
            "sha256": record.sha256,
            "created_at": record.created_at,
        }


class ProfileOut(ProfileSummary):
    profile: StoredDeviceProfile

    @classmethod
    def _fields(cls, record: records.Profile) -> dict[str, Any]:
        return {**super()._fields(record), "profile": record.content}


class UploadOut(Out):
    """A resumable upload."""

    id: str
    kind: str = Field(description="`model` or `dataset`: what it is to become.")
    filename: str
    name: str | None
    size_bytes: int
    offset: int = Field(description="Bytes that have arrived.")
    state: str = Field(
        description="`receiving`; `arrived`, where it is being inspected or waits for that; "
        "`finished` or `refused`."
    )
    record: str | None = Field(description="Path of the model or dataset that it became.")
    problem: Document | None = Field(description="Why inspection refused it.")
    created_at: datetime
    expires_at: datetime = Field(description="When it is forgotten, if nothing more comes.")

    @classmethod
    def of(cls, upload: records.Upload, *, offset: int, record: str | None) -> Self:
        if upload.finished_at is not None:
            state = "refused" if upload.error else "finished"
        else:
            state = "arrived" if offset == upload.size_bytes else "receiving"
        return cls(
            id=upload.id,
            kind=upload.kind,
            filename=upload.filename,
            name=upload.name,
            size_bytes=upload.size_bytes,
            offset=offset,
            state=state,
            record=record,
            problem=upload.error,
            created_at=upload.created_at,
            expires_at=upload.expires_at,
        )


class JobIn(BaseModel):
    """A job to create. Unknown fields are errors, here and anywhere in the spec."""

    model_config = ConfigDict(extra="forbid", protected_namespaces=())

    model: Id = Field(description="Id of an uploaded model.")
    dataset: Id = Field(description="Id of an uploaded dataset.")
    name: Name | None = Field(None, description="By default the names of model and dataset.")
    priority: int = Field(
        0,
        ge=-100,
        le=100,
        description="Of the jobs that wait for a device, those with the highest come first, then "
        "the oldest.",
    )
    time_limit_minutes: float | None = Field(
        None,
        gt=0,
        description="The job is ended and has failed once its runs have taken this long, all "
        "together. By default, and at most, the installation's limit. To stop training early and "
        "still get a result, set `max_minutes` in the spec.",
    )
    spec: Spec = Field(Spec(), description="What to do; every field has a default.")


class ClonePatch(RootModel[dict[str, Any]]):
    """A JSON merge patch (RFC 7396) of the document that the job was created with: `model`,
    `dataset`, `name`, `priority`, `time_limit_minutes` and `spec`. A null sets a field back to
    its default."""


class QueueOut(Shown):
    """Where a job waits. Unknown figures are null."""

    device: Device
    position: int | None = Field(
        description="From 1; jobs of all projects count. Null behind more than 1,000 jobs."
    )
    estimated_start: datetime | None = Field(
        description="From the plans of the jobs before it, corrected by what the last jobs on this "
        "device took; null until some have been measured."
    )
    warning: str | None = Field(description="Why it would wait without an end, as things are.")


class JobErrorOut(Out):
    model_config = ConfigDict(extra="allow")

    code: str
    message: str
    pointer: str | None = None
    rows: list[Document] = []


class JobSummary(Out):
    id: str
    name: str
    state: JobState
    model: str
    dataset: str
    priority: int
    cancel_requested: bool
    runs: int = Field(description="Runs that were started and not handed back.")
    created_at: datetime
    started_at: datetime | None
    finished_at: datetime | None
    error: JobErrorOut | None = Field(description="Why it failed.")
    selection: StoredSelection | None = Field(description="What was chosen; null until then.")

    @classmethod
    def listed(cls, record: records.Job, selection: Document | None) -> Self:
        """Of a record without its documents (store.list_jobs)."""
        return cls(**cls._summary(record), selection=selection)

    @staticmethod
    def _summary(record: records.Job) -> dict[str, Any]:
        return {
            "id": record.id,
            "name": record.name,
            "state": record.state,
            "model": record.model_id,
            "dataset": record.dataset_id,
            "priority": -record.precedence,
            "cancel_requested": record.cancel_requested,
            "runs": record.attempts,
            "created_at": record.created_at,
            "started_at": record.started_at,
            "finished_at": record.finished_at,
            "error": record.error,
        }


class JobOut(JobSummary):
    spec: StoredSpec
    plan: StoredPlan | None
    report: StoredReport | None = Field(description="The whole report, once it has succeeded.")
    time_limit_minutes: float | None
    queue: QueueOut | None = Field(None, description="Of a job that is queued.")

    @classmethod
    def of(cls, record: records.Job, outlook: Outlook | None = None) -> Self:
        limit = record.time_limit_seconds
        return cls(
            **cls._summary(record),
            selection=(record.report or {}).get("selection"),
            spec=record.spec,
            plan=record.plan,
            report=record.report,
            time_limit_minutes=None if limit is None else limit / 60,
            queue=None if outlook is None else QueueOut.of(outlook),
        )


class PlanOut(Out):
    plan: StoredPlan


class EventOut(Out):
    number: int = Field(description="Counts from 1 in each job, without gaps.")
    kind: str = Field(
        description="queued, started, resumed, progress, checkpoint, requeued, succeeded, failed "
        "or cancelled."
    )
    run: int = Field(description="The run that it belongs to; 0 before the first.")
    data: Document
    created_at: datetime

    @classmethod
    def of(cls, record: records.Event) -> Self:
        return cls(
            number=record.number,
            kind=record.kind,
            run=record.fence,
            data=record.data,
            created_at=record.created_at,
        )


class EventPage(Out):
    items: list[EventOut]
    next: int = Field(description="Ask again with ?after= this number; unchanged if none came.")
    ended: bool = Field(description="True once the job's last event is in this page or before it.")


class SubnetworksOut(Out):
    state: JobState
    main_metric: str | None = Field(
        description="What every accuracy is and every drop is of; null until the job has succeeded."
    )
    teacher: StoredTeacher | None
    items: list[StoredSubnetwork] = Field(description="Empty until the job has succeeded.")
    selection: StoredSelection | None


class ArtifactOut(Out):
    id: str
    job: str
    path: str = Field(description="<subnetwork>/<format>/<file>, or <subnetwork>/bundle.tar.gz.")
    size_bytes: int
    sha256: str
    media_type: str
    created_at: datetime
    content_url: str

    @classmethod
    def of(cls, record: records.Artifact) -> Self:
        return cls(
            id=record.id,
            job=record.job_id,
            path=record.path,
            size_bytes=record.size_bytes,
            sha256=record.sha256,
            media_type=record.media_type,
            created_at=record.created_at,
            content_url=f"/v1/artifacts/{record.id}/content",
        )


class WorkerDeviceOut(Out):
    device: Device
    slots: int = Field(description="Jobs that it runs at once; of gpu, its GPUs.")
    busy: int


class WorkerOut(Out):
    id: str
    name: str = Field(description="Host, process and a few random characters; also in events.")
    state: WorkerState
    devices: list[WorkerDeviceOut] = Field(description="What it has announced.")
    jobs: list[str] = Field(description="Jobs of your project that it runs now.")
    started_at: datetime
    last_heartbeat: datetime
    drain_requested_at: datetime | None

    @classmethod
    def of(cls, record: records.Worker, load: Load, *, at: datetime, project_id: str) -> Self:
        slots = {Device.CPU: record.slots, Device.GPU: record.gpus}
        return cls(
            id=record.id,
            name=record.name,
            state=state_of(record, load, at=at),
            devices=[
                WorkerDeviceOut(device=device, slots=count, busy=load.busy[device])
                for device, count in slots.items()
                if count
            ],
            jobs=[job_id for job_id, of_project in load.jobs if of_project == project_id],
            started_at=record.started_at,
            last_heartbeat=record.seen_at,
            drain_requested_at=record.drain_requested_at,
        )


class SelectionIn(BaseModel):
    """Constraints to select under. Unknown fields are errors."""

    model_config = ConfigDict(extra="forbid")

    constraints: ConstraintSpec = Field(description="In place of the job's own, all of them.")


class SelectionOut(Out):
    job: str
    constraints: ConstraintSpec
    selection: Selection
    artifacts: list[ArtifactOut] = Field(
        description="The files of the selected sub-network; empty where none was, or once they "
        "were deleted or their retention has ended: the answer is from measurements, which stay."
    )


class ProjectIn(BaseModel):
    """A project to create."""

    model_config = ConfigDict(extra="forbid")

    name: Name


class ProjectOut(Shown):
    id: str
    name: str
    created_at: datetime


_Bytes = Annotated[int, Field(ge=0, le=MAX_BYTES)]
_Count = Annotated[int, Field(ge=0, le=MAX_COUNT)]


class QuotasIn(BaseModel):
    """A project's quotas; null: no limit. Unknown fields are errors."""

    model_config = ConfigDict(extra="forbid", strict=True)

    bytes: _Bytes | None = Field(
        None, description="In models and datasets (the same bytes once), artifacts, and uploads."
    )
    uploads: _Count | None = Field(
        None, description="Models, datasets and resumable uploads under way."
    )
    running_jobs: _Count | None = Field(None, description="Others wait in the queue.")
    queued_jobs: _Count | None = None


class QuotasUsed(Out):
    bytes: int
    uploads: int
    running_jobs: int
    queued_jobs: int


class QuotasOut(Out):
    limits: QuotasIn
    used: QuotasUsed


class PastRetention(Shown):
    kind: str = Field(description="`artifact`, `model` or `dataset`.")
    id: str
    name: str
    size_bytes: int
    since: datetime = Field(description="When it was last of use.")


class RetentionOut(Out):
    days: float | None = Field(description="Null where no retention period is set.")
    items: list[PastRetention] = Field(description="The oldest of each kind, `limit` of each.")

    @classmethod
    def of(cls, found: Sequence[Expired], *, days: float | None) -> Self:
        return cls(days=days, items=[PastRetention.of(each) for each in found])


class KeyIn(BaseModel):
    """An API key to create. Unknown fields are errors."""

    model_config = ConfigDict(extra="forbid")

    name: Name = Field(description="What it is for, so that it can be told from others later.")
    role: Role = Field(
        description="`viewer` reads; `submitter` also uploads, creates and cancels jobs; `admin` "
        "also makes and revokes keys, sets up webhooks and reads the audit log."
    )
    expires_at: Time | None = Field(
        None, description="When it ends, with its time zone; null or left out: never."
    )


class KeyOut(Shown):
    """An API key's record; the key itself is kept nowhere."""

    id: str
    name: str
    role: Role
    created_at: datetime
    expires_at: datetime | None
    last_used_at: datetime | None = Field(description="To the minute.")
    revoked_at: datetime | None


class KeyCreated(KeyOut):
    key: str = Field(description="Shown this once.")

    @classmethod
    def shown_once(cls, record: records.ApiKey, key: str) -> Self:
        return cls(**KeyOut.of(record).model_dump(), key=key)


class ProjectCreated(ProjectOut):
    first_key: KeyCreated

    @classmethod
    def with_key(cls, record: records.Project, key: KeyCreated) -> Self:
        return cls(**ProjectOut.of(record).model_dump(), first_key=key)


class MeOut(Out):
    key: str = Field(description="The key's id.")
    name: str = Field(description="The key's name.")
    role: Role
    expires_at: datetime | None
    project: ProjectOut
    is_operator: bool = Field(description="Whether this key may create projects.")


class AuditEntryOut(Shown):
    id: str
    at: datetime = Field(validation_alias="created_at")
    key: str | None = Field(
        validation_alias="key_id",
        description="Id of the key that did it; null for the service's host: its start or its "
        "command line.",
    )
    action: str = Field(examples=["job.created"])
    target: str = Field(description="Id of the record that it was done to.")
    details: Document
    request_id: str | None = Field(description="By which the request's log line is found.")
    client: str | None = Field(description="Address that the request came from.")


class WebhookIn(BaseModel):
    """A webhook to create. Unknown fields are errors."""

    model_config = ConfigDict(extra="forbid")

    url: Annotated[str, StringConstraints(max_length=MAX_URL)] = Field(
        description="Where to POST: https, a host whose addresses are all public, port 80, 443 or "
        "from 1024 on, without user, password and fragment. The service's operator may allow "
        "other networks, and plain http in them.",
    )
    events: Annotated[list[WebhookEvent], Field(min_length=1, max_length=len(WebhookEvent))] = (
        Field(list(JOB_ENDS), description="What is told; by default the ends of jobs.")
    )


class WebhookOut(Shown):
    id: str
    url: str
    events: list[str]
    created_at: datetime
    failing_since: datetime | None = Field(
        description="The first failure that no success has followed."
    )
    disabled_at: datetime | None = Field(description="From when on it is not called any more.")
    disabled_reason: str | None


class WebhookCreated(WebhookOut):
    secret: str = Field(
        description="For the libraries of Standard Webhooks, which check its signatures. Shown "
        "this once."
    )


class DeliveryAttemptOut(Out):
    at: datetime
    status: int | None = Field(description="That was answered; null where nothing was.")
    error: str | None
    milliseconds: int


class DeliveryOut(Shown):
    id: str = Field(description="Also the message's `webhook-id`, the same at each attempt.")
    event: str
    job: str = Field(validation_alias="job_id")
    event_number: int
    state: DeliveryState
    attempts: list[DeliveryAttemptOut] = Field(description="Oldest first; the newest 30.")
    next_attempt_at: datetime | None
    created_at: datetime
    ended_at: datetime | None


class Fault(Out):
    detail: str
    pointer: str | None = Field(None, description="JSON pointer into the request's body.")
    parameter: str | None = None
    header: str | None = None


class BrokenRow(Out):
    file: str
    line: int = Field(description="From 1, the header line included.")
    message: str


class Problem(Out):
    """RFC 9457."""

    type: str = Field(examples=["urn:widthwise:problem:invalid-request"])
    title: str
    status: int
    detail: str
    instance: str
    pointer: str | None = None
    errors: list[Fault] | None = None
    rows: list[BrokenRow] | None = None
    request_id: str | None = None


class Health(Out):
    status: str


class Readiness(Out):
    status: str
    checks: dict[str, str]
