"""Dataset files are read exactly or refused by line."""

from __future__ import annotations

import csv
import io
import json
import tempfile
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from compression.errors import InvalidDataset
from compression.tables import (
    LINE_KEY,
    MAX_FIELD_CHARACTERS,
    MAX_LABELS,
    MAX_LINE_BYTES,
    MAX_ROW_ERRORS,
    DatasetProfile,
    Table,
    guess_columns,
    profile,
    read_splits,
    write_clean,
)

GOOD = b"text,label\nfine film,1\nweak film,0\nfine cast,1\nweak cast,0\n"


def dataset(folder: Path, **files: bytes | str) -> Path:
    """Files by name, "train_csv" being train.csv."""
    for name, content in files.items():
        raw = content.encode() if isinstance(content, str) else content
        (folder / name.replace("_", ".")).write_bytes(raw)
    return folder


def read_train(folder: Path, **files: bytes | str) -> Table:
    return read_splits(dataset(folder, **files))["train"]


def refused(folder: Path, **files: bytes | str) -> InvalidDataset:
    with pytest.raises(InvalidDataset) as caught:
        read_splits(dataset(folder, **files))
    return caught.value


def broken_lines(error: InvalidDataset) -> list[tuple[str, int]]:
    return [(row.file, row.line) for row in error.rows]


# --- which files ----------------------------------------------------------------------------


def test_every_split_is_read_in_a_fixed_order(tmp_path: Path) -> None:
    folder = dataset(
        tmp_path, test_tsv="text\ta\n1\t2\n", unlabelled_jsonl='{"text":"x"}', train_csv=GOOD
    )
    assert list(read_splits(folder)) == ["train", "test", "unlabelled"]


def test_names_are_read_whatever_their_case(tmp_path: Path) -> None:
    (tmp_path / "Train.CSV").write_bytes(GOOD)
    assert read_splits(tmp_path)["train"].file == "Train.CSV"


def test_files_that_are_no_tables_are_left_alone(tmp_path: Path) -> None:
    folder = dataset(tmp_path, train_csv=GOOD, README_md="# data", LICENSE="text")
    (folder / "._train.csv").write_bytes(b"\0\x05")
    (folder / "train").mkdir()
    assert list(read_splits(folder)) == ["train"]


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("validation.csv", "call it dev"),
        ("unlabeled.jsonl", "call it unlabelled"),
        ("data.csv", "train, dev, test or unlabelled"),
        ("train.json", ".jsonl"),
        ("dev.csv.gz", ".csv"),
        ("dev.xlsx", ".parquet"),
    ],
)
def test_an_unknown_name_is_refused_with_those_allowed(
    tmp_path: Path, name: str, says: str
) -> None:
    (tmp_path / name).write_bytes(GOOD)
    error = refused(tmp_path, train_csv=GOOD)
    assert name in error.message
    assert says in error.message
    assert error.pointer == name


def test_two_files_for_one_split_are_refused(tmp_path: Path) -> None:
    error = refused(tmp_path, train_csv=GOOD, train_tsv="text\tlabel\na\tb\n")
    assert "train.csv" in error.message
    assert "train.tsv" in error.message


def test_train_must_be_there(tmp_path: Path) -> None:
    error = refused(tmp_path, dev_csv=GOOD, notes_txt="x")
    assert "no train split" in error.message
    assert "dev.csv, notes.txt" in error.message


def test_a_folder_must_be_there(tmp_path: Path) -> None:
    with pytest.raises(InvalidDataset, match="not a folder"):
        read_splits(tmp_path / "nowhere")


# --- csv ------------------------------------------------------------------------------------


def test_csv_lines_count_line_breaks_inside_quotes(tmp_path: Path) -> None:
    table = read_train(
        tmp_path, train_csv='text,label\n"one\ntwo\r\nthree",1\n\nfour,0\n"fi""ve,",1'
    )
    assert [row["text"] for row in table.rows] == ["one\ntwo\r\nthree", "four", 'fi"ve,']
    assert table.lines == [2, 6, 7]


def test_csv_broken_rows_are_named_by_their_first_line(tmp_path: Path) -> None:
    error = refused(
        tmp_path,
        train_csv='text,label\n"one\ntwo",1,extra\nthree,0\nfour\n',
        dev_csv="text,label\na\n",
    )
    assert broken_lines(error) == [("train.csv", 2), ("train.csv", 5), ("dev.csv", 2)]
    assert "has 3 fields where the header has 2" in error.rows[0].message
    assert "has 1 field where" in error.rows[1].message
    assert "train.csv, line 2" in error.message
    assert "3 broken rows" in error.message


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ('"never closed,1\nx,0\n', "never closed"),
        ('"closed" twice",1\n', "closing quote"),
        ("old\rmac,1\n", "carriage return"),
        ("nul\0,1\n", "NUL"),
        (f"{'x' * (MAX_FIELD_CHARACTERS + 1)},1\n", "longer than"),
    ],
)
def test_csv_that_cannot_be_told_apart_is_refused(tmp_path: Path, row: str, says: str) -> None:
    error = refused(tmp_path, train_csv=f"text,label\ngood,1\n{row}")
    assert broken_lines(error)[0] == ("train.csv", 3)
    assert says in error.rows[0].message


def test_a_field_of_the_greatest_length_is_read(tmp_path: Path) -> None:
    text = "x" * MAX_FIELD_CHARACTERS
    assert read_train(tmp_path, train_csv=f"text,label\n{text},1\n").rows[0]["text"] == text


def test_only_the_first_broken_rows_are_reported(tmp_path: Path) -> None:
    error = refused(tmp_path, train_csv="text,label\n" + "short\n" * 500, dev_csv="a,b\nc\n")
    assert len(error.rows) == MAX_ROW_ERRORS
    assert "at least 20" in error.message


@pytest.mark.parametrize("ending", ["\n", "\r\n"])
@pytest.mark.parametrize("bom", [b"", b"\xef\xbb\xbf"])
def test_line_ends_and_byte_order_marks_leave_no_trace(
    tmp_path: Path, ending: str, bom: bytes
) -> None:
    for name, sep in (("train.csv", ","), ("dev.tsv", "\t")):
        text = ending.join([f"text{sep}label", f"café{sep}1", f"naïve{sep}0", ""])
        (tmp_path / name).write_bytes(bom + text.encode())
    splits = read_splits(tmp_path)
    for table in splits.values():
        assert table.columns == ("text", "label")
        assert table.rows == [{"text": "café", "label": "1"}, {"text": "naïve", "label": "0"}]
        assert table.lines == [2, 3]


@pytest.mark.parametrize("name", ["train_csv", "train_tsv", "train_jsonl"])
def test_latin_1_is_refused_by_line(tmp_path: Path, name: str) -> None:
    first = {"train_csv": "text,label", "train_tsv": "text\tlabel", "train_jsonl": '{"text":"a"}'}
    content = f"{first[name]}\n\ncafé".encode("latin-1")
    error = refused(tmp_path, **{name: content})
    assert broken_lines(error) == [(name.replace("_", "."), 3)]
    assert "0xe9 at position 4" in error.rows[0].message
    assert "UTF-8" in error.rows[0].message


def test_utf_16_is_named(tmp_path: Path) -> None:
    assert "UTF-16" in refused(tmp_path, train_csv="text,label\na,b\n".encode("utf-16")).message


def test_an_endless_line_is_refused_without_being_read(tmp_path: Path) -> None:
    error = refused(tmp_path, train_jsonl=b'{"text": "a"}\n' + b"x" * (MAX_LINE_BYTES + 1))
    assert broken_lines(error) == [("train.jsonl", 2)]


@pytest.mark.parametrize(
    "files",
    [
        {"train_csv": b""},
        {"train_csv": b"\xef\xbb\xbf"},
        {"train_csv": b"text,label\n"},
        {"train_tsv": b"\n\n"},
        {"train_tsv": b"text\tlabel\r\n"},
        {"train_jsonl": b" \n\n"},
    ],
)
def test_an_empty_split_is_refused(tmp_path: Path, files: dict[str, bytes]) -> None:
    error = refused(tmp_path, **files)
    assert "the train split is empty" in error.message
    assert error.pointer == next(iter(files)).replace("_", ".")


@pytest.mark.parametrize(
    ("header", "says"),
    [
        ("text,text", "'text' twice"),
        (f"text,{LINE_KEY}", "reserved"),
        (f"text,{'x' * 500}", "header"),
        (",".join(f"c{i}" for i in range(1001)), "1001 columns"),
        ("te\0xt,label", "NUL"),
    ],
)
def test_a_bad_header_is_refused(tmp_path: Path, header: str, says: str) -> None:
    error = refused(tmp_path, train_csv=f"{header}\na,b\n")
    assert says in error.message
    assert error.pointer == "train.csv"


def test_an_index_column_without_a_name_gets_one(tmp_path: Path) -> None:
    table = read_train(tmp_path, train_csv=",text,label\n0,a,1\n")
    assert table.columns == ("unnamed_1", "text", "label")


def test_tsv_has_no_quoting(tmp_path: Path) -> None:
    table = read_train(tmp_path, train_tsv='text\tlabel\n"open quote\t1\nsay "hi"\t0\n')
    assert [row["text"] for row in table.rows] == ['"open quote', 'say "hi"']
    assert table.lines == [2, 3]


def test_tsv_rows_of_other_lengths_are_refused(tmp_path: Path) -> None:
    error = refused(tmp_path, train_tsv="text\tlabel\na\t1\nb\n\nc\t1\t\n")
    assert broken_lines(error) == [("train.tsv", 3), ("train.tsv", 5)]


# --- jsonl ----------------------------------------------------------------------------------


def test_jsonl_keeps_digits_nulls_and_line_numbers(tmp_path: Path) -> None:
    table = read_train(
        tmp_path,
        train_jsonl='{"text": "a", "label": 1}\n\n{"label": 1.10, "text": null}\n'
        '{"text": "\\u00e9", "label": -2e3}',
    )
    assert table.columns == ("text", "label")
    assert [row["label"] for row in table.rows] == ["1", "1.10", "-2e3"]
    assert [row["text"] for row in table.rows] == ["a", None, "é"]
    assert table.lines == [1, 3, 4]


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ('{"text": "a", "label": true}', '"true"'),
        ('{"text": ["a"], "label": "1"}', "an array, unlike"),
        ('{"text": {"a": "b"}, "label": "1"}', "'text' of the first row is missing"),
        ('{"text": [["a"]], "label": "1"}', "an array in another"),
        ('{"text": {"a": {"b": "c"}}, "label": "1"}', "an object in another"),
        ('{"text": ["a", null], "label": "1"}', "null among its items"),
        ('{"text": [true], "label": "1"}', '"true"'),
        ('{"text": ["\\ud800"], "label": "1"}', "surrogate"),
        ('{"text": ["\\u0000"], "label": "1"}', "NUL"),
        ('{"text": [{"a": 1}, {"b": 1}], "label": "1"}', "same keys"),
        ('{"t": {"a": 1}, "t.a": 2, "label": "1"}', "twice"),
        ('{"text": "a", "text": "b", "label": "1"}', "twice"),
        ('{"text": "a", "label": NaN}', "NaN"),
        ('{"text": "a", "label": -Infinity}', "Infinity"),
        ('{"text": "a"}', "'label' of the first row is missing"),
        ('{"text": "a", "label": "1", "other": "2"}', "'other'"),
        ('["a", "1"]', "JSON object"),
        ('"a"', "JSON object"),
        ("text,label", "not JSON"),
        ('{"text": "a", "label": "1"} {}', "not JSON"),
        ('{"text": "a", "label": "1"', "not JSON"),
        ("{'text': 'a', 'label': '1'}", "not JSON"),
        ('{"text": "\\ud800", "label": "1"}', "surrogate"),
        ('{"text": "\\u0000", "label": "1"}', "NUL"),
        ('{"text": "a\tb", "label": "1"}', "control character"),
        ('{"text": "a", "label": "1", "__line__": "no"}', "reserved"),
        ('{"text": ' + "[" * 100_000 + "]" * 100_000 + "}", "nested"),
        ('{"text": "a", "label": ' + "9" * (MAX_FIELD_CHARACTERS + 1) + "}", "characters"),
    ],
)
def test_jsonl_rows_that_are_refused(tmp_path: Path, row: str, says: str) -> None:
    good = '{"text": "good", "label": "1"}'
    error = refused(tmp_path, train_jsonl=f"{good}\n{row}\n{good}\n")
    assert broken_lines(error) == [("train.jsonl", 2)]
    assert says in error.rows[0].message


def test_messages_stay_short_whatever_a_key_is(tmp_path: Path) -> None:
    key = "k" * 100_000
    error = refused(tmp_path, train_jsonl=f'{{"{key}": true}}')
    assert len(error.message) < 500


def test_a_number_of_any_length_is_read_in_linear_time(tmp_path: Path) -> None:
    # int() refuses more than 4300 digits, and took quadratic time before it did.
    digits = "9" * 100_000
    assert read_train(tmp_path, train_jsonl=f'{{"label": {digits}}}').rows == [{"label": digits}]


# --- parquet --------------------------------------------------------------------------------


def parquet(folder: Path, **columns: Any) -> Path:
    pq.write_table(pa.table(columns), folder / "train.parquet", row_group_size=2)
    return folder


def test_parquet_text_and_numbers_become_text(tmp_path: Path) -> None:
    nan = float("nan")
    parquet(
        tmp_path,
        text=pa.array(["a", None, "c"], pa.large_string()),
        coded=pa.array(["x", "y", "x"]).dictionary_encode(),
        whole=pa.array([1, 2, None], pa.uint8()),
        floating=pa.array([0.5, nan, 2.0]),
        exact=pa.array([Decimal("1.10"), Decimal("2.00"), Decimal("3.50")]),
        none=pa.nulls(3),
    )
    table = read_splits(tmp_path)["train"]
    assert table.columns == ("text", "coded", "whole", "floating", "exact", "none")
    assert [list(row.values()) for row in table.rows] == [
        ["a", "x", "1", "0.5", "1.10", None],
        [None, "y", "2", None, "2.00", None],
        ["c", "x", None, "2.0", "3.50", None],
    ]
    assert table.lines == [1, 2, 3]


def _list_of(kind: pa.DataType) -> pa.DataType:
    return pa.list_(pa.field("element", kind))  # as Parquet names it when it is read back


@pytest.mark.parametrize(
    "column",
    [
        pa.array([True]),
        pa.array([b"bytes"]),
        pa.array([[["a"]]], _list_of(_list_of(pa.string()))),
        pa.array([{"a": {"b": 1}}]),
        pa.array([[{"a": ["b"]}]], _list_of(pa.struct({"a": _list_of(pa.string())}))),
        pa.array([[True]], _list_of(pa.bool_())),
        pa.array([0], pa.timestamp("ms")),
        pa.array([0], pa.date32()),
    ],
    ids=lambda column: str(column.type),
)
def test_other_parquet_types_are_refused_by_column(tmp_path: Path, column: Any) -> None:
    parquet(tmp_path, text=pa.array(["a"]), odd=column)
    error = refused(tmp_path)
    assert "'odd'" in error.message
    assert str(column.type) in error.message


LISTS = [
    {"id": "1", "words": ["a", "\u4e2d"], "answers": {"text": ["b", "c"], "at": [1, 20]}},
    {"id": "2", "words": [], "answers": {"text": ["d"], "at": [0]}},
    {"id": "3", "words": None, "answers": {"text": [], "at": []}},
]
READ = [
    {"id": "1", "words": ("a", "\u4e2d"), "answers.text": ("b", "c"), "answers.at": ("1", "20")},
    {"id": "2", "words": (), "answers.text": ("d",), "answers.at": ("0",)},
    {"id": "3", "words": None, "answers.text": (), "answers.at": ()},
]


def test_lists_and_the_fields_of_objects_are_read_and_survive_the_clean_form(
    tmp_path: Path,
) -> None:
    for name in ("json", "parquet"):
        (tmp_path / name).mkdir()
    lines = "\n".join(json.dumps(row) for row in LISTS)
    table = read_train(tmp_path / "json", train_jsonl=lines)
    assert table.columns == ("id", "words", "answers.text", "answers.at")
    assert table.rows == READ
    write_clean({"train": table}, tmp_path / "clean")
    assert read_splits(tmp_path / "clean")["train"] == table
    pq.write_table(pa.Table.from_pylist(LISTS), tmp_path / "parquet" / "train.parquet")
    assert read_splits(tmp_path / "parquet")["train"].rows == READ


def test_a_list_of_objects_is_read_as_an_object_of_lists(tmp_path: Path) -> None:
    rows = [
        {"id": "1", "answers": [{"text": "b", "at": 1}, {"text": "c", "at": 20}]},
        {"id": "2", "answers": [{"text": "d", "at": 0}]},
    ]
    for name in ("json", "parquet"):
        (tmp_path / name).mkdir()
    expected = [{k: row[k] for k in ("id", "answers.text", "answers.at")} for row in READ[:2]]
    lines = "\n".join(json.dumps(row) for row in rows)
    assert read_train(tmp_path / "json", train_jsonl=lines).rows == expected
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "parquet" / "train.parquet")
    assert read_splits(tmp_path / "parquet")["train"].rows == expected


def test_a_list_columns_values_are_its_items(tmp_path: Path) -> None:
    lines = "\n".join(
        json.dumps({"words": words, "tags": tags, "label": str(len(words) % 2)})
        for words, tags in ((["a", "bb"], ["O", "B-x"]), (["c"], ["O"]), ([], []), (["d"], ["O"]))
    )
    table = read_train(tmp_path, train_jsonl=lines)
    tags = profile({"train": table}).splits["train"].column("tags")
    assert tags is not None
    assert (tags.kind, tags.distinct, tags.empty) == ("list", 2, 0)
    assert [(v.value, v.count, v.first_line) for v in tags.values or ()] == [
        ("O", 3, 1),
        ("B-x", 1, 1),
    ]
    assert tags.mean_characters == (4 + 1 + 0 + 1) / 4
    assert profile({"train": table}).label == "label"  # a list is no class


def test_parquet_text_that_is_no_text_is_refused_by_row(tmp_path: Path) -> None:
    raw = pa.array([b"good", b"caf\xe9", b"n\0l"])
    column = pa.Array.from_buffers(pa.string(), 3, raw.buffers())
    parquet(tmp_path, text=column)
    error = refused(tmp_path)
    assert broken_lines(error) == [("train.parquet", 2), ("train.parquet", 3)]
    assert "UTF-8" in error.rows[0].message
    assert "NUL" in error.rows[1].message


def test_an_empty_parquet_file_is_refused(tmp_path: Path) -> None:
    parquet(tmp_path, text=pa.array([], pa.string()))
    assert "the train split is empty" in refused(tmp_path).message


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_a_damaged_parquet_file_is_refused_or_read_never_a_crash(data: st.DataObject) -> None:
    with tempfile.TemporaryDirectory() as name:
        path = parquet(Path(name), text=["a", "b", "c"], label=[1, 2, 3]) / "train.parquet"
        raw = bytearray(path.read_bytes())
        cut = data.draw(st.integers(0, len(raw)))
        for _ in range(data.draw(st.integers(0, 3))):
            raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
        path.write_bytes(raw[:cut] if data.draw(st.booleans()) else raw)
        try:
            read_splits(Path(name))
        except InvalidDataset as error:
            assert "train.parquet" in error.message


def test_lists_are_read_as_texts_from_jsonl_and_parquet(tmp_path: Path) -> None:
    train = read_train(
        tmp_path,
        train_jsonl='{"t": "a", "l": ["x", 1.50]}\n{"t": "b", "l": []}\n{"t": "c", "l": null}\n',
    )
    assert [row["l"] for row in train.rows] == [("x", "1.50"), (), None]
    (tmp_path / "train.jsonl").unlink()
    parquet(tmp_path, t=["a", "b", "c"], l=pa.array([[1, 2], [], None]))
    assert [row["l"] for row in read_train(tmp_path).rows] == [("1", "2"), (), None]
    parquet(tmp_path, t=["a", "b"], l=pa.array([["x"], ["y", None]]))
    error = refused(tmp_path)
    assert broken_lines(error) == [("train.parquet", 2)]
    assert "null among its items" in error.message


# --- properties -----------------------------------------------------------------------------

# What a file may hold: any Unicode text without NUL; of control characters JSON escapes the rest.
texts = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=20)
kinds = (st.none() | texts, st.none() | st.lists(texts, max_size=3).map(tuple))  # of a column
names = st.lists(
    texts.filter(lambda n: n not in ("", LINE_KEY) and "\r" not in n and not n.startswith("=")),
    min_size=1,
    max_size=4,
    unique=True,
)


def tables(*kinds: st.SearchStrategy[Any]) -> st.SearchStrategy[Table]:
    def build(columns: list[str]) -> st.SearchStrategy[Table]:
        return st.tuples(*[st.sampled_from(kinds)] * len(columns)).flatmap(
            lambda own: filled(columns, own)
        )

    def filled(
        columns: list[str], own: tuple[st.SearchStrategy[Any], ...]
    ) -> st.SearchStrategy[Table]:
        row = st.tuples(*own).map(lambda r: dict(zip(columns, r, strict=True)))
        return st.lists(st.tuples(row, st.integers(1, 10**9)), min_size=1, max_size=6).map(
            lambda rows: Table(tuple(columns), [r for r, _ in rows], [n for _, n in rows])
        )

    return names.flatmap(build)


@settings(max_examples=80, deadline=None)
@given(tables(*kinds), tables(*kinds))
def test_clean_rows_read_back_identically(train: Table, dev: Table) -> None:
    with tempfile.TemporaryDirectory() as folder:
        written = write_clean({"train": train, "dev": dev}, Path(folder))
        assert [path.name for path in written] == ["train.jsonl", "dev.jsonl"]
        again = read_splits(Path(folder))
        assert again == {"train": train, "dev": dev}
        assert all(row.keys() == set(again["train"].columns) for row in again["train"].rows)


def test_the_longest_row_can_be_written_clean_and_read_back(tmp_path: Path) -> None:
    # Control characters take six bytes each in JSON.
    row: dict[str, str | None] = {f"c{i}": "\x01" * MAX_FIELD_CHARACTERS for i in range(8)}
    table = Table(tuple(row), [row], [7])
    write_clean({"train": table}, tmp_path)
    assert read_splits(tmp_path) == {"train": table}


def test_a_row_longer_than_that_is_refused(tmp_path: Path) -> None:
    parquet(tmp_path, **{f"c{i}": ["x" * MAX_FIELD_CHARACTERS] for i in range(9)})
    assert broken_lines(refused(tmp_path)) == [("train.parquet", 1)]


@settings(max_examples=80, deadline=None)
@given(tables(texts), st.sampled_from(["\n", "\r\n"]))
def test_what_the_csv_module_writes_is_read_back(table: Table, ending: str) -> None:
    # Everything is quoted: left alone, the module writes a bare carriage return without quotes.
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator=ending, quoting=csv.QUOTE_ALL)
    lines = [1]
    for record in (table.columns, *(row.values() for row in table.rows)):
        writer.writerow(record)
        lines.append(buffer.getvalue().count("\n") + 1)
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "train.csv").write_bytes(buffer.getvalue().encode())
        read = read_splits(Path(folder))["train"]
        assert read.columns == table.columns
        assert read.rows == table.rows
        assert read.lines == lines[1:-1]


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(["train.csv", "train.tsv", "train.jsonl"]), st.binary(max_size=200))
def test_any_bytes_are_read_or_refused(name: str, raw: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / name).write_bytes(raw)
        try:
            table = read_splits(Path(folder))["train"]
        except InvalidDataset as error:
            assert name in error.message
        else:
            assert len(table.rows) == len(table.lines) > 0
            assert all(row.keys() == set(table.columns) for row in table.rows)


# --- profile --------------------------------------------------------------------------------


def profile_of(folder: Path, **files: bytes | str) -> DatasetProfile:
    return profile(read_splits(dataset(folder, **files)))


def labelled(header: str, row: Callable[[int], str], rows: int = 12) -> str:
    return "\n".join([header, *(row(i) for i in range(rows))]) + "\n"


def test_a_profile_survives_json_and_counts_what_is_there(tmp_path: Path) -> None:
    found = profile_of(
        tmp_path,
        train_csv="text,label\nab,x\n,y\nabcd,x\nab,y\n",
        test_csv="text,label\nab,y\nother,x\n",
    )
    assert DatasetProfile.model_validate_json(found.model_dump_json()) == found
    assert (found.text, found.text_pair, found.label) == ("text", None, "label")
    train = found.splits["train"]
    assert (train.file, train.rows) == ("train.csv", 4)
    text, label = train.columns
    assert (text.distinct, text.empty, text.empty_lines, text.mean_characters) == (2, 1, (3,), 2.0)
    assert label.values is not None
    assert [(v.value, v.count, v.first_line) for v in label.values] == [("x", 2, 2), ("y", 2, 3)]
    assert found.shared_rows == {"train/test": 1}
    assert any("1 of 2 rows of test stand in train" in warning for warning in found.warnings)
    assert any("'text' is empty in 1 of 4 rows, first on line 3" in w for w in found.warnings)


def test_a_small_split_keeps_label_values_though_none_repeats(tmp_path: Path) -> None:
    found = profile_of(tmp_path, train_csv=GOOD, dev_csv="text,label\na,1\nb,0\n")
    column = found.splits["dev"].column("label")
    assert column is not None
    assert column.values is not None
    assert [value.value for value in column.values] == ["1", "0"]


def test_a_profile_does_not_carry_texts_that_never_repeat(tmp_path: Path) -> None:
    found = profile_of(tmp_path, train_csv=GOOD)
    column = found.splits["train"].column("text")
    assert column is not None
    assert column.values is None
    assert column.distinct == 4


@pytest.mark.parametrize(
    ("header", "expected"),
    [
        ("sentence1,sentence2,label", ("sentence1", "sentence2", "label")),
        ("label,hypothesis,premise", ("premise", "hypothesis", "label")),
        ("Text,note,Label", ("Text", None, "Label")),
        ("id,review,sentiment", ("review", None, "sentiment")),
    ],
)
def test_usual_names_are_guessed(
    tmp_path: Path, header: str, expected: tuple[str, str | None, str]
) -> None:
    columns = header.split(",")

    def row(i: int) -> str:
        kinds = ("label", "sentiment")
        return ",".join(str(i % 2) if c.lower() in kinds else f"{c} {i}" for c in columns)

    found = profile_of(tmp_path, train_csv=labelled(header, row))
    assert (found.text, found.text_pair, found.label) == expected


def test_unusual_names_are_guessed_by_what_they_hold(tmp_path: Path) -> None:
    found = profile_of(
        tmp_path,
        train_csv=labelled(
            "no,words,mood", lambda i: f"{i},some words {i},{'bad' if i % 2 else 'good'}"
        ),
    )
    assert (found.text, found.label) == ("words", "mood")


def test_a_guess_that_would_be_a_coin_toss_is_not_made(tmp_path: Path) -> None:
    found = profile_of(
        tmp_path, train_csv=labelled("words,genre,source", lambda i: f"some {i},{i % 2},{i % 3}")
    )
    assert found.label is None
    assert found.label_candidates == ("genre", "source")
    assert any("/task/label" in warning for warning in found.warnings)


def test_a_score_with_fractions_is_not_guessed_to_be_a_label(tmp_path: Path) -> None:
    found = profile_of(
        tmp_path, train_csv=labelled("words,score", lambda i: f"some {i},{i % 4 + 0.25}")
    )
    assert found.label is None
    assert found.label_candidates == ("score",)


def test_data_read_as_a_header_is_noticed(tmp_path: Path) -> None:
    found = profile_of(tmp_path, train_csv=labelled("a fine film,1", lambda i: f"film {i},{i % 2}"))
    assert any("looks like data" in warning for warning in found.warnings)


@pytest.mark.parametrize(
    ("files", "says"),
    [
        ({"train_csv": "text\na\nb\na\nb\n"}, "has no labels.*'text' is the text"),
        ({"train_csv": "id,text\n1,a\n2,b\n3,a\n"}, "has no labels"),
        (
            {"train_csv": labelled("text,label,source", lambda i: f"{i},x,{i % 2}")},
            "one class only",
        ),
        ({"train_csv": "text,label\na,x\nb,y\n"}, "has no labels"),
        ({"train_csv": GOOD, "dev_csv": "text\na\n"}, "missing in dev.csv"),
        ({"train_csv": "text,label\na,1\nb,1\nc,1\n"}, "one class only"),
        ({"train_csv": "text,label\na,\nb,\nc,\n"}, "has no labels"),
        (
            {"train_csv": labelled("id,label", lambda i: f"{i},{i % 1001}", 2 * MAX_LABELS + 2)},
            "more than 1000 distinct values",
        ),
    ],
)
def test_a_dataset_without_labels_is_refused(
    tmp_path: Path, files: dict[str, bytes | str], says: str
) -> None:
    splits = read_splits(dataset(tmp_path, **files))
    with pytest.raises(InvalidDataset, match=says) as caught:
        profile(splits)
    assert caught.value.pointer == "train.csv"


def test_lists_of_labels_are_profiled_item_by_item(tmp_path: Path) -> None:
    found = profile_of(
        tmp_path,
        train_jsonl='{"text": "a b", "labels": ["x", "y"]}\n{"text": "c", "labels": []}\n'
        '{"text": "d", "labels": ["y"]}\n{"text": "e", "labels": null}\n',
    )
    column = found.splits["train"].column("labels")
    assert column is not None
    assert column.values is not None
    assert (column.kind, column.distinct, column.empty_lines) == ("list", 2, (4,))
    assert [(v.value, v.count, v.lines) for v in column.values] == [
        ("x", 1, (1,)),
        ("y", 2, (1, 3)),
    ]
    assert (found.label, found.label_candidates) == (None, ())
    assert guess_columns(found.splits, "multi_label").label == "labels"


def test_scores_that_never_repeat_are_accepted_for_a_regression(tmp_path: Path) -> None:
    found = profile_of(
        tmp_path,
        train_csv=labelled("text,score", lambda i: f"t {i},{i / 7:.3f}"),
        dev_csv="text,score\na,0.5\nb,nan\nc,high\n",
    )
    assert guess_columns(found.splits).label is None
    assert guess_columns(found.splits, "regression").label == "score"
    column = found.splits["dev"].column("score")
    assert column is not None
    assert (column.kind, column.not_numbers, column.not_number_lines) == ("text", 2, (3, 4))


def test_an_unlabelled_split_needs_no_label(tmp_path: Path) -> None:
    found = profile_of(tmp_path, train_csv=GOOD, unlabelled_jsonl=json.dumps({"text": "more"}))
    assert found.label == "label"
    assert found.splits["unlabelled"].rows == 1


def test_a_large_table_is_read_and_profiled(tmp_path: Path) -> None:
    rows = 50_000
    found = profile_of(
        tmp_path, train_csv=labelled("text,label", lambda i: f"words {i},{i % 7}", rows)
    )
    label = found.splits["train"].column("label")
    assert label is not None
    assert label.values is not None
    assert sum(value.count for value in label.values) == rows
