"""What the building blocks of an encoder cost on this device: python -m compression profile.

Needs onnxruntime and numpy alone, so that a device can be profiled that will never run a
job. The latency of any sub-network is then predicted by addition (`predict`): what a call
costs, the embeddings, an attention and a feed-forward half of each layer, the head. What
that leaves out: what a runtime gains or loses between blocks. `--report` tells how far it
is off, against the sub-networks that a job measured on the same device.

A block is timed as it stands in a model: as many of its kind in a row as the model has
layers, each with weights of its own, so that caches hold no more of them than they would.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from compression import blocks
from compression.blocks import Shape
from compression.runtime_env import core_count, cpu_name

VERSION = 1
WARM_UP_CALLS = 5
FLOPS_TOLERANCE = 0.1  # a projection of the embeddings is not counted

Table = dict[str, Any]
"""One setting's milliseconds: {"call", "embeddings", "head"} and by count {"attention", "ffn"}."""


def measure_blocks(
    shape: Shape,
    *,
    heads: Sequence[int],
    ffn: Sequence[int],
    layers: int,
    batch_size: int,
    seq_len: int,
    threads: int,
    rounds: int,
) -> Table:
    """Median milliseconds of each block, less what a call costs; of one layer each.

    By turns, in shuffled order, each after an untimed call, as jobs measure latency.
    """
    sizes = (batch_size, seq_len)
    models: dict[tuple[str, int], bytes] = {
        ("call", 0): blocks.call(*sizes),
        ("embeddings", 0): blocks.embeddings(shape, *sizes),
        ("head", 0): blocks.head(shape, *sizes),
        **{
            ("attention", count): blocks.attention(shape, *sizes, heads=count, layers=layers)
            for count in heads
        },
        **{
            ("ffn", count): blocks.ffn(shape, *sizes, neurons=count, layers=layers) for count in ffn
        },
    }
    runs = {name: _loaded(model, threads) for name, model in models.items()}
    seconds: dict[tuple[str, int], list[float]] = {name: [] for name in runs}
    order = sorted(runs)
    for number in range(rounds):
        random.Random(number).shuffle(order)
        for name in order:
            runs[name]()
            started = time.perf_counter()
            runs[name]()
            seconds[name].append(time.perf_counter() - started)
    taken = {name: 1e3 * statistics.median(values) for name, values in seconds.items()}
    call = taken[("call", 0)]

    def of_one_layer(kind: str, counts: Sequence[int]) -> dict[str, float]:
        return {str(count): max(0.0, taken[(kind, count)] - call) / layers for count in counts}

    return {
        "batch_size": batch_size,
        "seq_len": seq_len,
        "threads": threads,
        "call": call,
        "embeddings": max(0.0, taken[("embeddings", 0)] - call),
        "head": max(0.0, taken[("head", 0)] - call),
        "attention": of_one_layer("attention", heads),
        "ffn": of_one_layer("ffn", ffn),
    }


def predict(table: Table, *, heads: Sequence[int], ffn: Sequence[int]) -> float:
    """Milliseconds of a call of the sub-network with so many heads and neurons in each layer.

    Counts between two that were measured are interpolated; ValueError beyond them.
    """
    layers = sum(_between(table["attention"], count) for count in heads)
    layers += sum(_between(table["ffn"], count) for count in ffn)
    return float(table["call"] + table["embeddings"] + layers + table["head"])


def errors(tables: Sequence[Table], report: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Predicted against measured p50 of each ONNX file of a job's report, in each setting.

    ValueError for a sub-network that is a `misfit`.
    """
    found = []
    for network in report["subnetworks"]:
        for fmt in network["formats"]:
            for latency in fmt.get("latencies", ()) if fmt["format"] == "onnx" else ():
                setting = {name: latency[name] for name in ("batch_size", "seq_len", "threads")}
                for table in tables:
                    if setting.items() <= table.items():
                        predicted = predict(table, heads=network["heads"], ffn=network["ffn"])
                        found.append(
                            {
                                "subnetwork": network["name"],
                                **setting,
                                "predicted_ms": predicted,
                                "measured_ms": latency["p50_ms"],
                                "error": predicted / latency["p50_ms"] - 1,
                            }
                        )
    return found


def misfit(network: Mapping[str, Any], table: Table, shape: Shape) -> str | None:
    """Why this profile says nothing of a report's sub-network; None where it does."""
    for kind, name in (("attention", "heads"), ("ffn", "ffn")):
        try:
            for count in set(network[name]):
                _between(table[kind], count)
        except ValueError as error:
            return f"{name}: {error}"
    lengths = [each["seq_len"] for fmt in network["formats"] for each in fmt.get("latencies", ())]
    if lengths:
        least, most = _flops(network, seq_len=lengths[0], shape=shape)
        if not least * (1 - FLOPS_TOLERANCE) <= network["flops"] <= most * (1 + FLOPS_TOLERANCE):
            return f"its FLOPs are not those of the profile's hidden size, {shape.hidden}"
    return None


def _flops(network: Mapping[str, Any], *, seq_len: int, shape: Shape) -> tuple[int, int]:
    """Of one row in the profile's shape, without its head and with it; as `cost.flops` counts.

    A report does not name the hidden size: this is what tells it.
    """
    units, neurons = sum(network["heads"]) * shape.head_dim, sum(network["ffn"])
    layers = seq_len * (shape.hidden * (4 * units + 2 * neurons) + 2 * seq_len * units)
    head = shape.hidden * (shape.hidden + seq_len * shape.labels)
    return 2 * layers, 2 * (layers + head)


def _loaded(model: bytes, threads: int) -> Callable[[], Any]:
    """The block, warmed up, with inputs of zeros and small random states."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    generator = np.random.default_rng(0)
    feed = {
        each.name: np.zeros(each.shape, np.int64)
        if each.type == "tensor(int64)"
        else generator.normal(size=each.shape).astype(np.float32)
        for each in session.get_inputs()
    }

    def run() -> Any:
        return session.run(None, feed)

    for _ in range(WARM_UP_CALLS):
        run()
    return run


def _between(measured: Mapping[str, float], count: int) -> float:
    counts = sorted(map(int, measured))
    if not counts[0] <= count <= counts[-1]:
        raise ValueError(
            f"{count} lies outside the profile, which goes from {counts[0]} to {counts[-1]}"
        )
    return float(np.interp(count, counts, [measured[str(each)] for each in counts]))


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m compression profile",
        description=(__doc__ or "").partition("\n")[0],
        epilog="The defaults are MiniLM-L6's.",
    )
    parser.add_argument("--out", type=Path, required=True, help="the JSON file to write")
    parser.add_argument("--hidden", type=int, default=384)
    parser.add_argument("--head-dim", type=int, default=32)
    parser.add_argument("--vocab-size", type=int, default=30522)
    parser.add_argument("--labels", type=int, default=2)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--heads", type=int, nargs="+", default=[3, 6, 9, 12])
    parser.add_argument("--ffn", type=int, nargs="+", default=[384, 768, 1152, 1536])
    for name, default in (("--batch-size", 1), ("--seq-len", 64), ("--threads", 1)):
        parser.add_argument(name, type=int, nargs="+", default=[default])
    parser.add_argument("--rounds", type=int, default=50)
    parser.add_argument("--report", type=Path, help="a job's report.json to hold it against")
    options = parser.parse_args(arguments)
    shape = Shape(options.hidden, options.head_dim, options.vocab_size, options.labels)
    tables = [
        measure_blocks(
            shape,
            heads=options.heads,
            ffn=options.ffn,
            layers=options.layers,
            batch_size=batch_size,
            seq_len=seq_len,
            threads=threads,
            rounds=options.rounds,
        )
        for threads in options.threads
        for seq_len in options.seq_len
        for batch_size in options.batch_size
    ]
    profile = {
        "widthwise_profile": VERSION,
        "cpu": cpu_name(),
        "cores": core_count(),
        "platform": platform.platform(),
        "onnxruntime": version("onnxruntime"),
        "shape": vars(shape),
        "layers": options.layers,
        "rounds": options.rounds,
        "tables": tables,
    }
    # Before the report is read: whatever that holds, the measurement is kept.
    options.out.write_text(json.dumps(profile, indent=2) + "\n")
    if options.report is not None:
        fitting = []
        for network in json.loads(options.report.read_text())["subnetworks"]:
            why = misfit(network, tables[0], shape)
            if why is None:
                fitting.append(network)
            else:
                print(f"{network['name']:>6} is left out: {why}")
        profile["errors"] = errors(tables, {"subnetworks": fitting})
        for each in profile["errors"]:
            print(
                f"{each['subnetwork']:>6}, batch {each['batch_size']}, {each['seq_len']} tokens, "
                f"{each['threads']} thread(s): predicted {each['predicted_ms']:.2f} ms, measured "
                f"{each['measured_ms']:.2f} ms ({100 * each['error']:+.0f} %)"
            )
        options.out.write_text(json.dumps(profile, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
