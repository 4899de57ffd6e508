"""INT8 for ONNX Runtime, made from the fp32 ONNX file, and the parts that are taken back to fp32.

The quantiser, like the conversion, has a process of its own: `compression.quantize`.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from compression.errors import ExportFailed
from compression.export.base import Exporter, ExportSource, Int8Source, Run
from compression.export.fresh import run_fresh
from compression.export.onnx import FILE, OPSET, OnnxExporter

PREPARED, QUANTISED = "prepared.onnx", "quantised.onnx"  # kept: in fp32, and all in int8
TIMEOUT_S = 900.0
RANK_TIMEOUT_S = 3600.0  # it runs some rows for each of the parts, 74 of BERT-base


class OnnxInt8Exporter(Exporter):
    """`method`: who finds the activations' scales, each call ("dynamic") or calibration rows."""

    def __init__(self, method: Literal["dynamic", "static"]) -> None:
        self.method = method

    def write(self, source: ExportSource, folder: Path) -> list[Path]:
        if source.int8 is None:
            raise ExportFailed("int8 needs calibration rows, and none were given")
        kept = self._kept(source.int8)
        kept.mkdir(parents=True, exist_ok=True)
        _quantise(
            "write",
            "--method",
            self.method,
            source=source.onnx,
            calibration=source.int8.calibration,
            prepared=kept / PREPARED,
            out=kept / QUANTISED,
        )
        return [Path(shutil.copyfile(kept / QUANTISED, folder / FILE))]

    def served_files(self, folder: Path) -> tuple[Path, ...]:
        return (folder / FILE,)

    def load(self, folder: Path, *, threads: int) -> Run:
        return OnnxExporter().load(folder, threads=threads)

    def describe(self) -> Mapping[str, Any]:
        return {
            "runtime": "ONNX Runtime",
            "opset": OPSET,
            "precision": "int8",
            "activations": self.method,
        }

    def worst_first(self, int8: Int8Source) -> list[str]:
        """The parts of the written file, first those whose rounding moves the logits most."""
        kept = self._kept(int8)
        answer = _quantise(
            "rank",
            prepared=kept / PREPARED,
            quantised=kept / QUANTISED,
            calibration=int8.calibration,
            timeout_s=RANK_TIMEOUT_S,
        )
        return list(answer["worst_first"])

    def rewrite(self, int8: Int8Source, folder: Path, *, in_fp32: Sequence[str]) -> None:
        """Writes the served file again, with these of its parts in fp32; all in int8 if none."""
        kept = self._kept(int8)
        if not in_fp32:
            shutil.copyfile(kept / QUANTISED, folder / FILE)
            return
        _quantise(
            "restore",
            *in_fp32,
            prepared=kept / PREPARED,
            quantised=kept / QUANTISED,
            out=folder / FILE,
        )

    def _kept(self, int8: Int8Source) -> Path:
        return int8.folder / self.method


def _quantise(
    command: str, *rest: str, timeout_s: float = TIMEOUT_S, **paths: Path
) -> dict[str, Any]:
    """One command of the quantiser's process; ExportFailed says what went wrong in it."""
    options = [part for name, path in paths.items() for part in (f"--{name}", path)]
    return run_fresh("compression.quantize", [command, *rest, *options], timeout_s=timeout_s)
