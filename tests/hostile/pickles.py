"""Pickles: code in every form that runs when the file is loaded, and sizes that lie."""

from __future__ import annotations

import io
import os
import pickle
import zipfile
from collections.abc import Callable
from typing import Any

import numpy as np

from tests.builders import torch_zip
from tests.hostile.corpus import Corpus, Files, Hostile, Made, Place, made, model, paddle_model

PADDLE, TORCH = "model_state.pdparams", "pytorch_model.bin"


class _Calls:
    """Pickles as a call of the function, which loading makes."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> tuple[Any, ...]:
        return self.call


def _system(place: Place) -> _Calls:
    return _Calls(os.system, place.command)


def _text(place: Place) -> bytes:
    """The command as a BINUNICODE."""
    command = place.command.encode()
    return b"X" + len(command).to_bytes(4, "little") + command


def _paddle(raw: Callable[[Place], bytes]) -> Callable[[Place], Files]:
    return lambda place: paddle_model(place, {PADDLE: raw(place)})


def _torch(raw: Callable[[Place], bytes]) -> Callable[[Place], Files]:
    return lambda place: model(place, {"model.safetensors": None, TORCH: raw(place)})


def _runs(raw: Callable[[Place], bytes], kind: str = "unsafe-pickle") -> Hostile:
    """A pickle that runs the command where nobody guards, in PaddleNLP's file."""
    return Hostile("models", kind, _paddle(raw), bites=raw)


def _refused(raw: Made, kind: str = "unsafe-pickle") -> Hostile:
    return Hostile("models", kind, _paddle(lambda _: made(raw)))


def _zip(files: dict[str, bytes], method: int = zipfile.ZIP_STORED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return buffer.getvalue()


def _in_torch_zip(raw: Callable[[Place], bytes]) -> Callable[[Place], bytes]:
    return lambda place: _zip({"archive/data.pkl": raw(place)})


def _dumped(wrap: Callable[[Any], Any], protocol: int) -> Callable[[Place], bytes]:
    return lambda place: pickle.dumps(wrap(_system(place)), protocol)


SYSTEM = b"cposix\nsystem\n"
ARRAY = np.zeros(4, np.float32)
NAME = b"X\x01\x00\x00\x00w"


def _good_weights(place: Place) -> dict[str, Any]:
    loaded: dict[str, Any] = pickle.loads(  # our own, made a moment ago
        bytes(paddle_model(place, {})[PADDLE])  # type: ignore[arg-type]
    )
    return loaded


def _shared_storage(place: Place) -> bytes:
    """A storage of 32 MB, and ten thousand tensors of one element of it."""
    views = b"".join(
        b"X" + len(name).to_bytes(4, "little") + name
        + b"ctorch._utils\n_rebuild_tensor_v2\n((X\x07\x00\x00\x00storagectorch\nFloatStorage\n"
        + b"X\x01\x00\x00\x000X\x03\x00\x00\x00cpuJ" + (2**23).to_bytes(4, "little") + b"tQJ"
        + i.to_bytes(4, "little") + b"K\x01\x85K\x01\x85\x89ccollections\nOrderedDict\n)RtR"
        for i in range(10_000)
        for name in (b"w%d" % i,)
    )  # fmt: skip
    return _zip({"a/data.pkl": b"\x80\x02}(" + views + b"u.", "a/data/0": bytes(2**25)})


def _torch_zip_with(place: Place, edit: Callable[[bytes], bytes], method: int = 0) -> bytes:
    path = torch_zip(place.folder / "weights", {"w": np.arange(12, dtype=np.float32)})
    with zipfile.ZipFile(path) as archive:
        files = {name: archive.read(name) for name in archive.namelist()}
    edited = {n: edit(c) if n.endswith("data.pkl") else c for n, c in files.items()}
    return _zip(edited, method)


def _directory_of(entries: int) -> bytes:
    from tests.hostile.archives import many_entries

    return many_entries(entries)


PICKLES: Corpus = {
    # Code that runs when the file is loaded.
    "REDUCE, protocol 0": _runs(_dumped(lambda call: {"w": call}, 0)),
    "REDUCE, protocol 5": _runs(_dumped(lambda call: {"w": call}, 5)),
    "a call instead of a dict": _runs(_dumped(lambda call: call, 4)),
    "a call far down": _runs(_dumped(lambda call: {"w": [({"x": (ARRAY, [call])},)]}, 4)),
    "a call after good weights": _runs(
        lambda place: pickle.dumps({**_good_weights(place), "z": _system(place)}, 4)
    ),
    "an object array of dicts": _runs(
        _dumped(lambda call: {"w": np.array([{"a": call}], dtype=object)}, 5)
    ),
    "an array's dtype from a call": _runs(
        lambda place: b"cnumpy\ndtype\n(" + SYSTEM + b"(" + _text(place) + b"tRtR."
    ),
    "STACK_GLOBAL": _runs(
        lambda place: b"\x80\x04\x8c\x05posix\x8c\x06system\x93" + _text(place) + b"\x85R."
    ),
    "STACK_GLOBAL of a dotted attribute": _runs(
        lambda place: b"\x80\x04\x8c\x06shutil\x8c\x09os.system\x93" + _text(place) + b"\x85R."
    ),
    "INST": _runs(
        lambda place: b"(S" + repr(place.command).encode() + b"\niposix\nsystem\n."
    ),
    "OBJ": _runs(lambda place: b"(" + SYSTEM + _text(place) + b"o."),
    "a call that is popped again": _runs(
        lambda place: SYSTEM + _text(place) + b"\x85R0" + pickle.dumps({"w": ARRAY}, 2)[2:]
    ),
    "BUILD by a class's __setstate__": _runs(
        lambda place: b"cbuiltins\ntype\n(X\x01\x00\x00\x00xcbuiltins\nobject\n\x85}"
        + b"X\x0c\x00\x00\x00__setstate__" + SYSTEM + b"stR)\x81" + _text(place) + b"b."
    ),
    "eval": _runs(
        lambda place: b"cbuiltins\neval\n(V__import__('os').system(" + repr(place.command).encode()
        + b")\ntR."
    ),
    "functools.partial": _runs(
        lambda place: b"cfunctools\npartial\n(" + SYSTEM + _text(place) + b"tR)R."
    ),
    "map, which a tuple walks": _runs(
        lambda place: b"cbuiltins\ntuple\n(cbuiltins\nmap\n(" + SYSTEM + b"(" + _text(place)
        + b"ltRtR."
    ),
    "a pickle within, by pickle.loads": _runs(
        lambda place: pickle.dumps({"w": _Calls(pickle.loads, pickle.dumps(_system(place)))}, 4)
    ),
    "two pickles, the second one of code": Hostile(
        "models",
        "damaged-weights",
        _paddle(lambda place: pickle.dumps({"w": ARRAY}) + pickle.dumps(_system(place))),
    ),
    "in torch's zip": Hostile(
        "models", "unsafe-pickle", _torch(_in_torch_zip(_dumped(lambda call: {"w": call}, 2)))
    ),
    "in torch's zip, as a persistent id": Hostile(
        "models",
        "unsafe-pickle",
        _torch(_in_torch_zip(lambda p: b"\x80\x02}" + NAME + SYSTEM + _text(p) + b"\x85RQs.")),
    ),
    "in torch's zip, beside a good one": Hostile(
        "models",
        "damaged-weights",
        _torch(
            lambda place: _zip(
                {"a/data.pkl": b"}.", "b/data.pkl": pickle.dumps(_system(place), 2)}
            )
        ),
    ),
    "torch's storage from bytes": Hostile(
        "models",
        "unsafe-pickle",
        _torch(
            _in_torch_zip(
                lambda place: b"\x80\x02ctorch.storage\n_load_from_bytes\n("
                + b"B" + len(raw := pickle.dumps(_system(place))).to_bytes(4, "little") + raw
                + b"tR."
            )
        ),
    ),
    # What no file of weights needs.
    "a persistent id without a zip": _refused(b"NQ."),
    "the extension registry, EXT1": _refused(b"\x82\x01)R."),
    "the extension registry, EXT4": _refused(b"\x84\x01\x00\x00\x00)R."),
    "NEWOBJ of a known name": _refused(b"\x80\x04ccollections\nOrderedDict\n)\x81."),
    "NEWOBJ_EX": _refused(b"\x80\x04ccollections\nOrderedDict\n)}\x92."),
    "BUILD of a class": _refused(
        b"ccollections\nOrderedDict\n}X\x01\x00\x00\x00xK\x01sb."
    ),
    # Bombs.
    "a memo bomb": _refused(
        # Ten references to the list before, thirty times: 10^30 elements, were they unfolded.
        b"\x80\x02]q\x00(" + b"N" * 10 + b"e"
        + b"".join(b"]q%c(" % (i + 1) + b"h%c" % i * 10 + b"e" for i in range(30))
        + b"}" + NAME + b"h\x1es.",
        "damaged-weights",
    ),
    "two million opcodes": _refused(
        lambda: b"\x80\x02](" + b"N0" * 1_000_000 + b"e.", "pickle-bomb"
    ),
    "a stack of half a million": _refused(b"(" * 500_000 + b".", "pickle-bomb"),
    "bytes of four exabytes": _refused(
        b"\x8e" + (2**62).to_bytes(8, "little") + b"x.", "damaged-weights"
    ),
    "a number of a million digits": _refused(
        lambda: b"L" + b"9" * 1_000_000 + b"L\n.", "damaged-weights"
    ),
    "fifty names for one array": Hostile(
        "models",
        "pickle-bomb",
        _paddle(lambda _: pickle.dumps({str(i): a for a in [np.zeros(9999)] for i in range(50)})),
    ),
    "an array larger than its bytes": _refused(
        pickle.dumps({"w": ARRAY}, 3).replace(b"K\x04\x85", b"J\xff\xff\xff\x7f\x85"),
        "damaged-weights",
    ),
    "a name that is not printable": _refused(
        pickle.dumps({"\u202egpj.w": ARRAY}), "damaged-weights"
    ),
    "NaN": Hostile(
        "models",
        "weights-not-finite",
        _paddle(
            lambda place: pickle.dumps(
                {n: a * np.float32("nan") for n, a in _good_weights(place).items()}
            )
        ),
    ),
    # torch's zip.
    "a compressed data.pkl": Hostile(
        "models",
        "damaged-weights",
        _torch(lambda place: _torch_zip_with(place, lambda raw: raw, zipfile.ZIP_DEFLATED)),
    ),
    "ten thousand views of one storage": Hostile(
        "models", "invalid-model", _torch(_shared_storage)
    ),
    "torch's zip of a million entries": Hostile(
        "models", "pickle-bomb", _torch(lambda _: _directory_of(1_000_000))
    ),
    "torch's format from before 1.6": Hostile(
        "models",
        "weights-unsupported",
        _torch(lambda _: pickle.dumps(0x1950A86A20F9469CFC6C, 2) + pickle.dumps(1001, 2)),
    ),
}  # fmt: skip
