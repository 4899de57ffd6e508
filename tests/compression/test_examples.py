"""Rows of words with tags and of questions with contexts, and what is wrong with bad ones."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from compression.errors import InvalidDataset
from compression.examples import Answer, asked_examples, mark_entities, tagged_examples
from compression.tables import Table

NUMBERS = {"O": 0, "B-X": 1}


def table(**columns: list[Any]) -> Table:
    rows = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
    return Table(tuple(columns), rows, list(range(1, len(rows) + 1)), "dev.jsonl")


def lines(error: pytest.ExceptionInfo[InvalidDataset]) -> list[int]:
    assert all(row.file == "dev.jsonl" for row in error.value.rows)
    return [row.line for row in error.value.rows]


def test_tags_become_numbers() -> None:
    rows = tagged_examples(
        table(w=[("中", "国"), ("a",)], t=[("B-X", "O"), ("O",)]),
        words="w",
        tags="t",
        numbers=NUMBERS,
    )
    assert rows.words == [("中", "国"), ("a",)]
    assert rows.tags is not None
    assert [tags.tolist() for tags in rows.tags] == [[1, 0], [0]]
    last = rows.take([1])
    assert (last.words, last.lines, len(last)) == ([("a",)], [2], 1)
    assert last.tags is not None
    np.testing.assert_array_equal(last.tags[0], [0])
    bare = tagged_examples(table(w=[("a",)]), words="w", tags=None, numbers=NUMBERS)
    assert bare.tags is None
    assert bare.take([0]).tags is None


def test_tags_that_do_not_match_their_words_name_the_first_ten_rows_and_a_count() -> None:
    words = [("a", "b")] * 15
    tags = [("O", "O"), ("O",), ("O", "B-Y"), *[("O", "O", "O")] * 12]
    with pytest.raises(InvalidDataset) as error:
        tagged_examples(table(w=words, t=tags), words="w", tags="t", numbers=NUMBERS)
    assert lines(error) == list(range(2, 12))
    assert error.value.message == "dev.jsonl, line 2: 2 words, but 1 tags (14 rows in all)"
    assert error.value.rows[1].message == "the tag 'B-Y' is not one of the plan's"


def test_a_row_without_words_is_refused() -> None:
    with pytest.raises(InvalidDataset, match="no words") as error:
        tagged_examples(
            table(w=[("a",), (), None], t=[("O",), (), ()]), words="w", tags="t", numbers=NUMBERS
        )
    assert lines(error) == [2, 3]


def asked(text: Any, start: Any, context: str = "the good 中国 film") -> Any:
    return asked_examples(
        table(q=["which"] * 2, c=[context] * 2, a=[text, "good"], s=[start, "4"]),
        question="q",
        context="c",
        text="a",
        start="s",
    )


@pytest.mark.parametrize(
    ("text", "start", "expected"),
    [
        (("good", "中国"), ("4", "9"), (Answer("good", 4), Answer("中国", 9))),
        ("film", "12.0", (Answer("film", 12),)),  # one answer, as a plain column; a float's 12
    ],
)
def test_answers_stand_where_they_are_said_to(text: Any, start: Any, expected: Any) -> None:
    rows = asked(text, start)
    assert rows.answers == [expected, (Answer("good", 4),)]
    assert rows.take([1, 0]).answers == [(Answer("good", 4),), expected]
    assert rows.take([1]).contexts == ["the good 中国 film"]


@pytest.mark.parametrize(
    ("text", "start", "says"),
    [
        (("good", "bad"), ("4", "4"), "'bad' is not in its context at character 4"),
        (("good",), ("5",), "'good' is not in its context at character 5; it is at 4"),
        (("good",), ("-4",), "is not a number of characters"),
        (("good",), ("four",), "is not a number of characters"),
        (("good",), ("9" * 5000,), "is not a number of characters"),
        (("good", "film"), ("4",), "2 answers, but 1 starts"),
        ((), (), "questions without one are not supported"),
        (None, None, "questions without one are not supported"),
        ((" ",), ("3",), "an answer is empty"),
    ],
)
def test_answers_that_are_refused(text: Any, start: Any, says: str) -> None:
    with pytest.raises(InvalidDataset) as error:
        asked(text, start)
    assert lines(error) == [1]
    assert says in error.value.message


def test_an_empty_question_or_context_is_refused() -> None:
    with pytest.raises(InvalidDataset, match="'c' is empty") as error:
        asked_examples(
            table(q=["which", " "], c=["", "good"]),
            question="q",
            context="c",
            text=None,
            start=None,
        )
    assert lines(error) == [1, 2]


def test_tags_mark_entities_in_iob_and_iobes() -> None:
    assert mark_entities(("O", "B-PER", "I-PER", "E-x-y", "S-1"))
    assert not mark_entities(("O",))
    assert not mark_entities(("NOUN", "VERB"))
    assert not mark_entities(("O", "1", "2"))
