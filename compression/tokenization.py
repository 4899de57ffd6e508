"""Tokenizers of model folders, read without transformers or paddlenlp."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Encoding, Tokenizer
from tokenizers.decoders import WordPiece as WordPieceDecoder
from tokenizers.models import WordPiece
from tokenizers.normalizers import BertNormalizer
from tokenizers.pre_tokenizers import BertPreTokenizer
from tokenizers.processors import TemplateProcessing

from compression.errors import InvalidModel
from compression.teachers import read_config
from compression.teachers.fields import Fields, read_json_object

TOKENIZER_FILE = "tokenizer.json"
VOCABULARY_FILE = "vocab.txt"
SETTINGS_FILE = "tokenizer_config.json"
SPECIAL_TOKENS_FILE = "special_tokens_map.json"
ADDED_TOKENS_FILE = "added_tokens.json"
TOKENIZER_FILES = (
    TOKENIZER_FILE,
    VOCABULARY_FILE,
    SETTINGS_FILE,
    SPECIAL_TOKENS_FILE,
    ADDED_TOKENS_FILE,
)

_SPECIAL_TOKENS = {
    "pad_token": "[PAD]",
    "unk_token": "[UNK]",
    "cls_token": "[CLS]",
    "sep_token": "[SEP]",
    "mask_token": "[MASK]",
}
_MAX_VOCABULARY_BYTES = 64 * 2**20


def load_tokenizer(model_dir: Path) -> Tokenizer:
    """tokenizer.json, else WordPiece over vocab.txt as BERT's tokenizer does it.

    Neither pads nor truncates, whatever the file says: that is the caller's to ask for.
    InvalidModel where there is none, where it cannot be read, where it adds no
    [CLS] and [SEP], or where its vocabulary is larger than the model's.
    """
    if (model_dir / TOKENIZER_FILE).is_file():
        tokenizer, file = _fast_tokenizer(model_dir / TOKENIZER_FILE), TOKENIZER_FILE
    elif (model_dir / VOCABULARY_FILE).is_file():
        tokenizer, file = _wordpiece(model_dir), VOCABULARY_FILE
    else:
        raise InvalidModel(
            f"the model folder has neither {TOKENIZER_FILE} nor {VOCABULARY_FILE}",
            pointer=TOKENIZER_FILE,
        )
    tokenizer.no_padding()
    tokenizer.no_truncation()
    if tokenizer.num_special_tokens_to_add(False) == 0:
        raise InvalidModel(f"{file}: the tokenizer adds no [CLS] and [SEP] to a text", pointer=file)
    rows = read_config(model_dir).encoder.vocab_size
    last = max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1)
    if last >= rows:
        raise InvalidModel(
            f"{file} has token ids up to {last}, but the model embeds only {rows} tokens",
            pointer=file,
        )
    return tokenizer


def save_tokenizer(model_dir: Path, out_dir: Path) -> list[Path]:
    """Writes the folder's tokenizer as tokenizer.json, with copies of its other files."""
    out_dir.mkdir(parents=True, exist_ok=True)
    written = [out_dir / TOKENIZER_FILE]
    load_tokenizer(model_dir).save(str(written[0]))
    for name in TOKENIZER_FILES[1:]:
        if (model_dir / name).is_file():
            written.append(Path(shutil.copyfile(model_dir / name, out_dir / name)))
    return written


def encode(
    tokenizer: Tokenizer,
    texts: Sequence[str],
    pairs: Sequence[str] | None,
    max_seq_len: int,
) -> list[tuple[list[int], list[int]]]:
    """(input_ids, token_type_ids) of every row, as `encode_rows`."""
    rows = encode_rows(tokenizer, texts, pairs, max_seq_len)
    return [(row.ids, row.type_ids) for row in rows]


def encode_rows(
    tokenizer: Tokenizer,
    texts: Sequence[str],
    pairs: Sequence[str] | None,
    max_seq_len: int,
) -> list[Encoding]:
    """Every row's encoding, at most `max_seq_len` long, not padded.

    What was cut off a row is its `overflowing`. Of a pair that is too long, the longer
    sentence is cut first. Works on a copy of the tokenizer, which takes a tenth of a
    second: hand over all rows at once.
    """
    if pairs is not None and len(pairs) != len(texts):
        raise ValueError(f"{len(texts)} texts, but {len(pairs)} second texts")
    own = Tokenizer.from_str(tokenizer.to_str())
    own.no_padding()
    own.enable_truncation(max_length=max_seq_len, strategy="longest_first")
    rows: list[Any] = list(texts) if pairs is None else list(zip(texts, pairs, strict=True))
    encoded: list[Encoding] = own.encode_batch(rows)
    return encoded


def _fast_tokenizer(path: Path) -> Tokenizer:
    read_json_object(path)  # size, encoding and nesting, before the Rust parser sees it
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises nothing more exact
        raise InvalidModel(
            f"{path.name} cannot be read as a tokenizer: {str(error)[:200]}", pointer=path.name
        ) from error


def _wordpiece(model_dir: Path) -> Tokenizer:
    path = model_dir / VOCABULARY_FILE
    settings = _optional_json(model_dir / SETTINGS_FILE)
    special = _special_tokens({**settings, **_optional_json(model_dir / SPECIAL_TOKENS_FILE)})
    vocabulary = _read_vocabulary(path)
    absent = [token for token in special.values() if token not in vocabulary]
    # Only a mask is never needed to classify.
    if absent and absent != [special["mask_token"]]:
        raise InvalidModel(f"{path.name} lacks {', '.join(absent)[:200]}", pointer=path.name)
    fields = Fields(settings, file=SETTINGS_FILE)
    lowercase = True if settings.get("do_lower_case") is None else fields.flag("do_lower_case")
    accents = None if settings.get("strip_accents") is None else fields.flag("strip_accents")
    chinese = settings.get("tokenize_chinese_chars") is None or fields.flag(
        "tokenize_chinese_chars"
    )

    tokenizer = Tokenizer(
        WordPiece(vocab=vocabulary, unk_token=special["unk_token"], max_input_chars_per_word=100)
    )
    tokenizer.normalizer = BertNormalizer(
        clean_text=True,
        handle_chinese_chars=chinese,
        strip_accents=accents,  # None: as lowercase says, which is BERT's rule
        lowercase=lowercase,
    )
    tokenizer.pre_tokenizer = BertPreTokenizer()
    cls, sep = special["cls_token"], special["sep_token"]
    tokenizer.post_processor = TemplateProcessing(
        single=[cls, "$A", sep],
        pair=[cls, "$A", sep, "$B:1", f"{sep}:1"],
        special_tokens=[(cls, vocabulary[cls]), (sep, vocabulary[sep])],
    )
    tokenizer.decoder = WordPieceDecoder(prefix="##")
    tokenizer.add_special_tokens(
        [AddedToken(token, special=True) for token in special.values() if token not in absent]
    )
    _add_tokens(tokenizer, model_dir / ADDED_TOKENS_FILE)
    return tokenizer


def _read_vocabulary(path: Path) -> dict[str, int]:
    """Token -> id, which is its line; as in BERT, the last one where it stands twice."""
    if path.stat().st_size > _MAX_VOCABULARY_BYTES:
        raise InvalidModel(f"{path.name} is too large for a vocabulary", pointer=path.name)
    try:
        text = path.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise InvalidModel(f"{path.name}, line {line}: not UTF-8", pointer=path.name) from error
    lines = text.removesuffix("\n").split("\n")
    return {line.rstrip("\r"): i for i, line in enumerate(lines)}


def _optional_json(path: Path) -> dict[str, Any]:
    return read_json_object(path) if path.is_file() else {}


def _special_tokens(settings: dict[str, Any]) -> dict[str, str]:
    special = {}
    for name, default in _SPECIAL_TOKENS.items():
        value = settings.get(name)
        if isinstance(value, dict):  # an AddedToken, spelt out
            value = value.get("content")
        special[name] = value if isinstance(value, str) and value else default
    return special


def _add_tokens(tokenizer: Tokenizer, path: Path) -> None:
    """Tokens that a slow tokenizer keeps beside its vocabulary: {"token": id}."""
    added = _optional_json(path)
    if not all(type(n) is int for n in added.values()):
        raise InvalidModel(f"{path.name} does not map tokens to ids", pointer=path.name)
    for token, number in sorted(added.items(), key=lambda item: int(item[1])):
        tokenizer.add_tokens([AddedToken(token, normalized=False)])
        if tokenizer.token_to_id(token) != number:
            raise InvalidModel(
                f"{path.name} gives {token[:40]!r} the id {number}, which does not follow "
                f"{VOCABULARY_FILE}",
                pointer=path.name,
            )
