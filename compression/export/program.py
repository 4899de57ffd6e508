"""Dynamic graph to a saved static program. Imports paddle."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import paddle
from paddle import Tensor, nn
from paddle.base import framework

from compression.encoder import Encoder
from compression.errors import ExportFailed
from compression.export.base import INPUTS, Program, graph_inputs

STEM = "inference"


class _Served(nn.Layer):
    """The encoder as it is served: INPUTS in, logits out.

    Tracing replaces the forward of the layer that it is given; it is given this
    one, so the encoder itself stays as it was.
    """

    def __init__(self, encoder: Encoder) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, input_ids: Tensor, token_type_ids: Tensor, attention_mask: Tensor) -> Tensor:
        logits: Tensor = self.encoder(input_ids, token_type_ids, attention_mask)
        return logits


class _ServedWithoutTypes(_Served):
    """One that reads no token types."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        logits: Tensor = self.encoder(input_ids, None, attention_mask)
        return logits


def save_program(encoder: Encoder, folder: Path) -> Program:
    """Traces the encoder, with batch and length left open."""
    names = graph_inputs(encoder.config)
    served = _Served(encoder) if names == INPUTS else _ServedWithoutTypes(encoder)
    try:
        with warnings.catch_warnings():
            # Paddle's tracer asks symbolic tensors for their device, then warns of that.
            warnings.filterwarnings("ignore", message="Tensor do not have 'place' interface")
            with _names_of_its_own(served):
                _trace(served, names, folder)
    except Exception as error:  # paddle raises whatever its tracer met
        raise ExportFailed(f"the encoder could not be traced: {error}") from error
    program = Program(folder / f"{STEM}.json", folder / f"{STEM}.pdiparams")
    for path in program:
        if not path.is_file():
            raise ExportFailed(f"paddle.jit.save wrote no {path.name}")
    return program


@contextmanager
def _names_of_its_own(served: nn.Layer) -> Iterator[None]:
    """Parameters are called by their place in the network, and numbered names begin at 0.

    Paddle counts names through the whole process, so what was built or traced before would
    change the files: a resumed job would write other bytes than one in a single run. The
    paths of layers (`struct_name`) are counted in a tree that it offers no guard for.
    """
    parameters = dict(served.named_parameters())
    numbered = {name: parameter.name for name, parameter in parameters.items()}
    paths = framework._name_struct
    try:
        framework._name_struct = framework.NameStruct()
        for name, parameter in parameters.items():
            parameter.name = name
        with paddle.utils.unique_name.guard():
            yield
    finally:
        framework._name_struct = paths
        for name, parameter in parameters.items():
            parameter.name = numbered[name]


def _trace(served: nn.Layer, names: Sequence[str], folder: Path) -> None:
    inputs = [paddle.static.InputSpec([None, None], "int64", name) for name in names]
    static = paddle.jit.to_static(served, input_spec=inputs, full_graph=True)
    paddle.jit.save(static, str(folder / STEM))
