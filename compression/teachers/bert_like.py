"""What BERT and its relatives share: fields of a config, names of layers in both toolkits.

A family's own file adds what it has of its own and says what it leaves out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from compression.teachers import fields as limits
from compression.teachers.config import EncoderConfig
from compression.teachers.fields import Fields

# What each toolkit calls an activation that our encoder has.
_ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_python": "gelu",
    "relu": "relu",
    "gelu_new": "gelu_new",
    "gelu_pytorch_tanh": "gelu_new",
}

# Embeddings and layers, without a head.
HUGGINGFACE_ENCODER = {
    "embeddings.word_embeddings": "embeddings.word",
    "embeddings.position_embeddings": "embeddings.position",
    "embeddings.token_type_embeddings": "embeddings.token_type",
    "embeddings.LayerNorm": "embeddings.norm",
    "encoder.layer.{i}.attention.self.query": "layers.{i}.attention.query",
    "encoder.layer.{i}.attention.self.key": "layers.{i}.attention.key",
    "encoder.layer.{i}.attention.self.value": "layers.{i}.attention.value",
    "encoder.layer.{i}.attention.output.dense": "layers.{i}.attention.output",
    "encoder.layer.{i}.attention.output.LayerNorm": "layers.{i}.attention.norm",
    "encoder.layer.{i}.intermediate.dense": "layers.{i}.ffn.intermediate",
    "encoder.layer.{i}.output.dense": "layers.{i}.ffn.output",
    "encoder.layer.{i}.output.LayerNorm": "layers.{i}.ffn.norm",
}
PADDLENLP_ENCODER = {
    "embeddings.word_embeddings": "embeddings.word",
    "embeddings.position_embeddings": "embeddings.position",
    "embeddings.token_type_embeddings": "embeddings.token_type",
    "embeddings.layer_norm": "embeddings.norm",
    "encoder.layers.{i}.self_attn.q_proj": "layers.{i}.attention.query",
    "encoder.layers.{i}.self_attn.k_proj": "layers.{i}.attention.key",
    "encoder.layers.{i}.self_attn.v_proj": "layers.{i}.attention.value",
    "encoder.layers.{i}.self_attn.out_proj": "layers.{i}.attention.output",
    "encoder.layers.{i}.norm1": "layers.{i}.attention.norm",
    "encoder.layers.{i}.linear1": "layers.{i}.ffn.intermediate",
    "encoder.layers.{i}.linear2": "layers.{i}.ffn.output",
    "encoder.layers.{i}.norm2": "layers.{i}.ffn.norm",
}

# The two heads of sentence classifiers. `dense` is our pooler in both: a linear layer and
# an activation over the first token, before the classifier proper.
POOLER_HEAD = {"pooler.dense": "pooler", "classifier": "classifier"}
DENSE_HEAD = {
    "classifier.dense": "pooler",
    "classifier.out_proj": "classifier",
    "classifier": "classifier",  # that of tokens or of choices, which has no dense layer
}


def parse_bert_like(
    data: Mapping[str, Any],
    file: str,
    *,
    family: str,
    found_types: int | None,
    least_types: int = 1,
    default_ffn: int | None = None,
    default_pad: int | None = 0,
    names: Mapping[str, str] | None = None,
) -> EncoderConfig:
    """The fields that BERT's config has. InvalidModel names file and field.

    `names` are a config's own names, by BERT's, where they differ. `found_types` is the
    number of token types in the weights, for a config that does not say it; a default
    of None makes its field obligatory.
    """
    fields = Fields(data, file=file, names=names)
    for name in ("is_decoder", "add_cross_attention", "fuse"):
        if fields.flag(name):
            raise fields.error(f"{name} is true; only plain encoders can be compressed")
    position = fields.text("position_embedding_type", default="absolute")
    if position != "absolute":
        raise fields.error(f"position_embedding_type {position[:40]!r} is not supported")
    pooling = fields.text("pool_act", default="tanh")
    if pooling != "tanh":
        raise fields.error(f"pool_act {pooling[:40]!r} is not supported, only 'tanh'")
    activation = fields.text("hidden_act", default="gelu")
    if activation not in _ACTIVATIONS:
        raise fields.error(
            f"{fields.name('hidden_act')} {activation[:40]!r} is not supported; known: "
            + ", ".join(_ACTIVATIONS)
        )
    hidden = fields.integer("hidden_size", low=1, high=limits.MAX_HIDDEN)
    layers = fields.integer("num_hidden_layers", low=1, high=limits.MAX_LAYERS)
    heads = fields.integer("num_attention_heads", low=1, high=limits.MAX_HEADS)
    ffn = fields.integer("intermediate_size", low=1, high=limits.MAX_FFN, default=default_ffn)
    if hidden % heads:
        raise fields.error(
            f"{fields.name('hidden_size')} {hidden} is not a multiple of "
            f"{fields.name('num_attention_heads')} {heads}"
        )
    vocabulary = fields.integer("vocab_size", low=1, high=limits.MAX_VOCABULARY)
    return EncoderConfig(
        family=family,
        vocab_size=vocabulary,
        hidden=hidden,
        layers=layers,
        heads=_kept_heads(fields, layers=layers, heads=heads),
        head_dim=hidden // heads,
        ffn=(ffn,) * layers,
        max_positions=fields.integer("max_position_embeddings", low=1, high=limits.MAX_POSITIONS),
        # PaddleNLP's default is 16 and Hugging Face's 2: the weights know better.
        type_vocab_size=fields.integer(
            "type_vocab_size",
            low=least_types,
            high=limits.MAX_TYPES,
            default=2 if found_types is None else found_types,
        ),
        layer_norm_eps=fields.number("layer_norm_eps", low=0.0, high=1.0, default=1e-12),
        activation=_ACTIVATIONS[activation],
        hidden_dropout=fields.number("hidden_dropout_prob", low=0.0, high=1.0, default=0.1),
        attention_dropout=fields.number(
            "attention_probs_dropout_prob", low=0.0, high=1.0, default=0.1
        ),
        pad_token_id=fields.integer(
            "pad_token_id", low=0, high=vocabulary - 1, default=default_pad
        ),
        num_labels=None,
    )


def _kept_heads(fields: Fields, *, layers: int, heads: int) -> tuple[int, ...]:
    """Heads of each layer; Hugging Face lists those it has pruned as {"layer": [heads]}."""
    pruned = fields.data.get("pruned_heads") or {}
    kept = [heads] * layers
    if not isinstance(pruned, Mapping):
        raise fields.error("pruned_heads is not an object")
    for layer, gone in pruned.items():
        if layer not in {str(i) for i in range(layers)} or not isinstance(gone, list):
            raise fields.error(f"pruned_heads names the layer {str(layer)[:20]!r}")
        known = {head for head in gone if type(head) is int and 0 <= head < heads}
        if len(known) != len(gone) or len(known) >= heads:
            raise fields.error(f"pruned_heads of layer {layer} does not name heads to remove")
        kept[int(layer)] = heads - len(known)
    return tuple(kept)


def without_prefix(prefix: str) -> Callable[[str], str]:
    """Takes the family's prefix off a name, and mends TensorFlow's gamma and beta of norms."""

    def normalised(name: str) -> str:
        stem, dot, kind = name.removeprefix(prefix).rpartition(".")
        if stem.endswith(("LayerNorm", "layer_norm")):
            kind = {"gamma": "weight", "beta": "bias"}.get(kind, kind)
        return f"{stem}{dot}{kind}"

    return normalised


def any_of(prefix: str, *stems: str) -> Callable[[str], bool]:
    """Whether a name, with or without the family's prefix, is or begins with one of `stems`.

    A stem that ends in "." is a beginning. The buffers of position and type numbers that
    some versions store beside the parameters always count.
    """
    whole = {"embeddings.position_ids", "embeddings.token_type_ids"}
    whole.update(stem for stem in stems if not stem.endswith("."))
    beginnings = tuple(stem for stem in stems if stem.endswith("."))

    def ignored(name: str) -> bool:
        name = name.removeprefix(prefix)
        return name in whole or name.startswith(beginnings)

    return ignored
