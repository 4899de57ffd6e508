"""Paddle Inference: the traced program, run with oneDNN.

On the CPU, Paddle's own kernels (without oneDNN) were 3.7 times slower on the
AMD machine that was measured, so oneDNN is how this format is checked, timed and
run by the bundle's predict.py.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from compression.export.base import Exporter, ExportSource, Logits, Run

GRAPH, WEIGHTS = "inference.json", "inference.pdiparams"


class PaddleExporter(Exporter):
    def write(self, source: ExportSource, folder: Path) -> list[Path]:
        program = source.program
        written = [folder / GRAPH, folder / WEIGHTS]
        for origin, target in zip(program, written, strict=True):
            shutil.copyfile(origin, target)
        return written

    def served_files(self, folder: Path) -> tuple[Path, ...]:
        return folder / GRAPH, folder / WEIGHTS

    def load(self, folder: Path, *, threads: int) -> Run:
        from paddle import inference

        graph, weights = self.served_files(folder)
        config = inference.Config(str(graph), str(weights))
        config.disable_gpu()
        config.disable_glog_info()
        config.set_cpu_math_library_num_threads(threads)
        config.enable_mkldnn()
        self.adjust(config)
        predictor = inference.create_predictor(config)
        inputs = {name: predictor.get_input_handle(name) for name in predictor.get_input_names()}
        output = predictor.get_output_handle(predictor.get_output_names()[0])

        def run(batch: Mapping[str, NDArray[np.int64]]) -> Logits:
            for name, handle in inputs.items():
                handle.copy_from_cpu(batch[name])
            predictor.run()
            logits: Logits = output.copy_to_cpu()
            return logits

        return run

    def adjust(self, config: Any) -> None:
        """What else the runtime's `inference.Config` is told before it loads."""

    def describe(self) -> Mapping[str, Any]:
        return {"runtime": "Paddle Inference", "onednn": True, "precision": "float32"}
