"""Removal of tokens that a deployment does not need, from a WordPiece vocabulary. Paddle-free.

The embedding is half of a small model, and a task uses a part of it. What stays is numbered anew,
in the old order; the tokenizer is written again, and a map says which token was which. A word
whose token is gone falls into pieces, at worst into its characters: those all stay. WordPiece
takes the longest piece that it knows, so where all tokens of a text stayed it finds the same
ones. Other kinds are refused: BPE would need its merges rebuilt, Unigram weighs whole paths.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

from compression.errors import InvalidModel, InvalidSpec
from compression.examples import AskedExamples, TaggedExamples
from compression.report import VocabularyReport
from compression.spec import VocabularySpec
from compression.teachers.config import EncoderConfig
from compression.teachers.fields import read_json_object
from compression.tokenization import (
    ADDED_TOKENS_FILE,
    SETTINGS_FILE,
    SPECIAL_TOKENS,
    SPECIAL_TOKENS_FILE,
    TOKENIZER_FILE,
    VOCABULARY_FILE,
)

MAP_FILE = "vocabulary_map.json"
KIND = "WordPiece"
WORD = "embeddings.word.weight"  # [tokens, width]
POINTER = "/vocabulary/remove_unused"

Ints = npt.NDArray[np.int64]
Arrays = Mapping[str, npt.NDArray[np.float32]]


@dataclass(frozen=True)
class Vocabulary:
    """What is left: token i was `kept[i]` in the model's own vocabulary of `rows` tokens."""

    kept: Ints
    rows: int
    tokenizer: Tokenizer

    @property
    def numbers(self) -> dict[int, int]:
        """The new number of each old one that is left."""
        return {old: new for new, old in enumerate(self.kept.tolist())}

    def renumbered(self, rows: Sequence[Sequence[int]]) -> list[list[int]]:
        """Token ids of the model's own tokenizer, all of which are left, by their new numbers."""
        numbers = self.numbers
        return [[numbers[token] for token in row] for row in rows]

    def config(self, config: EncoderConfig) -> EncoderConfig:
        """The same network with the smaller embedding."""
        pad = self.numbers[config.pad_token_id]
        return dataclasses.replace(config, vocab_size=len(self.kept), pad_token_id=pad)

    def weights(self, tensors: Arrays) -> dict[str, npt.NDArray[np.float32]]:
        """The weights without the rows that went; the others are not copied."""
        return {**tensors, WORD: tensors[WORD][self.kept]}


def check_removable(spec: VocabularySpec, kind: str | None) -> None:
    """InvalidSpec where tokens are to be removed and cannot be.

    `kind`: how the tokenizer splits words; None where that is not known yet.
    """
    if spec.remove_unused and kind not in (None, KIND):
        raise InvalidSpec(
            f"the model's tokenizer is {kind}: tokens can be removed from {KIND} vocabularies "
            "alone; set remove_unused to false",
            pointer=POINTER,
        )


def smaller_vocabulary(
    tokenizer: Tokenizer,
    config: EncoderConfig,
    used: Iterable[Sequence[int]],
    keep: Sequence[str],
) -> Vocabulary:
    """What is left where rows of the token ids `used`, and tokens or texts `keep`, are to stay.

    Special and added tokens, padding and all single characters stay too. InvalidModel where the
    tokenizer does something that cannot be numbered anew.
    """
    document = json.loads(tokenizer.to_str())
    vocabulary: dict[str, int] = document["model"]["vocab"]
    stays = {config.pad_token_id, *_special_ids(document)}
    stays.update(*used)
    prefix = document["model"]["continuing_subword_prefix"]
    stays.update(
        number for token, number in vocabulary.items() if len(token.removeprefix(prefix)) == 1
    )
    stays.update(number for entry in keep for number in _numbers_of(tokenizer, entry))
    # The library numbers tokens that were added to a vocabulary after all others.
    added = stays - set(vocabulary.values())
    kept = sorted(stays, key=lambda number: (number in added, number))
    return Vocabulary(
        np.array(kept, np.int64), config.vocab_size, _renumbered_tokenizer(document, kept)
    )


def unknown_entries(tokenizer: Tokenizer, keep: Sequence[str]) -> list[str]:
    """The entries that keep nothing, or not all of their text: the vocabulary lacks it."""
    unknown = tokenizer.token_to_id(_unk_token(tokenizer))
    found = ((entry, _numbers_of(tokenizer, entry)) for entry in keep)
    return [entry for entry, numbers in found if not numbers or unknown in numbers]


def _numbers_of(tokenizer: Tokenizer, entry: str) -> list[int]:
    """Of an entry of the keep-list: a token's own, else those of the text's tokens."""
    number = tokenizer.token_to_id(entry)
    if number is not None:
        return [number]
    return list(tokenizer.encode(entry, add_special_tokens=False).ids)


def _unk_token(tokenizer: Tokenizer) -> str:
    return str(json.loads(tokenizer.to_str())["model"]["unk_token"])


# --- the tokenizer's document ---------------------------------------------------------------


def _special_ids(document: Mapping[str, Any]) -> Iterator[int]:
    """Of BERT's special tokens, the added ones, and those put around a text."""
    model = document["model"]
    for token in (model["unk_token"], *SPECIAL_TOKENS.values()):
        if token in model["vocab"]:
            yield model["vocab"][token]
    yield from (added["id"] for added in document["added_tokens"])
    yield from (number for numbers in _put_around(document) for number in numbers)


def _put_around(document: Mapping[str, Any]) -> Iterator[list[int]]:
    """The lists of token ids in the post-processor, to be read or written in place."""
    pending = [document["post_processor"]]
    while pending:
        processor = pending.pop()
        match processor["type"]:
            case "Sequence":
                pending += processor["processors"]
            case "TemplateProcessing":
                yield from (special["ids"] for special in processor["special_tokens"].values())
            case "BertProcessing" | "RobertaProcessing":
                for end in ("cls", "sep"):  # ["[CLS]", 101]
                    numbers = [processor[end][1]]
                    yield numbers
                    processor[end][1] = numbers[0]
            case "ByteLevel":
                pass
            case other:
                raise InvalidModel(
                    f"the tokenizer's post-processor {str(other)[:40]!r} is not known here, so its "
                    "tokens cannot be numbered anew; set vocabulary.remove_unused to false",
                    pointer=TOKENIZER_FILE,
                )


def _renumbered_tokenizer(document: dict[str, Any], kept: Sequence[int]) -> Tokenizer:
    """The tokenizer with the kept tokens alone, numbered by their place; changes `document`."""
    numbers = {old: new for new, old in enumerate(kept)}
    model = document["model"]
    model["vocab"] = {
        token: numbers[old] for token, old in model["vocab"].items() if old in numbers
    }
    for added in document["added_tokens"]:
        added["id"] = numbers[added["id"]]
    for around in _put_around(document):
        around[:] = [numbers[old] for old in around]
    wanted = {**model["vocab"], **{a["content"]: a["id"] for a in document["added_tokens"]}}
    smaller = Tokenizer.from_str(json.dumps(document))
    if smaller.get_vocab(with_added_tokens=True) != wanted:
        raise InvalidModel(
            "the tokenizer's added tokens do not follow its vocabulary, so they cannot be "
            "numbered anew; set vocabulary.remove_unused to false",
            pointer=TOKENIZER_FILE,
        )
    return smaller


# --- what it does to texts ------------------------------------------------------------------


def texts_of(examples: Any) -> list[str] | list[tuple[str, ...]]:
    """All texts of a split's examples, of whatever task; rows of words stay such rows."""
    match examples:
        case TaggedExamples():
            return list(examples.words)
        case AskedExamples():
            return [*examples.questions, *examples.contexts]
        case _:
            return [*examples.texts, *(examples.pairs or ())]


def effect(
    tokenizer: Tokenizer,
    vocabulary: Vocabulary,
    texts: Sequence[str] | Sequence[tuple[str, ...]],
    split: Literal["dev", "test"],
) -> VocabularyReport:
    """What texts look like to the smaller vocabulary.

    InvalidModel where a text whose tokens all stayed does not get the same ones: the tokenizer
    is then no WordPiece as it is understood here.
    """
    before, after = _ids(tokenizer, texts), _ids(vocabulary.tokenizer, texts)
    numbers = vocabulary.numbers
    changed = 0
    for text, old, new in zip(texts, before, after, strict=True):
        if not all(token in numbers for token in old):
            changed += 1
        elif [numbers[token] for token in old] != new:
            raise InvalidModel(
                "the tokenizer does not give the same tokens after the unused ones were removed, "
                f"of {str(text)[:40]!r} for one; set vocabulary.remove_unused to false",
                pointer=TOKENIZER_FILE,
            )
    unknown = _unk_token(tokenizer)
    old_unknown, new_unknown = (
        each.token_to_id(unknown) for each in (tokenizer, vocabulary.tokenizer)
    )
    return VocabularyReport(
        tokens_before=vocabulary.rows,
        tokens_after=len(vocabulary.kept),
        split=split,
        unk_before=_share(before, old_unknown),
        unk_after=_share(after, new_unknown),
        length_before=_mean_length(before),
        length_after=_mean_length(after),
        changed_texts=changed / max(1, len(texts)),
    )


def _ids(tokenizer: Tokenizer, texts: Sequence[str] | Sequence[tuple[str, ...]]) -> list[list[int]]:
    are_words = bool(texts) and not isinstance(texts[0], str)
    rows = [text if isinstance(text, str) else list(text) for text in texts]
    encoded = tokenizer.encode_batch(rows, is_pretokenized=are_words, add_special_tokens=False)
    return [row.ids for row in encoded]


def _share(rows: Sequence[Sequence[int]], token: int | None) -> float:
    return sum(row.count(token) for row in rows) / max(1, sum(map(len, rows)))


def _mean_length(rows: Sequence[Sequence[int]]) -> float:
    return sum(map(len, rows)) / max(1, len(rows))


# --- files ----------------------------------------------------------------------------------


def save_smaller_tokenizer(vocabulary: Vocabulary, model_dir: Path, out_dir: Path) -> list[Path]:
    """Writes the tokenizer's files, as `save_tokenizer` does, and the map to the old numbers.

    vocab.txt, added_tokens.json and tokenizer_config.json are written where the model has them.
    """
    out_dir.mkdir(parents=True, exist_ok=True)
    tokenizer, numbers = vocabulary.tokenizer, vocabulary.numbers
    written = {
        MAP_FILE: _json({"tokens_before": vocabulary.rows, "kept": vocabulary.kept.tolist()})
    }
    if (model_dir / VOCABULARY_FILE).is_file():
        lines = _vocabulary_lines(tokenizer)
        if lines is not None:
            written[VOCABULARY_FILE] = lines
    if (model_dir / ADDED_TOKENS_FILE).is_file():
        added = {
            token: numbers[old]
            for token, old in read_json_object(model_dir / ADDED_TOKENS_FILE).items()
            if tokenizer.token_to_id(token) == numbers.get(old, -1)
        }
        written[ADDED_TOKENS_FILE] = _json(added)
    if (model_dir / SETTINGS_FILE).is_file():
        settings = read_json_object(model_dir / SETTINGS_FILE)
        decoder = settings.get("added_tokens_decoder")
        if isinstance(decoder, dict):
            settings["added_tokens_decoder"] = {
                str(numbers[int(old)]): token
                for old, token in decoder.items()
                if old.isdecimal() and int(old) in numbers
            }
        written[SETTINGS_FILE] = _json(settings)
    if (model_dir / SPECIAL_TOKENS_FILE).is_file():
        written[SPECIAL_TOKENS_FILE] = (model_dir / SPECIAL_TOKENS_FILE).read_text("utf-8")
    tokenizer.save(str(out_dir / TOKENIZER_FILE))
    for name, text in written.items():
        (out_dir / name).write_text(text, "utf-8")
    return [out_dir / name for name in (TOKENIZER_FILE, *written)]


def _vocabulary_lines(tokenizer: Tokenizer) -> str | None:
    """A token a line, in order; None where that cannot say it, which no vocab.txt could before."""
    vocabulary = tokenizer.get_vocab(with_added_tokens=False)
    tokens = sorted(vocabulary, key=lambda token: vocabulary[token])
    in_lines = not any("\n" in token or "\r" in token for token in tokens)
    if not in_lines or [vocabulary[token] for token in tokens] != list(range(len(tokens))):
        return None
    return "".join(f"{token}\n" for token in tokens)


def _json(value: Mapping[str, Any]) -> str:
    return json.dumps(value, ensure_ascii=False) + "\n"
