"""What a format must offer, and what all formats start from."""

from __future__ import annotations

import tempfile
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from compression.encoder import Encoder
    from compression.teachers import EncoderConfig

INPUTS = ("input_ids", "token_type_ids", "attention_mask")  # what every `Run` is given
OUTPUT = "logits"

Arrays = Mapping[str, NDArray[np.int64]]
Logits = NDArray[np.float32]
Run = Callable[[Arrays], Logits]
"""One call of a loaded model: arrays [B, T] by input name -> logits [B, labels].

A token head's logits are [B, T, labels].
"""


def graph_inputs(config: EncoderConfig) -> tuple[str, ...]:
    """Those of INPUTS that the traced program has: paddle refuses to save an unused one."""
    return tuple(name for name in INPUTS if name != "token_type_ids" or config.reads_token_types)


class Program(NamedTuple):
    """The two files of a traced program, as `paddle.jit.save` writes them."""

    graph: Path
    weights: Path


@dataclass(frozen=True)
class Int8Source:
    """What int8 formats need beside the encoder.

    `calibration` is an .npz of INPUTS, each int64 [rows, tokens]; `folder` keeps the graphs that
    parts of a quantised one can be put back into fp32 from.
    """

    calibration: Path
    folder: Path


class ExportSource:
    """An encoder on its way out; use as a context manager, which removes program and graph."""

    def __init__(
        self, encoder: Encoder, labels: Sequence[str] | None, int8: Int8Source | None = None
    ) -> None:
        self.encoder = encoder
        self.labels = tuple(labels) if labels is not None else None
        self.int8 = int8
        self._scratch = tempfile.TemporaryDirectory(prefix="widthwise-export-")
        self._program: Program | None = None
        self._onnx: Path | None = None

    def __enter__(self) -> ExportSource:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._scratch.cleanup()

    @property
    def program(self) -> Program:
        """The traced program, made at the first use: Paddle Inference and ONNX share it."""
        if self._program is None:
            from compression.export.program import save_program

            self._program = save_program(self.encoder, Path(self._scratch.name))
        return self._program

    @property
    def onnx(self) -> Path:
        """The fp32 ONNX file, made at the first use: int8 starts from it."""
        if self._onnx is None:
            from compression.export.onnx import save_onnx

            self._onnx = save_onnx(self.program, Path(self._scratch.name))
        return self._onnx


class Exporter(ABC):
    """One format. Its module imports its libraries inside the methods that need them."""

    @abstractmethod
    def write(self, source: ExportSource, folder: Path) -> list[Path]:
        """Writes the files into `folder` (which exists). ExportFailed says what went wrong."""

    @abstractmethod
    def served_files(self, folder: Path) -> tuple[Path, ...]:
        """The files that a runtime loads."""

    @abstractmethod
    def load(self, folder: Path, *, threads: int) -> Run:
        """Loads what `write` wrote, as it is served, on the CPU with so many threads."""

    def describe(self) -> Mapping[str, Any]:
        """How `load` runs it, for the manifest: runtime and options."""
        return {}
