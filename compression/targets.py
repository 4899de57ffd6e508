"""What a task learns from its label column: checked against a profile, then read cell by cell.

A target is what a row is to be told to be: a label's number, a 0 or 1 for each label,
or a score. Paddle-free.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from compression.errors import InvalidDataset, InvalidSpec, RowError
from compression.spec import TaskSpec
from compression.tables import (
    LABELLED_SPLITS,
    MAX_LABELS,
    MAX_LINES_NAMED,
    ColumnProfile,
    DatasetProfile,
    DistinctValue,
    Value,
    finite_number,
    is_empty,
)


class Unusable(Exception):
    """Why a cell is no target; ends the sentence that begins "the label "."""


def refused_rows(rows: Sequence[RowError], count: int) -> InvalidDataset:
    """The error that names the first of `count` rows that cannot be used."""
    first = rows[0]
    more = f" ({count} rows in all)" if count > 1 else ""
    return InvalidDataset(
        f"{first.file}, line {first.line}: {first.message}{more}",
        pointer=first.file,
        rows=tuple(rows[:MAX_LINES_NAMED]),
    )


# --- against the profile --------------------------------------------------------------------


def labelled_columns(name: str, dataset: DatasetProfile) -> dict[str, ColumnProfile]:
    """The label column of each labelled split, by the split's file; train's is the first."""
    splits = [dataset.splits[split] for split in LABELLED_SPLITS if split in dataset.splits]
    columns = {split.file: split.column(name) for split in splits}
    return {file: column for file, column in columns.items() if column is not None}


def refuse_empty(name: str, columns: Mapping[str, ColumnProfile]) -> None:
    empty = [
        RowError(file, line, f"the label ({name!r}) is empty")
        for file, column in columns.items()
        for line in column.empty_lines
    ]
    if empty:
        raise refused_rows(empty, sum(column.empty for column in columns.values()))


def refuse_unseen(found: Mapping[str, Sequence[DistinctValue]]) -> None:
    """Labels by file, train's first: what is not in train cannot be learnt there."""
    (_, in_train), *others = found.items()
    known = {value.value for value in in_train}
    unseen = [(file, value) for file, values in others for value in values]
    unseen = [(file, value) for file, value in unseen if value.value not in known]
    if unseen:
        rows = [
            RowError(file, line, f"the label {value.value!r} is not in train")
            for file, value in unseen
            for line in value.lines or (value.first_line,)
        ]
        raise refused_rows(rows, sum(value.count for _, value in unseen))


def multi_label_values(
    task: TaskSpec, name: str, dataset: DatasetProfile
) -> tuple[DistinctValue, ...]:
    """Train's labels, each with its rows. A row without labels is a row to which none applies."""
    found: dict[str, tuple[DistinctValue, ...]] = {}
    for file, column in labelled_columns(name, dataset).items():
        if column.values is None:
            raise InvalidSpec(
                f"the column {name!r} of {file} holds too many distinct texts to be told apart "
                f"into labels before a job runs ({column.distinct}; at most {MAX_LABELS} that "
                "repeat, each at most 200 characters): write the labels as lists, in .jsonl or "
                ".parquet",
                pointer="/task/label",
            )
        counts: dict[str, tuple[int, tuple[int, ...]]] = {}
        for value in column.values:
            items = [value.value] if column.kind == "list" else split_labels(value.value, task)
            for item in items:
                count, lines = counts.get(item, (0, ()))
                counts[item] = (count + value.count, lines + value.lines)
        found[file] = tuple(
            DistinctValue(
                value=label,
                count=count,
                first_line=min(lines),
                lines=tuple(sorted(lines)[:MAX_LINES_NAMED]),
            )
            for label, (count, lines) in counts.items()
        )
    train = next(iter(found))
    if len(found[train]) < 2:
        raise InvalidDataset(
            f"{train}: the column {name!r} has {len(found[train])} labels when split at "
            f"{task.separator!r}; a multi-label task needs two",
            pointer=train,
        )
    refuse_unseen(found)
    return found[train]


def check_scores(name: str, dataset: DatasetProfile) -> None:
    """InvalidDataset where a labelled row has no finite number, or train one number only."""
    columns = labelled_columns(name, dataset)
    refuse_empty(name, columns)
    broken = [
        RowError(file, line, f"the score ({name!r}) is not a number")
        for file, column in columns.items()
        for line in column.not_number_lines
    ]
    if broken:
        raise refused_rows(broken, sum(column.not_numbers for column in columns.values()))
    train, column = next(iter(columns.items()))
    if column.distinct < 2:
        raise InvalidDataset(
            f"{train}: the column {name!r} has one value only; there is nothing to learn",
            pointer=train,
        )


# --- cells ----------------------------------------------------------------------------------


def split_labels(cell: Value, task: TaskSpec) -> tuple[str, ...]:
    """The labels of a cell, each once: a list's items, or a text's parts without their blanks."""
    parts = cell if isinstance(cell, tuple) else (cell or "").split(task.separator)
    return tuple(dict.fromkeys(part.strip() for part in parts if part.strip()))


def read_targets(
    task: TaskSpec,
    cells: Sequence[Value],
    labels: Sequence[str],
    *,
    file: str,
    lines: Sequence[int],
) -> npt.NDArray[Any]:
    """The targets of a split, which InvalidDataset's rows say where a cell has none.

    int64 [rows] of a classification, float32 [rows, labels] of a multi-label task,
    float32 [rows] of a regression.
    """
    numbers = {label: i for i, label in enumerate(labels)}
    read = {"classification": _number, "multi_label": _marks, "regression": _score}[task.kind]
    targets, broken = [], []
    for cell, line in zip(cells, lines, strict=True):
        try:
            targets.append(read(cell, numbers, task))
        except Unusable as error:
            broken.append(RowError(file, line, f"the label {error}"))
    if broken:
        raise refused_rows(broken, len(broken))
    return np.array(targets, np.int64 if task.kind == "classification" else np.float32)


def _number(cell: Value, numbers: Mapping[str, int], task: TaskSpec) -> int:
    number = numbers.get(cell) if isinstance(cell, str) else None
    if number is None:
        raise Unusable("is empty" if is_empty(cell) else "is not one of the plan's")
    return number


def _marks(cell: Value, numbers: Mapping[str, int], task: TaskSpec) -> list[float]:
    if cell is None:
        raise Unusable("is null; write an empty list or text where no label applies")
    marks = [0.0] * len(numbers)
    for label in split_labels(cell, task):
        if label not in numbers:
            raise Unusable(f"{label[:40]!r} is not one of the plan's")
        marks[numbers[label]] = 1.0
    return marks


def _score(cell: Value, numbers: Mapping[str, int], task: TaskSpec) -> float:
    number = finite_number(cell)
    if number is None:
        raise Unusable("is empty" if is_empty(cell) else "is not a number")
    return number
