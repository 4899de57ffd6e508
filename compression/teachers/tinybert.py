"""TinyBERT (arXiv:1909.10351) as PaddleNLP stores it: a BERT under a prefix of its own.

PaddleNLP's classifier has a ReLU after the pooler's tanh, here before it, which is the
same function: tanh keeps the sign. Hugging Face stores TinyBERT as
a plain BERT.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from compression.teachers.bert_like import (
    PADDLENLP_ENCODER,
    POOLER_HEAD,
    any_of,
    parse_bert_like,
    without_prefix,
)
from compression.teachers.config import EncoderConfig
from compression.teachers.family import Family, Layout


def _parse(data: Mapping[str, Any], file: str, found_types: int | None) -> EncoderConfig:
    config = parse_bert_like(data, file, family="tinybert", found_types=found_types)
    return dataclasses.replace(config, pooler_activation="relu_tanh")


TINYBERT = Family(
    name="tinybert",
    class_prefixes=("TinyBert",),
    layouts=(Layout("paddlenlp", {**PADDLENLP_ENCODER, **POOLER_HEAD}, linear_out_in=False),),
    parse=_parse,
    normalised=without_prefix("tinybert."),
    ignored=any_of("tinybert.", "cls.", "fit_dense.", "fit_denses."),
)
