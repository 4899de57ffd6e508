"""ONNX, converted from the traced program by paddle2onnx and run by ONNX Runtime.

`python -m compression.export.onnx` is the conversion: paddle2onnx ends the process
on what it cannot convert and reports to standard error alone, so it gets one of its own.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from compression.errors import ExportFailed
from compression.export.base import INPUTS, OUTPUT, Exporter, ExportSource, Logits, Program, Run
from compression.export.fresh import run_fresh

FILE = "model.onnx"
OPSET = 17  # the first with LayerNormalization
CONVERT_TIMEOUT_S = 300.0


def save_onnx(program: Program, folder: Path) -> Path:
    """Converts a traced program into `folder`, in a process of its own."""
    target = folder / FILE
    run_fresh(
        "compression.export.onnx",
        ["--graph", program.graph, "--weights", program.weights, "--out", target],
        timeout_s=CONVERT_TIMEOUT_S,
    )
    if not target.is_file():
        raise ExportFailed("paddle2onnx wrote no file")
    return target


class OnnxExporter(Exporter):
    def write(self, source: ExportSource, folder: Path) -> list[Path]:
        return [Path(shutil.copyfile(source.onnx, folder / FILE))]

    def served_files(self, folder: Path) -> tuple[Path, ...]:
        return (folder / FILE,)

    def load(self, folder: Path, *, threads: int) -> Run:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        session = onnxruntime.InferenceSession(
            str(folder / FILE), options, providers=["CPUExecutionProvider"]
        )

        names = [value.name for value in session.get_inputs()]

        def run(batch: Mapping[str, NDArray[np.int64]]) -> Logits:
            logits: Logits = session.run([OUTPUT], {name: batch[name] for name in names})[0]
            return logits

        return run

    def describe(self) -> Mapping[str, Any]:
        return {"runtime": "ONNX Runtime", "opset": OPSET, "precision": "float32"}


def convert(graph: Path, weights: Path, out: Path) -> None:
    """Writes `out` with inputs of INPUTS [batch, length] and output OUTPUT, [batch, labels] or
    of a token head [batch, length, labels]."""
    import onnx
    import paddle2onnx

    raw = out.with_name(out.name + ".raw")
    try:
        paddle2onnx.export(
            str(graph),
            str(weights),
            str(raw),
            opset_version=OPSET,
            auto_upgrade_opset=False,
            enable_onnx_checker=False,  # checked below, after the names are set
            optimize_tool="None",  # the default runs pip install
            verbose=False,
        )
        model = onnx.load(str(raw))
    finally:
        raw.unlink(missing_ok=True)
    _name_ends(model.graph)
    drop_dead(model.graph)
    onnx.checker.check_model(model)
    onnx.save(model, str(out))


def _name_ends(graph: Any) -> None:
    """Readable names for the output and the open axes, which paddle2onnx numbers."""
    names = [value.name for value in graph.input]
    required = {"input_ids", "attention_mask"}
    if not required <= set(names) <= set(INPUTS) or len(graph.output) != 1:
        raise ExportFailed(f"the converted graph has inputs {names}, expected {list(INPUTS)}")
    (output,) = graph.output
    for node in graph.node:
        for ends in (node.input, node.output):
            for i, name in enumerate(ends):
                if name == output.name:
                    ends[i] = OUTPUT
    output.name = OUTPUT
    for value in graph.input:
        batch, length = value.type.tensor_type.shape.dim
        batch.dim_param, length.dim_param = "batch", "length"
    for axis, name in zip(
        output.type.tensor_type.shape.dim[:-1], ("batch", "length"), strict=False
    ):
        axis.dim_param = name


def drop_dead(graph: Any) -> None:
    """Without the constants that nothing reads: ONNX Runtime warns of each at every load.

    The graph holds no control flow, so inputs are all that a node reads.
    """
    read = {value.name for value in graph.output}
    nodes = []
    for node in reversed(graph.node):  # stored in an order of computation
        if read.intersection(node.output):
            read.update(node.input)
            nodes.append(node)
    initializers = [value for value in graph.initializer if value.name in read]
    del graph.node[:], graph.initializer[:]
    graph.node.extend(reversed(nodes))
    graph.initializer.extend(initializers)


def main() -> None:
    parser = argparse.ArgumentParser(description="Convert a traced program to ONNX.")
    for name in ("--graph", "--weights", "--out"):
        parser.add_argument(name, type=Path, required=True)
    arguments = parser.parse_args()
    convert(arguments.graph, arguments.weights, arguments.out)
    sys.stdout.write(json.dumps({"size_bytes": arguments.out.stat().st_size}) + "\n")


if __name__ == "__main__":
    main()
