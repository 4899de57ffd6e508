"""FP16 for ONNX Runtime, made from the fp32 ONNX file: half its bytes, and what GPUs are fast in.

`python -m compression.export.onnx_fp16` is the conversion, in a process without paddle. Token ids
go in as int64 and logits come out in fp32, as of every format. A CPU has no kernels for most of
it: ONNX Runtime computes there in fp32 what lies between two roundings.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from compression.errors import ExportFailed
from compression.export.base import Exporter, ExportSource, Run
from compression.export.fresh import run_fresh
from compression.export.onnx import FILE, OPSET, OnnxExporter

CONVERT_TIMEOUT_S = 300.0


class OnnxFp16Exporter(Exporter):
    def write(self, source: ExportSource, folder: Path) -> list[Path]:
        target = folder / FILE
        run_fresh(
            "compression.export.onnx_fp16",
            ["--source", source.onnx, "--out", target],
            timeout_s=CONVERT_TIMEOUT_S,
        )
        if not target.is_file():
            raise ExportFailed("the conversion to fp16 wrote no file")
        return [target]

    def served_files(self, folder: Path) -> tuple[Path, ...]:
        return (folder / FILE,)

    def load(self, folder: Path, *, threads: int) -> Run:
        return OnnxExporter().load(folder, threads=threads)

    def describe(self) -> Mapping[str, Any]:
        return {"runtime": "ONNX Runtime", "opset": OPSET, "precision": "float16"}


def convert(source: Path, out: Path) -> None:
    """Writes `out`: weights and activations in fp16, the ends as they are."""
    import onnx
    from onnxruntime.transformers.float16 import convert_float_to_float16

    model = convert_float_to_float16(onnx.load(str(source)), keep_io_types=True)
    onnx.checker.check_model(model)
    onnx.save(model, str(out))


def main() -> None:
    parser = argparse.ArgumentParser(description="Convert an ONNX file to fp16.")
    for name in ("--source", "--out"):
        parser.add_argument(name, type=Path, required=True)
    arguments = parser.parse_args()
    convert(arguments.source, arguments.out)
    sys.stdout.write(json.dumps({"size_bytes": arguments.out.stat().st_size}) + "\n")


if __name__ == "__main__":
    main()
