"""Tokenizers of model folders, read without transformers or paddlenlp."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Encoding, Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.decoders import WordPiece as WordPieceDecoder
from tokenizers.models import BPE, WordPiece
from tokenizers.normalizers import BertNormalizer
from tokenizers.pre_tokenizers import BertPreTokenizer, ByteLevel
from tokenizers.processors import RobertaProcessing, TemplateProcessing

from compression.errors import InvalidModel
from compression.teachers import read_config
from compression.teachers.fields import MAX_VOCABULARY, Fields, read_json_object

TOKENIZER_FILE = "tokenizer.json"
VOCABULARY_FILE = "vocab.txt"
BYTE_VOCABULARY_FILE = "vocab.json"
MERGES_FILE = "merges.txt"
SETTINGS_FILE = "tokenizer_config.json"
SPECIAL_TOKENS_FILE = "special_tokens_map.json"
ADDED_TOKENS_FILE = "added_tokens.json"
TOKENIZER_FILES = (
    TOKENIZER_FILE,
    VOCABULARY_FILE,
    BYTE_VOCABULARY_FILE,
    MERGES_FILE,
    SETTINGS_FILE,
    SPECIAL_TOKENS_FILE,
    ADDED_TOKENS_FILE,
)

SPECIAL_TOKENS = {  # BERT's
    "pad_token": "[PAD]",
    "unk_token": "[UNK]",
    "cls_token": "[CLS]",
    "sep_token": "[SEP]",
    "mask_token": "[MASK]",
}
_BYTE_SPECIAL_TOKENS = {  # RoBERTa's
    "bos_token": "<s>",
    "eos_token": "</s>",
    "pad_token": "<pad>",
    "unk_token": "<unk>",
    "cls_token": "<s>",
    "sep_token": "</s>",
    "mask_token": "<mask>",
}
_MAX_VOCABULARY_BYTES = 64 * 2**20


def invalid_tokenizer(message: str, *, pointer: str) -> InvalidModel:
    return InvalidModel(message, pointer=pointer, code="invalid-tokenizer")


@contextmanager
def panics_as_errors() -> Iterator[None]:
    """What the library gives up over, for example an expression that goes back over a text too
    often, is no Exception of Python's; here it is InvalidModel."""
    try:
        yield
    except BaseException as error:
        if type(error).__name__ != "PanicException":
            raise
        raise invalid_tokenizer(
            f"the tokenizer fails on a text: {str(error)[:200]}", pointer=TOKENIZER_FILE
        ) from None


def load_tokenizer(model_dir: Path) -> Tokenizer:
    """tokenizer.json, else BPE over vocab.json as RoBERTa's, or WordPiece over vocab.txt as BERT's.

    Neither pads nor truncates, whatever the file says: that is the caller's to ask for.
    InvalidModel where there is none, where it cannot be read, where it adds no
    [CLS] and [SEP], or where its vocabulary is larger than the model's.
    """
    rows = read_config(model_dir).encoder.vocab_size
    if (model_dir / TOKENIZER_FILE).is_file():
        tokenizer, file = _fast_tokenizer(model_dir / TOKENIZER_FILE, rows), TOKENIZER_FILE
    elif (model_dir / BYTE_VOCABULARY_FILE).is_file():
        tokenizer, file = _byte_level(model_dir), BYTE_VOCABULARY_FILE
    elif (model_dir / VOCABULARY_FILE).is_file():
        tokenizer, file = _wordpiece(model_dir, rows), VOCABULARY_FILE
    else:
        raise invalid_tokenizer(
            f"the model folder has neither {TOKENIZER_FILE} nor {VOCABULARY_FILE}, nor "
            f"{BYTE_VOCABULARY_FILE} with {MERGES_FILE}",
            pointer=TOKENIZER_FILE,
        )
    tokenizer.no_padding()
    tokenizer.no_truncation()
    if tokenizer.num_special_tokens_to_add(False) == 0:
        raise invalid_tokenizer(
            f"{file}: the tokenizer adds no [CLS] and [SEP] to a text", pointer=file
        )
    _check_last(
        max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1), rows=rows, file=file
    )
    return tokenizer


def _check_last(number: int, *, rows: int, file: str) -> None:
    if number >= rows:
        raise invalid_tokenizer(
            f"{file} has token ids up to {number}, but the model embeds only {rows} tokens",
            pointer=file,
        )


def vocabulary_kind(tokenizer: Tokenizer) -> str:
    """How it splits words: "WordPiece", "BPE", "Unigram" or "WordLevel"."""
    return type(tokenizer.model).__name__


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
    with panics_as_errors():
        encoded: list[Encoding] = own.encode_batch(rows)
    return encoded


def _fast_tokenizer(path: Path, rows: int) -> Tokenizer:
    document = read_json_object(path)  # size, encoding and nesting, before the Rust parser sees it
    model = document.get("model")
    vocabulary = model.get("vocab") if isinstance(model, dict) else None
    if isinstance(vocabulary, (dict, list)):  # many tokens take seconds to build
        _check_last(len(vocabulary) - 1, rows=rows, file=path.name)
    with panics_as_errors():
        try:
            return Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises nothing more exact
            raise invalid_tokenizer(
                f"{path.name} cannot be read as a tokenizer: {str(error)[:200]}", pointer=path.name
            ) from error


def _wordpiece(model_dir: Path, rows: int) -> Tokenizer:
    path = model_dir / VOCABULARY_FILE
    settings = _optional_json(model_dir / SETTINGS_FILE)
    vocabulary = _read_vocabulary(path)
    _check_last(max(vocabulary.values()), rows=rows, file=path.name)
    special, present = _special_tokens(model_dir, settings, SPECIAL_TOKENS, vocabulary, path)
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
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in present])
    _add_tokens(tokenizer, model_dir / ADDED_TOKENS_FILE, vocabulary_file=VOCABULARY_FILE)
    return tokenizer


def _byte_level(model_dir: Path) -> Tokenizer:
    """Byte-level BPE with "<s> a </s>" and "<s> a </s></s> b </s>", all of token type 0."""
    path, settings = model_dir / BYTE_VOCABULARY_FILE, _optional_json(model_dir / SETTINGS_FILE)
    vocabulary = read_json_object(path)
    if not all(type(number) is int and 0 <= number < 2**31 for number in vocabulary.values()):
        raise invalid_tokenizer(f"{path.name} does not map tokens to ids", pointer=path.name)
    special, present = _special_tokens(model_dir, settings, _BYTE_SPECIAL_TOKENS, vocabulary, path)
    prefix_space = Fields(settings, file=SETTINGS_FILE).flag("add_prefix_space")
    merges = _read_merges(model_dir / MERGES_FILE)
    try:
        tokenizer = Tokenizer(BPE(vocab=vocabulary, merges=merges))
    except Exception as error:  # the library raises nothing more exact
        raise invalid_tokenizer(
            f"{MERGES_FILE} does not fit {path.name}: {str(error)[:200]}", pointer=MERGES_FILE
        ) from error
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=prefix_space)
    tokenizer.decoder = ByteLevelDecoder()
    cls, sep = special["cls_token"], special["sep_token"]
    tokenizer.post_processor = RobertaProcessing(
        (sep, vocabulary[sep]),
        (cls, vocabulary[cls]),
        trim_offsets=True,
        add_prefix_space=prefix_space,
    )
    # A mask takes the space before it, as a word does.
    mask = special["mask_token"]
    tokenizer.add_special_tokens(
        [AddedToken(token, lstrip=token == mask, special=True) for token in present]
    )
    _add_tokens(tokenizer, model_dir / ADDED_TOKENS_FILE, vocabulary_file=path.name)
    return tokenizer


def _read_merges(path: Path) -> list[tuple[str, str]]:
    """Pairs of tokens that BPE joins, the most frequent first; "#version" may stand above them."""
    merges: list[tuple[str, str]] = []
    for number, line in enumerate(_read_lines(path), start=1):
        if not line or (number == 1 and line.startswith("#version")):
            continue
        left, space, right = line.partition(" ")
        if not (left and space and right) or " " in right:
            raise invalid_tokenizer(
                f"{path.name}, line {number}: not two tokens with a space between them",
                pointer=path.name,
            )
        merges.append((left, right))
    return merges


def _read_vocabulary(path: Path) -> dict[str, int]:
    """Token -> id, which is its line; as in BERT, the last one where it stands twice."""
    return {line: i for i, line in enumerate(_read_lines(path))}


def _read_lines(path: Path) -> list[str]:
    if not path.is_file():
        raise invalid_tokenizer(f"the model folder lacks {path.name}", pointer=path.name)
    if path.stat().st_size > _MAX_VOCABULARY_BYTES:
        raise _too_large(path, f"more than {_MAX_VOCABULARY_BYTES // 2**20} MiB")
    raw = path.read_bytes()
    if raw.count(b"\n") > MAX_VOCABULARY:  # a line takes some sixty bytes, be it empty
        raise _too_large(path, f"more than {MAX_VOCABULARY} lines")
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise invalid_tokenizer(
            f"{path.name}, line {line}: not UTF-8", pointer=path.name
        ) from error
    return [line.rstrip("\r") for line in text.removesuffix("\n").split("\n")]


def _too_large(path: Path, why: str) -> InvalidModel:
    return InvalidModel(
        f"{path.name} is too large for a vocabulary: {why}",
        pointer=path.name,
        code="tokenizer-too-large",
    )


def _optional_json(path: Path) -> dict[str, Any]:
    return read_json_object(path) if path.is_file() else {}


def _special_tokens(
    model_dir: Path,
    settings: dict[str, Any],
    defaults: Mapping[str, str],
    vocabulary: Mapping[str, int],
    file: Path,
) -> tuple[dict[str, str], list[str]]:
    """The special tokens by name, and those that the vocabulary has: all but perhaps the mask."""
    stated = {**settings, **_optional_json(model_dir / SPECIAL_TOKENS_FILE)}
    special = {}
    for name, default in defaults.items():
        value = stated.get(name)
        if isinstance(value, dict):  # an AddedToken, spelt out
            value = value.get("content")
        special[name] = value if isinstance(value, str) and value else default
    tokens = dict.fromkeys(special.values())
    absent = [token for token in tokens if token not in vocabulary]
    # Only a mask is never needed to classify.
    if absent and absent != [special["mask_token"]]:
        raise invalid_tokenizer(f"{file.name} lacks {', '.join(absent)[:200]}", pointer=file.name)
    return special, [token for token in tokens if token not in absent]


def _add_tokens(tokenizer: Tokenizer, path: Path, *, vocabulary_file: str) -> None:
    """Tokens that a slow tokenizer keeps beside its vocabulary: {"token": id}."""
    added = _optional_json(path)
    if not all(type(n) is int for n in added.values()):
        raise invalid_tokenizer(f"{path.name} does not map tokens to ids", pointer=path.name)
    for token, number in sorted(added.items(), key=lambda item: int(item[1])):
        tokenizer.add_tokens([AddedToken(token, normalized=False)])
        if tokenizer.token_to_id(token) != number:
            raise invalid_tokenizer(
                f"{path.name} gives {token[:40]!r} the id {number}, which does not follow "
                f"{vocabulary_file}",
                pointer=path.name,
            )
