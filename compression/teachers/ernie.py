"""ERNIE 1.0, 2.0 and 3.0 (arXiv:1904.09223, 1907.12412, 2107.02137) in both toolkits' layouts.

With `use_task_id`, the row `task_id` of a third table is added to every token: rows of
other tasks are kept, and never used. Left out: sentencepiece vocabularies (ernie-tiny).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from compression.teachers import fields as limits
from compression.teachers.bert_like import (
    HUGGINGFACE_ENCODER,
    PADDLENLP_ENCODER,
    POOLER_HEAD,
    any_of,
    parse_bert_like,
    without_prefix,
)
from compression.teachers.config import EncoderConfig
from compression.teachers.family import Family, Layout
from compression.teachers.fields import Fields

_TASK_TYPES = {"embeddings.task_type_embeddings": "embeddings.task_type"}
_FFN = 3072  # what PaddleNLP assumes, where its older configs do not say it


def _parse(data: Mapping[str, Any], file: str, found_types: int | None) -> EncoderConfig:
    config = parse_bert_like(
        data, file, family="ernie", found_types=found_types, least_types=0, default_ffn=_FFN
    )
    fields = Fields(data, file=file)
    if not fields.flag("use_task_id"):
        return config
    tasks = fields.integer("task_type_vocab_size", low=1, high=limits.MAX_TYPES, default=3)
    task = fields.integer("task_id", low=0, high=tasks - 1, default=0)
    return dataclasses.replace(config, task_type_vocab_size=tasks, task_id=task)


ERNIE = Family(
    name="ernie",
    class_prefixes=("Ernie",),
    layouts=(
        Layout(
            "huggingface",
            {**HUGGINGFACE_ENCODER, **_TASK_TYPES, **POOLER_HEAD},
            linear_out_in=True,
        ),
        Layout(
            "paddlenlp",
            {**PADDLENLP_ENCODER, **_TASK_TYPES, **POOLER_HEAD},
            linear_out_in=False,
            fixed={"layer_norm_eps": 1e-12},  # PaddleNLP does not read the config's
        ),
    ),
    parse=_parse,
    normalised=without_prefix("ernie."),
    ignored=any_of("ernie.", "cls."),
)
