"""safetensors files whose header lies, and weights that are no numbers."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from tests.hostile.corpus import Corpus, Files, Hostile, Made, Place, made, model

FILE = "model.safetensors"
Header = dict[str, Any]
FIRST, SECOND = "bert.embeddings.LayerNorm.bias", "bert.embeddings.LayerNorm.weight"


def _file(header: bytes, data: bytes) -> bytes:
    return len(header).to_bytes(8, "little") + header + data


def _of(raw: Callable[[Place], bytes]) -> Callable[[Place], Files]:
    return lambda place: model(place, {FILE: raw(place)})


def _parts(place: Place) -> tuple[Header, bytes]:
    raw = bytes(model(place, {})[FILE])  # type: ignore[arg-type]
    length = int.from_bytes(raw[:8], "little")
    return json.loads(raw[8 : 8 + length]), raw[8 + length :]


def _claiming(**changes: Any) -> Hostile:
    """The first tensor's entry changed."""

    def raw(place: Place) -> bytes:
        header, data = _parts(place)
        header[FIRST] |= changes
        return _file(json.dumps(header).encode(), data)

    return Hostile("models", "damaged-weights", _of(raw))


def _edited(edit: Callable[[Header], object], kind: str = "damaged-weights") -> Hostile:
    def raw(place: Place) -> bytes:
        header, data = _parts(place)
        edit(header)
        return _file(json.dumps(header).encode(), data)

    return Hostile("models", kind, _of(raw))


def _headed(header: Made) -> Hostile:
    return Hostile("models", "damaged-weights", _of(lambda _: _file(made(header), bytes(64))))


def _raw(content: Callable[[bytes], bytes]) -> Hostile:
    def raw(place: Place) -> bytes:
        header, data = _parts(place)
        return content(_file(json.dumps(header).encode(), data))

    return Hostile("models", "damaged-weights", _of(raw))


def _holding(value: float, dtype: str = "F32") -> Hostile:
    """All weights of one value, of one type."""
    stored = {"F64": np.dtype("<f8"), "F32": np.dtype("<f4"), "F16": np.dtype("<f2")}

    def raw(place: Place) -> bytes:
        header, _ = _parts(place)
        header.pop("__metadata__", None)
        if dtype == "BF16":
            number = np.array([value], "<f4").tobytes()[2:]
        else:
            number = np.array([value], stored[dtype]).tobytes()
        data, position = b"", 0
        for entry in header.values():
            content = number * int(np.prod(entry["shape"]))
            entry |= {"dtype": dtype, "data_offsets": [position, position + len(content)]}
            data, position = data + content, position + len(content)
        return _file(json.dumps(header).encode(), data)

    return Hostile("models", "weights-not-finite", _of(raw))


def _swapped(header: Header) -> None:
    """Two tensors that share their bytes, and a gap where the second one was."""
    header[SECOND]["data_offsets"] = header[FIRST]["data_offsets"]


def _entry(name: str, **fields: Any) -> Mapping[str, Any]:
    return {name: {"dtype": "F32", "shape": [1], "data_offsets": [0, 4], **fields}}


WEIGHTS: Corpus = {
    "safetensors: tensors that overlap": _edited(_swapped),
    "safetensors: a type of half the bytes": _raw(lambda raw: raw.replace(b'"F32"', b'"F16"', 1)),
    "safetensors: bytes behind the last tensor": _raw(lambda raw: raw + b"evil"),
    "safetensors: cut short": _raw(lambda raw: raw[:-100]),
    "safetensors: a header of eight exabytes": _raw(lambda raw: b"\xff" * 7 + b"\x7f" + raw[8:]),
    "safetensors: a header of 30 MB": _headed(lambda: b"{" + b" " * 30_000_000 + b"}"),
    "safetensors: a header of a million values": _headed(
        lambda: b'{"x": [' + b"[]," * 1_500_000 + b"0]}"
    ),
    "safetensors: a deep header": _headed(b'{"x":' * 100_000 + b"0" + b"}" * 100_000),
    "safetensors: a name twice": _headed(
        b'{"x":{"dtype":"U8","shape":[64],"data_offsets":[0,64]},'
        b'"x":{"dtype":"U8","shape":[64],"data_offsets":[0,64]}}'
    ),
    "safetensors: a negative size": _claiming(shape=[-32]),
    "safetensors: negative sizes whose product fits": _claiming(shape=[-8, -4]),
    "safetensors: negative offsets": _claiming(data_offsets=[-128, 0]),
    "safetensors: an offset of an exabyte": _claiming(data_offsets=[0, 2**60]),
    "safetensors: sizes whose product overflows": _claiming(shape=[2**40, 2**40]),
    "safetensors: a size that is a fraction": _claiming(shape=[32.0]),
    "safetensors: a million dimensions": _claiming(shape=[1] * 100_000),
    "safetensors: a tensor of numbers that are not floats": Hostile(
        "models",
        "invalid-model",
        _of(
            lambda place: (
                lambda header, data: _file(
                    json.dumps(header).replace('"F32"', '"I32"').encode(), data
                )
            )(*_parts(place))
        ),
    ),
    "safetensors: parameters that nobody knows": Hostile(
        "models",
        "invalid-model",
        _of(lambda _: _file(json.dumps(_entry("../../etc/passwd")).encode(), bytes(4))),
    ),
    "safetensors: NaN": _holding(float("nan")),
    "safetensors: infinity": _holding(float("inf")),
    "safetensors: NaN in bfloat16": _holding(float("nan"), "BF16"),
    "safetensors: doubles beyond a float": _holding(1e300, "F64"),
}  # fmt: skip
