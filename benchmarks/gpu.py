"""Published ONNX files on a GPU: what fp16 and a narrower network bring, and what they change.

    python -m benchmarks.gpu BUNDLE [BUNDLE ...] --data sst2/dev.tsv

For a GPU host of yours: it needs onnxruntime-gpu in place of the onnxruntime that `make` installs,
and onnx, tokenizers and pydantic. Bundles are unpacked ones with a file in fp32; the first is what
the others are held against. FP16 files are made by the exporter's own conversion.

All files are asked by turns, in ONNX Runtime with its defaults (on a GPU it multiplies fp32 numbers
in TF32), from token ids in the host's memory to logits there. Answers are held against those that
the CPU gives in fp32. The last line of standard output is one JSON object; of each NAME, in fp32
and in fp16:
    NAME_ms_bB              median milliseconds of a call of B rows
    NAME_speedup_bB         the first bundle's in fp32 over that
    NAME_flipped_percent    of the data's rows: the likeliest label is another than the CPU's
    NAME_drift              the largest difference of a logit
    NAME_cpu_nodes          nodes of the graph that ran on the CPU all the same
"""

from __future__ import annotations

import argparse
import csv
import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
PROVIDERS = {"cuda": "CUDAExecutionProvider", "cpu": "CPUExecutionProvider"}
JUDGED_ROWS = 32
WARM_UP_CALLS = 10
CONVERT = "from compression.export.onnx_fp16 import main; main()"


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("bundles", type=Path, nargs="+", metavar="BUNDLE")
    parser.add_argument("--data", type=Path, required=True, help="a table with a column of texts")
    parser.add_argument("--text", default="sentence", help="that column")
    parser.add_argument("--batch-size", type=int, nargs="+", default=[1, 16, 128])
    parser.add_argument("--seq-len", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--provider", choices=PROVIDERS, default="cuda", help="cpu: to try it out")
    args = parser.parse_args()
    for bundle in args.bundles:
        if not (bundle / "onnx" / "model.onnx").is_file():
            parser.error(f"{bundle} is no unpacked bundle with a file in fp32 (onnx/model.onnx)")
    if not args.data.is_file():
        parser.error(f"--data: there is no file {args.data}")
    import onnxruntime

    if PROVIDERS[args.provider] not in onnxruntime.get_available_providers():
        sys.exit("this ONNX Runtime has no CUDA: install onnxruntime-gpu in place of onnxruntime")
    if hasattr(onnxruntime, "preload_dlls"):  # of CUDA, where it was installed with pip
        onnxruntime.preload_dlls()
    with tempfile.TemporaryDirectory() as work:
        files: dict[str, Path] = {}
        for bundle in args.bundles:
            files[bundle.name] = bundle / "onnx" / "model.onnx"
            files[f"{bundle.name}_fp16"] = to_fp16(files[bundle.name], Path(work) / bundle.name)
        figures = measure(files, args)
        rows = read_rows(args.bundles[0], args.data, args.text, max_tokens=args.seq_len)
        for bundle in args.bundles:
            expected = answers(files[bundle.name], "cpu", rows)
            for name in (bundle.name, f"{bundle.name}_fp16"):
                got = answers(files[name], args.provider, rows)
                flipped = np.mean(got.argmax(-1) != expected.argmax(-1))
                figures[f"{name}_flipped_percent"] = round(100 * float(flipped), 2)
                figures[f"{name}_drift"] = float(np.abs(got - expected).max().round(5))
                figures[f"{name}_cpu_nodes"] = nodes_on_the_cpu(
                    files[name], args.provider, rows[:1], Path(work)
                )
    print(json.dumps({"rows": len(rows), "onnxruntime": onnxruntime.__version__, **figures}))
    return 0


def to_fp16(source: Path, folder: Path) -> Path:
    folder.mkdir()
    target = folder / "model.onnx"
    subprocess.run(
        [sys.executable, "-c", CONVERT, "--source", str(source), "--out", str(target)],
        cwd=ROOT,
        check=True,
        stdout=subprocess.DEVNULL,
    )
    return target


def session_of(path: Path, provider: str, **options: Any) -> Any:
    """Never ONNX Runtime's silent way back to the CPU: RuntimeError where the GPU was not taken."""
    import onnxruntime

    wanted = PROVIDERS[provider]
    chosen = onnxruntime.SessionOptions()
    for name, value in options.items():
        setattr(chosen, name, value)
    session = onnxruntime.InferenceSession(str(path), chosen, providers=[wanted])
    if session.get_providers()[0] != wanted:
        raise RuntimeError(f"ONNX Runtime took {session.get_providers()} and not {wanted}")
    return session


def asked(session: Any, ids: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Logits [rows, labels] in fp32."""
    feed = {"input_ids": ids, "attention_mask": mask, "token_type_ids": np.zeros_like(ids)}
    names = [each.name for each in session.get_inputs()]
    return np.asarray(session.run(["logits"], {name: feed[name] for name in names})[0])


def measure(files: dict[str, Path], args: argparse.Namespace) -> dict[str, Any]:
    sessions = {name: session_of(path, args.provider) for name, path in files.items()}
    reference, figures = next(iter(files)), {}
    generator = np.random.default_rng(0)
    for batch in args.batch_size:
        ids = generator.integers(1000, 30000, (batch, args.seq_len), dtype=np.int64)
        mask = np.ones_like(ids)
        seconds: dict[str, list[float]] = {name: [] for name in files}
        for session in sessions.values():
            for _ in range(WARM_UP_CALLS):
                asked(session, ids, mask)
        order = sorted(files)
        for number in range(args.rounds):
            random.Random(number).shuffle(order)
            for name in order:
                began = time.perf_counter()
                asked(sessions[name], ids, mask)
                seconds[name].append(time.perf_counter() - began)
        medians = {name: statistics.median(taken) for name, taken in seconds.items()}
        for name, median in medians.items():
            figures[f"{name}_ms_b{batch}"] = round(1e3 * median, 3)
            figures[f"{name}_speedup_b{batch}"] = round(medians[reference] / median, 2)
    return figures


def read_rows(bundle: Path, data: Path, column: str, *, max_tokens: int) -> list[list[int]]:
    """Token ids of each text, by the bundle's tokenizer."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(bundle / "tokenizer" / "tokenizer.json"))
    tokenizer.no_padding()
    tokenizer.enable_truncation(max_tokens)
    with data.open(encoding="utf-8", newline="") as file:
        table = csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE)
        if column not in (table.fieldnames or ()):
            sys.exit(f"{data} has no column {column}: name one of {table.fieldnames} with --text")
        texts = [row[column] for row in table]
    return [encoded.ids for encoded in tokenizer.encode_batch(texts)]


def padded(rows: list[list[int]]) -> tuple[np.ndarray, np.ndarray]:
    """Ids and mask [rows, tokens of the longest]."""
    ids = np.zeros((len(rows), max(map(len, rows))), np.int64)
    mask = np.zeros_like(ids)
    for i, row in enumerate(rows):
        ids[i, : len(row)], mask[i, : len(row)] = row, 1
    return ids, mask


def answers(path: Path, provider: str, rows: list[list[int]]) -> np.ndarray:
    session = session_of(path, provider)
    parts = [rows[i : i + JUDGED_ROWS] for i in range(0, len(rows), JUDGED_ROWS)]
    return np.concatenate([asked(session, *padded(part)) for part in parts])


def nodes_on_the_cpu(path: Path, provider: str, rows: list[list[int]], work: Path) -> int:
    prefix = str(work / "profile")
    session = session_of(path, provider, enable_profiling=True, profile_file_prefix=prefix)
    asked(session, *padded(rows))
    events = json.loads(Path(session.end_profiling()).read_text())
    placed = {
        event["args"].get("node_index", event["name"]): event["args"]["provider"]
        for event in events
        if event.get("cat") == "Node" and "provider" in event.get("args", {})
    }
    if not placed:
        raise RuntimeError("ONNX Runtime's profile names no node")
    return sum(each == PROVIDERS["cpu"] for each in placed.values())


if __name__ == "__main__":
    sys.exit(main())
