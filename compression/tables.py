"""Dataset files to rows: .csv, .tsv, .jsonl and .parquet, read strictly and reported by line.

A dataset is a folder with a file for each split, `train` at least. Nothing is
repaired and nothing is dropped: what cannot be read as it stands is an
`InvalidDataset` that names file and line, because a row that goes missing in
silence would change what a model learns and what it is measured on.
"""

from __future__ import annotations

import csv
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, Literal, NoReturn

import numpy as np
from pydantic import Field

from compression.errors import InvalidDataset, RowError
from compression.spec import Frozen

SPLITS = ("train", "dev", "test", "unlabelled")
LABELLED_SPLITS = ("train", "dev", "test")
SUFFIXES = (".csv", ".tsv", ".jsonl", ".parquet")
LINE_KEY = "__line__"  # of the rows that write_clean writes: the line in the uploaded file

MAX_ROW_ERRORS = 20
MAX_LINES_NAMED = 10  # of rows that are sound, and wrong for a task
MAX_COLUMNS = 1000
MAX_FIELD_CHARACTERS = 131_072  # also the csv module's own limit
MAX_ROW_CHARACTERS = 2**20
MAX_COLUMN_CHARACTERS = 200
# Room for the longest row as JSON with its keys, every character escaped in six: what
# write_clean writes can be read back.
MAX_LINE_BYTES = 8 * 2**20
MAX_LABELS = 1000
MAX_LABEL_CHARACTERS = 200
# What a .parquet file may unpack to: as an archive, whose limits are those of jobs/archives.py.
_MAX_RATIO = 200
_RATIO_FREE_BYTES = 64 * 2**20

_ALLOWED = "train, dev, test or unlabelled, each as .csv, .tsv, .jsonl or .parquet"
_OTHER_NAMES = {
    "training": "train",
    "val": "dev",
    "valid": "dev",
    "validation": "dev",
    "eval": "dev",
    "development": "dev",
    "testing": "test",
    "unlabeled": "unlabelled",
    "unsupervised": "unlabelled",
}

Value = str | tuple[str, ...] | None  # a tuple is a list of texts, which .csv and .tsv cannot hold
Row = dict[str, Value]


@dataclass(frozen=True)
class Table:
    """One split: `rows[i]` stands on line `lines[i]` of its file and has every column.

    Values are text as it stands in the file, numbers included, or a list of such; None is
    a null of .jsonl or .parquet. The fields of an object, or of a list of objects, are
    columns called "answers.text". A line counts from 1 and a row that spans several lines
    has the number of its first; in .parquet it is the number of the row.
    """

    columns: tuple[str, ...]
    rows: list[Row]
    lines: list[int]
    file: str = field(default="", compare=False)  # the name that errors speak of


class _BadRow(Exception):
    """Why one row is refused; the reader goes on to the next."""


class _BadFile(Exception):
    """Why reading stops at `line`: what follows it cannot be told apart any more."""

    def __init__(self, line: int, message: str, code: str) -> None:
        super().__init__(message)
        self.line = line
        self.code = code


class _Errors:
    """The first broken rows of a dataset."""

    def __init__(self) -> None:
        self.rows: list[RowError] = []
        self.code: str | None = None  # of the first one, where it says more than "invalid-dataset"

    @property
    def full(self) -> bool:
        return len(self.rows) >= MAX_ROW_ERRORS

    def add(self, file: str, line: int, message: str, code: str | None = None) -> None:
        if not self.rows:
            self.code = code
        self.rows.append(RowError(file, line, message))


def read_splits(dataset_dir: Path) -> dict[str, Table]:
    """Every split of the folder, in the order of SPLITS.

    InvalidDataset: no train split, two files for one split, a file name that is none
    of ours, an empty split, a header that names a column twice, or broken rows (the
    first 20 of them in `rows`). Files that are no tables (a README) are left alone,
    and blank lines are passed over.
    """
    errors = _Errors()
    splits: dict[str, Table] = {}
    for split, path in _split_files(dataset_dir).items():
        table = _READERS[path.suffix.lower()](path, errors)
        if table is not None:
            splits[split] = table
        if errors.full:
            break
    if errors.rows:
        first = errors.rows[0]
        count = f"at least {len(errors.rows)}" if errors.full else str(len(errors.rows))
        raise InvalidDataset(
            f"{first.file}, line {first.line}: {first.message}"
            + (f" ({count} broken rows in all)" if len(errors.rows) > 1 else ""),
            pointer=first.file,
            rows=tuple(errors.rows),
            code=errors.code,
        )
    return splits


def write_clean(splits: Mapping[str, Table], out_dir: Path) -> list[Path]:
    """Writes `{split}.jsonl`, which `read_splits` reads back to equal tables, lines included."""
    out_dir.mkdir(parents=True, exist_ok=True)
    paths = []
    for split, table in splits.items():
        path = out_dir / f"{split}.jsonl"
        with path.open("w", encoding="utf-8", newline="\n") as file:
            for row, line in zip(table.rows, table.lines, strict=True):
                values = {LINE_KEY: line} | {column: row[column] for column in table.columns}
                file.write(json.dumps(values, ensure_ascii=False) + "\n")
        paths.append(path)
    return paths


# --- which files ----------------------------------------------------------------------------


def _split_files(dataset_dir: Path) -> dict[str, Path]:
    found: dict[str, Path] = {}
    others: list[str] = []
    if not dataset_dir.is_dir():
        raise InvalidDataset(f"{dataset_dir.name!r} is not a folder")
    for path in sorted(dataset_dir.iterdir()):
        if path.name.startswith(".") or not path.is_file():
            continue
        stem, _, rest = path.name.lower().partition(".")
        suffix = f".{rest}"
        if stem in SPLITS and suffix in SUFFIXES:
            if stem in found:
                raise InvalidDataset(
                    f"{found[stem].name} and {path.name} are both the {stem} split: keep one",
                    pointer=path.name,
                )
            found[stem] = path
        elif stem in SPLITS or path.suffix.lower() in SUFFIXES:
            advice = f"; call it {_OTHER_NAMES[stem]}" if stem in _OTHER_NAMES else ""
            raise InvalidDataset(
                f"{path.name!r} is not a name that is known: files are called {_ALLOWED}{advice}",
                pointer=path.name,
            )
        else:
            others.append(path.name)
    if "train" not in found:
        seen = [path.name for path in found.values()] + others
        raise InvalidDataset(
            f"there is no train split: files are called {_ALLOWED}"
            + (f"; found {', '.join(seen[:10])}" if seen else "; found no files")
        )
    return {split: found[split] for split in SPLITS if split in found}


# --- text files -----------------------------------------------------------------------------


def _text_lines(file: BinaryIO) -> Iterator[str]:
    """Lines with their line ends, decoded one by one so that a bad byte has a line number."""
    number = 0
    while raw := file.readline(MAX_LINE_BYTES + 1):
        number += 1
        if len(raw) > MAX_LINE_BYTES:
            raise _BadFile(
                number, f"the line is longer than {MAX_LINE_BYTES} bytes", "table-line-too-long"
            )
        if number == 1:
            if raw.startswith((b"\xff\xfe", b"\xfe\xff")):
                raise _BadFile(1, "the file is in UTF-16; save it as UTF-8", "table-encoding")
            raw = raw.removeprefix(b"\xef\xbb\xbf")
        try:
            line = raw.decode("utf-8")
        except UnicodeDecodeError as error:
            raise _BadFile(
                number,
                f"byte 0x{raw[error.start]:02x} at position {error.start + 1} of the line is not "
                "UTF-8 (is the file in Latin-1 or Windows-1252?); save it as UTF-8",
                "table-encoding",
            ) from error
        yield line


def _read_csv(path: Path, errors: _Errors) -> Table | None:
    """RFC 4180: quoted fields may hold commas, doubled quotes and line breaks."""
    with path.open("rb") as file:
        reader = csv.reader(_text_lines(file), strict=True)

        def records() -> Iterator[tuple[int, list[str]]]:
            while True:
                line = reader.line_num + 1
                try:
                    record = next(reader)
                except StopIteration:
                    return
                except csv.Error as error:
                    raise _BadFile(line, _csv_message(error), "table-quotes") from error
                if record:
                    yield line, record

        return _read_records(path.name, records(), errors)


def _csv_message(error: csv.Error) -> str:
    text = str(error)
    if "field limit" in text:
        return (
            f"a field is longer than {MAX_FIELD_CHARACTERS} characters, or its opening quote is "
            "never closed"
        )
    if "unexpected end" in text:
        return "an opening quote is never closed"
    if "expected after" in text:
        return 'a closing quote is followed by text; write a quote inside a field as ""'
    if "new-line" in text:
        return "a bare carriage return; end lines with \\n or \\r\\n, or quote the field"
    return text


def _read_tsv(path: Path, errors: _Errors) -> Table | None:
    """Tab-separated lines without any quoting: a quote is a character like others."""
    with path.open("rb") as file:

        def records() -> Iterator[tuple[int, list[str]]]:
            for number, line in enumerate(_text_lines(file), start=1):
                line = line.removesuffix("\n").removesuffix("\r")
                if line:
                    yield number, line.split("\t")

        return _read_records(path.name, records(), errors)


def _read_records(
    name: str, records: Iterator[tuple[int, list[str]]], errors: _Errors
) -> Table | None:
    """Header and rows of a .csv or .tsv file; None when broken rows were reported."""
    columns: tuple[str, ...] = ()
    rows: list[Row] = []
    lines: list[int] = []
    before = len(errors.rows)
    try:
        for line, record in records:
            if not columns:
                columns = _header(name, line, record)
                continue
            try:
                if len(record) != len(columns):
                    raise _BadRow(_ragged(record, columns))
                _check_row(columns, record)
            except _BadRow as error:
                errors.add(name, line, str(error))
                if errors.full:
                    return None
                continue
            rows.append(dict(zip(columns, record, strict=True)))
            lines.append(line)
    except _BadFile as error:
        errors.add(name, error.line, str(error), error.code)
        return None
    if len(errors.rows) > before:
        return None
    if not columns:
        _refuse_empty(name, "the file is empty")
    if not rows:
        _refuse_empty(name, "there is a header and no row")
    return Table(columns, rows, lines, name)


def _ragged(record: Sequence[str], columns: Sequence[str]) -> str:
    fields = "1 field" if len(record) == 1 else f"{len(record)} fields"
    return f"the row has {fields} where the header has {len(columns)}"


def _header(name: str, line: int, names: Sequence[str]) -> tuple[str, ...]:
    _check_number(name, names)
    # A column without a name is what a data frame's index becomes in a .csv file.
    columns = tuple(title or f"unnamed_{i}" for i, title in enumerate(names, start=1))
    _check_columns(name, columns)
    if any("\r" in column for column in columns):
        raise InvalidDataset(
            f"{name}, line {line}: a column's name holds a carriage return; end lines with \\n or "
            "\\r\\n",
            pointer=name,
        )
    return columns


def _check_number(name: str, columns: Sequence[str]) -> None:
    if len(columns) > MAX_COLUMNS:
        raise InvalidDataset(
            f"{name} has {len(columns)} columns; at most {MAX_COLUMNS} are read",
            pointer=name,
            code="table-too-wide",
        )


def _check_columns(name: str, columns: Sequence[str]) -> None:
    _check_number(name, columns)
    seen: set[str] = set()
    for column in columns:
        if len(column) > MAX_COLUMN_CHARACTERS:
            raise InvalidDataset(
                f"{name}: a column's name has {len(column)} characters, at most "
                f"{MAX_COLUMN_CHARACTERS} are read; is the first line a header?",
                pointer=name,
            )
        if column in seen:
            raise InvalidDataset(f"{name} names the column {column!r} twice", pointer=name)
        if column == LINE_KEY:
            raise InvalidDataset(f"{name}: the column name {LINE_KEY!r} is reserved", pointer=name)
        if "\0" in column:
            raise InvalidDataset(f"{name}: a column's name holds a NUL character", pointer=name)
        if column.startswith("="):
            raise InvalidDataset(
                f"{name}: the column name {column!r} is a spreadsheet's formula; save the values",
                pointer=name,
                code="table-formula",
            )
        seen.add(column)


def _check_row(columns: Sequence[str], values: Sequence[Value]) -> None:
    total = 0
    for column, value in zip(columns, values, strict=True):
        for item in texts_of(value):
            if len(item) > MAX_FIELD_CHARACTERS:
                raise _BadRow(
                    f"{column!r} has {len(item)} characters; at most {MAX_FIELD_CHARACTERS} "
                    "are read"
                )
            if "\0" in item:
                raise _BadRow(f"{column!r} holds a NUL character")
            total += len(item) + isinstance(value, tuple)  # each item needs quotes in JSON
    if total > MAX_ROW_CHARACTERS:
        raise _BadRow(f"the row has {total} characters; at most {MAX_ROW_CHARACTERS} are read")


def texts_of(value: Value) -> tuple[str, ...]:
    """The texts of one value: those of its list, itself, or none."""
    return value if isinstance(value, tuple) else () if value is None else (value,)


def _shown(name: str) -> str:
    """Quoted, and short enough for a message whatever a file holds."""
    return repr(name if len(name) <= 80 else f"{name[:77]}...")


def _refuse_empty(name: str, reason: str) -> NoReturn:
    split = name.partition(".")[0].lower()
    raise InvalidDataset(f"{name}: {reason}: the {split} split is empty", pointer=name)


# --- .jsonl ---------------------------------------------------------------------------------


def _pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    row = dict(pairs)
    if len(row) != len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise _BadRow(f"the key {_shown(key)} stands in it twice")
            seen.add(key)
    return row


def _constant(name: str) -> NoReturn:
    raise _BadRow(f"{name} is not a JSON value; write null")


# Numbers keep their digits as written: "1.10" stays that, and no number is too long to parse.
_DECODER = json.JSONDecoder(
    object_pairs_hook=_pairs, parse_int=str, parse_float=str, parse_constant=_constant
)


def _read_jsonl(path: Path, errors: _Errors) -> Table | None:
    """A JSON object a line, all with the keys of the first one."""
    name = path.name
    columns: tuple[str, ...] = ()
    keys: Set[str] = frozenset()
    lists: dict[str, bool] = {}  # whether a column holds them, by its first value
    rows: list[Row] = []
    lines: list[int] = []
    before = len(errors.rows)
    with path.open("rb") as file:
        try:
            for number, text in enumerate(_text_lines(file), start=1):
                if not text.strip(" \t\r\n"):
                    continue
                try:
                    row, line = _json_row(text, number)
                    if not columns:
                        if not row or "" in row:
                            raise _BadRow("the first object must name every column")
                        columns, keys = tuple(row), row.keys()
                        _check_columns(name, columns)
                    elif row.keys() != keys:
                        raise _BadRow(_other_keys(row, columns))
                    _check_row(tuple(row), tuple(row.values()))
                    for key, value in row.items():
                        given = isinstance(value, tuple)
                        if value is not None and lists.setdefault(key, given) != given:
                            kind = "an array" if given else "no array"
                            raise _BadRow(f"{_shown(key)} is {kind}, unlike in the rows above")
                except _BadRow as error:
                    errors.add(name, number, str(error))
                    if errors.full:
                        return None
                    continue
                rows.append(row)
                lines.append(line)
        except _BadFile as error:
            errors.add(name, error.line, str(error), error.code)
            return None
    if len(errors.rows) > before:
        return None
    if not columns:
        _refuse_empty(name, "the file is empty")
    return Table(columns, rows, lines, name)


def _json_row(text: str, number: int) -> tuple[Row, int]:
    try:
        row = _DECODER.decode(text)
    except json.JSONDecodeError as error:
        raise _BadRow(f"not JSON: {error.msg} at character {error.pos + 1}") from error
    except RecursionError as error:
        raise _BadRow("not a flat JSON object: it is nested too deeply") from error
    if not isinstance(row, dict):
        raise _BadRow('each line must be a JSON object, for example {"text": "...", "label": "1"}')
    line = number
    if LINE_KEY in row:
        written = row.pop(LINE_KEY)
        if not isinstance(written, str) or not re.fullmatch("[1-9][0-9]{0,11}", written):
            raise _BadRow(f"{LINE_KEY!r} is reserved for a line number")
        line = int(written)
    row = _flat(row)
    if "\\u" in text:  # the only way in for half a surrogate pair
        for key, value in row.items():
            try:
                "".join((key, *texts_of(value))).encode()
            except UnicodeEncodeError as error:
                raise _BadRow(
                    f"{_shown(key)} holds half a surrogate pair: not Unicode text"
                ) from error
    return row, line


def _flat(record: Mapping[str, Any]) -> Row:
    """Values by column: the fields of an object, or of a list of objects, become columns."""
    row: Row = {}
    for key, value in record.items():
        for column, own in _fields(key, value):
            if column in row:
                raise _BadRow(f"{_shown(column)} stands in it twice")
            row[column] = own
    return row


def _fields(key: str, value: Any) -> Iterator[tuple[str, Value]]:
    if isinstance(value, dict):
        for name, inner in value.items():
            yield f"{key}.{name}", _value(f"{key}.{name}", inner)
    elif isinstance(value, list) and value and all(isinstance(item, dict) for item in value):
        for name in value[0]:
            if any(item.keys() != value[0].keys() for item in value):
                raise _BadRow(f"the objects in {_shown(key)} do not all have the same keys")
            yield f"{key}.{name}", _value(f"{key}.{name}", [item[name] for item in value])
    else:
        yield key, _value(key, value)


def _value(key: str, value: Any) -> Value:
    if isinstance(value, list):
        items = [_text(key, item) for item in value]
        if None in items:
            raise _BadRow(f"{_shown(key)} has a null among its items")
        return tuple(item for item in items if item is not None)
    return _text(key, value)


def _text(key: str, value: Any) -> str | None:
    """A text or a number as text; None of a null, and of the NaN that data frames write for it."""
    if isinstance(value, bool):
        written = str(value).lower()
        raise _BadRow(f'{_shown(key)} is {written}; write a text or a number, "{written}" or 1')
    if isinstance(value, (list, dict)):
        kind = "an array" if isinstance(value, list) else "an object"
        raise _BadRow(f"{_shown(key)} holds {kind} in another; write texts or numbers there")
    return None if value is None or value != value else str(value)


def _other_keys(row: Row, columns: Sequence[str]) -> str:
    missing = [column for column in columns if column not in row]
    if missing:
        return f"the key {_shown(missing[0])} of the first row is missing; write null for no value"
    extra = [key for key in row if key not in columns]
    return f"the key {_shown(extra[0])} does not stand in the first row"


# --- .parquet -------------------------------------------------------------------------------


def _read_parquet(path: Path, errors: _Errors) -> Table | None:
    """Columns of text, integers, floats, decimals or lists of them; others are refused."""
    import pyarrow as pa  # takes a third of a second, and few datasets need it
    import pyarrow.parquet as pq

    name = path.name
    rows: list[Row] = []
    before = len(errors.rows)
    most = max(_RATIO_FREE_BYTES, _MAX_RATIO * path.stat().st_size)
    try:
        with pq.ParquetFile(path) as file:
            schema = file.schema_arrow
            if not schema.names:
                _refuse_empty(name, "there are no columns")
            if "" in schema.names:
                raise InvalidDataset(f"{name} has a column without a name", pointer=name)
            columns = tuple(column for entry in schema for column in _parquet_columns(entry))
            _check_columns(name, columns)
            for entry in schema:
                if not _readable(entry.type):
                    raise InvalidDataset(
                        f"{name}: the column {entry.name!r} is of type {entry.type}; "
                        "only text, numbers and lists of them are read",
                        pointer=name,
                    )
            read = 0
            for batch in file.iter_batches(batch_size=1024, use_threads=False):
                # A page of a dictionary's numbers may stand for gigabytes of one long text.
                read += batch.nbytes
                if read > most:
                    raise InvalidDataset(
                        f"{name} unpacks to more than {most} bytes from {path.stat().st_size}; "
                        "that is refused as a decompression bomb",
                        pointer=name,
                        code="table-bomb",
                    )
                values = [_parquet_values(column) for column in batch.columns]
                for record in zip(*values, strict=True):
                    try:
                        rows.append(_parquet_row(schema.names, columns, record))
                    except _BadRow as error:
                        rows.append({})
                        errors.add(name, len(rows), str(error))
                        if errors.full:
                            return None
    except MemoryError:  # Arrow's own is one of both kinds
        raise
    # A damaged footer may also name columns in bytes that are no text.
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise InvalidDataset(f"{name} cannot be read as Parquet: {error}", pointer=name) from error
    if len(errors.rows) > before:
        return None
    if not rows:
        _refuse_empty(name, "there are no rows")
    return Table(columns, rows, list(range(1, len(rows) + 1)), name)


def _struct_fields(kind: Any) -> list[Any]:
    """The fields of a struct, or of a list of structs; none of any other type."""
    from pyarrow import types

    if types.is_list(kind) or types.is_large_list(kind):
        kind = kind.value_type
    return [kind.field(i) for i in range(kind.num_fields)] if types.is_struct(kind) else []


def _parquet_columns(entry: Any) -> list[str]:
    """What `_flat` makes of the entry's values."""
    return [f"{entry.name}.{field.name}" for field in _struct_fields(entry.type)] or [entry.name]


def _readable(kind: Any) -> bool:
    """Texts and numbers, lists of them, and objects (or lists of objects) that hold them."""
    from pyarrow import types

    fields = _struct_fields(kind)
    if not fields:
        return _readable_value(kind)
    readable = _readable_value if types.is_struct(kind) else _readable_text
    return all(readable(field.type) for field in fields)


def _readable_value(kind: Any) -> bool:
    from pyarrow import types

    listed = types.is_list(kind) or types.is_large_list(kind)
    return _readable_text(kind.value_type if listed else kind)


def _readable_text(kind: Any) -> bool:
    from pyarrow import types

    if types.is_dictionary(kind):
        kind = kind.value_type
    return bool(
        types.is_string(kind)
        or types.is_large_string(kind)
        or types.is_string_view(kind)
        or types.is_integer(kind)
        or types.is_floating(kind)
        or types.is_decimal(kind)
        or types.is_null(kind)
    )


def _parquet_values(column: Any) -> list[Any]:
    try:
        values: list[Any] = column.to_pylist()
    except UnicodeDecodeError:  # Parquet files may claim UTF-8 and hold other bytes
        values = []
        for scalar in column:
            try:
                values.append(scalar.as_py())
            except UnicodeDecodeError as error:
                values.append(error)
    return values


def _parquet_row(names: Sequence[str], columns: Sequence[str], record: Sequence[Any]) -> Row:
    for name, value in zip(names, record, strict=True):
        if isinstance(value, UnicodeDecodeError):
            raise _BadRow(f"{name!r} is not UTF-8 text")
    found = _flat(dict(zip(names, record, strict=True)))
    # A null, or a list without objects, says nothing of the columns that it stands for.
    row = {column: found.get(column) for column in columns}
    _check_row(columns, tuple(row.values()))
    return row


_READERS = {
    ".csv": _read_csv,
    ".tsv": _read_tsv,
    ".jsonl": _read_jsonl,
    ".parquet": _read_parquet,
}


# --- profile --------------------------------------------------------------------------------

LABEL_NAMES = (
    "label", "labels", "target", "class", "category", "intent", "sentiment", "gold_label", "y",
)  # fmt: skip
SCORE_NAMES = ("score", "similarity", "rating", "stars")
PAIR_NAMES = (
    ("sentence1", "sentence2"),
    ("text", "text_pair"),
    ("text1", "text2"),
    ("text_a", "text_b"),
    ("sentence_a", "sentence_b"),
    ("premise", "hypothesis"),
    ("question1", "question2"),
    ("question", "sentence"),
    ("question", "context"),
    ("question", "answer"),
    ("query", "passage"),
    ("query", "document"),
)
TEXT_NAMES = (
    "text", "sentence", "sentence1", "text1", "text_a", "premise", "question", "question1", "query",
    "utterance", "content", "review", "message", "comment", "tweet", "body", "document", "title",
)  # fmt: skip

_INTEGER = re.compile(r"[+-]?[0-9]+(\.0*)?")
_NUMBER = re.compile(r"[+-]?([0-9]+(\.[0-9]*)?|\.[0-9]+)([eE][+-]?[0-9]+)?")


class DistinctValue(Frozen):
    value: str
    count: int
    first_line: int
    lines: tuple[int, ...] = Field((), description="Lines of the first 10 rows that have it.")


class ColumnProfile(Frozen):
    """What one column of one split holds. "Empty" is a null or a text of blanks.

    Of a column of lists, values are the items of the lists; an empty list is not empty.
    """

    name: str
    kind: Literal["integer", "number", "text", "list"]
    distinct: int
    values: tuple[DistinctValue, ...] | None = Field(
        description="Distinct values in order of appearance; null where the column cannot hold "
        "labels: more than 1000 values or one longer than 200 characters, or in train none that "
        "stands twice."
    )
    empty: int
    empty_lines: tuple[int, ...] = Field(description="Lines of the first 20 empty values.")
    not_numbers: int = Field(0, description="Values that are neither empty nor a finite number.")
    not_number_lines: tuple[int, ...] = Field((), description="Lines of the first 10 of them.")
    mean_characters: float
    p95_characters: int


class SplitProfile(Frozen):
    file: str
    rows: int
    columns: tuple[ColumnProfile, ...]

    def column(self, name: str) -> ColumnProfile | None:
        return next((column for column in self.columns if column.name == name), None)


class Defects(Frozen):
    """Broken rows of these columns, were they to be read for a task: ten at most, told in words."""

    columns: tuple[str | None, ...]
    message: str
    rows: tuple[RowError, ...]


class DatasetProfile(Frozen):
    """What a dataset holds, without its rows: kept with the dataset, read by `make_plan`."""

    splits: Mapping[str, SplitProfile]
    text: str | None
    text_pair: str | None
    label: str | None
    label_candidates: tuple[str, ...]
    shared_rows: Mapping[str, int] = Field(
        description='"train/dev": rows of dev whose texts stand in train too, and so on.'
    )
    defects: Mapping[str, Defects] = Field(
        {}, description="What a kind of task would refuse, by the kind, where its columns are here."
    )
    warnings: tuple[str, ...]


@dataclass(frozen=True)
class Columns:
    """Which columns hold the task; None is not known, or for `text_pair` not there."""

    text: str | None
    text_pair: str | None
    label: str | None


def profile(splits: Mapping[str, Table]) -> DatasetProfile:
    """Counts, distinct values and guessed columns. InvalidDataset: no labels, or one class."""
    profiles = {"train": _split_profile(splits["train"], keep_values=None)}
    kept = {column.name for column in profiles["train"].columns if column.values is not None}
    for split in SPLITS[1:]:
        if split in splits:
            profiles[split] = _split_profile(splits[split], keep_values=kept)
    guess = guess_columns(profiles)
    texts = (guess.text, guess.text_pair)
    candidates = tuple(name for name in label_candidates(profiles) if name not in texts)
    _refuse_unlabelled(profiles, candidates, guess)
    shared = shared_rows(splits, guess)
    return DatasetProfile(
        splits=profiles,
        text=guess.text,
        text_pair=guess.text_pair,
        label=guess.label,
        label_candidates=candidates,
        shared_rows=shared,
        warnings=tuple(_warnings(profiles, candidates, guess, shared)),
    )


def label_candidates(
    splits: Mapping[str, SplitProfile], kind: str = "classification"
) -> tuple[str, ...]:
    """Columns of train that could be a task's labels, and that stand in every labelled split.

    For a classification 2 to 1000 values that repeat; for a regression numbers; of a
    multi-label task lists, or texts where the values repeat or the name is a label's.
    """

    def could(column: ColumnProfile) -> bool:
        repeats = column.values is not None and column.kind != "list"
        match kind:
            case "regression":
                fits = column.kind in ("integer", "number")
            case "multi_label":
                called = column.name.strip().lower() in LABEL_NAMES
                fits = column.kind == "list" or repeats or called
            case _:
                fits = repeats
        return fits and column.distinct >= 2

    return tuple(
        column.name
        for column in splits["train"].columns
        if could(column) and _everywhere(splits, column.name)
    )


def _everywhere(splits: Mapping[str, SplitProfile], name: str) -> bool:
    return all(
        splits[split].column(name) is not None for split in LABELLED_SPLITS if split in splits
    )


def guess_columns(
    splits: Mapping[str, SplitProfile],
    kind: str = "classification",
    *,
    text: str | None = None,
    text_pair: str | None = None,
    label: str | None = None,
) -> Columns:
    """The columns by their usual names, then by what they hold. What is given is kept.

    A pair is guessed by name alone, and never beside a given `text`: naming it is how a
    user says that one sentence is meant.
    """
    train = splits["train"]
    given = {text, text_pair, label}
    free = {column.name.strip().lower(): column.name for column in train.columns}
    free = {key: name for key, name in free.items() if name not in given}
    candidates = [name for name in label_candidates(splits, kind) if name not in given]
    usual = SCORE_NAMES + LABEL_NAMES if kind == "regression" else LABEL_NAMES
    if label is None:
        label = next((free[n] for n in usual if free.get(n) in candidates), None)
    if text is None and text_pair is None:
        for first, second in PAIR_NAMES:
            if first in free and second in free and label not in (free[first], free[second]):
                text, text_pair = free[first], free[second]
                break
    if text is None:
        taken = (text_pair, label)
        text = next((free[n] for n in TEXT_NAMES if n in free and free[n] not in taken), None)
    if text is None:
        texts = [
            column
            for column in train.columns
            if column.kind == "text" and column.name not in {*given, label}
        ]
        # The longest texts are the sentences; the first of equals.
        text = max(texts, key=lambda column: column.mean_characters).name if texts else None
    # A column that is called a label and cannot be one is not passed over for another.
    if label is None and not any(name in free for name in usual):
        left = [name for name in candidates if name not in (text, text_pair)]
        kinds = {column.name: column.kind for column in train.columns}
        if kind != "regression":
            left = [name for name in left if kinds[name] != "number"]
        label = left[0] if len(left) == 1 else None
    return Columns(text=text, text_pair=text_pair, label=label)


def is_empty(value: Value) -> bool:
    """A null, or a text of nothing but blanks; never a list."""
    return value is None or (isinstance(value, str) and not value.strip())


def plain_text(value: Value) -> str:
    """The text of a value that is no list; a null is an empty text."""
    if isinstance(value, tuple):
        raise TypeError("a list is no text")
    return value or ""


def finite_number(value: Value) -> float | None:
    """4.5 of "4.5"; None of anything that is no finite number in digits."""
    if not isinstance(value, str) or not _NUMBER.fullmatch(value.strip()):
        return None
    number = float(value)
    return number if math.isfinite(number) else None


def whole_number(value: str) -> int | None:
    """3 of "3" and of "3.0", as data frames write it; None of anything else."""
    return int(value.partition(".")[0]) if _INTEGER.fullmatch(value) else None


def _split_profile(table: Table, *, keep_values: Set[str] | None) -> SplitProfile:
    """`keep_values`: columns whose values are told in full; None (train): those that repeat."""
    return SplitProfile(
        file=table.file,
        rows=len(table.rows),
        columns=tuple(_column_profile(table, name, keep_values) for name in table.columns),
    )


def _column_profile(table: Table, name: str, keep_values: Set[str] | None) -> ColumnProfile:
    values: dict[str, list[int]] | None = {}  # value -> [count, its first lines]
    seen: set[str] = set()
    empty = items = not_numbers = 0
    empty_lines: list[int] = []
    not_number_lines: list[int] = []
    integer = True
    lists = False
    lengths = np.zeros(len(table.rows), np.int64)
    for i, (row, line) in enumerate(zip(table.rows, table.lines, strict=True)):
        cell = row[name]
        if is_empty(cell):
            empty += 1
            if len(empty_lines) < MAX_ROW_ERRORS:
                empty_lines.append(line)
            continue
        lists = lists or isinstance(cell, tuple)
        if finite_number(cell) is None:
            not_numbers += 1
            if len(not_number_lines) < MAX_LINES_NAMED:
                not_number_lines.append(line)
        for value in texts_of(cell):
            items += 1
            lengths[i] += len(value)
            if value not in seen:
                seen.add(value)
                integer = integer and _INTEGER.fullmatch(value) is not None
                if values is not None:
                    values[value] = [0]
                    if len(values) > MAX_LABELS or len(value) > MAX_LABEL_CHARACTERS:
                        values = None
            if values is not None:
                values[value][0] += 1
                if len(values[value]) <= MAX_LINES_NAMED:
                    values[value].append(line)
    keep = lists or len(seen) < items if keep_values is None else name in keep_values
    number: Literal["integer", "number"] = "integer" if integer else "number"
    return ColumnProfile(
        name=name,
        kind="list" if lists else "text" if not_numbers or not seen else number,
        distinct=len(seen),
        values=tuple(
            DistinctValue(value=value, count=count, first_line=lines[0], lines=tuple(lines))
            for value, (count, *lines) in values.items()
        )
        if keep and values is not None
        else None,
        empty=empty,
        empty_lines=tuple(empty_lines),
        not_numbers=not_numbers,
        not_number_lines=tuple(not_number_lines),
        mean_characters=round(float(lengths.mean()), 2),
        p95_characters=int(np.percentile(lengths, 95)),
    )


def _refuse_unlabelled(
    splits: Mapping[str, SplitProfile], candidates: Sequence[str], guess: Columns
) -> None:
    train = splits["train"]
    if guess.label is None:
        for column in train.columns:
            if column.name.strip().lower() in LABEL_NAMES and column.distinct == 1:
                raise InvalidDataset(
                    f"{train.file}: the column {column.name!r} has one class only; "
                    "a classifier needs two",
                    pointer=train.file,
                )
    # Scores that never repeat, lists of labels and answers are for a task that the spec names.
    if candidates or any(
        (column.kind in ("number", "list") or column.name == "answer_start")
        and _everywhere(splits, column.name)
        for column in train.columns
        if column.name not in (guess.text, guess.text_pair)
    ):
        return
    reasons = []
    for column in train.columns:
        lacking = [
            splits[s].file
            for s in LABELLED_SPLITS
            if s in splits and splits[s].column(column.name) is None
        ]
        if column.name in (guess.text, guess.text_pair):
            reasons.append(f"{column.name!r} is the text")
        elif lacking:
            reasons.append(f"{column.name!r} is missing in {lacking[0]}")
        elif column.distinct < 2:
            reasons.append(f"{column.name!r} has {column.distinct} distinct values")
        elif column.distinct > MAX_LABELS:
            reasons.append(f"{column.name!r} has more than {MAX_LABELS} distinct values")
        else:
            reasons.append(f"{column.name!r} has no value that stands twice, or long ones")
    raise InvalidDataset(
        f"{train.file} has no labels: no column has 2 to {MAX_LABELS} values that repeat and "
        f"stands in every labelled split ({'; '.join(reasons[:10])})",
        pointer=train.file,
    )


# What judges is held against what was learnt from, labels or not.
_SHARED = (
    ("train", "dev"),
    ("train", "test"),
    ("dev", "test"),
    ("unlabelled", "dev"),
    ("unlabelled", "test"),
)


def shared_rows(splits: Mapping[str, Table], columns: Columns) -> dict[str, int]:
    """ "train/dev": how many rows of dev have a text (and pair) that stands in train, and so on."""
    if columns.text is None:
        return {}
    names = [name for name in (columns.text, columns.text_pair) if name is not None]
    texts: dict[str, list[tuple[Value, ...]]] = {}
    for split in SPLITS:
        if split in splits and all(name in splits[split].columns for name in names):
            texts[split] = [tuple(row[name] for name in names) for row in splits[split].rows]
    sets = {split: set(rows) for split, rows in texts.items()}
    return {
        f"{first}/{second}": sum(text in sets[first] for text in texts[second])
        for first, second in _SHARED
        if first in texts and second in texts
    }


def _warnings(
    splits: Mapping[str, SplitProfile],
    candidates: Sequence[str],
    guess: Columns,
    shared: Mapping[str, int],
) -> Iterator[str]:
    for split in splits.values():
        numbers = [c.name for c in split.columns if _NUMBER.fullmatch(c.name.strip())]
        if numbers:
            yield (
                f"{split.file}: the first line is read as the header, and {numbers[0]!r} looks "
                "like data; a file without a header is not supported"
            )
    if guess.label is None:
        yield (
            "the label column could not be guessed; name it in the spec (/task/label)"
            + (f": {', '.join(candidates)}" if candidates else ", and the task's kind")
        )
    if guess.text is None:
        yield "the text column could not be guessed; name it in the spec (/task/text)"
    yield from column_warnings(splits, guess)
    yield from shared_warnings(splits, shared)


def column_warnings(
    splits: Mapping[str, SplitProfile], columns: Columns, kind: str = "classification"
) -> Iterator[str]:
    """What a user should know about the columns of the task, though it stops nothing."""
    label = splits["train"].column(columns.label) if columns.label is not None else None
    if kind == "classification" and label is not None and label.kind == "number":
        yield (
            f"{label.name!r} holds fractions; a classification takes each value for a class. "
            'For scores, name the task kind "regression"'
        )
    for name in (columns.text, columns.text_pair):
        for split in splits.values():
            column = split.column(name) if name is not None else None
            if column is not None and column.empty:
                yield (
                    f"{split.file}: {name!r} is empty in {column.empty} of {split.rows} rows, "
                    f"first on line {column.empty_lines[0]}"
                )


def shared_warnings(splits: Mapping[str, SplitProfile], shared: Mapping[str, int]) -> Iterator[str]:
    for pair, count in shared.items():
        if count:
            first, second = pair.split("/")
            yield f"{count} of {splits[second].rows} rows of {second} stand in {first} too"
