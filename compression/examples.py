"""Rows of the tasks that label tokens: words with tags, questions with a context. Paddle-free."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from compression.errors import InvalidDataset, RowError
from compression.tables import Table, is_empty, texts_of, whole_number

ROWS_NAMED = 10  # of those that an error is about; their count is told too
_ENTITY_TAG = re.compile(r"O|[BIES]-.+")


class Answer(NamedTuple):
    """`text` stands in its context from the character `start` on."""

    text: str
    start: int


@dataclass(frozen=True)
class TaggedExamples:
    """Rows of words. `tags` are the numbers of their tags, one a word; None where unlabelled.

    `lines[i]` is the line of row i in the uploaded file.
    """

    words: list[tuple[str, ...]]
    tags: list[npt.NDArray[np.int64]] | None
    lines: list[int]

    def __len__(self) -> int:
        return len(self.words)

    def take(self, rows: Sequence[int]) -> TaggedExamples:
        """These rows, in this order."""
        return TaggedExamples(
            [self.words[i] for i in rows],
            None if self.tags is None else [self.tags[i] for i in rows],
            [self.lines[i] for i in rows],
        )


@dataclass(frozen=True)
class AskedExamples:
    """Questions on a context, each with one or more answers; None where unlabelled."""

    questions: list[str]
    contexts: list[str]
    answers: list[tuple[Answer, ...]] | None
    lines: list[int]

    def __len__(self) -> int:
        return len(self.questions)

    def take(self, rows: Sequence[int]) -> AskedExamples:
        """These rows, in this order."""
        return AskedExamples(
            [self.questions[i] for i in rows],
            [self.contexts[i] for i in rows],
            None if self.answers is None else [self.answers[i] for i in rows],
            [self.lines[i] for i in rows],
        )


def mark_entities(tags: Sequence[str]) -> bool:
    """Whether tags are those of IOB1, IOB2 or IOBES, which entities can be read from."""
    return all(_ENTITY_TAG.fullmatch(tag) for tag in tags) and set(tags) != {"O"}


def tagged_examples(
    table: Table, *, words: str, tags: str | None, numbers: Mapping[str, int]
) -> TaggedExamples:
    """The table's rows; `tags` None where it is unlabelled. InvalidDataset names broken rows."""
    rows = [texts_of(row[words]) for row in table.rows]
    refuse_rows(
        RowError(table.file, line, f"there are no words in {words!r}")
        for row, line in zip(rows, table.lines, strict=True)
        if not row
    )
    if tags is None:
        return TaggedExamples(rows, None, list(table.lines))
    given = [texts_of(row[tags]) for row in table.rows]

    def wrong() -> Iterator[RowError]:
        for own, named, line in zip(rows, given, table.lines, strict=True):
            unknown = [tag for tag in named if tag not in numbers]
            if len(own) != len(named):
                yield RowError(table.file, line, f"{len(own)} words, but {len(named)} tags")
            elif unknown:
                yield RowError(table.file, line, f"the tag {unknown[0]!r} is not one of the plan's")

    refuse_rows(wrong())
    return TaggedExamples(
        rows,
        [np.array([numbers[tag] for tag in named], np.int64) for named in given],
        list(table.lines),
    )


def asked_examples(
    table: Table, *, question: str, context: str, text: str | None, start: str | None
) -> AskedExamples:
    """The table's rows; `text` and `start` are the answers' columns, None where unlabelled.

    InvalidDataset names the rows without a question, a context or an answer, and those whose
    answer does not stand in the context where it is said to.
    """
    questions = ["".join(texts_of(row[question])) for row in table.rows]
    contexts = ["".join(texts_of(row[context])) for row in table.rows]
    refuse_rows(
        RowError(table.file, line, f"{column!r} is empty")
        for row, line in zip(table.rows, table.lines, strict=True)
        for column in (question, context)
        if is_empty(row[column])
    )
    if text is None or start is None:
        return AskedExamples(questions, contexts, None, list(table.lines))
    answers: list[tuple[Answer, ...]] = []
    broken: list[RowError] = []
    for i, row in enumerate(table.rows):
        starts = [_character(value) for value in texts_of(row[start])]
        answers.append(
            tuple(
                Answer(found, -1 if first is None else first)
                for found, first in zip(texts_of(row[text]), starts, strict=False)
            )
        )
        reason = _wrong_answer(contexts[i], texts_of(row[text]), starts, start)
        if reason is not None:
            broken.append(RowError(table.file, table.lines[i], reason))
    refuse_rows(broken)
    return AskedExamples(questions, contexts, answers, list(table.lines))


def _character(value: str) -> int | None:
    return whole_number(value) if len(value) <= 12 else None


def _wrong_answer(
    context: str, texts: Sequence[str], starts: Sequence[int | None], column: str
) -> str | None:
    if len(texts) != len(starts):
        return f"{len(texts)} answers, but {len(starts)} starts"
    if not texts:
        return "there is no answer; questions without one are not supported"
    for text, start in zip(texts, starts, strict=True):
        shown = repr(text if len(text) <= 40 else f"{text[:37]}...")
        if not text.strip():
            return "an answer is empty"
        if start is None or start < 0:
            return f"{column!r} is not a number of characters"
        if context[start : start + len(text)] != text:
            elsewhere = context.find(text)
            where = "" if elsewhere < 0 else f"; it is at {elsewhere}"
            return f"the answer {shown} is not in its context at character {start}{where}"
    return None


def refuse_rows(broken: Iterator[RowError] | Sequence[RowError]) -> None:
    """InvalidDataset with the first ten of these rows and their count, where there are any."""
    rows = list(broken)
    if rows:
        first = rows[0]
        count = f" ({len(rows)} rows in all)" if len(rows) > 1 else ""
        raise InvalidDataset(
            f"{first.file}, line {first.line}: {first.message}{count}",
            pointer=first.file,
            rows=tuple(rows[:ROWS_NAMED]),
        )
