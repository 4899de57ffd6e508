"""Elastic layers: one shared weight each, of which a sub-network uses the first part.

Shapes: B rows, T tokens, H hidden size, A heads, D units a head, F neurons. A
Paddle `Linear` weight is [in, out], so a narrower layer is the weight's
upper-left block. The active size is an argument of each call, never a mode.
"""

from __future__ import annotations

import paddle
from paddle import Tensor, nn
from paddle.nn import functional as F

from compression import kernels
from compression.noise import Noise, dropout

ACTIVATIONS = {
    "gelu": F.gelu,
    "gelu_new": lambda x: F.gelu(x, approximate=True),
    "relu": F.relu,
}


def sliced(
    layer: nn.Linear, *, inputs: int | None = None, outputs: int | None = None
) -> tuple[Tensor, Tensor]:
    """weight[:inputs, :outputs] and bias[:outputs]; None keeps the whole side."""
    weight, bias = layer.weight, layer.bias
    if inputs is not None and inputs < weight.shape[0]:
        weight = weight[:inputs]
    if outputs is not None and outputs < weight.shape[1]:
        weight, bias = weight[:, :outputs], bias[:outputs]
    return weight, bias


class Norm(nn.LayerNorm):
    """paddle's layer norm over the last axis, with a faster backward."""

    def forward(self, x: Tensor) -> Tensor:
        return kernels.layer_norm(x, self.weight, self.bias, self._epsilon)


class ElasticAttention(nn.Layer):
    """Multi-head self-attention with its residual and norm (post-norm, as in BERT)."""

    def __init__(
        self,
        *,
        hidden: int,
        heads: int,
        head_dim: int,
        epsilon: float,
        dropouts: tuple[float, float],
    ) -> None:
        super().__init__()
        self.heads, self.head_dim = heads, head_dim
        self.query = nn.Linear(hidden, heads * head_dim)
        self.key = nn.Linear(hidden, heads * head_dim)
        self.value = nn.Linear(hidden, heads * head_dim)
        self.output = nn.Linear(heads * head_dim, hidden)
        self.norm = Norm(hidden, epsilon=epsilon)
        self.hidden_dropout, self.attention_dropout = dropouts

    def forward(
        self,
        x: Tensor,
        mask: Tensor,
        *,
        heads: int | None = None,
        gates: Tensor | None = None,
        noise: Noise | None = None,
    ) -> Tensor:
        """x [B, T, H], gates [A] -> [B, T, H]; the mask is what `kernels.expanded` makes."""
        heads = heads or self.heads
        width = heads * self.head_dim

        def project(layer: nn.Linear) -> Tensor:  # [B, T, H] -> [B, A, T, D]
            y = kernels.linear(x, *sliced(layer, outputs=width))
            return y.reshape([0, 0, heads, self.head_dim]).transpose([0, 2, 1, 3])

        query, key = project(self.query) * self.head_dim**-0.5, project(self.key)
        value = project(self.value)
        if noise is None or self.attention_dropout == 0:
            context = kernels.attention(query, key, value, mask)  # [B, A, T, D]
        else:
            scores = paddle.matmul(query, key, transpose_y=True) + mask  # [B, A, T, T]
            weights = dropout(F.softmax(scores), self.attention_dropout, noise)
            context = paddle.matmul(weights, value)
        if gates is not None:
            context = context * gates.reshape([1, heads, 1, 1])
        context = context.transpose([0, 2, 1, 3]).reshape([0, 0, width])  # [B, T, A * D]
        y = kernels.linear(context, *sliced(self.output, inputs=width))
        return self.norm(x + dropout(y, self.hidden_dropout, noise))


class ElasticFeedForward(nn.Layer):
    """The two-layer feed-forward block with its residual and norm."""

    def __init__(
        self, *, hidden: int, neurons: int, epsilon: float, dropout: float, activation: str
    ) -> None:
        super().__init__()
        self.intermediate = nn.Linear(hidden, neurons)
        self.output = nn.Linear(neurons, hidden)
        self.norm = Norm(hidden, epsilon=epsilon)
        self.dropout = dropout
        self.activation = ACTIVATIONS[activation]

    def forward(
        self, x: Tensor, *, neurons: int | None = None, noise: Noise | None = None
    ) -> Tensor:
        """x [B, T, H] -> [B, T, H], through the first `neurons` of F."""
        into, out = sliced(self.intermediate, outputs=neurons), sliced(self.output, inputs=neurons)
        if self.activation is F.gelu:
            y = kernels.gelu_feed_forward(x, *into, *out)
        else:
            y = kernels.linear(self.activation(kernels.linear(x, *into)), *out)
        return self.norm(x + dropout(y, self.dropout, noise))
