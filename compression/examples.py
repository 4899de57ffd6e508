"""Rows of the tasks that label tokens: words with tags, questions with a context.

Their columns are resolved against a dataset's profile, and their rows read from its
tables. Paddle-free.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import astuple, dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from compression.errors import InvalidDataset, InvalidSpec, RowError
from compression.spec import TaskSpec
from compression.tables import (
    LABELLED_SPLITS,
    DatasetProfile,
    Defects,
    SplitProfile,
    Table,
    is_empty,
    texts_of,
    whole_number,
)
from compression.targets import refused_rows

_ENTITY_TAG = re.compile(r"O|[BIES]-.+")


# What the columns of a task are usually called, by field of the spec.
_USUAL_NAMES: Mapping[str, Mapping[str, tuple[str, ...]]] = {
    "token_classification": {
        "text": ("tokens", "words"),
        "label": ("tags", "ner_tags", "labels", "pos_tags"),
    },
    "question_answering": {
        "text": ("question", "query"),
        "text_pair": ("context", "passage", "paragraph"),
        "label": ("answers.text", "answer_text", "answers", "answer"),
        "answer_start": ("answers.answer_start", "answer_start"),
    },
}


@dataclass(frozen=True)
class SequenceColumns:
    """Which columns hold words and tags, or question, context, and the answers with their start."""

    text: str
    text_pair: str | None
    label: str
    answer_start: str | None


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

    @property
    def groups(self) -> list[tuple[str, ...]]:
        """What rows that stay together have in common: their words."""
        return self.words

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

    @property
    def groups(self) -> list[str]:
        """What rows that stay together have in common: their context."""
        return self.contexts

    def take(self, rows: Sequence[int]) -> AskedExamples:
        """These rows, in this order."""
        return AskedExamples(
            [self.questions[i] for i in rows],
            [self.contexts[i] for i in rows],
            None if self.answers is None else [self.answers[i] for i in rows],
            [self.lines[i] for i in rows],
        )


def sequence_columns(task: TaskSpec, dataset: DatasetProfile) -> SequenceColumns:
    """The columns that the spec names, the others by their usual names.

    InvalidSpec where one is not found, is missing in a split that needs it, or holds lists
    where single values belong, or the other way round.
    """
    given = {
        "text": task.text,
        "text_pair": task.text_pair,
        "label": task.label,
        "answer_start": task.answer_start,
    }
    usual = _USUAL_NAMES[task.kind]
    extra = next((field for field, name in given.items() if name and field not in usual), None)
    if extra is not None:
        raise InvalidSpec(f"a {task.kind} task has no {extra}", pointer=f"/task/{extra}")
    named = {field: _named(field, given[field], names, dataset) for field, names in usual.items()}
    for field, name in named.items():
        for split, found in dataset.splits.items():
            column = found.column(name)
            if column is None and (split in LABELLED_SPLITS or field in ("text", "text_pair")):
                raise InvalidSpec(
                    f"{found.file} has no column {name!r}; {_columns_of(found)}",
                    pointer=f"/task/{field}",
                )
            lists = column is not None and column.kind == "list"
            if column is not None and task.kind == "token_classification" and not lists:
                raise InvalidSpec(
                    f"the column {name!r} of {found.file} holds no lists, of which a "
                    "token_classification reads one a row; write them in .jsonl or .parquet",
                    pointer=f"/task/{field}",
                )
            if lists and task.kind == "question_answering" and field in ("text", "text_pair"):
                raise InvalidSpec(
                    f"the column {name!r} of {found.file} holds lists, not texts",
                    pointer=f"/task/{field}",
                )
    return SequenceColumns(
        named["text"], named.get("text_pair"), named["label"], named.get("answer_start")
    )


def _named(field: str, given: str | None, usual: Sequence[str], dataset: DatasetProfile) -> str:
    train = dataset.splits["train"]
    if given is not None:
        # "answers" stands for the texts of that object.
        inner = f"{given}.text"
        return inner if train.column(given) is None and train.column(inner) else given
    names = {column.name.strip().lower(): column.name for column in train.columns}
    for name in usual:
        if name in names:
            return names[name]
    raise InvalidSpec(
        f"which column is it? None is called {' or '.join(map(repr, usual))}; {_columns_of(train)}",
        pointer=f"/task/{field}",
    )


def _columns_of(split: SplitProfile) -> str:
    names = [column.name for column in split.columns]
    return f"its columns are {', '.join(names[:20])}{', ...' if len(names) > 20 else ''}"


def with_defects(found: DatasetProfile, splits: Mapping[str, Table]) -> DatasetProfile:
    """The profile with what is wrong with its rows, in case they are meant for these tasks.

    So a plan can refuse them before a job is stored; whoever reads the rows checks them again.
    """
    defects = {}
    for kind in _USUAL_NAMES:
        try:
            columns = sequence_columns(TaskSpec.model_validate({"kind": kind}), found)
            for split in LABELLED_SPLITS:
                if split in splits:
                    read_sequences(columns, splits[split], split, numbers=None)
        except InvalidSpec:  # the columns are not there: it is another task's dataset
            continue
        except InvalidDataset as error:
            defects[kind] = Defects(
                columns=astuple(columns), message=error.message, rows=error.rows
            )
    return found.model_copy(update={"defects": defects})


def refuse_defects(kind: str, columns: SequenceColumns, dataset: DatasetProfile) -> None:
    """InvalidDataset where inspection has found broken rows in just these columns."""
    defects = dataset.defects.get(kind)
    if defects is not None and defects.columns == astuple(columns):
        raise InvalidDataset(
            defects.message, pointer=defects.rows[0].file, rows=tuple(defects.rows)
        )


def read_sequences(
    columns: SequenceColumns, table: Table, split: str, *, numbers: Mapping[str, int] | None
) -> TaggedExamples | AskedExamples:
    """A split's rows; `numbers` are those of the plan's tags, None where any tag will do."""
    labelled = split in LABELLED_SPLITS
    if columns.text_pair is None:
        tags = columns.label if labelled else None
        if numbers is None:
            numbers = {tag: 0 for row in table.rows for tag in texts_of(row[columns.label])}
        return tagged_examples(table, words=columns.text, tags=tags, numbers=numbers)
    return asked_examples(
        table,
        question=columns.text,
        context=columns.text_pair,
        text=columns.label if labelled else None,
        start=columns.answer_start if labelled else None,
    )


def mark_entities(tags: Sequence[str]) -> bool:
    """Whether tags are those of IOB1, IOB2 or IOBES, which entities can be read from."""
    return all(_ENTITY_TAG.fullmatch(tag) for tag in tags) and set(tags) != {"O"}


def tagged_examples(
    table: Table, *, words: str, tags: str | None, numbers: Mapping[str, int]
) -> TaggedExamples:
    """The table's rows; `tags` None where it is unlabelled. InvalidDataset names broken rows."""
    rows = [texts_of(row[words]) for row in table.rows]
    _refuse(
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

    _refuse(wrong())
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
    _refuse(
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
    _refuse(broken)
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


def _refuse(broken: Iterable[RowError]) -> None:
    rows = list(broken)
    if rows:
        raise refused_rows(rows, len(rows))
