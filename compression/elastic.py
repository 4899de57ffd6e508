"""Elastic layers: one shared weight each, of which a sub-network uses the first part.

Shapes: B rows, T tokens, H hidden size, A heads, D units a head, F neurons. A
Paddle `Linear` weight is [in, out], so a narrower layer is the weight's
upper-left block. The active size is an argument of each call, never a mode.
"""

from __future__ import annotations

from paddle import Tensor, nn
from paddle.nn import functional as F

from compression import kernels
from compression.layout import Layout
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
        layout: Layout,
        *,
        heads: int | None = None,
        gates: Tensor | None = None,
        noise: Noise | None = None,
    ) -> Tensor:
        """x [..., H] in the layout's own shape, gates [A] -> [..., H]."""
        heads = heads or self.heads
        width = heads * self.head_dim
        query, key, value = (
            kernels.linear(x, *sliced(layer, outputs=width))
            for layer in (self.query, self.key, self.value)
        )
        context = layout.attend(
            query * self.head_dim**-0.5,
            key,
            value,
            heads=heads,
            gates=gates,
            rate=self.attention_dropout,
            noise=noise,
        )
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
        """x [..., H] -> [..., H], through the first `neurons` of F."""
        into, out = sliced(self.intermediate, outputs=neurons), sliced(self.output, inputs=neurons)
        if self.activation is F.gelu:
            y = kernels.gelu_feed_forward(x, *into, *out)
        else:
            y = kernels.linear(self.activation(kernels.linear(x, *into)), *out)
        return self.norm(x + dropout(y, self.dropout, noise))
