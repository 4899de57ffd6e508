"""ELECTRA's discriminator (arXiv:2003.10555), as Hugging Face and PaddleNLP store it.

Embeddings narrower than the layers are projected. The classifier's own dense layer and
activation are our pooler: GELU in Hugging Face's, `hidden_act` in PaddleNLP's.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from compression.teachers import fields as limits
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

_PROJECTION = {"embeddings_project": "embeddings.projection"}


def _parse(data: Mapping[str, Any], file: str, found_types: int | None) -> EncoderConfig:
    config = parse_bert_like(data, file, family="electra", found_types=found_types)
    size = Fields(data, file=file).integer("embedding_size", low=1, high=limits.MAX_HIDDEN)
    return dataclasses.replace(
        config,
        embedding_size=None if size == config.hidden else size,
        pooler_activation=config.activation,
    )


ELECTRA = Family(
    name="electra",
    class_prefixes=("Electra",),
    layouts=(
        Layout(
            "huggingface",
            {**HUGGINGFACE_ENCODER, **_PROJECTION, **DENSE_HEAD},
            linear_out_in=True,
            fixed={"pooler_activation": "gelu"},
        ),
        Layout(
            "paddlenlp", {**PADDLENLP_ENCODER, **_PROJECTION, **DENSE_HEAD}, linear_out_in=False
        ),
    ),
    parse=_parse,
    normalised=without_prefix("electra."),
    ignored=any_of(
        "electra.",
        "discriminator_predictions.",
        "generator_predictions.",
        "generator_lm_head.",
        "generator_lm_head_bias",
    ),
)
