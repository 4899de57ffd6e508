"""Training with those rows of the word embedding alone that the data's tokens use.

A small data set uses a part of a vocabulary, and the vocabulary is half of a small model. A row
that no token uses gets no gradient, and all that AdamW does to it is the decay of its weights,
which `put_back` makes up for in one product. So a training without these rows ends with the
weights of one with them, up to the rounding of that product.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import paddle

from compression.batches import Encoded
from compression.encoder import Encoder

WORD = "embeddings.word.weight"


def used_tokens(data: Encoded, *, pad_id: int) -> np.ndarray:
    """The numbers of all tokens that a batch of these rows may hold, in ascending order."""
    found = {pad_id}
    for ids in data.input_ids:
        found.update(ids)
    return np.array(sorted(found), np.int64)


def with_token_rows(encoder: Encoder, tokens: np.ndarray) -> Encoder:
    """An encoder of the same function for these tokens; another token is an error of paddle.

    All parameters are the given encoder's own memory, but the word embedding: [tokens, width].
    """
    vocabulary = encoder.config.vocab_size
    lean = Encoder(dataclasses.replace(encoder.config, vocab_size=len(tokens)))
    own = dict(lean.named_parameters())
    for name, parameter in encoder.named_parameters():
        if name == WORD:
            own[name].set_value(paddle.gather(parameter.detach(), paddle.to_tensor(tokens)))
        else:
            parameter._share_buffer_to(own[name])
            own[name].stop_gradient = parameter.stop_gradient
    rows = np.full(vocabulary, len(tokens), np.int64)  # out of range
    rows[tokens] = np.arange(len(tokens))
    lean.embeddings.rows = paddle.to_tensor(rows)
    return lean


@paddle.no_grad()
def put_back(lean: Encoder, encoder: Encoder, tokens: np.ndarray, *, decay: float) -> None:
    """Writes the trained rows into the encoder that `with_token_rows` was given.

    `decay` is what the weights of the other rows have been multiplied with.
    """
    word = encoder.embeddings.word.weight
    values = word.numpy() * np.float32(decay)
    values[tokens] = lean.embeddings.word.weight.numpy()
    word.set_value(values)
