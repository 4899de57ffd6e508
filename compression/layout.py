"""How the tokens of a batch lie in memory: padded to one length, or packed without padding.

All of an encoder but its attention looks at one token at a time, and so works on either. Letters:
B rows, T tokens of the longest, N real tokens of all rows, H hidden size, A heads, D units a head.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import numpy as np
import paddle
from paddle import Tensor
from paddle.nn import functional as F

from compression import kernels
from compression.noise import Noise, dropout

MASKED = -1e9  # added to scores of padding: its softmax weight is exactly 0 in fp32
GROUP_ROWS = 8  # rows whose attention is computed together, padded to the longest of them


class Layout(ABC):
    """Where tokens are, and what of an encoder depends on it."""

    @abstractmethod
    def states(self, x: Tensor) -> Tensor:
        """A batch's states [B, T, H] in this layout."""

    @abstractmethod
    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        heads: int,
        gates: Tensor | None = None,
        rate: float = 0.0,
        noise: Noise | None = None,
    ) -> Tensor:
        """Each token's context of its own row; all four in this layout, of A * D units.

        The query is scaled already; `gates` [A] multiply each head's context; `rate` is the
        dropout of the attention weights.
        """

    @abstractmethod
    def first_tokens(self, x: Tensor) -> Tensor:
        """The states of each row's first token, [B, H]."""

    @abstractmethod
    def padded(self, x: Tensor) -> Tensor:
        """What is said of each token, in the batch's own shape [B, T, ...]; zeros at padding."""

    @abstractmethod
    def squared_distance(self, own: Tensor, other: Tensor) -> Tensor:
        """The sum of (own - other)^2 over real tokens and units; only `own` gets a gradient."""


class Padded(Layout):
    """[B, T, H], `attention_mask` [B, T] with ones at real tokens.

    With `counts_padding` distances are over padding too.
    """

    def __init__(self, attention_mask: Tensor, *, counts_padding: bool = False) -> None:
        real = attention_mask.astype("float32")
        self._mask = (1.0 - real).unsqueeze([1, 2]) * MASKED  # [B, 1, 1, T]
        self._counted = None if counts_padding else real
        self._expanded: dict[int, Tensor] = {}

    def states(self, x: Tensor) -> Tensor:
        return x

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        heads: int,
        gates: Tensor | None = None,
        rate: float = 0.0,
        noise: Noise | None = None,
    ) -> Tensor:
        if heads not in self._expanded:
            self._expanded[heads] = kernels.expanded(self._mask, heads)
        query, key, value = (_by_head(each, heads) for each in (query, key, value))
        context = _attention(query, key, value, self._expanded[heads], rate, noise)
        if gates is not None:
            context = context * gates.reshape([1, heads, 1, 1])
        return _by_token(context)

    def first_tokens(self, x: Tensor) -> Tensor:
        return x[:, 0]

    def padded(self, x: Tensor) -> Tensor:
        return x

    def squared_distance(self, own: Tensor, other: Tensor) -> Tensor:
        return kernels.squared_distance(own, other, self._counted)


class Packed(Layout):
    """[N, H]: the real tokens row after row, of rows of so many tokens in a batch [B, T].

    Attention alone is padded, group by group of rows of like length. For training: traced
    programs know no lengths.
    """

    def __init__(self, lengths: Sequence[int] | np.ndarray, tokens: int) -> None:
        counts = np.asarray(lengths, np.int64)
        starts = np.concatenate([[0], np.cumsum(counts)])
        count = int(starts[-1])
        inside = np.arange(tokens) < counts[:, None]  # [B, T]
        places = np.where(inside, starts[:-1, None] + np.arange(tokens), count)  # N is padding
        order = np.argsort(counts, kind="stable")
        groups = [order[i : i + GROUP_ROWS] for i in range(0, len(order), GROUP_ROWS)]
        self._shapes = [(len(rows), int(counts[rows].max())) for rows in groups]  # (b, t)
        own = [places[rows, :t] for rows, (_, t) in zip(groups, self._shapes, strict=True)]
        self._masks = [
            paddle.to_tensor(np.where(each < count, 0.0, MASKED).astype(np.float32)[:, None, None])
            for each in own
        ]
        self._expanded: dict[int, list[Tensor]] = {}
        # The groups' tokens one after the other, padding included, are M.
        spread = np.concatenate([each.reshape(-1) for each in own])  # [M] -> 0..N
        collected = np.empty(count + 1, np.int64)
        collected[spread] = np.arange(len(spread))
        self._spread = paddle.to_tensor(spread)
        self._collected = paddle.to_tensor(collected[:count])  # [N] -> 0..M-1
        self._real = paddle.to_tensor(np.flatnonzero(inside))  # [N] -> 0..B*T-1
        self._places = paddle.to_tensor(places)
        self._firsts = paddle.to_tensor(starts[:-1])

    def states(self, x: Tensor) -> Tensor:
        return paddle.gather(x.reshape([-1, x.shape[-1]]), self._real)

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        heads: int,
        gates: Tensor | None = None,
        rate: float = 0.0,
        noise: Noise | None = None,
    ) -> Tensor:
        width = query.shape[-1]
        sizes = [rows * tokens for rows, tokens in self._shapes]
        parts = [
            paddle.split(kernels.spread(each, self._spread, self._collected), sizes)
            for each in (query, key, value)
        ]
        if heads not in self._expanded:  # of every layer of this width
            self._expanded[heads] = [kernels.expanded(mask, heads) for mask in self._masks]
        found = []
        for number, (rows, tokens) in enumerate(self._shapes):
            own = (_by_head(each[number].reshape([rows, tokens, width]), heads) for each in parts)
            mask = self._expanded[heads][number]
            found.append(_by_token(_attention(*own, mask, rate, noise)).reshape([-1, width]))
        context = kernels.collected(paddle.concat(found), self._spread, self._collected)
        if gates is not None:
            by_head = context.reshape([-1, heads, width // heads]) * gates.reshape([1, heads, 1])
            context = by_head.reshape([-1, width])
        return context

    def first_tokens(self, x: Tensor) -> Tensor:
        return paddle.gather(x, self._firsts)

    def padded(self, x: Tensor) -> Tensor:
        with_padding = paddle.concat([x, paddle.zeros([1, x.shape[-1]], x.dtype)])
        return paddle.gather(with_padding, self._places.reshape([-1])).reshape(
            [*self._places.shape, x.shape[-1]]
        )

    def squared_distance(self, own: Tensor, other: Tensor) -> Tensor:
        return kernels.squared_distance(own, other, None)


def _by_head(x: Tensor, heads: int) -> Tensor:  # [B, T, A * D] -> [B, A, T, D]
    return x.reshape([0, 0, heads, x.shape[-1] // heads]).transpose([0, 2, 1, 3])


def _by_token(x: Tensor) -> Tensor:  # [B, A, T, D] -> [B, T, A * D]
    return x.transpose([0, 2, 1, 3]).reshape([0, 0, x.shape[1] * x.shape[3]])


def _attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor, rate: float, noise: Noise | None
) -> Tensor:
    """[B, A, T, D], with dropout of the weights where there is noise."""
    if noise is None or rate == 0:
        return kernels.attention(query, key, value, mask)
    scores = paddle.matmul(query, key, transpose_y=True) + mask  # [B, A, T, T]
    return paddle.matmul(dropout(F.softmax(scores), rate, noise), value)
