"""The families that can be read. A new family: its own file, and one line here."""

from __future__ import annotations

from compression.teachers.bert import BERT
from compression.teachers.family import Family

FAMILIES: dict[str, Family] = {
    BERT.name: BERT,
}
