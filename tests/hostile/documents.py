"""JSON: depth, digits, keys that stand twice, and configurations that no model has."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from tests.hostile.corpus import Corpus, Hostile, Made, Place, made, model

CONFIG = "config.json"


def _config(content: Made, kind: str = "invalid-json") -> Hostile:
    return Hostile("models", kind, lambda place: model(place, {CONFIG: made(content)}))


def _changed(**changes: Any) -> Hostile:
    """A field of the configuration that no model has."""
    return _spelt(lambda config: json.dumps({**config, **changes}), "invalid-model")


def _spelt(write: Callable[[dict[str, Any]], str], kind: str = "invalid-json") -> Hostile:
    def files(place: Place) -> Any:
        config = json.loads(bytes(model(place, {})[CONFIG]))  # type: ignore[arg-type]
        return model(place, {CONFIG: write(config).encode()})

    return Hostile("models", kind, files)


def _with_text(field: str, written: str) -> Callable[[dict[str, Any]], str]:
    """The configuration with a field whose value is written as no dump would write it."""
    return lambda config: (
        json.dumps({name: value for name, value in config.items() if name != field})[:-1]
        + f', "{field}": {written}}}'
    )


DOCUMENTS: Corpus = {
    "JSON: a hundred thousand arrays deep": _config(
        b'{"x":' + b"[" * 100_000 + b"]" * 100_000 + b"}"
    ),
    "JSON: a hundred thousand objects deep": _config(b'{"x":' * 100_000 + b"1" + b"}" * 100_000),
    "JSON: five million values": _config(lambda: b'{"x":[' + b"0," * 5_000_000 + b"0]}"),
    "JSON: more than 64 MiB": _config(lambda: b"{" + b" " * (64 * 2**20) + b"}"),
    "JSON: a number of a million digits": _spelt(_with_text("x", "9" * 1_000_000)),
    "JSON: Infinity": _spelt(_with_text("x", "-Infinity")),
    "JSON: a key twice": _spelt(
        lambda config: json.dumps(config)[:-1] + ', "hidden_size": 1000000}'
    ),
    "JSON: half a surrogate pair": _spelt(_with_text("id2label", r'{"0": "\ud800", "1": "a"}')),
    "JSON: UTF-16": _config('{"model_type": "bert"}'.encode("utf-16")),
    "JSON: not UTF-8": _config(b'{"model_type": "b\xe9rt"}'),
    "JSON: NULs": _config(bytes(1000)),
    "config: a thousand million layers": _changed(num_hidden_layers=10**9),
    "config: a width of a thousand digits": _changed(hidden_size=10**900),
    "config: no heads": _changed(num_attention_heads=0),
    "config: an epsilon that overflows": _spelt(
        _with_text("layer_norm_eps", "1e999"), "invalid-model"
    ),
    "config: a vocabulary of all numbers": _changed(vocab_size=2**62),
    "config: labels without an end": _changed(id2label={str(i): str(i) for i in range(20_000)}),
    "config: a path as its type": _changed(model_type="../../etc/passwd"),
    "config: code as its type": _changed(
        model_type=None, auto_map={"AutoModel": "evil.Evil"}, architectures=["Evil"]
    ),
    "config: PaddleNLP's arguments without an end": _changed(
        init_class="BertForSequenceClassification", init_args=[{"init_args": [[]]}]
    ),
}
