"""The number formats of training: fp32, or mixed on a GPU."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal

import numpy as np
import paddle
from paddle import Tensor

Kind = Literal["fp32", "mixed"]
_FIRST_SCALE = 2.0**15  # halved at once where it is too large
_CHANGING = ("scale", "incr_count", "decr_count")  # of GradScaler


class Precision:
    """How losses are computed and differentiated, and the optimizer's step that fits.

    mixed: products in bfloat16 where the GPU has it. Else in float16, whose gradients are too
    small for the format unless the loss is scaled; a step whose gradients overflow is left out
    and the scale halved. Weights, moments and sums stay in fp32.
    """

    def __init__(self, kind: Kind = "fp32") -> None:
        self.dtype: str | None = None
        self._scaler: Any = None
        if kind == "mixed" and paddle.amp.is_bfloat16_supported():
            self.dtype = "bfloat16"
        elif kind == "mixed":
            self.dtype = "float16"
            self._scaler = paddle.amp.GradScaler(init_loss_scaling=_FIRST_SCALE)

    def cast(self) -> AbstractContextManager[Any]:
        """Around the forward pass."""
        if self.dtype is None:
            return nullcontext()
        return paddle.amp.auto_cast(dtype=self.dtype, level="O1")  # type: ignore[no-any-return]

    def scaled(self, loss: Tensor) -> Tensor:
        """What to differentiate."""
        return loss if self._scaler is None else self._scaler.scale(loss)

    def unscale(self, optimizer: Any) -> None:
        """Makes its gradients those of the losses themselves; comes before `step`."""
        if self._scaler is not None:
            self._scaler.unscale_(optimizer)

    def step(self, optimizer: Any) -> None:
        """The optimizer's step, left out where a gradient of a scaled loss overflowed."""
        if self._scaler is None:
            optimizer.step()
        else:
            self._scaler.step(optimizer)
            self._scaler.update()

    def state(self) -> dict[str, float]:
        """For a checkpoint; empty without a scale."""
        held = {} if self._scaler is None else self._scaler.state_dict()
        return {name: np.asarray(held[name]).item() for name in _CHANGING if held}

    def restore(self, state: dict[str, float]) -> None:
        """The inverse of `state`."""
        if self._scaler is not None and state:
            counts = {name: int(state[name]) for name in _CHANGING[1:]}
            scale = np.array([state["scale"]], np.float32)
            self._scaler.load_state_dict({**self._scaler.state_dict(), **counts, "scale": scale})
