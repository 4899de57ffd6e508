"""safetensors with our own config.json: the format that further training starts from."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from compression.export.base import INPUTS, Exporter, ExportSource, Logits, Run

CONFIG, WEIGHTS = "config.json", "model.safetensors"


class SafetensorsExporter(Exporter):
    def write(self, source: ExportSource, folder: Path) -> list[Path]:
        from compression.encoder import numpy_weights
        from compression.teachers import write_checkpoint

        encoder = source.encoder
        write_checkpoint(folder, encoder.config, numpy_weights(encoder), source.labels)
        return [folder / CONFIG, folder / WEIGHTS]

    def served_files(self, folder: Path) -> tuple[Path, ...]:
        return folder / CONFIG, folder / WEIGHTS

    def load(self, folder: Path, *, threads: int) -> Run:
        """`threads` is not used: this format is loaded to be checked, never to be timed."""
        import paddle

        from compression.encoder import build_encoder
        from compression.teachers import read_checkpoint

        checkpoint = read_checkpoint(folder)
        encoder = build_encoder(checkpoint.config, checkpoint.tensors)

        def run(batch: Mapping[str, NDArray[np.int64]]) -> Logits:
            with paddle.no_grad():
                logits: Logits = encoder(
                    *(paddle.to_tensor(batch[name]) for name in INPUTS)
                ).numpy()
            return logits

        return run

    def describe(self) -> Mapping[str, Any]:
        return {"layout": "widthwise-encoder", "precision": "float32"}
