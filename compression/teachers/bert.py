"""BERT (arXiv:1810.04805), as Hugging Face transformers and PaddleNLP store it.

MiniLM and Hugging Face's TinyBERT are BERTs by another training. Left out: decoders,
relative positions, PaddleNLP's fused layers.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

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


def _parse(data: Mapping[str, Any], file: str, found_types: int | None) -> EncoderConfig:
    return parse_bert_like(data, file, family="bert", found_types=found_types)


BERT = Family(
    name="bert",
    class_prefixes=("Bert",),
    layouts=(
        Layout("huggingface", {**HUGGINGFACE_ENCODER, **POOLER_HEAD}, linear_out_in=True),
        Layout("paddlenlp", {**PADDLENLP_ENCODER, **POOLER_HEAD}, linear_out_in=False),
    ),
    parse=_parse,
    normalised=without_prefix("bert."),
    # Pre-training heads, and the layers that a TinyBERT learnt its hidden states with.
    ignored=any_of("bert.", "cls.", "fit_dense.", "fit_denses."),
)
