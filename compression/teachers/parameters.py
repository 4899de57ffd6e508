"""Our parameter names and their shapes, derived from an encoder's config alone."""

from __future__ import annotations

from compression.teachers.config import EncoderConfig


def parameter_shapes(config: EncoderConfig) -> dict[str, tuple[int, ...]]:
    """Every parameter of an encoder, in the order of the forward pass.

    Linear weights are [in, out], as paddle keeps them. The pooler is listed
    unless the head reads every token; the classifier only where `num_labels` is known.
    """
    hidden = config.hidden
    shapes: dict[str, tuple[int, ...]] = {
        "embeddings.word.weight": (config.vocab_size, hidden),
        "embeddings.position.weight": (config.max_positions, hidden),
        "embeddings.token_type.weight": (config.type_vocab_size, hidden),
        "embeddings.norm.weight": (hidden,),
        "embeddings.norm.bias": (hidden,),
    }
    for i, (heads, ffn) in enumerate(zip(config.heads, config.ffn, strict=True)):
        units = heads * config.head_dim
        for name in ("query", "key", "value"):
            shapes[f"layers.{i}.attention.{name}.weight"] = (hidden, units)
            shapes[f"layers.{i}.attention.{name}.bias"] = (units,)
        shapes[f"layers.{i}.attention.output.weight"] = (units, hidden)
        shapes[f"layers.{i}.attention.output.bias"] = (hidden,)
        shapes[f"layers.{i}.attention.norm.weight"] = (hidden,)
        shapes[f"layers.{i}.attention.norm.bias"] = (hidden,)
        shapes[f"layers.{i}.ffn.intermediate.weight"] = (hidden, ffn)
        shapes[f"layers.{i}.ffn.intermediate.bias"] = (ffn,)
        shapes[f"layers.{i}.ffn.output.weight"] = (ffn, hidden)
        shapes[f"layers.{i}.ffn.output.bias"] = (hidden,)
        shapes[f"layers.{i}.ffn.norm.weight"] = (hidden,)
        shapes[f"layers.{i}.ffn.norm.bias"] = (hidden,)
    if config.head == "sequence":
        shapes["pooler.weight"] = (hidden, hidden)
        shapes["pooler.bias"] = (hidden,)
    if config.num_labels is not None:
        shapes["classifier.weight"] = (hidden, config.num_labels)
        shapes["classifier.bias"] = (config.num_labels,)
    return shapes
