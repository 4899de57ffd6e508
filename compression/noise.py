"""Dropout whose masks are a function of numbers: they can be drawn again, in any thread.

paddle draws from one generator a process, so its masks depend on which thread asks first
and on all that was drawn before.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import paddle
from paddle import Tensor


class Noise:
    """The masks of one forward pass; the same key, for example (seed, step), the same masks."""

    def __init__(self, key: Sequence[int]) -> None:
        self._generator = np.random.Generator(np.random.SFC64(np.random.SeedSequence(key)))

    def dropped(self, x: Tensor, rate: float) -> Tensor:
        """x with each element zeroed with probability `rate`, the others scaled up."""
        if rate == 0:
            return x
        keep = self._generator.random(x.shape, dtype=np.float32) >= rate
        return x * paddle.to_tensor(keep.astype(np.float32) / np.float32(1 - rate))


def dropout(x: Tensor, rate: float, noise: Noise | None) -> Tensor:
    """x itself without noise, that is outside training."""
    return x if noise is None else noise.dropped(x, rate)
