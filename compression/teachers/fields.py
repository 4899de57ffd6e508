"""Reading a configuration that nobody has checked: JSON objects and bounded fields."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

from compression.errors import InvalidModel
from compression.spec import Head
from compression.teachers.config import EncoderConfig

MAX_JSON_BYTES = 64 * 2**20
# A value takes a hundred bytes of memory, whatever its text takes. A vocabulary of a million
# tokens, each with a score, has three million.
MAX_JSON_VALUES = 4_000_000

# No published encoder comes near these; they keep a hostile config from asking for
# loops or memory before its weights are looked at.
MAX_LAYERS = 256
MAX_HEADS = 1024
MAX_HIDDEN = 32_768
MAX_FFN = 262_144
MAX_VOCABULARY = 2**20  # the largest published one has 901,629
MAX_POSITIONS = 131_072
MAX_TYPES = 1024
MAX_LABELS = 10_000

ACTIVATIONS = ("gelu", "gelu_new", "relu")  # those that our encoder has
POOLER_ACTIVATIONS = ("tanh", "relu_tanh", *ACTIVATIONS)


def read_json_object(path: Path, *, max_bytes: int = MAX_JSON_BYTES) -> dict[str, Any]:
    """The JSON object in a file; InvalidModel ("invalid-json"), with its name, where there is none.

    A key that stands twice in an object is refused: readers differ in which one they believe.
    """

    def error(message: str) -> InvalidModel:
        return InvalidModel(f"{path.name} {message}", pointer=path.name, code="invalid-json")

    try:
        if path.stat().st_size > max_bytes:
            raise error(f"is larger than {max_bytes // 2**20} MiB")
        raw = path.read_bytes()
        if json_values(raw) > MAX_JSON_VALUES:
            raise error(f"holds more than {MAX_JSON_VALUES} values")
        data = json.loads(
            raw.decode("utf-8"),
            object_pairs_hook=without_duplicates,
            parse_constant=_refuse_constant,
            parse_int=_whole_number,
        )
    except OSError as problem:
        raise InvalidModel(f"{path.name} cannot be read", pointer=path.name) from problem
    except RecursionError as problem:
        raise error("is nested too deeply") from problem
    except ValueError as problem:  # bad UTF-8 and bad JSON are both ValueErrors
        raise error(f"is not JSON: {problem}") from problem
    if not isinstance(data, dict):
        raise error("does not hold a JSON object")
    if b"\\ud" in raw.lower():  # the only way in for half a surrogate pair
        try:
            json.dumps(data, ensure_ascii=False).encode()
        except UnicodeEncodeError as problem:
            raise error("holds half a surrogate pair: not Unicode text") from problem
    return data


def json_values(raw: bytes) -> int:
    """About how many values a JSON text holds, or somewhat more: counted without reading it."""
    return sum(raw.count(mark) for mark in (b",", b"[", b"{"))


def without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of JSON; ValueError where a key stands in it twice."""
    found = dict(pairs)
    if len(found) != len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise ValueError(f"the key {key[:60]!r} stands twice in an object")
            seen.add(key)
    return found


def _whole_number(digits: str) -> int:
    if len(digits) > 1000:
        raise ValueError(f"a whole number of {len(digits)} digits")
    return int(digits)


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is not a JSON number")


class Fields:
    """Typed, bounded reads of a configuration's fields; InvalidModel names file and field.

    `names` are the configuration's own, where they differ from those that are asked for.
    """

    def __init__(
        self, data: Mapping[str, Any], *, file: str, names: Mapping[str, str] | None = None
    ) -> None:
        self.data = data
        self.file = file
        self.names = names or {}

    def name(self, name: str) -> str:
        return self.names.get(name, name)

    def error(self, message: str) -> InvalidModel:
        return InvalidModel(f"{self.file}: {message}", pointer=self.file)

    def integer(self, name: str, *, low: int, high: int, default: int | None = None) -> int:
        value = self.data.get(self.name(name))
        if value is None:
            if default is None:
                raise self.error(f"{self.name(name)} is missing")
            return default
        if isinstance(value, bool) or not isinstance(value, int):
            raise self.error(f"{self.name(name)} is {_short(value)}, not a whole number")
        if not low <= value <= high:
            raise self.error(
                f"{self.name(name)} is {_short(value)}; it must be from {low} to {high}"
            )
        return value

    def number(self, name: str, *, low: float, high: float, default: float) -> float:
        """A number in [low, high)."""
        value = self.data.get(self.name(name))
        if value is None:
            return default
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise self.error(f"{self.name(name)} is {_short(value)}, not a number")
        if not (math.isfinite(value) and low <= value < high):
            raise self.error(
                f"{self.name(name)} is {_short(value)}; it must be at least {low:g}, below {high:g}"
            )
        return float(value)

    def text(self, name: str, *, default: str | None = None) -> str:
        value = self.data.get(self.name(name))
        if value is None and default is not None:
            return default
        if not isinstance(value, str):
            raise self.error(f"{self.name(name)} is {_short(value)}, not a string")
        return value

    def flag(self, name: str) -> bool:
        value = self.data.get(self.name(name), False)
        if value is not None and not isinstance(value, bool):
            raise self.error(f"{self.name(name)} is {_short(value)}, not true or false")
        return bool(value)


def _short(value: object) -> str:
    """A value as an error may quote it: never a megabyte of it."""
    if isinstance(value, int) and value.bit_length() > 200:
        return "a number of hundreds of digits"
    if isinstance(value, (list, dict)):
        return "a list" if isinstance(value, list) else "an object"
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def check_bounds(config: EncoderConfig, *, file: str) -> None:
    """Refuses an encoder config, for example one that was hand-edited, that no encoder has."""
    fields = Fields(config.to_dict(), file=file)
    fields.integer("vocab_size", low=1, high=MAX_VOCABULARY)
    fields.integer("hidden", low=1, high=MAX_HIDDEN)
    fields.integer("layers", low=1, high=MAX_LAYERS)
    fields.integer("head_dim", low=1, high=MAX_HIDDEN)
    fields.integer("max_positions", low=1, high=MAX_POSITIONS)
    fields.integer("type_vocab_size", low=0, high=MAX_TYPES)
    fields.integer("task_type_vocab_size", low=0, high=MAX_TYPES)
    fields.integer("task_id", low=0, high=max(config.task_type_vocab_size - 1, 0))
    fields.integer("position_offset", low=0, high=config.max_positions - 1)
    if config.embedding_size is not None:
        fields.integer("embedding_size", low=1, high=MAX_HIDDEN)
    fields.integer("pad_token_id", low=0, high=config.vocab_size - 1)
    fields.number("layer_norm_eps", low=0.0, high=1.0, default=math.nan)
    fields.number("hidden_dropout", low=0.0, high=1.0, default=math.nan)
    fields.number("attention_dropout", low=0.0, high=1.0, default=math.nan)
    fields.text("family")
    if fields.text("activation") not in ACTIVATIONS:
        raise fields.error(f"activation is {_short(config.activation)}")
    if config.head not in get_args(Head):
        raise fields.error(f"head is {_short(config.head)}")
    if fields.text("pooler_activation") not in POOLER_ACTIVATIONS:
        raise fields.error(f"pooler_activation is {_short(config.pooler_activation)}")
    if config.num_labels is not None:
        fields.integer("num_labels", low=1, high=MAX_LABELS)
    for name, counts, high in (("heads", config.heads, MAX_HEADS), ("ffn", config.ffn, MAX_FFN)):
        for i, count in enumerate(counts):
            if not 1 <= count <= high:
                raise fields.error(f"{name}[{i}] is {_short(count)}; it must be from 1 to {high}")
