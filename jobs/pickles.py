"""Weights out of pickles, without loading the pickle. Called inside the sandbox alone.

`pickle.load`, `torch.load` and `paddle.load` run whatever a file names. This reader
never imports or calls anything a file names: it walks the opcodes on a stack of its
own, on which a name is a mere token, and knows a fixed list of tokens by which numpy,
torch and paddle describe arrays. Any other name or opcode is refused. Arrays are
views of bytes that the file itself holds, so allocations are bounded by its size.

Opcodes are documented in the standard library's pickletools; torch's zip layout in
pytorch.org/docs/stable/notes/serialization.html.
"""

from __future__ import annotations

import json
import math
import mmap
import pickletools
import struct
import warnings
import zipfile
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np

from jobs.archives import open_zip
from jobs.errors import UploadRejected

_MAX_OPCODES = 1_000_000  # a tensor takes about forty
_MAX_ENTRIES = 20_000  # of torch's zip: a file each storage
_MAX_DEPTH = 100_000
_MAX_DIMENSIONS = 8
_MAX_NAME = 500
_TORCH_MAGIC = 0x1950A86A20F9469CFC6C
_STRUCTURED_NAMES = "StructuredToParameterName@@"  # paddle's own note beside the weights

# numpy type -> safetensors type. numpy has no bfloat16; paddle stores it as uint16.
_NUMPY_TYPES = {
    "f8": "F64", "f4": "F32", "f2": "F16", "u2": "BF16",
    "i8": "I64", "i4": "I32", "i2": "I16", "i1": "I8", "u1": "U8", "b1": "BOOL",
}  # fmt: skip
_TORCH_STORAGES = {
    "DoubleStorage": "F64", "FloatStorage": "F32", "HalfStorage": "F16", "BFloat16Storage": "BF16",
    "LongStorage": "I64", "IntStorage": "I32", "ShortStorage": "I16", "CharStorage": "I8",
    "ByteStorage": "U8", "BoolStorage": "BOOL",
}  # fmt: skip
_ITEM_BYTES = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2,
    "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1,
}  # fmt: skip


@dataclass(frozen=True)
class Stored:
    """One tensor: its type as safetensors names it, and a way to its little-endian bytes."""

    dtype: str
    shape: tuple[int, ...]
    load: Callable[[], bytes]

    @property
    def size_bytes(self) -> int:
        return math.prod(self.shape) * _ITEM_BYTES[self.dtype]


def convert(source: Path, out: Path) -> None:
    """Writes the pickled weights of `source` (torch or paddle) as safetensors, names unchanged.

    UploadRejected: "unsafe-pickle" for anything but plain arrays, "pickle-bomb" for what
    would grow far beyond its size, "damaged-weights", or "weights-unsupported" for torch's
    format from before its version 1.6.
    """
    size = source.stat().st_size
    try:
        with warnings.catch_warnings(), source.open("rb") as file:
            warnings.simplefilter("ignore")  # pickletools decodes odd escapes, and warns of them
            if file.read(4) == b"PK\x03\x04":
                archive = open_zip(file, max_files=_MAX_ENTRIES)
                if archive is None:
                    raise _bomb(source.name, f"it lists more than {_MAX_ENTRIES} files")
                with archive:
                    weights = _torch_weights(archive, file, source.name)
                    _write(weights, out, size=size, name=source.name)
                return
            file.seek(0)
            weights = _weights(_Machine(_Clamped(file, size), source.name).run(), source.name)
        _write(weights, out, size=size, name=source.name)
    except UploadRejected:
        raise
    except _NotPlain as error:
        raise _unsafe(source.name, f"it holds {error}") from error
    except (
        ValueError, TypeError, IndexError, KeyError, AttributeError, OverflowError, EOFError,
        RecursionError, NotImplementedError, RuntimeError, zipfile.BadZipFile, zlib.error,
    ) as error:  # fmt: skip
        raise _damaged(source.name, str(error)) from error


class _NotPlain(ValueError):
    """An array of what is not plain numbers."""


def _damaged(name: str, why: str) -> UploadRejected:
    return UploadRejected(
        f"{name} is damaged, cut short or not a file of weights: {why[:200]}",
        code="damaged-weights",
        pointer=name,
    )


def _unsafe(name: str, what: str, code: str = "unsafe-pickle") -> UploadRejected:
    return UploadRejected(
        f"{name} is refused: {what}. A file of weights holds plain arrays by name; "
        "save it as safetensors",
        code=code,
        pointer=name,
    )


def _bomb(name: str, what: str) -> UploadRejected:
    return _unsafe(name, what, "pickle-bomb")


# --- writing safetensors --------------------------------------------------------------------


def _write(weights: Mapping[str, Stored], out: Path, *, size: int, name: str) -> None:
    """One tensor in memory at a time. Tied weights are written for each of their names."""
    header: dict[str, Any] = {}
    offset = 0
    for key, tensor in weights.items():
        header[key] = {
            "dtype": tensor.dtype,
            "shape": list(tensor.shape),
            "data_offsets": [offset, offset + tensor.size_bytes],
        }
        offset += tensor.size_bytes
    # An output embedding tied to the vocabulary at most doubles a file.
    if offset > 2 * size:
        raise _bomb(name, f"its {size} bytes describe arrays of {offset} bytes")
    raw = json.dumps(header).encode()
    raw += b" " * (-len(raw) % 8)
    with out.open("xb") as file:
        file.write(len(raw).to_bytes(8, "little") + raw)
        for key, tensor in weights.items():
            data = tensor.load()
            if len(data) != tensor.size_bytes:
                raise _damaged(name, f"{key!r} has {len(data)} bytes, not {tensor.size_bytes}")
            file.write(data)


# --- what a pickle may hold -----------------------------------------------------------------


@dataclass(frozen=True)
class _Name:
    """A name out of the list below; nothing is ever looked up by it but this module's functions."""

    module: str
    name: str


_ARRAY_MODULES = ("numpy.core.multiarray", "numpy._core.multiarray")
_NUMERIC_MODULES = ("numpy.core.numeric", "numpy._core.numeric")
_ALLOWED = {
    *(_Name(module, name) for module in _ARRAY_MODULES for name in ("_reconstruct", "scalar")),
    *(_Name(module, "_frombuffer") for module in _NUMERIC_MODULES),
    _Name("numpy", "ndarray"),
    _Name("numpy", "dtype"),
    _Name("collections", "OrderedDict"),
    _Name("_codecs", "encode"),
    # Protocols 0 to 2 write empty bytes as bytes().
    _Name("__builtin__", "bytes"),
    _Name("builtins", "bytes"),
    # paddle stores a tensor as tuple((name, array)).
    _Name("builtins", "tuple"),
    _Name("__builtin__", "tuple"),
}
_ALLOWED_IN_TORCH = {
    _Name("collections", "OrderedDict"),
    _Name("torch._utils", "_rebuild_tensor_v2"),
    _Name("torch._utils", "_rebuild_parameter"),
    *(_Name("torch", storage) for storage in _TORCH_STORAGES),
}


class _DType:
    """numpy.dtype in the making: type code now, byte order when BUILD follows."""

    def __init__(self, code: str) -> None:
        self.code = code
        self.order = "<"


class _Array:
    """An array in the making; `tensor` is set once its content is known."""

    def __init__(self) -> None:
        self.tensor: Stored | None = None


class _Mark:
    pass


@dataclass(frozen=True)
class _Storage:
    """A torch storage: a file of the zip archive."""

    dtype: str
    key: str
    count: int


class _Clamped:
    """A file that never tries to read more than there is, whatever length a pickle claims."""

    def __init__(self, file: IO[bytes], size: int) -> None:
        self.file = file
        self.left = size

    def read(self, count: int) -> bytes:
        data = self.file.read(max(0, min(count, self.left)))
        self.left -= len(data)
        return data

    def readline(self) -> bytes:
        data = self.file.readline(self.left)
        self.left -= len(data)
        return data

    def tell(self) -> int:
        return self.file.tell()


class _Machine:
    """Walks one pickle's opcodes. It has no instruction that imports or calls."""

    def __init__(
        self, file: Any, name: str, *, storage: Callable[[Any], _Storage] | None = None
    ) -> None:
        self.file = file
        self.name = name
        self.storage = storage
        self.allowed = _ALLOWED if storage is None else _ALLOWED_IN_TORCH
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}

    def run(self) -> Any:
        """The object that the pickle describes."""
        for count, (opcode, argument, _) in enumerate(pickletools.genops(self.file)):
            if count > _MAX_OPCODES or len(self.stack) > _MAX_DEPTH:
                raise _bomb(self.name, "it describes more than any file of weights holds")
            if opcode.name == "STOP":
                (result,) = self.stack
                if self.file.read(1) and result != _TORCH_MAGIC:
                    raise ValueError("more follows where the pickle ends")
                return result
            self._step(opcode.name, argument)
        raise EOFError("no end")

    def _step(self, code: str, argument: Any) -> None:
        stack = self.stack
        if code in _LITERALS:
            stack.append(argument)
        elif code in _CONSTANTS:
            stack.append(_CONSTANTS[code])
        elif code == "MARK":
            stack.append(_Mark)
        elif code in ("BINPUT", "LONG_BINPUT", "PUT"):
            self.memo[argument] = stack[-1]
        elif code == "MEMOIZE":
            self.memo[len(self.memo)] = stack[-1]
        elif code in ("BINGET", "LONG_BINGET", "GET"):
            stack.append(self.memo[argument])
        elif code in ("GLOBAL", "STACK_GLOBAL"):
            stack.append(self._token(code, argument))
        elif code == "REDUCE":
            arguments, function = stack.pop(), stack.pop()
            stack.append(self._rebuild(function, arguments))
        elif code == "BUILD":
            state = stack.pop()
            self._set_state(stack[-1], state)
        elif code == "BINPERSID" and self.storage is not None:
            stack.append(self.storage(stack.pop()))
        elif code in _CONTAINERS:
            _CONTAINERS[code](self)
        elif code not in ("PROTO", "FRAME"):
            raise _unsafe(self.name, f"it uses the pickle opcode {code}")

    def pop_mark(self) -> list[Any]:
        items: list[Any] = []
        while (item := self.stack.pop()) is not _Mark:
            items.append(item)
        items.reverse()
        return items

    def _token(self, code: str, argument: Any) -> _Name:
        if code == "GLOBAL":
            module, _, name = str(argument).partition(" ")
        else:
            name, module = self.stack.pop(), self.stack.pop()
        if not isinstance(module, str) or not isinstance(name, str):
            raise _unsafe(self.name, "it names something by what is not a name")
        token = _Name(module, name)
        if token not in self.allowed:
            raise _unsafe(self.name, f"it names {f'{module}.{name}'[:100]!r}")
        return token

    def _rebuild(self, function: Any, arguments: Any) -> Any:
        if not isinstance(function, _Name) or not isinstance(arguments, tuple):
            raise _unsafe(self.name, "it calls what is not a function")
        return _REBUILDERS[function.name](*arguments)

    def _set_state(self, target: Any, state: Any) -> None:
        if isinstance(target, _Array) and target.tensor is None:
            _version, shape, dtype, fortran, data = state
            target.tensor = _from_bytes(dtype, shape, data, fortran=fortran)
        elif isinstance(target, _DType):
            order, subarray, names = state[1:4]
            if order not in ("<", ">", "|", "=") or subarray is not None or names is not None:
                raise _unsafe(self.name, "it holds an array that is not of plain numbers")
            target.order = order
        elif not (type(target) is dict and isinstance(state, dict)):
            # A dict's state is the _metadata that torch hangs on its state dicts: not needed.
            raise _unsafe(self.name, "it sets the state of what is not an array")


_LITERALS = {
    "INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT",
    "STRING", "BINSTRING", "SHORT_BINSTRING", "UNICODE", "SHORT_BINUNICODE", "BINUNICODE",
    "BINUNICODE8", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8",
}  # fmt: skip
_CONSTANTS: dict[str, Any] = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}


def _set_items(target: Any, items: list[Any]) -> None:
    if type(target) is not dict or len(items) % 2:
        raise ValueError("items for what is not a dict")
    for key, value in zip(items[::2], items[1::2], strict=True):
        if not isinstance(key, str):  # other keys could be made slow, or deep, to hash
            raise ValueError("a key that is not text")
        target[key] = value


def _setitem(machine: _Machine) -> None:
    value, key = machine.stack.pop(), machine.stack.pop()
    _set_items(machine.stack[-1], [key, value])


def _setitems(machine: _Machine) -> None:
    items = machine.pop_mark()
    _set_items(machine.stack[-1], items)


def _dict(machine: _Machine) -> None:
    made: dict[str, Any] = {}
    _set_items(made, machine.pop_mark())
    machine.stack.append(made)


def _extend(machine: _Machine, items: list[Any]) -> None:
    target = machine.stack[-1]
    if type(target) is not list:
        raise ValueError("an item for what is not a list")
    target.extend(items)


def _tuple_of(count: int) -> Callable[[_Machine], None]:
    def collect(machine: _Machine) -> None:
        items = tuple(machine.stack[-count:])
        if len(items) < count or _Mark in items:
            raise ValueError("a tuple of too few items")
        del machine.stack[-count:]
        machine.stack.append(items)

    return collect


_CONTAINERS: dict[str, Callable[[_Machine], Any]] = {
    "EMPTY_LIST": lambda machine: machine.stack.append([]),
    "LIST": lambda machine: machine.stack.append(machine.pop_mark()),
    "APPEND": lambda machine: _extend(machine, [machine.stack.pop()]),
    "APPENDS": lambda machine: _extend(machine, machine.pop_mark()),
    "TUPLE": lambda machine: machine.stack.append(tuple(machine.pop_mark())),
    "TUPLE1": _tuple_of(1),
    "TUPLE2": _tuple_of(2),
    "TUPLE3": _tuple_of(3),
    "EMPTY_DICT": lambda machine: machine.stack.append({}),
    "DICT": _dict,
    "SETITEM": _setitem,
    "SETITEMS": _setitems,
    "POP": lambda machine: machine.stack.pop(),
    "POP_MARK": lambda machine: machine.pop_mark(),
}


# --- our own versions of the functions that pickles of arrays name --------------------------


def _reconstruct(subtype: Any, shape: Any, _typecode: Any) -> _Array:
    if subtype != _Name("numpy", "ndarray") or shape != (0,):
        raise ValueError("an array of an unknown kind")
    return _Array()


def _dtype(code: Any, _align: Any = False, _copy: Any = True) -> _DType:
    if not isinstance(code, str) or code not in _NUMPY_TYPES:
        raise _NotPlain(f"an array of the type {str(code)[:20]!r}, not of plain numbers")
    return _DType(code)


def _scalar(dtype: Any, data: Any) -> _Array:
    array = _Array()
    array.tensor = _from_bytes(dtype, (), data, fortran=False)
    return array


def _frombuffer(data: Any, dtype: Any, shape: Any, order: Any) -> _Array:
    array = _Array()
    array.tensor = _from_bytes(dtype, shape, data, fortran=order == "F")
    return array


def _encode(text: Any, encoding: Any) -> bytes:
    """How protocols 0 to 2 write bytes: as text of the same code points."""
    if not isinstance(text, str) or encoding != "latin1":
        raise ValueError("bytes in an unknown encoding")
    return text.encode("latin-1")


def _empty_bytes() -> bytes:
    return b""


def _ordered_dict(*arguments: Any) -> dict[str, Any]:
    made: dict[str, Any] = {}
    (pairs,) = arguments or ([],)
    for key, value in pairs:
        _set_items(made, [key, value])
    return made


def _named_tensor(pair: Any) -> tuple[Any, ...]:
    if not isinstance(pair, tuple):
        raise ValueError("a tuple of what is not one")
    return pair


@dataclass(frozen=True)
class _View:
    """A torch tensor: `shape` elements of a storage, from `offset`, by `strides` (in elements)."""

    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


def _rebuild_tensor(
    storage: Any, offset: Any, shape: Any, strides: Any, _grad: Any, _hooks: Any, _meta: Any = None
) -> _View:
    if not isinstance(storage, _Storage) or type(offset) is not int or offset < 0:
        raise ValueError("a tensor without a storage")
    checked, steps = _shape(shape), _shape(strides)
    if len(checked) != len(steps):
        raise ValueError("a tensor whose strides do not fit its shape")
    count = math.prod(checked)
    last = offset + sum((n - 1) * step for n, step in zip(checked, steps, strict=True))
    if count > storage.count or (count and last >= storage.count):
        raise ValueError("a tensor that is larger than its storage")
    return _View(storage, offset, checked, steps)


def _rebuild_parameter(data: Any, _grad: Any, _hooks: Any) -> _View:
    if not isinstance(data, _View):
        raise ValueError("a parameter without a tensor")
    return data


_REBUILDERS: dict[str, Callable[..., Any]] = {
    "_reconstruct": _reconstruct,
    "scalar": _scalar,
    "_frombuffer": _frombuffer,
    "dtype": _dtype,
    "OrderedDict": _ordered_dict,
    "encode": _encode,
    "bytes": _empty_bytes,
    "tuple": _named_tensor,
    "_rebuild_tensor_v2": _rebuild_tensor,
    "_rebuild_parameter": _rebuild_parameter,
}


def _shape(value: Any) -> tuple[int, ...]:
    if not isinstance(value, tuple) or len(value) > _MAX_DIMENSIONS:
        raise ValueError("an array without a shape")
    if not all(type(n) is int and 0 <= n < 2**48 for n in value):
        raise ValueError("an array of an impossible shape")
    return value


def _from_bytes(dtype: Any, shape: Any, data: Any, *, fortran: Any) -> Stored:
    """An array over bytes that the pickle holds; refused unless they fill it exactly."""
    if not isinstance(dtype, _DType):
        raise ValueError("an array without a type")
    if isinstance(data, str):  # as Python 2 wrote bytes
        data = data.encode("latin-1")
    if not isinstance(data, (bytes, bytearray)):
        raise _NotPlain("an array of objects, not of plain numbers")
    name, stored = _NUMPY_TYPES[dtype.code], np.dtype(dtype.order + dtype.code)
    checked = _shape(shape)
    if math.prod(checked) * stored.itemsize != len(data):
        raise ValueError(f"an array of the shape {list(checked)} in {len(data)} bytes")

    def load() -> bytes:
        array = np.frombuffer(data, dtype=stored)
        if fortran:
            array = array.reshape(checked, order="F")
        plain = np.ascontiguousarray(array, dtype=stored.newbyteorder("<"))
        return plain.tobytes()

    return Stored(name, checked, load)


# --- whole files ----------------------------------------------------------------------------


def _weights(found: Any, file: str) -> dict[str, Stored]:
    """Tensors by name out of what a pickle described."""
    if type(found) is not dict:
        if type(found) is int and found == _TORCH_MAGIC:
            raise UploadRejected(
                f"{file} is in torch's format from before version 1.6; save it again as "
                "safetensors, or with a newer torch",
                code="weights-unsupported",
                pointer=file,
            )
        raise _damaged(file, "it does not hold arrays by name")
    weights: dict[str, Stored] = {}
    for name, value in found.items():
        if name == _STRUCTURED_NAMES:
            continue
        if isinstance(value, tuple) and len(value) == 2 and isinstance(value[0], str):
            value = value[1]
        tensor = value.tensor if isinstance(value, _Array) else value
        if not isinstance(tensor, Stored):
            kind = "an array" if isinstance(value, _Array) else type(value).__name__
            raise _damaged(file, f"{name[:100]!r} is {kind}, not an array with content")
        weights[_parameter_name(name)] = tensor
    return weights


def _parameter_name(name: str) -> str:
    name.encode()  # a lone surrogate is a ValueError
    if not 0 < len(name) <= _MAX_NAME or not name.isprintable():
        raise ValueError(f"the parameter's name {name[:60]!r}")
    if name == "__metadata__":  # means something else in safetensors
        raise ValueError("a parameter called __metadata__")
    return name


def _torch_weights(archive: zipfile.ZipFile, raw: IO[bytes], file: str) -> dict[str, Stored]:
    """torch.save's zip: PREFIX/data.pkl describes the tensors, PREFIX/data/KEY holds the bytes."""
    members: dict[str, zipfile.ZipInfo] = {}
    for info in archive.infolist():
        if info.filename in members:
            raise ValueError(f"{info.filename[:100]!r} is there twice")
        members[info.filename] = info
    pickles = [name for name in members if name.count("/") == 1 and name.endswith("/data.pkl")]
    if len(pickles) != 1:
        raise ValueError("no data.pkl")
    prefix = pickles[0].removesuffix("data.pkl")
    order = members.get(f"{prefix}byteorder")
    if order is not None and (order.file_size > 16 or archive.read(order) != b"little"):
        raise ValueError("big-endian tensors")

    def storage(reference: Any) -> _Storage:
        kind, token, key, _location, count = reference
        if kind != "storage" or not isinstance(token, _Name) or not isinstance(key, str):
            raise ValueError("an unknown reference")
        dtype = _TORCH_STORAGES[token.name]
        info = members[f"{prefix}data/{key}"]
        # torch stores without compression; a file that does not cannot be a bomb.
        if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 0x1:
            raise ValueError("a compressed storage")
        if type(count) is not int or count * _ITEM_BYTES[dtype] != info.file_size:
            raise ValueError(f"the storage {key[:20]!r} has {info.file_size} bytes")
        return _Storage(dtype, f"{prefix}data/{key}", count)

    info = members[pickles[0]]
    if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 0x1:
        raise ValueError("a compressed data.pkl")
    with archive.open(info) as stream:
        found = _Machine(_Clamped(stream, info.file_size), file, storage=storage).run()
    if type(found) is not dict:
        raise _damaged(file, "it does not hold tensors by name")
    weights = {}
    starts: dict[str, int] = {}
    for name, view in found.items():
        if not isinstance(view, _View):
            raise _damaged(file, f"{name[:100]!r} is {type(view).__name__}, not a tensor")
        if view.storage.key not in starts:
            starts[view.storage.key] = _checked_start(archive, raw, members[view.storage.key])
        weights[_parameter_name(name)] = Stored(
            view.storage.dtype, view.shape, _view_loader(raw, starts[view.storage.key], view)
        )
    return weights


def _checked_start(archive: zipfile.ZipFile, raw: IO[bytes], info: zipfile.ZipInfo) -> int:
    """Where a stored file's bytes begin in the archive, after they were held against their CRC."""
    with archive.open(info) as stream:
        while stream.read(2**20):
            pass
    raw.seek(info.header_offset + 26)
    name, extra = struct.unpack("<HH", raw.read(4))
    return int(info.header_offset + 30 + name + extra)


def _view_loader(raw: IO[bytes], start: int, view: _View) -> Callable[[], bytes]:
    """Maps the part of the file that holds the view, so that many views of one large storage
    cost what they show, not the storage each."""

    def load() -> bytes:
        if 0 in view.shape:
            return b""
        item = _ITEM_BYTES[view.storage.dtype]
        # The whole view lies within the storage: checked when the tensor was described.
        steps = zip(view.shape, view.strides, strict=True)
        span = (1 + sum((n - 1) * step for n, step in steps)) * item
        first = start + view.offset * item
        aligned = first - first % mmap.ALLOCATIONGRANULARITY
        with mmap.mmap(
            raw.fileno(), first - aligned + span, offset=aligned, access=mmap.ACCESS_READ
        ) as mapped:
            flat = np.frombuffer(mapped, f"V{item}", span // item, offset=first - aligned)
            array = np.lib.stride_tricks.as_strided(
                flat,
                shape=view.shape,
                strides=[step * item for step in view.strides],
                writeable=False,
            )
            data = array.tobytes()
            del flat, array  # the map cannot be closed while they look at it
        return data

    return load
