"""RoBERTa (arXiv:1907.11692), as Hugging Face transformers and PaddleNLP store it.

Positions are counted from `pad_token_id + 1`. The classifier's own dense layer and tanh
are our pooler; the pooler of the bare model, which no classifier uses, is left out.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from compression.teachers.bert_like import (
    DENSE_HEAD,
    HUGGINGFACE_ENCODER,
    PADDLENLP_ENCODER,
    any_of,
    parse_bert_like,
    without_prefix,
)
from compression.teachers.config import EncoderConfig
from compression.teachers.family import Family, Layout
from compression.teachers.fields import Fields


def _parse(data: Mapping[str, Any], file: str, found_types: int | None) -> EncoderConfig:
    # The two toolkits differ in the padding token that they assume, and positions follow it.
    config = parse_bert_like(
        data, file, family="roberta", found_types=found_types, default_pad=None
    )
    offset = config.pad_token_id + 1
    if offset >= config.max_positions:
        raise Fields(data, file=file).error(
            f"max_position_embeddings {config.max_positions} leaves no position: "
            f"they are counted from pad_token_id + 1, which is {offset}"
        )
    return dataclasses.replace(config, position_offset=offset)


ROBERTA = Family(
    name="roberta",
    class_prefixes=("Roberta",),
    layouts=(
        Layout("huggingface", {**HUGGINGFACE_ENCODER, **DENSE_HEAD}, linear_out_in=True),
        Layout("paddlenlp", {**PADDLENLP_ENCODER, **DENSE_HEAD}, linear_out_in=False),
    ),
    parse=_parse,
    normalised=without_prefix("roberta."),
    ignored=any_of("roberta.", "pooler.", "lm_head."),
)
