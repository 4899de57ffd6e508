"""Export of an extracted encoder: one file a format, one line here to register it.

Nothing in this package imports paddle before a function that needs it is called:
the process that checks or times an ONNX file must show that it serves without.
"""

from __future__ import annotations

import hashlib
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from compression.errors import ExportFailed
from compression.export.base import (
    INPUTS,
    OUTPUT,
    Exporter,
    ExportSource,
    Int8Source,
    Logits,
    graph_inputs,
)
from compression.export.fresh import run_fresh
from compression.export.onnx import OnnxExporter
from compression.export.onnx_fp16 import OnnxFp16Exporter
from compression.export.onnx_int8 import OnnxInt8Exporter
from compression.export.paddle import PaddleExporter
from compression.export.paddle_bf16 import PaddleBf16Exporter
from compression.export.safetensors import SafetensorsExporter
from compression.report import FileReport, FormatReport
from compression.spec import Format

if TYPE_CHECKING:
    from compression.encoder import Encoder

EXPORTERS: dict[Format, Exporter] = {
    "safetensors": SafetensorsExporter(),
    "paddle": PaddleExporter(),
    "onnx": OnnxExporter(),
    "onnx-int8-dynamic": OnnxInt8Exporter("dynamic"),
    "onnx-int8-static": OnnxInt8Exporter("static"),
    "onnx-fp16": OnnxFp16Exporter(),
    "paddle-bf16": PaddleBf16Exporter(),
}
VERIFY_TIMEOUT_S = 300.0
ANSWER_TIMEOUT_S = 3600.0  # of a whole split, however large
HASH_CHUNK_BYTES = 1 << 20

__all__ = [
    "EXPORTERS",
    "INPUTS",
    "OUTPUT",
    "Exported",
    "Int8Source",
    "Parity",
    "export",
    "export_formats",
    "format_report",
    "graph_inputs",
    "served_bytes",
    "served_logits",
    "sha256_of",
    "verify",
]


@dataclass(frozen=True)
class Exported:
    """What became of one format: its files, or the error that kept it from being written."""

    format: Format
    folder: Path
    files: tuple[Path, ...]
    seconds: float
    error: str | None = None


class Parity(NamedTuple):
    """`max_abs`: largest |logit - reference| over all rows; `error`: why the gate stays shut."""

    max_abs: float | None
    error: str | None


def export(
    fmt: Format, encoder: Encoder, out_dir: Path, *, labels: Sequence[str] | None
) -> list[Path]:
    """Writes one format's files into `out_dir` and returns them. ExportFailed says what failed.

    Inputs are named as in INPUTS (int64, batch and length dynamic), the ONNX output OUTPUT.
    """
    with ExportSource(encoder, labels) as source:
        out_dir.mkdir(parents=True, exist_ok=True)
        return EXPORTERS[fmt].write(source, out_dir)


def export_formats(
    formats: Sequence[Format],
    encoder: Encoder,
    out_dir: Path,
    *,
    labels: Sequence[str] | None,
    int8: Int8Source | None = None,
) -> dict[Format, Exported]:
    """Writes each format into `out_dir/<format>`; the program is traced once for all of them.

    Formats in int8 need `int8`. A format that fails leaves no files behind and does not keep
    the others from being written.
    """
    done: dict[Format, Exported] = {}
    with ExportSource(encoder, labels, int8) as source:
        for fmt in formats:
            folder = out_dir / fmt
            started = time.monotonic()
            folder.mkdir(parents=True, exist_ok=True)
            files: tuple[Path, ...] = ()
            error: str | None = None
            try:
                files = tuple(EXPORTERS[fmt].write(source, folder))
            except ExportFailed as failure:
                error = failure.message
                shutil.rmtree(folder)
            done[fmt] = Exported(fmt, folder, files, time.monotonic() - started, error)
    return done


def verify(
    fmt: Format,
    folder: Path,
    *,
    batch: Path,
    reference: Path,
    tolerance: float,
    timeout_s: float = VERIFY_TIMEOUT_S,
) -> Parity:
    """Reloads one exported format in a fresh process and compares its logits.

    `batch` is an .npz of INPUTS, each int64 [rows, tokens]; `reference` an .npz with
    "logits" [rows, labels], or of a token head [rows, tokens, labels]. All rows are run
    in padded batches, and some again alone at their own length, so a shape frozen by the
    export cannot pass.
    """
    try:
        answer = run_fresh(
            "compression.export.parity",
            ["--format", fmt, "--folder", folder, "--batch", batch, "--reference", reference],
            timeout_s=timeout_s,
        )
    except ExportFailed as failure:
        return Parity(None, failure.message)
    max_abs = answer["max_abs"]
    if answer["error"] is not None:
        return Parity(max_abs, answer["error"])
    if max_abs > tolerance:
        return Parity(
            max_abs,
            f"logits differ from the supernet's by {max_abs:.2g}, more than {tolerance:.2g}",
        )
    return Parity(max_abs, None)


def served_logits(
    fmt: Format,
    folder: Path,
    *,
    rows: Path,
    batch_size: int,
    out: Path,
    timeout_s: float = ANSWER_TIMEOUT_S,
) -> Logits:
    """One exported format's logits of `rows`, an .npz of INPUTS, [rows, labels].

    Of a token head [rows, tokens, labels], zeros at padding. A fresh process computes them as
    they are served, `batch_size` rows a call, and writes them to `out`. ExportFailed where it
    cannot, or where a logit is not finite.
    """
    options = {"--format": fmt, "--folder": folder, "--rows": rows, "--out": out}
    run_fresh(
        "compression.export.answers",
        [*(part for pair in options.items() for part in pair), "--batch-size", str(batch_size)],
        timeout_s=timeout_s,
    )
    with np.load(out, allow_pickle=False) as file:
        logits: Logits = file["logits"]
    if not np.isfinite(logits).all():
        row = int(np.argwhere(~np.isfinite(logits))[0][0])
        raise ExportFailed(f"logits of row {row} are not finite")
    return logits


def served_bytes(fmt: Format, folder: Path) -> int:
    """Bytes of weights and graph as a runtime loads them; tokenizer files do not count."""
    return sum(path.stat().st_size for path in EXPORTERS[fmt].served_files(folder))


def format_report(
    exported: Exported, parity: Parity | None, *, root: Path, rows: int, tolerance: float | None
) -> FormatReport:
    """The report of one format; one that failed the gate is deleted, so nothing can publish it.

    `parity` is None where the format was never written. Paths are relative to `root`.
    """
    files: tuple[FileReport, ...] = ()
    size = 0
    error = exported.error or (parity.error if parity else "its logits were never compared")
    if error is not None:
        shutil.rmtree(exported.folder, ignore_errors=True)
    else:
        size = served_bytes(exported.format, exported.folder)
        files = tuple(
            FileReport(
                path=path.relative_to(root).as_posix(),
                size_bytes=path.stat().st_size,
                sha256=sha256_of(path),
            )
            for path in sorted(exported.files)
        )
    return FormatReport(
        format=exported.format,
        published=error is None,
        parity_max_abs=parity.max_abs if parity else None,
        parity_rows=rows if parity else 0,
        parity_tolerance=tolerance,
        error=error,
        size_bytes=size,
        files=files,
        latency=None,
        speedup=None,
    )


def sha256_of(path: Path) -> str:
    """The file's SHA-256 in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(HASH_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()
