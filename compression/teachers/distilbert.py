"""DistilBERT (arXiv:1910.01108), as Hugging Face transformers and PaddleNLP store it.

No token types and no pooler: the classifier's `pre_classifier` and its ReLU are ours.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from compression.teachers.bert_like import (
    PADDLENLP_ENCODER,
    any_of,
    parse_bert_like,
    without_prefix,
)
from compression.teachers.config import EncoderConfig
from compression.teachers.family import Family, Layout

# What Hugging Face calls BERT's fields; PaddleNLP calls them as in BERT.
_FIELDS = {
    "hidden_size": "dim",
    "num_hidden_layers": "n_layers",
    "num_attention_heads": "n_heads",
    "intermediate_size": "hidden_dim",
    "hidden_act": "activation",
    "hidden_dropout_prob": "dropout",
    "attention_probs_dropout_prob": "attention_dropout",
}
_HEAD = {"pre_classifier": "pooler", "classifier": "classifier"}


def _parse(data: Mapping[str, Any], file: str, found_types: int | None) -> EncoderConfig:
    config = parse_bert_like(
        {**data, "type_vocab_size": 0},
        file,
        family="distilbert",
        found_types=None,
        least_types=0,
        names=None if "hidden_size" in data else _FIELDS,
    )
    # Both toolkits have this epsilon in their code, whatever a config says.
    return dataclasses.replace(config, layer_norm_eps=1e-12, pooler_activation="relu")


DISTILBERT = Family(
    name="distilbert",
    class_prefixes=("DistilBert",),
    layouts=(
        Layout(
            "huggingface",
            {
                "embeddings.word_embeddings": "embeddings.word",
                "embeddings.position_embeddings": "embeddings.position",
                "embeddings.LayerNorm": "embeddings.norm",
                "transformer.layer.{i}.attention.q_lin": "layers.{i}.attention.query",
                "transformer.layer.{i}.attention.k_lin": "layers.{i}.attention.key",
                "transformer.layer.{i}.attention.v_lin": "layers.{i}.attention.value",
                "transformer.layer.{i}.attention.out_lin": "layers.{i}.attention.output",
                "transformer.layer.{i}.sa_layer_norm": "layers.{i}.attention.norm",
                "transformer.layer.{i}.ffn.lin1": "layers.{i}.ffn.intermediate",
                "transformer.layer.{i}.ffn.lin2": "layers.{i}.ffn.output",
                "transformer.layer.{i}.output_layer_norm": "layers.{i}.ffn.norm",
                **_HEAD,
            },
            linear_out_in=True,
        ),
        Layout("paddlenlp", {**PADDLENLP_ENCODER, **_HEAD}, linear_out_in=False),
    ),
    parse=_parse,
    normalised=without_prefix("distilbert."),
    ignored=any_of("distilbert.", "vocab_transform.", "vocab_layer_norm.", "vocab_projector."),
)
