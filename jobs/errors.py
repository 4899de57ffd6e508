"""What can go wrong in the service, by meaning. The edge (REST, worker) gives it a form."""

from __future__ import annotations

from typing import Any, ClassVar

from compression.errors import CompressionError, RowError


class JobsError(Exception):
    """Base of this package's errors. `code` is stable; `message` is a plain sentence."""

    code = "jobs-error"

    def __init__(self, message: str, *, code: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        if code is not None:
            self.code = code


class NotFound(JobsError):
    """There is no such record in the project that asks."""

    code = "not-found"

    def __init__(self, kind: str, id: str) -> None:
        super().__init__(f"There is no {kind} {id!r}.")
        self.kind = kind
        self.id = id


class Gone(NotFound):
    """There was such a record, and its time is over."""

    code = "gone"

    def __init__(self, kind: str, id: str, message: str) -> None:
        super().__init__(kind, id)
        self.message = message
        self.args = (message,)


class Conflict(JobsError):
    """The record's state does not allow what was asked."""

    code = "conflict"

    def __init__(self, message: str, code: str = "conflict") -> None:
        super().__init__(message, code=code)


class KeyReused(JobsError):
    """An Idempotency-Key that was used for another request."""

    code = "idempotency-key-reused"


class StaleRun(JobsError):
    """A run wrote after its job was given to another run, or ended. The write was refused."""

    code = "stale-run"

    def __init__(self, job_id: str, fence: int) -> None:
        super().__init__(f"Run {fence} of {job_id} no longer holds the job.")
        self.job_id = job_id
        self.fence = fence


class UploadRejected(JobsError):
    """An upload that cannot be used; `rows` holds the first broken rows of a dataset.

    `pointer` is a file's name (or a JSON pointer into a document) where one is to blame.
    """

    code = "upload-rejected"

    def __init__(
        self,
        message: str,
        *,
        code: str = "upload-rejected",
        pointer: str | None = None,
        rows: tuple[RowError, ...] = (),
    ) -> None:
        super().__init__(message, code=code)
        self.pointer = pointer
        self.rows = rows

    @classmethod
    def of(cls, error: CompressionError) -> UploadRejected:
        """The library's complaint about a model or a dataset, as a refusal of its upload."""
        return cls(
            error.message,
            code=error.code,
            pointer=error.pointer,
            rows=getattr(error, "rows", ()),
        )


class StoreFull(JobsError):
    """The disk or bucket has no room left."""

    code = "store-full"


class StoreRefused(JobsError):
    """The disk or bucket does not take what is to be stored, whatever its room."""

    code = "store-refused"


class StoreUnreachable(JobsError):
    """The disk or bucket is not there, or does not answer as it should: it may do so again.
    `reason`: in the store's own words, for the log."""

    code = "store-unreachable"

    def __init__(self, reason: object) -> None:
        super().__init__("The object store cannot be reached, or does not answer as it should.")
        self.reason = " ".join(str(reason).split())[:500]


class QuotaExceeded(JobsError):
    """A project would have more than it may: see jobs.quotas. `used` is with what was asked."""

    code = "quota-exceeded"
    _WORDS: ClassVar = {
        "bytes": "bytes in models, datasets and artifacts",
        "uploads": "models, datasets and uploads under way",
        "queued_jobs": "queued jobs",
    }

    def __init__(self, quota: str, *, limit: int, used: int) -> None:
        super().__init__(
            f"The project may have {limit} {self._WORDS[quota]}; with this it would have {used}. "
            "Delete what is not needed, or ask the installation's operator for more."
        )
        self.quota = quota
        self.limit = limit
        self.used = used


class ObjectExists(JobsError):
    """An object key was about to be written a second time."""

    code = "object-exists"


class ObjectMissing(JobsError):
    """An object that a record names is not in the store, or is not what was stored."""

    code = "object-missing"


def as_json(error: CompressionError | JobsError) -> dict[str, Any]:
    """`{"code", "message", "pointer", "rows"}`, the form in which a job keeps its error."""
    return {
        "code": error.code,
        "message": error.message,
        "pointer": getattr(error, "pointer", None),
        "rows": [
            {"file": row.file, "line": row.line, "message": row.message}
            for row in getattr(error, "rows", ())
        ],
    }
