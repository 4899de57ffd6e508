"""Tables: bytes that are no text, lines and quotes without an end, rows that say two things."""

from __future__ import annotations

import io
import struct
import zipfile
from collections.abc import Callable, Iterator

import pyarrow as pa
import pyarrow.parquet as pq

from tests.hostile.corpus import Corpus, Hostile, Made, Place, made

ROWS = b"text,label\ngood,1\nbad,0\ngood,1\nbad,0\n"
JSON_ROWS = b'{"text": "good", "label": 1}\n{"text": "bad", "label": 0}\n' * 2


def _table(name: str, content: Made, kind: str = "invalid-dataset") -> Hostile:
    return Hostile("datasets", kind, lambda _: {name: made(content)})


def _streamed(name: str, content: Callable[[], Iterator[bytes]], kind: str) -> Hostile:
    return Hostile("datasets", kind, lambda _: {name: content})


def _csv(content: Made, kind: str = "invalid-dataset") -> Hostile:
    return _table("train.csv", content, kind)


def _json(line: Made, kind: str = "invalid-dataset") -> Hostile:
    """A good .jsonl file and one more line."""
    return _table("train.jsonl", lambda: JSON_ROWS + made(line) + b"\n", kind)


def _long(first: bytes, mebibytes: int) -> Callable[[], Iterator[bytes]]:
    def stream() -> Iterator[bytes]:
        yield first
        chunk = b"x" * 2**20
        for _ in range(mebibytes):
            yield chunk

    return stream


def _workbook() -> bytes:
    """What a spreadsheet program saves, with a formula in a cell."""
    buffer = io.BytesIO()
    sheet = (
        '<worksheet xmlns="http://schemas.openxmlformats.org/spreadsheetml/2006/main"><sheetData>'
        '<row r="1"><c r="A1"><f>cmd|\'/C calc\'!A0</f></c></row></sheetData></worksheet>'
    )
    with zipfile.ZipFile(buffer, "w") as file:
        file.writestr("[Content_Types].xml", "<Types/>")
        file.writestr("xl/worksheets/sheet1.xml", sheet)
    return buffer.getvalue()


def _parquet(table: Callable[[], pa.Table], **options: object) -> Callable[[Place], bytes]:
    def build(_: Place) -> bytes:
        buffer = io.BytesIO()
        pq.write_table(table(), buffer, **options)
        return buffer.getvalue()

    return build


def _of_parquet(build: Callable[[Place], bytes], kind: str = "invalid-dataset") -> Hostile:
    return Hostile("datasets", kind, lambda place: {"train.parquet": build(place)})


def _footer(length: int) -> bytes:
    return b"PAR1" + bytes(64) + struct.pack("<I", length) + b"PAR1"


def _dictionary(count: int, size: int) -> pa.Table:
    """A column of one long text `count` times, which takes a page of a few bytes."""
    text = pa.DictionaryArray.from_arrays(pa.array([0] * count, pa.int32()), ["x" * size])
    return pa.table({"text": text, "label": pa.array([i % 2 for i in range(count)], pa.int8())})


def _good() -> pa.Table:
    return pa.table({"text": ["good", "bad"] * 2, "label": [1, 0] * 2})


TABLES: Corpus = {
    # Bytes that are no text.
    "csv: UTF-16": _csv(ROWS.decode().encode("utf-16"), "table-encoding"),
    "csv: Latin-1": _csv(ROWS + "caf\u00e9,1\n".encode("latin-1"), "table-encoding"),
    "csv: UTF-8 and Windows-1251 mixed": _csv(
        ROWS + "кафе,1\n".encode() + "кафе,0\n".encode("cp1251"), "table-encoding"
    ),
    "csv: an overlong slash": _csv(ROWS + b"..\xc0\xaf..,1\n", "table-encoding"),
    "csv: a NUL in a cell": _csv(ROWS + b"a\0b,1\n"),
    "csv: random bytes": _csv(bytes(range(255, -1, -1)) * 100, "table-encoding"),
    # Lines and quotes.
    "csv: a line of a gigabyte": _streamed("train.csv", _long(ROWS, 1024), "table-line-too-long"),
    "csv: four million columns": _csv(lambda: b"," * 4_000_000 + b"\n", "table-too-wide"),
    "csv: a field of a megabyte": _csv(lambda: ROWS + b"x" * 2**20 + b",1\n", "table-quotes"),
    "csv: a quote that never closes, for megabytes": _csv(
        lambda: ROWS + b'"' + b"a line of text, 1\n" * 500_000, "table-quotes"
    ),
    "csv: text after a closing quote": _csv(ROWS + b'"a" b,1\n', "table-quotes"),
    "csv: a bare carriage return": _csv(ROWS + b"a\rb,1\n", "table-quotes"),
    "csv: a row that is too short": _csv(ROWS + b"a\n"),
    "csv: a column twice": _csv(ROWS.replace(b"text,label", b"label,label")),
    # Formulas.
    "csv: a formula as a column's name": _csv(
        ROWS.replace(b"text", b"=cmd|'/C calc'!A0"), "table-formula"
    ),
    "xlsx: a workbook that is called a table": _csv(_workbook(), "table-encoding"),
    # .jsonl
    "jsonl: a line of a hundred megabytes": _streamed(
        "train.jsonl", _long(b'{"text": "', 100), "table-line-too-long"
    ),
    "jsonl: a hundred thousand arrays deep": _json(
        b'{"text":' + b"[" * 10**5 + b"]" * 10**5 + b"}"
    ),
    "jsonl: three million values": _json(lambda: b'{"text":[' + b"[]," * 2_500_000 + b"0]}"),
    "jsonl: a key twice": _json(b'{"text": "a", "label": 1, "label": 0}'),
    "jsonl: NaN": _json(b'{"text": "a", "label": NaN}'),
    "jsonl: a number of a million digits": _json(
        lambda: b'{"text":"a","label":' + b"9" * 10**6 + b"}"
    ),
    "jsonl: half a surrogate pair": _json(b'{"text": "\\ud800", "label": 1}'),
    "jsonl: a list where texts are": _json(b'{"text": ["a"], "label": 1}'),
    # .parquet
    "parquet: random bytes": _of_parquet(lambda _: b"PAR1" + bytes(range(256)) * 4 + b"PAR1"),
    "parquet: a footer of four gigabytes": _of_parquet(lambda _: _footer(2**32 - 1)),
    "parquet: a column that is no text": _of_parquet(
        _parquet(lambda: pa.table({"text": [b"\xff"] * 4, "label": [1, 0] * 2}))
    ),
    "parquet: a text that is not UTF-8": _of_parquet(
        lambda place: _parquet(_good, compression="none", use_dictionary=False)(place).replace(
            b"good", b"g\xffod"
        )
    ),
    "parquet: one long text, four gigabytes of times": _of_parquet(
        _parquet(lambda: _dictionary(40_000, 100_000), compression="zstd"), "inspection-too-large"
    ),
    "parquet: one text of a hundred megabytes": _of_parquet(
        _parquet(lambda: _dictionary(2000, 10**8), compression="zstd"), "table-bomb"
    ),
    "parquet: two thousand columns": _of_parquet(
        _parquet(lambda: pa.table({f"c{i}": [1, 0] for i in range(2000)})), "table-too-wide"
    ),
    # Files of a dataset.
    "files: a program": _table("train.py", b"import os; os.system('id')"),
}
