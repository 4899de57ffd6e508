"""Reading a safetensors file that nobody has checked.

The format (huggingface.co/docs/safetensors): eight bytes give the header's length,
the header is JSON, the tensors follow without gaps. Every claim of the header is
held against the file before a byte of a tensor is read, so what is allocated never
exceeds what the file holds, and an error names the tensor.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from compression.errors import InvalidModel
from compression.teachers.fields import json_values, without_duplicates

Array = npt.NDArray[Any]

MAX_HEADER_BYTES = 25 * 2**20
MAX_HEADER_VALUES = 1_000_000  # about eight a tensor
MAX_DIMENSIONS = 8
# Bytes of one element. BF16 has no numpy type: read as its 16 bits.
_STORED: dict[str, np.dtype[Any]] = {
    "F64": np.dtype("<f8"),
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype("<u2"),
    "I64": np.dtype("<i8"),
    "I32": np.dtype("<i4"),
    "I16": np.dtype("<i2"),
    "I8": np.dtype("i1"),
    "U64": np.dtype("<u8"),
    "U32": np.dtype("<u4"),
    "U16": np.dtype("<u2"),
    "U8": np.dtype("u1"),
    "BOOL": np.dtype("?"),
}
_FLOATS = ("F64", "F32", "F16", "BF16")


@dataclass(frozen=True)
class Entry:
    """Where one tensor lies; `start` counts from the file's beginning, in bytes."""

    dtype: str
    shape: tuple[int, ...]
    start: int


class SafetensorsFile:
    """A file whose header has been checked; `entries` by the names the file gives."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.entries = _read_header(path)

    def read(self, name: str) -> Array:
        """The tensor as float32; InvalidModel where it is not of a float type or not finite."""
        entry = self.entries[name]
        if entry.dtype not in _FLOATS:
            raise self._error(f"parameter {name!r} is stored as {entry.dtype}, not as a float")
        stored = _STORED[entry.dtype]
        count = math.prod(entry.shape)
        flat = np.fromfile(self.path, dtype=stored, count=count, offset=entry.start)
        if flat.size != count:
            raise self._error(f"parameter {name!r} is cut short", code="damaged-weights")
        if entry.dtype == "BF16":
            values = bfloat16_to_float32(flat)
        else:
            with np.errstate(over="ignore"):  # what overflows becomes inf and is refused below
                values = flat.astype(np.float32, copy=False)
        if not np.isfinite(values).all():
            raise self._error(
                f"parameter {name!r} holds values that are not finite (NaN or inf)",
                code="weights-not-finite",
            )
        return values.reshape(entry.shape)

    def _error(self, message: str, code: str | None = None) -> InvalidModel:
        return InvalidModel(f"{self.path.name}: {message}", pointer=self.path.name, code=code)


def bfloat16_to_float32(bits: Array) -> npt.NDArray[np.float32]:
    """bfloat16 is the upper half of a float32; `bits` holds it as uint16."""
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def _read_header(path: Path) -> dict[str, Entry]:
    def error(message: str) -> InvalidModel:
        return InvalidModel(f"{path.name}: {message}", pointer=path.name, code="damaged-weights")

    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            first = file.read(8)
            length = int.from_bytes(first, "little")
            if len(first) < 8 or length > size - 8:
                raise error("is cut short: its header is longer than the file")
            if length > MAX_HEADER_BYTES:
                raise error(f"its header of {length} bytes is longer than {MAX_HEADER_BYTES}")
            raw = file.read(length)
    except OSError as problem:
        raise error("cannot be read") from problem
    if json_values(raw) > MAX_HEADER_VALUES:
        raise error(f"its header holds more than {MAX_HEADER_VALUES} values")
    try:
        header = json.loads(raw.decode("utf-8"), object_pairs_hook=without_duplicates)
    except RecursionError as problem:
        raise error("its header is nested too deeply") from problem
    except ValueError as problem:
        raise error(f"its header is not JSON: {problem}") from problem
    if not isinstance(header, dict):
        raise error("its header is not a JSON object")
    header.pop("__metadata__", None)

    data_start = 8 + length
    spans: list[tuple[int, int, str]] = []
    entries: dict[str, Entry] = {}
    for name, claim in header.items():
        shown = name if len(name) <= 200 else name[:197] + "..."
        if not isinstance(claim, dict) or not {"dtype", "shape", "data_offsets"} <= claim.keys():
            raise error(f"the header of {shown!r} lacks dtype, shape or data_offsets")
        dtype, shape, offsets = claim["dtype"], claim["shape"], claim["data_offsets"]
        if not isinstance(dtype, str) or dtype not in _STORED:
            raise error(f"the header of {shown!r} names the unknown dtype {str(dtype)[:20]!r}")
        if not _naturals(shape) or len(shape) > MAX_DIMENSIONS:
            raise error(f"the header of {shown!r} has a shape that is not one")
        if not _naturals(offsets) or len(offsets) != 2 or not offsets[0] <= offsets[1]:
            raise error(f"the header of {shown!r} has data_offsets that are not a range")
        start, end = offsets
        if end > size - data_start:
            raise error(
                f"the header puts {shown!r} beyond the end of the file: it lies, "
                "or the file is cut short"
            )
        if math.prod(shape) * _STORED[dtype].itemsize != end - start:
            raise error(
                f"the header gives {shown!r} {end - start} bytes, which do not hold "
                f"{dtype} of shape {shape}"
            )
        spans.append((start, end, shown))
        entries[name] = Entry(dtype=dtype, shape=tuple(shape), start=data_start + start)
    position = 0
    for start, end, shown in sorted(spans):
        if start != position:
            raise error(f"the header leaves a gap or an overlap before {shown!r}")
        position = end
    if position != size - data_start:
        raise error(f"{size - data_start - position} bytes follow the last tensor")
    return entries


def _naturals(value: object) -> bool:
    """A list of whole numbers from 0 to 2**62, the most that a file's offsets can mean."""
    return isinstance(value, list) and all(type(n) is int and 0 <= n <= 2**62 for n in value)
