from __future__ import annotations

import os
import pickle
import random
import shutil
import tracemalloc
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from safetensors.numpy import load_file

from jobs.errors import UploadRejected
from jobs.pickles import convert
from tests.builders import torch_zip


def _convert(folder: Path, raw: bytes, name: str = "model_state.pdparams") -> dict[str, Any]:
    source, out = folder / name, folder / "model.safetensors"
    source.write_bytes(raw)
    out.unlink(missing_ok=True)
    convert(source, out)
    return dict(load_file(out))


def _refused(folder: Path, raw: bytes, name: str = "model_state.pdparams") -> UploadRejected:
    with pytest.raises(UploadRejected) as caught:
        _convert(folder, raw, name)
    assert caught.value.pointer == name
    return caught.value


ARRAYS: dict[str, npt.NDArray[Any]] = {
    "linear.weight": np.arange(12, dtype=np.float32).reshape(3, 4),
    "fortran": np.asfortranarray(np.arange(6, dtype=np.float64).reshape(2, 3)),
    "big.endian": np.arange(5, dtype=">f4"),
    "half": np.array([0.5, -1.5], np.float16),
    "numbers": np.arange(4, dtype=np.int64),
    "flags": np.array([True, False]),
    "scalar": np.float32(2.5).reshape(()),
    "empty": np.zeros((0, 3), np.float32),
}


@pytest.mark.parametrize("protocol", range(6))
def test_arrays_of_every_protocol_come_out_as_they_went_in(tmp_path: Path, protocol: int) -> None:
    found = _convert(tmp_path, pickle.dumps(OrderedDict(ARRAYS), protocol))
    assert found.keys() == ARRAYS.keys()
    for name, array in ARRAYS.items():
        np.testing.assert_array_equal(found[name], array)
        assert found[name].shape == array.shape


class _Named:
    """Pickles as paddle pickles a tensor: a call of tuple with (name, array)."""

    def __init__(self, name: str, array: npt.NDArray[Any]) -> None:
        self.pair = (name, array)

    def __reduce__(self) -> tuple[Any, ...]:
        return tuple, (self.pair,)


@pytest.mark.parametrize("protocol", [2, 4])
def test_paddles_own_forms(tmp_path: Path, protocol: int) -> None:
    array = ARRAYS["linear.weight"]
    bits = (array.view(np.uint32) >> 16).astype(np.uint16)  # paddle's bfloat16
    raw = pickle.dumps(
        {
            "w": _Named("linear_0.w_0", array),
            "bf16": bits,
            "StructuredToParameterName@@": {"w": "linear_0.w_0"},
        },
        protocol,
    )
    source, out = tmp_path / "x.pdparams", tmp_path / "x.safetensors"
    source.write_bytes(raw)
    convert(source, out)
    assert b'"bf16": {"dtype": "BF16"' in out.read_bytes()
    assert b"Structured" not in out.read_bytes()
    source.write_bytes(pickle.dumps({"w": _Named("linear_0.w_0", array)}, protocol))
    out.unlink()
    convert(source, out)
    np.testing.assert_array_equal(load_file(out)["w"], array)


@pytest.mark.parametrize("as_parameters", [False, True])
def test_torchs_zip(tmp_path: Path, as_parameters: bool) -> None:
    weights = {
        name: ARRAYS[name] for name in ("linear.weight", "half", "numbers", "empty", "scalar")
    }
    path = torch_zip(tmp_path / "pytorch_model.bin", weights, as_parameters=as_parameters)
    found = _convert(tmp_path, path.read_bytes(), path.name)
    assert found.keys() == weights.keys()
    for name, array in weights.items():
        np.testing.assert_array_equal(found[name], array)


# --- hostile pickles ------------------------------------------------------------------------


class _Calls:
    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> tuple[Any, ...]:
        return self.call


def _touch(canary: Path) -> str:
    return f"touch '{canary}'"


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize(
    "wrap",
    [
        lambda call: call,
        lambda call: {"w": call},
        lambda call: {"w": np.zeros(2, np.float32), "x": [(call,)]},
        lambda call: {"w": ("name", call)},
        lambda call: OrderedDict(w=call),
        lambda call: np.array([call], dtype=object),
        lambda call: {"w": np.array([{"a": call}], dtype=object)},
    ],
)
def test_a_call_is_refused_and_ran_nothing(
    tmp_path: Path, protocol: int, wrap: Callable[[Any], Any]
) -> None:
    canary = tmp_path / "canary"
    raw = pickle.dumps(wrap(_Calls(os.system, _touch(canary))), protocol)
    pickle.loads(raw)  # the control: it does bite where it is loaded
    assert canary.exists()
    canary.unlink()
    _refused(tmp_path, raw)
    assert not canary.exists()


def _hand_written(canary: Path) -> dict[str, bytes]:
    """Opcodes that pickle.dumps does not emit, each of them calling os.system when loaded."""
    text = _touch(canary).encode()
    short = b"\x8c" + bytes([len(text)]) + text
    system = b"cposix\nsystem\n"
    by_stack = b"\x8c\x05posix\x8c\x06system\x93"
    return {
        "GLOBAL, REDUCE": system + b"(" + short + b"tR.",
        "STACK_GLOBAL, REDUCE": b"\x80\x04" + by_stack + short + b"\x85R.",
        "INST": b"(S" + repr(text.decode()).encode() + b"\niposix\nsystem\n.",
        "OBJ": b"(" + system + short + b"o.",
        "through the memo": system + b"q\x00" + b"0" + b"h\x00" + short + b"\x85R.",
        "a name from the memo": b"\x80\x04\x8c\x05posix\x94\x8c\x06system\x94h\x00h\x01\x93"
        + short
        + b"\x85R.",
        "within a dict": b"}X\x01\x00\x00\x00w" + system + short + b"\x85Rs.",
        "then a good object on top": system + short + b"\x85R0}.",
        "eval": b"c__builtin__\neval\n(V__import__('os').system(\"" + text + b'")\ntR.',
        "numpy's own exec": b'cnumpy.testing._private.utils\nrunstring\n(Vimport os; os.system("'
        + text
        + b'")\n}tR.',
        "dotted names": b"\x80\x04\x8c\x02os\x8c\x06system\x93" + short + b"\x85R.",
        "dotted attribute": b"\x80\x04\x8c\x06shutil\x8c\x09os.system\x93" + short + b"\x85R.",
    }


def test_hand_written_calls_are_refused_and_ran_nothing(tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    for form, raw in _hand_written(canary).items():
        pickle.loads(raw)
        assert canary.exists(), f"the control of {form!r} does not bite"
        canary.unlink()
        error = _refused(tmp_path, raw)
        assert error.code == "unsafe-pickle", form
        assert not canary.exists(), form
        # The same within torch's zip.
        path = tmp_path / "pytorch_model.bin"
        with zipfile.ZipFile(path, "w") as file:
            file.writestr("archive/data.pkl", raw)
        assert _refused(tmp_path, path.read_bytes(), path.name).code == "unsafe-pickle", form
        assert not canary.exists(), form


NAME = b"X\x01\x00\x00\x00w"
ARRAY = pickle.dumps(np.zeros(2, np.float32), 2)[2:-1]


@pytest.mark.parametrize(
    "raw",
    [
        # Names on the list, used for what they are not for.
        b"ccollections\nOrderedDict\n(lp0\nNtb.",
        b"cnumpy\nndarray\n(K\x03tR.",
        b"cnumpy\ndtype\n(X\x01\x00\x00\x00O\x89\x88tR.",
        b"cnumpy\ndtype\n(X\x02\x00\x00\x00f4\x89\x88tR}X\x01\x00\x00\x00xK\x01sb.",
        b"cbuiltins\ntuple\n(K\x05tR.",
        b"cbuiltins\ngetattr\n.",
        b"ccopyreg\n_reconstructor\n(cbuiltins\nobject\ncbuiltins\nobject\nNtR.",
        b"ccopy_reg\n_reconstructor\n.",
        b"c_codecs\nencode\n(X\x01\x00\x00\x00ax\x04\x00\x00\x00utf7tR.",
        b"c_codecs\ndecode\n.",
        b"cnumpy.core.multiarray\nfromfile\n.",
        b"cnumpy\nload\n.",
        b"cnumpy.core.multiarray\n_reconstruct\n(cposix\nsystem\nK\x00\x85C\x01btR.",
        b"ctorch\nFloatStorage\n.",  # only in torch's zip
        # Opcodes that no file of weights needs.
        b"\x82\x01.", b"\x83\x01\x00.", b"\x84\x01\x00\x00\x00.",  # extension registry
        b"P0\n.", b"N" + b"Q.",  # persistent ids
        b"\x80\x04ccollections\nOrderedDict\n)\x81.",  # NEWOBJ
        b"\x80\x04ccollections\nOrderedDict\n)}\x92.",  # NEWOBJ_EX
        b"\x80\x05\x97.", b"\x80\x05\x97\x98.",  # out-of-band buffers
        b"\x80\x04\x8f.", b"\x80\x04(\x91.",  # sets
        # Structures that are no arrays by name.
        b"N.", b"K\x01.", b"].", b"}" + NAME + b"K\x01s.", b"}K\x01" + ARRAY + b"s.",
        b"}" + NAME + b"}s.", b"}" + NAME + b"(lp0\nh\x00as.",
        b"}q\x00" + NAME + b"h\x00s.",  # contains itself
        b"]q\x00h\x00a.",
        b"}" + NAME + b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(K\x00tC\x01btRs.",
        # Damage.
        b"", b".", b"}", b"(.", b"0.", b"t.", b"R.", b"b.", b"s.", b"a.", b"h\x07.", b"\x93.",
        b"\xff.", b"}" + NAME + b".", b"K\x01K\x01.", b"(((.", b"(}s.", b"\x85.", b"2.", b"1.",
    ],
)  # fmt: skip
def test_anything_but_arrays_by_name_is_refused(tmp_path: Path, raw: bytes) -> None:
    assert _refused(tmp_path, raw).code in ("unsafe-pickle", "damaged-weights")


@pytest.mark.parametrize(
    "raw",
    [
        b"\x8e" + (2**62).to_bytes(8, "little") + b"x.",  # BINBYTES8 of four exabytes
        b"\x80\x05\x96" + (2**40).to_bytes(8, "little") + b"x.",  # BYTEARRAY8
        b"\x8d" + (2**40).to_bytes(8, "little") + b"x.",  # BINUNICODE8
        b"\x8b" + (2**31 - 1).to_bytes(4, "little") + b"x.",  # LONG4
        b"T" + (2**31 - 1).to_bytes(4, "little") + b"x.",  # BINSTRING
        b"Nr" + (2**32 - 1).to_bytes(4, "little") + b".",  # a memo of four thousand million
        b"N" + b"p99999999999999\n" + b".",
        b"L" + b"9" * 1_000_000 + b"L\n.",
        b"\x80\x04\x95" + (2**63 - 1).to_bytes(8, "little") + b"N.",  # FRAME
        b"(" * 500_000 + b".",
        b"N" + b"\x85" * 200_000 + b".",  # a very deep tuple
        b"]" * 50_000 + b"a" * 49_999 + b".",
        b"}" + NAME + b"N" + b"\x85" * 100_000 + b"s.",
    ],
)
def test_size_bombs_and_depth_are_refused_without_their_memory(tmp_path: Path, raw: bytes) -> None:
    tracemalloc.start()
    try:
        _refused(tmp_path, raw)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 2**29  # not the gigabytes that the pickle asks for


def _array_pickle(*, shape: bytes, data: bytes) -> bytes:
    """{"w": array} whose claimed shape and content are given."""
    good = pickle.dumps({"w": np.zeros(4, np.float32)}, 3)
    assert good.count(b"K\x04\x85") == 1
    content = b"C\x10" + bytes(16)
    assert good.count(content) == 1
    return good.replace(b"K\x04\x85", shape).replace(
        content, b"B" + len(data).to_bytes(4, "little") + data
    )


@pytest.mark.parametrize(
    ("shape", "data"),
    [
        (b"K\x05\x85", bytes(16)),
        (b"K\x04\x85", bytes(15)),
        (b"K\x04\x85", b""),
        (b"\x8a\x06\xff\xff\xff\xff\xff\x00\x85", bytes(16)),
        (b"J\xff\xff\xff\xff\x85", bytes(16)),
        (b"(" + b"K\x01" * 40 + b"K\x04t", bytes(16)),
        (b"G" + bytes(8) + b"\x85", bytes(16)),
        (b"\x88K\x04\x86", bytes(16)),
        (b"]", bytes(16)),
    ],
)
def test_an_array_must_fill_its_bytes_exactly(tmp_path: Path, shape: bytes, data: bytes) -> None:
    assert _convert(tmp_path, _array_pickle(shape=b"K\x04\x85", data=bytes(16))).keys() == {"w"}
    assert _refused(tmp_path, _array_pickle(shape=shape, data=data)).code == "damaged-weights"


@pytest.mark.parametrize(
    "array",
    [
        np.array(["text"]),
        np.array([b"text"]),
        np.zeros(2, [("a", "f4"), ("b", "f4")]),
        np.zeros(2, "M8[s]"),
        np.zeros(2, np.complex64),
        np.zeros(2, "V4"),
        np.zeros(2, np.longdouble),
    ],
)
@pytest.mark.parametrize("protocol", [2, 5])
def test_arrays_of_other_things_than_numbers_are_refused(
    tmp_path: Path, array: npt.NDArray[Any], protocol: int
) -> None:
    _refused(tmp_path, pickle.dumps({"w": array}, protocol))


@pytest.mark.parametrize("name", ["", "a\nb", "a" * 600, "__metadata__", "\u202e", "\x00"])
def test_odd_parameter_names_are_refused(tmp_path: Path, name: str) -> None:
    _refused(tmp_path, pickle.dumps({name: np.zeros(2, np.float32)}))


def test_many_names_for_one_array_do_not_multiply_it(tmp_path: Path) -> None:
    array = np.zeros(10_000, np.float32)
    tied = pickle.dumps({"a": array, "b": array})
    assert _convert(tmp_path, tied).keys() == {"a", "b"}
    error = _refused(tmp_path, pickle.dumps({str(i): array for i in range(50)}))
    assert "describe arrays of 2000000 bytes" in error.message


def test_every_truncation_and_random_damage_is_refused_or_harmless(tmp_path: Path) -> None:
    chooser = random.Random(0)
    for protocol in (0, 2, 4):
        whole = pickle.dumps({"w": ARRAYS["linear.weight"]}, protocol)
        for size in range(0, len(whole), 7):
            _refused(tmp_path, whole[:size])
        for _ in range(300):
            damaged = bytearray(whole)
            for _ in range(chooser.randint(1, 4)):
                damaged[chooser.randrange(len(damaged))] = chooser.randrange(256)
            try:
                found = _convert(tmp_path, bytes(damaged))
            except UploadRejected:
                continue
            assert all(isinstance(array, np.ndarray) for array in found.values())


# --- torch's zip ----------------------------------------------------------------------------


def _repacked(path: Path, edit: Callable[[str, bytes], bytes | None], method: int = 0) -> bytes:
    copy = path.with_name("copy")
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(copy, "w", method) as new:
        for name in old.namelist():
            content = edit(name, old.read(name))
            if content is not None:
                new.writestr(name, content)
    return copy.read_bytes()


def _int(number: int) -> bytes:
    return b"J" + number.to_bytes(4, "little", signed=True)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (_int(3) + _int(4) + b"t", _int(3) + _int(5) + b"t"),  # more than the storage holds
        (_int(3) + _int(4) + b"t", _int(30000) + _int(30000) + b"t"),
        (_int(4) + _int(1) + b"t", _int(0) + _int(7) + b"t"),  # strides that run out of it
        (_int(4) + _int(1) + b"t", _int(-4) + _int(1) + b"t"),
        (_int(4) + _int(1) + b"t", _int(1) + b"t"),
        (b"tQ" + _int(0), b"tQ" + _int(1)),  # an offset
        (b"tQ" + _int(0), b"tQ" + _int(-1)),
        (_int(12) + b"tQ", _int(13) + b"tQ"),  # a storage that is longer than its file
        (b"FloatStorage", b"DoubleStorage"),
        (b"FloatStorage", b"UntypedStorage"),
        (b"X\x07\x00\x00\x00storage", b"X\x07\x00\x00\x00otherXY"),
        (b"X\x01\x00\x00\x000", b"X\x09\x00\x00\x00../../etc"),
        (b"_rebuild_tensor_v2", b"_rebuild_qtensor"),
    ],
)
def test_tensors_that_leave_their_storage_are_refused(
    tmp_path: Path, old: bytes, new: bytes
) -> None:
    path = torch_zip(tmp_path / "good.bin", {"w": ARRAYS["linear.weight"]})

    def edit(name: str, content: bytes) -> bytes:
        if not name.endswith("data.pkl"):
            return content
        assert content.count(old) == 1
        return content.replace(old, new)

    _refused(tmp_path, _repacked(path, edit), "pytorch_model.bin")


def test_a_torch_tensor_that_is_a_transposed_view(tmp_path: Path) -> None:
    path = torch_zip(tmp_path / "good.bin", {"w": ARRAYS["linear.weight"]})
    old = _int(3) + _int(4) + b"t(" + _int(4) + _int(1) + b"t"
    new = _int(4) + _int(3) + b"t(" + _int(1) + _int(4) + b"t"
    raw = _repacked(path, lambda _, content: content.replace(old, new))
    found = _convert(tmp_path, raw, "pytorch_model.bin")
    np.testing.assert_array_equal(found["w"], ARRAYS["linear.weight"].T)


def test_torch_zips_with_parts_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    path = torch_zip(tmp_path / "good.bin", {"w": ARRAYS["linear.weight"]})
    name = "pytorch_model.bin"

    def without(part: str) -> bytes:
        return _repacked(path, lambda found, content: None if part in found else content)

    def changed(part: str, new: bytes) -> bytes:
        return _repacked(path, lambda found, content: new if part in found else content)

    assert _convert(tmp_path, without("nothing"), name).keys() == {"w"}
    for raw in (
        without("data.pkl"),
        without("data/0"),
        changed("data/0", bytes(40)),
        changed("byteorder", b"big"),
        changed("byteorder", b"x" * 10_000),
        _repacked(path, lambda _, content: content, zipfile.ZIP_DEFLATED),
        path.read_bytes()[:-30],
        path.read_bytes()[: len(path.read_bytes()) // 2],
    ):
        assert _refused(tmp_path, raw, name).code == "damaged-weights"
    for part in ("archive/data.pkl", "other/data.pkl"):
        shutil.copy(path, tmp_path / "twice.bin")
        with zipfile.ZipFile(tmp_path / "twice.bin", "a") as file, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that a name is there twice is the point
            file.writestr(part, b"N.")
        _refused(tmp_path, (tmp_path / "twice.bin").read_bytes(), name)


def test_torchs_old_format_gets_advice(tmp_path: Path) -> None:
    raw = pickle.dumps(0x1950A86A20F9469CFC6C, 2) + pickle.dumps(1001, 2)
    error = _refused(tmp_path, raw, "pytorch_model.bin")
    assert "save it again as safetensors" in error.message
