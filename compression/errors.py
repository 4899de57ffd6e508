"""What can be wrong with a model, a dataset or a spec, said so that a user can mend it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

Fault = TypeVar("Fault", bound=Mapping[str, Any])


@dataclass(frozen=True)
class RowError:
    """One broken row of a table. `line` counts from 1 and includes the header line."""

    file: str
    line: int
    message: str


class CompressionError(Exception):
    """Base of every error that a user of the library can mend.

    `pointer` is a JSON pointer into the spec (`/supernet/width_mults/2`) or a
    file's name; None where neither applies. `code` is stable, and the class's unless
    it says more exactly what is wrong.
    """

    code = "compression-error"

    def __init__(
        self, message: str, *, pointer: str | None = None, code: str | None = None
    ) -> None:
        super().__init__(message)
        self.message = message
        self.pointer = pointer
        if code is not None:
            self.code = code


def without_consequences(faults: Sequence[Fault]) -> list[Fault]:
    """Those of pydantic's `ValidationError.errors()` that say what to mend.

    A list that lost its broken items is "too short" only because of them.
    """

    def is_consequence(fault: Fault) -> bool:
        own = fault["loc"]
        return fault["type"] == "too_short" and any(
            other["loc"][: len(own)] == own != other["loc"] for other in faults
        )

    return [fault for fault in faults if not is_consequence(fault)]


class Interrupted(Exception):
    """The job was told to stop and has: no error, it goes on from its last checkpoint."""


class InvalidSpec(CompressionError):
    """The spec contradicts itself, the model or the dataset."""

    code = "invalid-spec"


class InvalidModel(CompressionError):
    """The model folder cannot be read, or its weights do not fit its configuration."""

    code = "invalid-model"


class InvalidDataset(CompressionError):
    """The dataset cannot be read; `rows` holds the first broken rows."""

    code = "invalid-dataset"

    def __init__(
        self,
        message: str,
        *,
        pointer: str | None = None,
        rows: tuple[RowError, ...] = (),
        code: str | None = None,
    ) -> None:
        super().__init__(message, pointer=pointer, code=code)
        self.rows = rows


class DeviceUnavailable(CompressionError):
    """The spec asks for a device that this host does not have."""

    code = "device-unavailable"


class TrainingDiverged(CompressionError):
    """A loss was not finite: nothing after it can be trusted."""

    code = "training-diverged"


class ReferenceFailed(CompressionError):
    """The process of the engine paddleslim did not come to its end."""

    code = "reference-failed"


class RankFailed(CompressionError):
    """One of several processes that train together did not come to its end."""

    code = "rank-failed"


class OutOfMemory(CompressionError):
    """The host's or the device's memory is too small for the spec; `pointer` says what to lower."""

    code = "out-of-memory"


class CheckpointRefused(CompressionError):
    """A checkpoint of another spec, model or dataset: going on from it would mix two jobs."""

    code = "checkpoint-refused"


class SigningKeyRefused(CompressionError):
    """A file that should hold an Ed25519 key does not."""

    code = "signing-key-refused"


class ExportFailed(CompressionError):
    """A format could not be written, or failed the parity gate."""

    code = "export-failed"
