"""Tokenizers: vocabularies without an end, and expressions that go back over a text for ever."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from typing import Any

from compression.tokenization import load_tokenizer
from tests.builders import SPECIAL_TOKENS, WORDS, tiny_bert
from tests.hostile.corpus import Corpus, Hostile, Made, Place, made, model, noise

FILE = "tokenizer.json"
Document = dict[str, Any]


def _fast(edit: Callable[[Document], object], kind: str = "invalid-tokenizer") -> Hostile:
    """A good model whose tokenizer is a tokenizer.json that was edited by hand."""

    def files(place: Place) -> Any:
        document = json.loads(load_tokenizer(tiny_bert(place.folder / "model")).to_str())
        edit(document)
        return model(place, {FILE: json.dumps(document).encode()})

    return Hostile("models", kind, files)


def _splits_by(expression: str, kind: str = "invalid-tokenizer") -> Hostile:
    return _fast(
        lambda document: document.update(
            pre_tokenizer={
                "type": "Split",
                "pattern": {"Regex": expression},
                "behavior": "Isolated",
                "invert": False,
            }
        ),
        kind,
    )


def _replaces(*rules: tuple[Any, str], kind: str = "invalid-tokenizer") -> Hostile:
    steps = [{"type": "Replace", "pattern": pattern, "content": text} for pattern, text in rules]
    return _fast(
        lambda document: document.update(normalizer={"type": "Sequence", "normalizers": steps}),
        kind,
    )


def _file(name: str, content: Made, kind: str = "invalid-tokenizer") -> Hostile:
    return Hostile("models", kind, lambda place: model(place, {name: made(content)}))


def _words(document: Document, count: int) -> None:
    document["model"]["vocab"] |= {f"w{i}": 100 + i for i in range(count)}


VOCABULARY = "\n".join((*SPECIAL_TOKENS, *WORDS)).encode()

TOKENIZERS: Corpus = {
    # Size.
    "vocab.txt: thirty million empty lines": _file(
        "vocab.txt", lambda: b"\n" * 30_000_000, "tokenizer-too-large"
    ),
    "vocab.txt: more tokens than the model embeds": _file(
        "vocab.txt", lambda: VOCABULARY + b"".join(b"\nw%d" % i for i in range(300_000))
    ),
    "vocab.txt: a token of ten megabytes": _file(
        "vocab.txt", lambda: VOCABULARY.replace(b"good", b"g" * 10_000_000) + b"\n" + b"good"
    ),
    "vocab.txt: no special tokens": _file("vocab.txt", b"a\nb\nc"),
    "tokenizer.json: a third of a million tokens": _fast(lambda d: _words(d, 333_333)),
    "tokenizer.json: five million values": _file(
        FILE, lambda: b'{"x":[' + b"[]," * 2_500_000 + b"0]}", "invalid-json"
    ),
    "tokenizer.json: a text that grows a millionfold": _replaces(
        ({"String": "a"}, "b" * 1000), ({"String": "b"}, "c" * 100_000), kind="tokenizer-too-large"
    ),
    # Expressions.
    "regex: it does not close": _splits_by("(a"),
    "regex: a group that is not there": _splits_by(r"(a)\9(?<x>"),
    "regex: exponential": _splits_by("(a+)+$"),
    "regex: exponential by alternatives": _splits_by("(a|a)*$"),
    "regex: exponential in a normalizer": _replaces(({"Regex": "(b*)*c"}, "")),
    "regex: a square, at each place of a text": _splits_by(r"\s*\s*#", "tokenizer-too-slow"),
    "regex: a hundred thousand alternatives": _splits_by(
        "|".join(f"w{i}" for i in range(100_000)) + "|("
    ),
    # What does not hold together.
    "tokenizer.json: a model of an unknown kind": _fast(lambda d: d["model"].update(type="Evil")),
    "tokenizer.json: ids beyond the model": _fast(lambda d: d["model"]["vocab"].update(good=2**31)),
    "tokenizer.json: a negative id": _fast(lambda d: d["model"]["vocab"].update(good=-1)),
    "tokenizer.json: a special token beyond the model": _fast(
        lambda d: d["post_processor"]["special_tokens"]["[CLS]"].update(ids=[2**31])
    ),
    "tokenizer.json: thousands of special tokens around a text": _fast(
        lambda d: d["post_processor"].update(single=d["post_processor"]["single"] * 1000),
        "tokenizer-too-large",
    ),
    "tokenizer.json: sequences in sequences": _fast(
        lambda d: d.update(
            normalizer=json.loads(
                '{"type":"Sequence","normalizers":[' * 300 + '{"type":"NFC"}' + "]}" * 300
            )
        )
    ),
    "tokenizer.json: a map of random bytes": _fast(
        lambda d: d.update(
            normalizer={
                "type": "Precompiled",
                "precompiled_charsmap": base64.b64encode(noise(4096)).decode(),
            }
        ),
        "tokenizer-too-large",
    ),
    "added_tokens.json: ids that do not follow": _file("added_tokens.json", b'{"<a>": 1000000000}'),
    "merges.txt: a line of three": Hostile(
        "models",
        "invalid-tokenizer",
        lambda place: model(
            place,
            {
                "vocab.txt": None,
                "vocab.json": json.dumps(
                    {t: i for i, t in enumerate(("<s>", "</s>", "<pad>", "<unk>", "<mask>"))}
                ).encode(),
                "merges.txt": b"#version\na b c\n",
            },
        ),
    ),
}
