from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from compression.errors import InvalidModel
from compression.teachers.weights import SafetensorsFile, bfloat16_to_float32


def _file(path: Path, header: Any, data: bytes = b"", *, length: int | None = None) -> Path:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    size = len(raw) if length is None else length
    path.write_bytes(size.to_bytes(8, "little") + raw + data)
    return path


def _claim(**changes: Any) -> dict[str, Any]:
    return {"w": {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16], **changes}}


def test_what_the_library_writes_is_read(tmp_path: Path) -> None:
    arrays = {
        "a": np.arange(6, dtype=np.float32).reshape(2, 3),
        "half": np.array([0.5, -2.0], np.float16),
        "empty": np.zeros((0, 4), np.float32),
        "ids": np.arange(3),
    }
    save_file(arrays, tmp_path / "w", metadata={"format": "np"})
    file = SafetensorsFile(tmp_path / "w")
    assert {name: entry.shape for name, entry in file.entries.items()} == {
        name: array.shape for name, array in arrays.items()
    }
    for name in ("a", "half", "empty"):
        np.testing.assert_array_equal(file.read(name), arrays[name].astype(np.float32))


def test_bfloat16_is_the_upper_half_of_float32(tmp_path: Path) -> None:
    values = np.array([1.0, -0.15625, 3.0e38, 0.0], np.float32)
    bits = (values.view(np.uint32) >> 16).astype("<u2")
    claim = {"w": {"dtype": "BF16", "shape": [4], "data_offsets": [0, 8]}}
    read = SafetensorsFile(_file(tmp_path / "w", claim, bits.tobytes())).read("w")
    np.testing.assert_allclose(read, values, rtol=2**-8)
    np.testing.assert_array_equal(read, bfloat16_to_float32(bits))


DATA = np.ones(4, np.float32).tobytes()


@pytest.mark.parametrize(
    ("header", "data", "message"),
    [
        (_claim(data_offsets=[0, 1 << 40]), DATA, "beyond the end of the file"),
        (_claim(data_offsets=[16, 32]), DATA, "beyond the end"),
        (_claim(), DATA[:-1], "cut short"),
        (_claim(), DATA + b"x", "1 bytes follow the last tensor"),
        (_claim(data_offsets=[8, 0]), DATA, "not a range"),
        (_claim(data_offsets=[-16, 0]), DATA, "not a range"),
        (_claim(data_offsets=[0, 16, 32]), DATA, "not a range"),
        (_claim(data_offsets=[0.0, 16.0]), DATA, "not a range"),
        (_claim(shape=[4, 4]), DATA, "do not hold"),
        (_claim(shape=[1 << 40, 1 << 40]), DATA, "do not hold"),
        (_claim(shape=[-2, -2]), DATA, "a shape that is not one"),
        (_claim(shape=[True, 4]), DATA, "a shape that is not one"),
        (_claim(shape="22"), DATA, "a shape that is not one"),
        (_claim(shape=[1] * 100), DATA, "a shape that is not one"),
        (_claim(dtype="F64"), DATA, "do not hold"),
        (_claim(dtype="O"), DATA, "unknown dtype"),
        (_claim(dtype=["F32"]), DATA, "unknown dtype"),
        ({"w": 3}, DATA, "lacks dtype"),
        ({"w": {"dtype": "F32"}}, DATA, "lacks dtype"),
        ([], DATA, "not a JSON object"),
        (b"{", DATA, "not JSON"),
        (b"\xff\xfe", DATA, "not JSON"),
        (b"[" * 100_000, DATA, "nested too deeply"),
        (
            {**_claim(), "v": {"dtype": "F32", "shape": [2], "data_offsets": [8, 16]}},
            DATA,
            "a gap or an overlap before 'v'",
        ),
        (_claim(shape=[2], data_offsets=[8, 16]), DATA, "a gap or an overlap before 'w'"),
        (
            b'{"w":{"dtype":"F32","shape":[4],"data_offsets":[0,16]},'
            b'"w":{"dtype":"F32","shape":[4],"data_offsets":[0,16]}}',
            DATA,
            "stands twice",
        ),
    ],
)
def test_a_header_that_lies_is_refused(
    tmp_path: Path, header: Any, data: bytes, message: str
) -> None:
    with pytest.raises(InvalidModel, match=message) as caught:
        SafetensorsFile(_file(tmp_path / "model.safetensors", header, data))
    assert caught.value.pointer == "model.safetensors"


@pytest.mark.parametrize("length", [1 << 62, 30 * 2**20, 200])
def test_a_length_that_lies_is_refused(tmp_path: Path, length: int) -> None:
    with pytest.raises(InvalidModel):
        SafetensorsFile(_file(tmp_path / "w", _claim(), DATA, length=length))


def test_every_truncation_is_refused(tmp_path: Path) -> None:
    whole = _file(tmp_path / "whole", _claim(), DATA).read_bytes()
    for size in range(len(whole)):
        (tmp_path / "cut").write_bytes(whole[:size])
        with pytest.raises(InvalidModel):
            SafetensorsFile(tmp_path / "cut")


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite_are_refused_by_name(tmp_path: Path, value: float) -> None:
    save_file({"some.weight": np.array([0.0, value], np.float32)}, tmp_path / "w")
    with pytest.raises(InvalidModel, match=r"some\.weight"):
        SafetensorsFile(tmp_path / "w").read("some.weight")


def test_float64_beyond_float32_is_refused(tmp_path: Path) -> None:
    save_file({"w": np.array([1e300])}, tmp_path / "w")
    with pytest.raises(InvalidModel, match="not finite"):
        SafetensorsFile(tmp_path / "w").read("w")
