"""INT8 of an ONNX file: quantise it, find the parts that bear it worst, put them back in fp32.

    python -m compression.quantize write|rank|restore ...

A part is a matrix product with a weight, or the lookup in an embedding table; it is called as
its parameter is, "layers.3.ffn.output". Weights are int8 (7 bits of it) with a scale for each
output, tables int8 with one scale. Activations are uint8, with a scale that each call finds for
itself (dynamic) or that calibration rows have fixed (static). What is between two products
(norms, softmax, GELU, attention's own products) stays in fp32, and so does the classifier: it
is small, and its error is the logits'. Processes of this module hold ONNX Runtime and no paddle.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx
from numpy.typing import NDArray

from compression.errors import ExportFailed
from compression.export.base import INPUTS, OUTPUT, Arrays
from compression.export.onnx import drop_dead

Method = Literal["dynamic", "static"]

PREFIX, SUFFIX = "encoder.", ".weight"  # around a part's name in that of its parameter
NEVER = ("classifier",)
BATCH_ROWS = 16  # of calibration rows, like lengths together
RANK_ROWS = 32  # a file is run on them for each part


def prepared(model: onnx.ModelProto) -> onnx.ModelProto:
    """The same function as the quantiser wants it, its parts called as their parameters are.

    Constants become initializers, and nodes that only pass a value on are dropped.
    """
    done = onnx.ModelProto()
    done.CopyFrom(model)
    graph = done.graph
    passed_on: dict[str, str] = {}
    nodes = []
    ends = {value.name for value in graph.output}
    for node in graph.node:
        if node.op_type == "Constant":
            tensor = graph.initializer.add()
            tensor.CopyFrom(node.attribute[0].t)
            tensor.name = node.output[0]
        elif node.op_type == "Identity" and node.output[0] not in ends:
            passed_on[node.output[0]] = passed_on.get(node.input[0], node.input[0])
        else:
            nodes.append(node)
    weights = {value.name for value in graph.initializer}
    for node in nodes:
        for i, name in enumerate(node.input):
            node.input[i] = passed_on.get(name, name)
        for name in node.input:
            if name in weights and name.endswith(SUFFIX):
                node.name = name.removeprefix(PREFIX).removesuffix(SUFFIX)
    kept = [onnx.NodeProto.FromString(node.SerializeToString()) for node in nodes]
    del graph.node[:]
    graph.node.extend(kept)
    return done


def parts(graph: onnx.GraphProto, *, operator: str | None = None) -> list[str]:
    """The names of what can be quantised in a prepared graph, in the order of the forward pass."""
    matrices = {
        value.name
        for value in graph.initializer
        if value.data_type == onnx.TensorProto.FLOAT and len(value.dims) == 2
    }
    place = {"MatMul": 1, "Gather": 0}  # of the weight among the inputs
    return [
        node.name
        for node in graph.node
        if node.op_type in place
        and operator in (None, node.op_type)
        and node.input[place[node.op_type]] in matrices
        and node.name not in NEVER
    ]


def quantised(
    model: onnx.ModelProto, method: Method, *, calibration: Arrays, folder: Path
) -> onnx.ModelProto:
    """The prepared model in int8. `calibration`: INPUTS [rows, T], read by static alone.

    `folder` takes what onnxruntime's quantiser writes on its way.
    """
    from onnxruntime import quantization

    source, tables, done = (folder / f"{name}.onnx" for name in ("source", "tables", "done"))
    onnx.save(model, str(source))
    quantization.quantize_dynamic(
        source,
        tables,
        op_types_to_quantize=["Gather"],
        nodes_to_quantize=parts(model.graph, operator="Gather"),
        weight_type=quantization.QuantType.QInt8,
    )
    products: dict[str, Any] = {
        "op_types_to_quantize": ["MatMul"],
        "nodes_to_quantize": parts(model.graph, operator="MatMul"),
        "per_channel": True,
        "weight_type": quantization.QuantType.QInt8,
        # Seven bits: without VNNI a CPU adds two products in 16 bits, which two of eight overflow.
        # A file would then answer otherwise on another CPU than on the one that judged it.
        "reduce_range": True,
    }
    if method == "dynamic":
        quantization.quantize_dynamic(
            tables, done, extra_options={"MatMulConstBOnly": True}, **products
        )
    else:
        quantization.quantize_static(
            tables,
            done,
            _Calibration(calibration, [value.name for value in model.graph.input]),
            quant_format=quantization.QuantFormat.QDQ,
            activation_type=quantization.QuantType.QUInt8,
            # A product's sums leave it in fp32: to round them as well costs no less time, and
            # moved the logits of MiniLM 2.4 times as far.
            # Their bounds are a mean over batches: single values do not widen them for all others.
            extra_options={
                "OpTypesToExcludeOutputQuantization": ["MatMul"],
                "CalibMovingAverage": True,
            },
            **products,
        )
    result = onnx.load(str(done))
    # Shapes that the quantiser has noted. ONNX Runtime, which infers less of a graph of open sizes,
    # fuses by them an Add into the norm behind it, and takes a CPU four times as long for that.
    del result.graph.value_info[:]
    _round_for_products_alone(result.graph)
    return result


def _round_for_products_alone(graph: onnx.GraphProto) -> None:
    """Whatever else reads an activation that was rounded for a product reads it in fp32 again.

    Static quantisation gives all readers the rounded one: a residual would be rounded as well,
    and a part that goes back to fp32 would leave that behind.
    """
    made_by = {node.output[0]: node for node in graph.node}
    for node in graph.node:
        if node.op_type in ("MatMul", "DequantizeLinear"):
            continue
        for i, name in enumerate(node.input):
            reader = made_by.get(name)
            if reader is not None and reader.op_type == "DequantizeLinear":
                rounder = made_by.get(reader.input[0])
                if rounder is not None and rounder.op_type == "QuantizeLinear":
                    node.input[i] = rounder.input[0]


class _Calibration:
    """Batches of rows as onnxruntime's calibration asks for them."""

    def __init__(self, rows: Arrays, names: Sequence[str]) -> None:
        self._batches = iter([{name: part[name] for name in names} for part in batches(rows)])

    def get_next(self) -> dict[str, NDArray[np.int64]] | None:
        return next(self._batches, None)


def batches(rows: Arrays) -> Iterator[dict[str, NDArray[np.int64]]]:
    """Padded rows [rows, T] in batches, shortest first, each cut to its longest row."""
    lengths = rows["attention_mask"].sum(axis=1)
    order = np.argsort(lengths, kind="stable")
    for start in range(0, len(order), BATCH_ROWS):
        own = order[start : start + BATCH_ROWS]
        yield {name: np.ascontiguousarray(rows[name][own, : lengths[own].max()]) for name in INPUTS}


def with_float(
    model: onnx.ModelProto, original: onnx.ModelProto, names: Iterable[str]
) -> onnx.ModelProto:
    """The quantised model with the named parts as they are in the prepared `original`.

    Both call the tensors between the parts alike, so a part's output says what to replace.
    """
    wanted = {node.output[0]: node for node in original.graph.node if node.name in set(names)}
    done = onnx.ModelProto()
    done.CopyFrom(model)
    graph = done.graph
    nodes = [
        onnx.NodeProto.FromString((wanted.get(node.output[0], node)).SerializeToString())
        for node in graph.node
    ]
    del graph.node[:]
    graph.node.extend(nodes)
    present = {value.name for value in graph.initializer}
    read = {name for node in wanted.values() for name in node.input}
    graph.initializer.extend(
        value
        for value in original.graph.initializer
        if value.name in read and value.name not in present
    )
    drop_dead(graph)
    return done


def worst_first(
    model: onnx.ModelProto, original: onnx.ModelProto, calibration: Arrays
) -> list[str]:
    """The parts, first the one whose return to fp32 brings the logits most for each byte it costs.

    Judged by the root mean square over real tokens of RANK_ROWS calibration rows. Without the
    bytes the word table, most of the file, would come before products that are as bad.
    """
    rows = {name: calibration[name][:RANK_ROWS] for name in INPUTS}
    expected = _logits(original, rows)

    def error(changed: onnx.ModelProto) -> float:
        pairs = zip(_logits(changed, rows), expected, strict=True)
        squares = np.concatenate([((found - wanted) ** 2).ravel() for found, wanted in pairs])
        return float(np.sqrt(squares.mean()))

    rounded, size = error(model), int(model.ByteSize())

    def gain(name: str) -> float:
        changed = with_float(model, original, [name])
        # A tenth of the file on top: a part in fp32 also costs time, however small it is.
        added = int(changed.ByteSize()) - size
        return (rounded - error(changed)) / (added + size / 10)

    return sorted(parts(original.graph), key=gain, reverse=True)


def _logits(model: onnx.ModelProto, rows: Arrays) -> list[NDArray[np.float32]]:
    """A batch's logits each; of a token head, those of real tokens [tokens, labels]."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    names = [value.name for value in session.get_inputs()]
    found = []
    for batch in batches(rows):
        (logits,) = session.run([OUTPUT], {name: batch[name] for name in names})
        found.append(logits[batch["attention_mask"] == 1] if logits.ndim == 3 else logits)
    return found


def read_rows(path: Path) -> dict[str, NDArray[np.int64]]:
    """INPUTS, each int64 [rows, T], from an .npz."""
    with np.load(path, allow_pickle=False) as file:
        return {name: np.ascontiguousarray(file[name], dtype=np.int64) for name in INPUTS}


def main() -> None:
    parser = argparse.ArgumentParser(description="Quantise an ONNX file to int8.")
    commands = parser.add_subparsers(dest="command", required=True)
    asked = {
        "write": ("--source", "--calibration", "--prepared", "--out"),
        "rank": ("--prepared", "--quantised", "--calibration"),
        "restore": ("--prepared", "--quantised", "--out"),
    }
    for command, paths in asked.items():
        own = commands.add_parser(command)
        for name in paths:
            own.add_argument(name, type=Path, required=True)
    commands.choices["write"].add_argument("--method", choices=("dynamic", "static"), required=True)
    commands.choices["restore"].add_argument("names", nargs="+")
    arguments = parser.parse_args()
    answer: dict[str, object] = {}
    if arguments.command == "write":
        original = prepared(onnx.load(str(arguments.source)))
        if not parts(original.graph):
            raise ExportFailed("the ONNX graph holds no product with a weight: nothing to quantise")
        with tempfile.TemporaryDirectory(prefix="widthwise-int8-") as folder:
            model = quantised(
                original,
                arguments.method,
                calibration=read_rows(arguments.calibration),
                folder=Path(folder),
            )
        onnx.save(original, str(arguments.prepared))
        onnx.save(model, str(arguments.out))
    else:
        original = onnx.load(str(arguments.prepared))
        model = onnx.load(str(arguments.quantised))
        if arguments.command == "rank":
            answer["worst_first"] = worst_first(model, original, read_rows(arguments.calibration))
        else:
            onnx.save(with_float(model, original, arguments.names), str(arguments.out))
    sys.stdout.write(json.dumps(answer) + "\n")


if __name__ == "__main__":
    main()
