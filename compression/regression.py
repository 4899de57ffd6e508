"""What changed against the teacher, row by row: which answers flipped, and in which groups.

A task judges each model's answers (`Judged`), one a unit: a row, a word of a row, or a
question. `compare` holds a sub-network's against the teacher's. Paddle-free.
Letters: U units, R rows of the split.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from pydantic import Field

from compression.spec import Frozen
from compression.tables import Table, texts_of

LENGTH_LIMITS = (16, 32, 64, 128, 256, 512)  # the last token of each bucket
MAX_GROUPS = 100
MAX_NAME = 80  # characters of a column's value
WORST_ROWS = 10
DECIMALS = 6  # of shares and margins: more would be rounding errors, which hosts differ in

Unit = Literal["row", "word", "question"]
Bools = npt.NDArray[np.bool_]
Floats = npt.NDArray[np.floating[Any]]
Ints = npt.NDArray[np.int64]


class Flips(Frozen):
    """Two models' answers to the same units."""

    units: int
    agreement: float = Field(description="Share of units that both models answer alike, 0..1.")
    teacher_right: int
    right_to_wrong: int = Field(description="Units that the teacher alone has right.")
    wrong_to_right: int = Field(description="Units that the sub-network alone has right.")


class GroupFlips(Flips):
    name: str


class WorstRow(Frozen):
    """A row whose true answer lost most of its margin. Texts are null unless the spec asks."""

    file: str
    line: int
    margin_lost: float
    word: int | None = Field(None, description="Which of the row's words, from 1.")
    truth: str | None
    teacher: str | None
    subnetwork: str | None
    text: str | None = Field(None, description="Its first characters.")


class RegressionReport(Frozen):
    """A sub-network against its teacher on one split. Groups that lost most come first."""

    split: Literal["dev", "test"]
    unit: Unit
    rule: str = Field(description="When an answer is right, and what its margin is.")
    overall: Flips
    by_label: tuple[GroupFlips, ...] = Field(
        description="By true label; a row of several labels is in the group of each."
    )
    by_length: tuple[GroupFlips, ...] = Field(description="By tokens of the row, shortest first.")
    by_column: Mapping[str, tuple[GroupFlips, ...]] = Field(
        description="By the values of the columns that the spec's report.slices names."
    )
    worst_rows: tuple[WorstRow, ...]


class Regressions(Frozen):
    """A bundle's regression.json; `test` is null where the sub-network was not judged on it."""

    dev: RegressionReport
    test: RegressionReport | None = None


@dataclass(frozen=True)
class Judged:
    """One model's answers to U units.

    `rows` [U]: the row of each. `right` [U]; `margins` [U]: how clearly, larger is better.
    `answers`, `truths`, `labels` [U]: in words, and the labels whose groups a unit is in.
    `are_texts`: answers are texts out of the dataset. `words` [U]: which word of its row, from
    1. `scores` [U]: of answers that are numbers, alike where within `tolerance`.
    """

    unit: Unit
    rule: str
    rows: Ints
    right: Bools
    margins: Floats
    answers: Sequence[str]
    truths: Sequence[str]
    labels: Sequence[Sequence[str]]
    are_texts: bool = False
    words: Ints | None = None
    scores: Floats | None = None
    tolerance: float = 0.0

    def take(self, units: Sequence[int]) -> Judged:
        """These units, in this order."""
        at = np.asarray(units, np.int64)
        return dataclasses.replace(
            self,
            rows=self.rows[at],
            right=self.right[at],
            margins=self.margins[at],
            answers=[self.answers[i] for i in units],
            truths=[self.truths[i] for i in units],
            labels=[self.labels[i] for i in units],
            words=None if self.words is None else self.words[at],
            scores=None if self.scores is None else self.scores[at],
        )

    @property
    def keys(self) -> list[tuple[int, int]]:
        """What each unit is known by: its row, and which word of it."""
        words = self.words if self.words is not None else np.zeros_like(self.rows)
        return list(zip(self.rows.tolist(), words.tolist(), strict=True))


@dataclass(frozen=True)
class RowFacts:
    """Where the R rows of a split come from, and what groups them.

    `columns`: each of the spec's slices with its value [R]. `excerpt_chars`: of a row's text
    and answers that may be quoted; `texts` [R] are cut to it already.
    """

    file: str
    lines: Sequence[int]
    columns: Mapping[str, Sequence[str]]
    texts: Sequence[str]
    excerpt_chars: int = 0


def row_facts(
    table: Table,
    lines: Sequence[int],
    *,
    slices: Sequence[str],
    text_columns: Sequence[str],
    excerpt_chars: int,
) -> RowFacts:
    """Facts of the rows on these lines of a table that has all these columns."""
    by_line = dict(zip(table.lines, table.rows, strict=True))
    rows = [by_line[line] for line in lines]
    texts = [""] * len(rows)
    if excerpt_chars:
        texts = [
            " | ".join(" ".join(texts_of(row[name])) for name in text_columns)[:excerpt_chars]
            for row in rows
        ]
    columns = {name: [" ".join(texts_of(row[name])) for row in rows] for name in slices}
    return RowFacts(table.file, list(lines), columns, texts, excerpt_chars)


def in_common(one: Judged, other: Judged) -> tuple[Judged, Judged]:
    """Both, of the units that both answered: two tokenizers may cut other words off a row."""
    places = {key: unit for unit, key in enumerate(other.keys)}
    pairs = [(unit, places[key]) for unit, key in enumerate(one.keys) if key in places]
    return one.take([unit for unit, _ in pairs]), other.take([unit for _, unit in pairs])


def compare(
    *,
    teacher: Judged,
    subnetwork: Judged,
    split: Literal["dev", "test"],
    facts: RowFacts,
    lengths: Ints,
) -> RegressionReport:
    """The report of a split; `lengths` [R] are its rows' tokens.

    ValueError where the two did not answer the same units.
    """
    if not np.array_equal(teacher.rows, subnetwork.rows):
        raise ValueError("teacher and sub-network were judged on different units")
    pair = _Pair(_alike(teacher, subnetwork), teacher.right, subnetwork.right)
    buckets = np.searchsorted(LENGTH_LIMITS, lengths[teacher.rows])
    return RegressionReport(
        split=split,
        unit=teacher.unit,
        rule=teacher.rule,
        overall=Flips(**pair.figures(np.arange(len(teacher.rows)))),
        by_label=_most_lost(pair, _groups(teacher.labels)),
        by_length=tuple(
            GroupFlips(name=_bucket_name(bucket), **pair.figures(np.flatnonzero(buckets == bucket)))
            for bucket in np.unique(buckets)
        ),
        by_column={
            name: _most_lost(pair, _groups([(_named(values[row]),) for row in teacher.rows]))
            for name, values in facts.columns.items()
        },
        worst_rows=tuple(_worst_rows(teacher, subnetwork, facts)),
    )


@dataclass(frozen=True)
class _Pair:
    """Two models on U units."""

    alike: Bools
    teacher_right: Bools
    own_right: Bools

    def figures(self, units: Ints) -> dict[str, Any]:
        """The fields of Flips, for these units."""
        before, after = self.teacher_right[units], self.own_right[units]
        share = float(self.alike[units].mean()) if len(units) else 1.0
        return {
            "units": len(units),
            "agreement": round(share, DECIMALS),
            "teacher_right": int(before.sum()),
            "right_to_wrong": int((before & ~after).sum()),
            "wrong_to_right": int((~before & after).sum()),
        }


def _alike(teacher: Judged, subnetwork: Judged) -> Bools:
    if teacher.scores is not None and subnetwork.scores is not None:
        near: Bools = np.abs(teacher.scores - subnetwork.scores) <= teacher.tolerance
        return near
    pairs = zip(teacher.answers, subnetwork.answers, strict=True)
    return np.fromiter((one == other for one, other in pairs), bool, len(teacher.answers))


def _groups(names: Sequence[Sequence[str]]) -> dict[str, Ints]:
    """The units of each name; beyond the MAX_GROUPS largest, all others together."""
    members: dict[str, list[int]] = {}
    for unit, own in enumerate(names):
        for name in own:
            members.setdefault(name, []).append(unit)
    by_size = sorted(members, key=lambda name: (-len(members[name]), name))
    groups = {name: np.array(members[name]) for name in by_size[:MAX_GROUPS]}
    if others := by_size[MAX_GROUPS:]:
        rest: set[int] = set().union(*(members[name] for name in others))
        groups[f"({len(others)} others)"] = np.array(sorted(rest))
    return groups


def _most_lost(pair: _Pair, groups: Mapping[str, Ints]) -> tuple[GroupFlips, ...]:
    found = [GroupFlips(name=name, **pair.figures(units)) for name, units in groups.items()]

    def lost(group: GroupFlips) -> tuple[float, Hashable]:
        return (group.wrong_to_right - group.right_to_wrong) / group.units, group.name

    return tuple(sorted(found, key=lost))


def _bucket_name(bucket: int) -> str:
    if bucket == len(LENGTH_LIMITS):
        return f"more than {LENGTH_LIMITS[-1]} tokens"
    first = LENGTH_LIMITS[bucket - 1] + 1 if bucket else 1
    return f"{first} to {LENGTH_LIMITS[bucket]} tokens"


def _named(value: str) -> str:
    """A column's value as the name of its group."""
    line = " ".join(value.split())
    return (line if len(line) <= MAX_NAME else f"{line[: MAX_NAME - 3]}...") or "(empty)"


def _worst_rows(teacher: Judged, subnetwork: Judged, facts: RowFacts) -> Iterator[WorstRow]:
    """The rows that lost most at any of their units; none that lost nothing."""
    lost = teacher.margins - subnetwork.margins
    seen: set[int] = set()
    for unit in np.argsort(-lost, kind="stable"):
        row = int(teacher.rows[unit])
        if lost[unit] <= 0 or len(seen) == WORST_ROWS:
            return
        if row in seen:
            continue
        seen.add(row)

        def shown(answers: Sequence[str], unit: int = int(unit)) -> str | None:
            if not teacher.are_texts:
                return answers[unit]
            return answers[unit][: facts.excerpt_chars] if facts.excerpt_chars else None

        yield WorstRow(
            file=facts.file,
            line=facts.lines[row],
            margin_lost=round(float(lost[unit]), DECIMALS),
            word=None if teacher.words is None else int(teacher.words[unit]),
            truth=shown(teacher.truths),
            teacher=shown(teacher.answers),
            subnetwork=shown(subnetwork.answers),
            text=facts.texts[row] if facts.excerpt_chars else None,
        )
