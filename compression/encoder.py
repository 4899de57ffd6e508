"""A BERT-family encoder with a classifier, readable in one file.

The teacher, the supernet and every extracted sub-network are this one class.
The supernet runs narrower when a `Subnetwork` is passed; an extracted one is
built narrower. Letters: B rows, T tokens, H hidden size.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import paddle
from paddle import Tensor, nn
from paddle.nn import functional as F

from compression.elastic import ACTIVATIONS, ElasticAttention, ElasticFeedForward, Norm
from compression.errors import InvalidModel
from compression.layout import Layout, Padded
from compression.noise import Noise, dropout
from compression.spec import Head
from compression.supernet import Subnetwork
from compression.teachers.config import EncoderConfig

INITIAL_STD = 0.02  # of new weights, as in BERT
POOLER_ACTIVATIONS = {
    "tanh": paddle.tanh,
    # In this order: Paddle Inference's oneDNN gives wrong numbers for ReLU after tanh.
    "relu_tanh": lambda x: paddle.tanh(F.relu(x)),
    **ACTIVATIONS,
}


@dataclass(frozen=True)
class EncoderStates:
    """`hidden[0]` is the embedding output, `hidden[i]` the output of the i-th layer that ran.

    Each is [B, T, H], or [N, H] where the tokens were packed.
    """

    hidden: list[Tensor]
    logits: Tensor  # [B, labels]; of a token head [B, T, labels]


class Embeddings(nn.Layer):
    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.config = config
        width = config.embedding_size or config.hidden
        self.word = nn.Embedding(config.vocab_size, width)
        self.position = nn.Embedding(config.max_positions, width)
        if config.type_vocab_size:
            self.token_type = nn.Embedding(config.type_vocab_size, width)
        if config.task_type_vocab_size:
            self.task_type = nn.Embedding(config.task_type_vocab_size, width)
        self.norm = Norm(width, epsilon=config.layer_norm_eps)
        self.dropout = config.hidden_dropout
        if config.embedding_size is not None:
            self.projection = nn.Linear(width, config.hidden)
        # Where each token of the vocabulary stands in `word`, int64 [vocabulary]; None: in order.
        self.register_buffer("rows", None, persistable=False)

    def forward(
        self, input_ids: Tensor, token_type_ids: Tensor | None, *, noise: Noise | None = None
    ) -> Tensor:
        """ids [B, T] -> [B, T, H]; types are not looked at where `reads_token_types` is False."""
        config = self.config
        # A running count, not arange(T): it keeps the exported length dynamic. A token's
        # number depends on those before it alone, so padding behind a row cannot change it.
        positions = paddle.cumsum(paddle.ones_like(input_ids), axis=1)
        rows = input_ids
        if self.rows is not None:
            rows = paddle.gather(self.rows, input_ids.reshape([-1])).reshape(input_ids.shape)
        total = self.word(rows) + self.position(positions + (config.position_offset - 1))
        if config.reads_token_types:
            total = total + self.token_type(token_type_ids)
        elif config.type_vocab_size:
            total = total + self.token_type.weight[0]
        if config.task_type_vocab_size:
            total = total + self.task_type.weight[config.task_id]
        x = dropout(self.norm(total), self.dropout, noise)
        return x if config.embedding_size is None else self.projection(x)


class Layer(nn.Layer):
    def __init__(self, config: EncoderConfig, index: int) -> None:
        super().__init__()
        self.attention = ElasticAttention(
            hidden=config.hidden,
            heads=config.heads[index],
            head_dim=config.head_dim,
            epsilon=config.layer_norm_eps,
            dropouts=(config.hidden_dropout, config.attention_dropout),
        )
        self.ffn = ElasticFeedForward(
            hidden=config.hidden,
            neurons=config.ffn[index],
            epsilon=config.layer_norm_eps,
            dropout=config.hidden_dropout,
            activation=config.activation,
        )

    def forward(
        self,
        x: Tensor,
        layout: Layout,
        *,
        heads: int | None = None,
        neurons: int | None = None,
        gates: Tensor | None = None,
        noise: Noise | None = None,
    ) -> Tensor:
        x = self.attention(x, layout, heads=heads, gates=gates, noise=noise)
        return self.ffn(x, neurons=neurons, noise=noise)


class Encoder(nn.Layer):
    """Embeddings, layers, pooler and classifier; parameter names as compression.teachers says."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        if config.num_labels is None:
            raise ValueError("an encoder needs num_labels; give a headless checkpoint's config one")
        self.config = config
        self.embeddings = Embeddings(config)
        self.layers = nn.LayerList([Layer(config, i) for i in range(config.layers)])
        if config.head == "sequence":
            self.pooler = nn.Linear(config.hidden, config.hidden)
        self.dropout = config.hidden_dropout
        self.classifier = nn.Linear(config.hidden, config.num_labels)

    def encode(
        self,
        input_ids: Tensor,
        token_type_ids: Tensor | None,
        attention_mask: Tensor,
        *,
        layout: Layout | None = None,
        subnetwork: Subnetwork | None = None,
        head_gates: Sequence[Tensor] | None = None,
        noise: Noise | None = None,
    ) -> EncoderStates:
        """All hidden states and the logits of one batch; the first three are int64 [B, T].

        States are in the layout, padded as the batch is unless one is given.

        `token_type_ids` may be None where the config reads none. `head_gates` multiplies
        each head's output, one tensor [heads] a layer: ones change nothing, and their
        gradient is the head importance. `noise` makes the pass one of training, with the
        config's dropout.
        """
        layout = layout or Padded(attention_mask)
        return self.encode_embedded(
            layout.states(self.embeddings(input_ids, token_type_ids, noise=noise)),
            layout,
            subnetwork=subnetwork,
            head_gates=head_gates,
            noise=noise,
        )

    def encode_embedded(
        self,
        x: Tensor,
        layout: Layout,
        *,
        subnetwork: Subnetwork | None = None,
        head_gates: Sequence[Tensor] | None = None,
        noise: Noise | None = None,
    ) -> EncoderStates:
        """The same from the embedding output x in its layout, which all sub-networks share."""
        hidden = [x]
        for i, number in enumerate(subnetwork.layers if subnetwork else range(len(self.layers))):
            x = self.layers[number](
                x,
                layout,
                heads=subnetwork.heads[i] if subnetwork else None,
                neurons=subnetwork.ffn[i] if subnetwork else None,
                gates=head_gates[number] if head_gates is not None else None,
                noise=noise,
            )
            hidden.append(x)
        if self.config.head == "sequence":
            activation = POOLER_ACTIVATIONS[self.config.pooler_activation]
            x = activation(self.pooler(layout.first_tokens(x)))  # [..., H] -> [B, H]
        logits = self.classifier(dropout(x, self.dropout, noise))
        return EncoderStates(
            hidden, layout.padded(logits) if self.config.head == "token" else logits
        )

    def forward(
        self,
        input_ids: Tensor,
        token_type_ids: Tensor | None,
        attention_mask: Tensor,
        subnetwork: Subnetwork | None = None,
    ) -> Tensor:
        """The logits [B, labels]; of a token head [B, T, labels]."""
        states = self.encode(input_ids, token_type_ids, attention_mask, subnetwork=subnetwork)
        return states.logits


def numpy_weights(encoder: Encoder) -> dict[str, np.ndarray]:
    """A copy of every parameter by name."""
    return {name: value.numpy().copy() for name, value in encoder.state_dict().items()}


def load_weights(encoder: Encoder, tensors: Mapping[str, np.ndarray]) -> None:
    """Puts `numpy_weights` of the same encoder back, in place."""
    for name, parameter in encoder.state_dict().items():
        parameter.set_value(tensors[name])


def build_encoder(config: EncoderConfig, tensors: Mapping[str, np.ndarray]) -> Encoder:
    """An encoder that holds exactly `tensors`; InvalidModel names what does not fit."""
    encoder = Encoder(config)
    own = encoder.state_dict()
    missing, unexpected = sorted(own.keys() - tensors.keys()), sorted(tensors.keys() - own.keys())
    if missing or unexpected:
        raise InvalidModel(f"weights do not fit: missing {missing}, unexpected {unexpected}")
    for name, parameter in own.items():
        if list(parameter.shape) != list(tensors[name].shape):
            raise InvalidModel(
                f"{name} has shape {list(tensors[name].shape)}, expected {list(parameter.shape)}"
            )
        parameter.set_value(tensors[name].astype(np.float32))
    return encoder


def with_new_head(
    config: EncoderConfig,
    tensors: Mapping[str, np.ndarray],
    *,
    num_labels: int,
    head: Head = "sequence",
    seed: int,
) -> tuple[EncoderConfig, dict[str, np.ndarray]]:
    """The checkpoint with a fresh classifier (and the pooler that its head needs), seeded."""
    generator = np.random.default_rng(seed)
    hidden = config.hidden
    new = {
        name: value
        for name, value in tensors.items()
        if head == "sequence" or not name.startswith("pooler.")
    }
    if head == "sequence" and "pooler.weight" not in new:
        new["pooler.weight"] = generator.normal(0, INITIAL_STD, (hidden, hidden)).astype(np.float32)
        new["pooler.bias"] = np.zeros(hidden, np.float32)
    new["classifier.weight"] = generator.normal(0, INITIAL_STD, (hidden, num_labels)).astype(
        np.float32
    )
    new["classifier.bias"] = np.zeros(num_labels, np.float32)
    return dataclasses.replace(config, num_labels=num_labels, head=head), new
