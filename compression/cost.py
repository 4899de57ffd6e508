"""What an encoder costs before anybody measures it: parameters and FLOPs, from its config alone."""

from __future__ import annotations

import math

from compression.teachers.config import EncoderConfig
from compression.teachers.parameters import parameter_shapes


def parameters(config: EncoderConfig) -> int:
    """Number of weights, embeddings, pooler and (where there is one) classifier included."""
    return sum(math.prod(shape) for shape in parameter_shapes(config).values())


def flops(config: EncoderConfig, seq_len: int) -> int:
    """Floating-point operations for one row of `seq_len` tokens, a multiply-add being two.

    Counts matrix products alone: the linear layers and the two products of
    attention. Embedding look-ups, biases, normalisation, activations and softmax
    are left out; in a BERT they are some hundredths of the whole.
    """
    multiply_adds = 0
    for heads, ffn in zip(config.heads, config.ffn, strict=True):
        units = heads * config.head_dim
        multiply_adds += 4 * seq_len * config.hidden * units  # query, key, value, output
        multiply_adds += 2 * seq_len * seq_len * units  # scores, and scores times values
        multiply_adds += 2 * seq_len * config.hidden * ffn  # both halves of the FFN
    classified = seq_len if config.head == "token" else 1
    if config.head == "sequence":
        multiply_adds += config.hidden * config.hidden  # pooler: first token only
    multiply_adds += classified * config.hidden * (config.num_labels or 0)
    return 2 * multiply_adds
