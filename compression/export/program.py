"""Dynamic graph to a saved static program. Imports paddle."""

from __future__ import annotations

import warnings
from pathlib import Path

import paddle
from paddle import Tensor, nn

from compression.encoder import Encoder
from compression.errors import ExportFailed
from compression.export.base import INPUTS, Program

STEM = "inference"


class _Served(nn.Layer):
    """The encoder as it is served: three inputs, logits out.

    Tracing replaces the forward of the layer that it is given; it is given this
    one, so the encoder itself stays as it was.
    """

    def __init__(self, encoder: Encoder) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, input_ids: Tensor, token_type_ids: Tensor, attention_mask: Tensor) -> Tensor:
        logits: Tensor = self.encoder(input_ids, token_type_ids, attention_mask)
        return logits


def save_program(encoder: Encoder, folder: Path) -> Program:
    """Traces the encoder, with batch and length left open."""
    try:
        with warnings.catch_warnings():
            # Paddle's tracer asks symbolic tensors for their device, then warns of that.
            warnings.filterwarnings("ignore", message="Tensor do not have 'place' interface")
            _trace(_Served(encoder), folder)
    except Exception as error:  # paddle raises whatever its tracer met
        raise ExportFailed(f"the encoder could not be traced: {error}") from error
    program = Program(folder / f"{STEM}.json", folder / f"{STEM}.pdiparams")
    for path in program:
        if not path.is_file():
            raise ExportFailed(f"paddle.jit.save wrote no {path.name}")
    return program


def _trace(served: nn.Layer, folder: Path) -> None:
    inputs = [paddle.static.InputSpec([None, None], "int64", name) for name in INPUTS]
    static = paddle.jit.to_static(served, input_spec=inputs, full_graph=True)
    paddle.jit.save(static, str(folder / STEM))
