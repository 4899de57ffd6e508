"""The parity gate's fresh process: `python -m compression.export.parity`.

Prints one JSON object: max_abs, rows, error, and which libraries the process
holds, the proof that an ONNX file was run without paddle.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from compression.export import EXPORTERS, INPUTS
from compression.export.base import Arrays, Run
from compression.export.fresh import runtime_libraries

BATCH_ROWS = 16
SINGLE_ROWS = 16  # about so many, spread over all


def cuts(batch: Arrays) -> Iterator[tuple[slice, Arrays]]:
    """The rows as they will be met: all in padded batches, some alone and unpadded."""
    mask = batch["attention_mask"]
    for start in range(0, len(mask), BATCH_ROWS):
        rows = slice(start, start + BATCH_ROWS)
        yield rows, {name: batch[name][rows] for name in INPUTS}
    for row in range(0, len(mask), max(1, len(mask) // SINGLE_ROWS)):
        length = int(mask[row].sum())
        rows = slice(row, row + 1)
        yield rows, {name: np.ascontiguousarray(batch[name][rows, :length]) for name in INPUTS}


def largest_difference(
    run: Run, batch: Arrays, reference: NDArray[np.float32]
) -> tuple[float | None, str | None]:
    """(max_abs, None), or (None, why there is no such number)."""
    rows_given = len(batch["attention_mask"])
    if rows_given == 0 or rows_given != len(reference):
        return None, f"{rows_given} rows, but logits of {len(reference)} to compare with"
    if not np.isfinite(reference).all():  # a comparison with NaN is never true, so would pass
        return None, "the supernet's own logits are not finite"
    of_tokens = reference.ndim == 3  # [rows, T, labels]
    largest = 0.0
    for rows, inputs in cuts(batch):
        logits = run(inputs)
        expected = reference[rows]
        real = inputs["attention_mask"] == 1  # [B, T]
        if of_tokens:
            expected = expected[:, : real.shape[1]]  # cut as the inputs are
        if logits.shape != expected.shape:
            return None, f"logits have shape {list(logits.shape)}, not {list(expected.shape)}"
        if of_tokens:
            logits, expected = logits[real], expected[real]  # of padding they mean nothing
        if not np.isfinite(logits).all():
            return None, f"logits of row {rows.start} are not finite"
        largest = max(largest, float(np.abs(logits - expected).max()))
    return largest, None


def main() -> None:
    parser = argparse.ArgumentParser(description="Compare an exported model's logits.")
    parser.add_argument("--format", choices=sorted(EXPORTERS), required=True)
    for name in ("--folder", "--batch", "--reference"):
        parser.add_argument(name, type=Path, required=True)
    arguments = parser.parse_args()
    with np.load(arguments.batch, allow_pickle=False) as file:
        batch = {name: np.ascontiguousarray(file[name], dtype=np.int64) for name in INPUTS}
    with np.load(arguments.reference, allow_pickle=False) as file:
        reference = file["logits"].astype(np.float32)
    run = EXPORTERS[arguments.format].load(arguments.folder, threads=1)
    max_abs, error = largest_difference(run, batch, reference)
    answer = {
        "max_abs": max_abs,
        "rows": len(reference),
        "error": error,
        "libraries": runtime_libraries(),
    }
    print(json.dumps(answer))


if __name__ == "__main__":
    main()
