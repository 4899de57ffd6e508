"""The families that can be read. A new family: its own file, and one line here."""

from __future__ import annotations

from compression.teachers.bert import BERT
from compression.teachers.distilbert import DISTILBERT
from compression.teachers.electra import ELECTRA
from compression.teachers.ernie import ERNIE
from compression.teachers.family import Family
from compression.teachers.roberta import ROBERTA
from compression.teachers.tinybert import TINYBERT

FAMILIES: dict[str, Family] = {
    BERT.name: BERT,
    TINYBERT.name: TINYBERT,
    ROBERTA.name: ROBERTA,
    ERNIE.name: ERNIE,
    ELECTRA.name: ELECTRA,
    DISTILBERT.name: DISTILBERT,
}
