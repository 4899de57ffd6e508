"""Logits of a whole split by one exported file: `python -m compression.export.answers`.

A fresh process, so that an ONNX file is seen to answer without paddle. Prints one JSON object:
rows, and which libraries the process holds.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np

from compression.export import EXPORTERS, INPUTS
from compression.export.base import Arrays, Logits, Run
from compression.export.fresh import runtime_libraries


def logits_of(run: Run, rows: Arrays, *, batch_size: int) -> Logits:
    """The logits of padded rows [rows, T], `batch_size` a call, each call cut to its longest row.

    [rows, labels], or of a token head [rows, T, labels] with zeros at padding.
    """
    mask = rows["attention_mask"]
    parts = []
    for start in range(0, len(mask), batch_size):
        own = slice(start, start + batch_size)
        length = int(mask[own].sum(axis=1).max())
        batch = {name: np.ascontiguousarray(rows[name][own, :length]) for name in INPUTS}
        logits = run(batch)
        if logits.ndim == 3:
            logits = np.where(batch["attention_mask"][:, :, None] == 1, logits, np.float32(0))
            logits = np.pad(logits, ((0, 0), (0, mask.shape[1] - length), (0, 0)))
        parts.append(logits)
    return np.concatenate(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description="An exported model's logits of a split.")
    parser.add_argument("--format", choices=sorted(EXPORTERS), required=True)
    for name in ("--folder", "--rows", "--out"):
        parser.add_argument(name, type=Path, required=True)
    parser.add_argument("--batch-size", type=int, required=True)
    arguments = parser.parse_args()
    with np.load(arguments.rows, allow_pickle=False) as file:
        rows = {name: np.ascontiguousarray(file[name], dtype=np.int64) for name in INPUTS}
    run = EXPORTERS[arguments.format].load(arguments.folder, threads=1)
    np.savez(arguments.out, logits=logits_of(run, rows, batch_size=arguments.batch_size))
    print(json.dumps({"rows": len(rows["attention_mask"]), "libraries": runtime_libraries()}))


if __name__ == "__main__":
    main()
