"""Whether an uploaded tokenizer tokenizes, found out before a job needs it. Inside the sandbox.

A tokenizer.json carries regular expressions of its maker's, and the library that runs
them goes back over a text without an end in sight, or panics. So texts that provoke it
are tried here, in a stage with a limit of its own.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from compression.errors import InvalidModel
from compression.teachers import EncoderConfig
from compression.tokenization import TOKENIZER_FILE, encode, load_tokenizer
from jobs.errors import UploadRejected
from jobs.sandbox import stage

# Words, and a character that hardly any vocabulary has: the unknown token is tried too.
_PLAIN_TEXT = "a first text, in words \ua66e"
_LONG = 2000  # characters of a text that provokes; what takes a square of it, shows
_REPEATED = ("a", "A", "0", " ", "\n", ".", "-", "'", "#", "é", "\u4e2d", "ab", "a ", "a1", "a.")
_MAX_LETTERS = 32  # of the expressions' own, each of which makes a text


def try_tokenizer(folder: Path, config: EncoderConfig, *, seconds: float) -> Tokenizer:
    """The folder's tokenizer; UploadRejected or InvalidModel where it cannot serve the model.

    What a tokenizer.json puts around a text comes with ids of its own, beside the vocabulary:
    an id without an embedding reads past the table's end on some devices. What takes longer
    than `seconds` of processor time ends the sandbox's child.
    """
    with stage("tokenizer", seconds=seconds):
        tokenizer = load_tokenizer(folder)
        alone = _encoded(tokenizer, [_PLAIN_TEXT], None)[0]
        pair = _encoded(tokenizer, [_PLAIN_TEXT], ["a second"])[0]
        _encoded(tokenizer, list(_provoking_texts(folder / TOKENIZER_FILE)), None)
    if not alone[0]:
        raise _refused("The tokenizer makes no tokens of a text.")
    for ids, types in (alone, pair):
        if max(ids) >= config.vocab_size:
            raise _refused(
                f"The tokenizer gives the token id {max(ids)}, but the model embeds only "
                f"{config.vocab_size} tokens."
            )
        if config.reads_token_types and max(types) >= config.type_vocab_size:
            raise _refused(
                f"The tokenizer gives the token type {max(types)}, but the model has only "
                f"{config.type_vocab_size}."
            )
    return tokenizer


def _encoded(
    tokenizer: Tokenizer, texts: list[str], pairs: list[str] | None
) -> list[tuple[list[int], list[int]]]:
    try:
        return encode(tokenizer, texts, pairs, 64)
    except InvalidModel:
        raise
    except Exception as error:  # the library raises nothing more exact
        raise _refused(f"The tokenizer fails on a plain text: {str(error)[:200]}") from error


def _refused(message: str) -> UploadRejected:
    return UploadRejected(message, code="invalid-tokenizer")


def _provoking_texts(file: Path) -> Iterator[str]:
    """Long runs of what expressions repeat, each ended by what most do not expect there, and then
    by all that they do: an expression that needs a letter which a text lacks is not even tried."""
    letters = ""
    if file.is_file():
        found = dict.fromkeys("".join(_expressions(json.loads(file.read_bytes()))))
        letters = "".join(list(found)[:_MAX_LETTERS])
    for run in dict.fromkeys((*_REPEATED, *letters)):
        yield f"{run * (_LONG // len(run))}\ua66e!{letters}"


def _expressions(node: Any) -> Iterator[str]:
    """Every {"Regex": "..."} of a tokenizer.json, outside of its vocabulary."""
    if isinstance(node, dict):
        if isinstance(node.get("Regex"), str):
            yield node["Regex"]
        for key, value in node.items():
            if key not in ("vocab", "merges", "added_tokens"):
                yield from _expressions(value)
    elif isinstance(node, list):
        for item in node:
            yield from _expressions(item)
