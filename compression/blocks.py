"""The building blocks of an encoder as ONNX files, written without the onnx package.

A device that is to be profiled has ONNX Runtime and numpy; a model file is a protocol
buffer of few kinds of fields (onnx.proto), so this module writes those itself. Weights are
random: they change no time. Rows and tokens are open, as in the files that are served: by what it
knows of sizes ONNX Runtime chooses what it fuses. Letters: B rows, T tokens, H hidden units.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

OPSET = 17  # as the exported models have
IR_VERSION = 8
FLOAT, INT8, INT64 = 1, 3, 7  # TensorProto.DataType
KINDS = {"float32": FLOAT, "int8": INT8, "int64": INT64}  # by numpy's names
ATTRIBUTE_FLOAT, ATTRIBUTE_INT, ATTRIBUTE_INTS = 1, 2, 7  # AttributeProto.AttributeType
EPSILON = 1e-12
MASKED = -1e9  # added to scores of padding
ACTIVATIONS = ("gelu", "gelu_new", "relu")
IDS, TYPES, MASK, STATES = "ids", "types", "mask", "x"  # inputs
OPEN = None  # a size that is known with the call
End = tuple[str, int, Sequence[int | None]]  # name, type and shape of an input
_IDS = (OPEN, OPEN)


@dataclass(frozen=True)
class Shape:
    """What all sub-networks of an encoder share; names as in EncoderConfig."""

    hidden: int
    head_dim: int
    vocab_size: int
    labels: int
    embedding_size: int | None = None
    activation: str = "gelu"  # of ACTIVATIONS


@dataclass
class _Graph:
    """Nodes and weights of one model, in an order of computation.

    `int8`: products with weights and lookups are as in onnx-int8-dynamic files.
    """

    int8: bool = False
    nodes: list[bytes] = field(default_factory=list)
    weights: list[bytes] = field(default_factory=list)
    names: int = 0
    random: np.random.Generator = field(default_factory=lambda: np.random.default_rng(0))
    rounded: dict[str, list[str]] = field(default_factory=dict)  # activations, once for all readers

    def add(self, op: str, *inputs: str, **attributes: Any) -> str:
        """One node; the name of its output."""
        return self._node(op, inputs, 1, attributes)[0]

    def _node(
        self, op: str, inputs: Sequence[str], outputs: int, attributes: Mapping[str, Any]
    ) -> list[str]:
        names = [self._name() for _ in range(outputs)]
        parts = [_text(1, name) for name in inputs] + [_text(2, name) for name in names]
        parts += [_text(4, op)]
        parts += [_bytes(5, _attribute(name, value)) for name, value in attributes.items()]
        self.nodes.append(b"".join(parts))
        return names

    def constant(self, values: npt.NDArray[Any]) -> str:
        name = self._name()
        parts = [_number(1, size) for size in values.shape]
        parts += [_number(2, KINDS[values.dtype.name]), _text(8, name), _bytes(9, values.tobytes())]
        self.weights.append(b"".join(parts))
        return name

    def weight(self, *shape: int) -> str:
        return self.constant(self.random.normal(0, 0.02, shape).astype(np.float32))

    def linear(self, x: str, inputs: int, outputs: int, *, in_fp32: bool = False) -> str:
        if self.int8 and not in_fp32:
            product = self._int8_product(x, inputs, outputs)
        else:
            product = self.add("MatMul", x, self.weight(inputs, outputs))
        return self.add("Add", product, self.weight(outputs))

    def _int8_product(self, x: str, inputs: int, outputs: int) -> str:
        """Of uint8 with a scale that the call finds, and int8 with a scale for each output."""
        if x not in self.rounded:
            self.rounded[x] = self._node("DynamicQuantizeLinear", [x], 3, {})
        values, scale, zero = self.rounded[x]
        zeros = self.constant(np.zeros(outputs, np.int8))
        whole = self.add("MatMulInteger", values, self._int8_weight(inputs, outputs), zero, zeros)
        scales = self.add("Mul", scale, self.constant(np.full(outputs, 1e-3, np.float32)))
        return self.add("Mul", self.add("Cast", whole, to=FLOAT), scales)

    def _int8_weight(self, *shape: int) -> str:
        return self.constant(self.random.integers(-64, 64, shape, dtype=np.int8))

    def lookup(self, rows: int, width: int, ids: str) -> str:
        if not self.int8:
            return self.add("Gather", self.weight(rows, width), ids)
        found = self.add("Gather", self._int8_weight(rows, width), ids)
        scale, zero = self.constant(np.array(1e-3, np.float32)), self.constant(np.array(0, np.int8))
        return self.add("DequantizeLinear", found, scale, zero)

    def norm(self, x: str, hidden: int) -> str:
        scale = self.constant(np.ones(hidden, np.float32))
        return self.add(
            "LayerNormalization", x, scale, self.weight(hidden), axis=-1, epsilon=EPSILON
        )

    def model(self, inputs: Sequence[End], output: str, shape: Sequence[int | None]) -> bytes:
        """The file, with these inputs and the one output, which is float."""
        graph = [_bytes(1, node) for node in self.nodes] + [_text(2, "block")]
        graph += [_bytes(5, weight) for weight in self.weights]
        graph += [_bytes(11, _value(*each)) for each in inputs]
        graph.append(_bytes(12, _value(output, FLOAT, shape)))
        opset = _bytes(8, _text(1, "") + _number(2, OPSET))
        return _number(1, IR_VERSION) + _bytes(7, b"".join(graph)) + opset

    def _name(self) -> str:
        self.names += 1
        return f"v{self.names}"


def call() -> bytes:
    """Nothing but a call of the runtime: what each block costs beside its work."""
    graph = _Graph()
    return graph.model([(IDS, INT64, _IDS)], graph.add("Cast", IDS, to=FLOAT), _IDS)


def embeddings(shape: Shape, seq_len: int, *, int8: bool = False) -> bytes:
    """Ids [B, T] to states [B, T, H]: words, positions, types, the norm and any projection.
    `seq_len`: rows of the table of positions."""
    graph = _Graph(int8)
    inputs = [(IDS, INT64, _IDS), (TYPES, INT64, _IDS)]
    return graph.model(inputs, _embedded(graph, shape, seq_len), _states(shape))


def attention(shape: Shape, *, heads: int, layers: int, int8: bool = False) -> bytes:
    """Self-attention of so many heads with residual and norm, `layers` times in a row, of states
    [B, T, H] and a mask [B, 1, 1, T] that is added to the scores."""
    graph = _Graph(int8)
    attend = _attention(graph, shape, heads)
    x = STATES
    for _ in range(layers):
        x = attend(x, MASK)
    inputs = [(STATES, FLOAT, _states(shape)), (MASK, FLOAT, (OPEN, 1, 1, OPEN))]
    return graph.model(inputs, x, _states(shape))


def ffn(shape: Shape, *, neurons: int, layers: int, int8: bool = False) -> bytes:
    """The feed-forward half of a layer with residual and norm, `layers` times in a row."""
    graph = _Graph(int8)
    feed_forward = _feed_forward(graph, shape, neurons)
    x = STATES
    for _ in range(layers):
        x = feed_forward(x)
    return graph.model([(STATES, FLOAT, _states(shape))], x, _states(shape))


def head(shape: Shape, *, int8: bool = False) -> bytes:
    """Pooler and classifier of the first token, [B, T, H] to [B, labels]."""
    graph = _Graph(int8)
    logits = _pooled_logits(graph, shape, STATES)
    return graph.model([(STATES, FLOAT, _states(shape))], logits, (OPEN, shape.labels))


def token_head(shape: Shape) -> bytes:
    """The classifier of every token, [B, T, H] to [B, T, labels]; in fp32 in every file."""
    graph = _Graph()
    logits = graph.linear(STATES, shape.hidden, shape.labels)
    return graph.model([(STATES, FLOAT, _states(shape))], logits, (OPEN, OPEN, shape.labels))


def network(
    shape: Shape,
    seq_len: int,
    *,
    heads: Sequence[int],
    neurons: Sequence[int],
    int8: bool = False,
) -> bytes:
    """A whole encoder, ids [B, T] to logits [B, labels]; layer i has its own heads and neurons."""
    graph = _Graph(int8)
    one, minus, masked = (graph.constant(np.array(v, np.float32)) for v in (1.0, -1.0, MASKED))
    axes = graph.constant(np.array([1, 2], np.int64))
    padding = graph.add("Add", graph.add("Mul", graph.add("Cast", MASK, to=FLOAT), minus), one)
    mask = graph.add("Mul", graph.add("Unsqueeze", padding, axes), masked)
    x = _embedded(graph, shape, seq_len)
    for i in range(len(heads)):
        x = _attention(graph, shape, heads[i])(x, mask)
        x = _feed_forward(graph, shape, neurons[i])(x)
    inputs = [(name, INT64, _IDS) for name in (IDS, TYPES, MASK)]
    return graph.model(inputs, _pooled_logits(graph, shape, x), (OPEN, shape.labels))


def _states(shape: Shape) -> tuple[int | None, ...]:
    return (OPEN, OPEN, shape.hidden)


def _embedded(graph: _Graph, shape: Shape, seq_len: int) -> str:
    width = shape.embedding_size or shape.hidden
    words, types = graph.lookup(shape.vocab_size, width, IDS), graph.lookup(2, width, TYPES)
    one, axis, minus = (graph.constant(np.array(value, np.int64)) for value in ([1], 1, [-1]))
    counted = graph.add("CumSum", graph.add("Expand", one, graph.add("Shape", IDS)), axis)
    places = graph.lookup(seq_len, width, graph.add("Add", counted, minus))
    x = graph.norm(graph.add("Add", graph.add("Add", words, places), types), width)
    return x if shape.embedding_size is None else graph.linear(x, width, shape.hidden)


def _attention(graph: _Graph, shape: Shape, heads: int) -> Callable[[str, str], str]:
    """Adds one layer's half each time it is called; constants are shared, weights are not."""
    units = heads * shape.head_dim
    apart = graph.constant(np.array([0, 0, heads, shape.head_dim], np.int64))
    together = graph.constant(np.array([0, 0, units], np.int64))
    scale = graph.constant(np.array(shape.head_dim**-0.5, np.float32))

    def attend(x: str, mask: str) -> str:
        query, key, value = (graph.linear(x, shape.hidden, units) for _ in range(3))
        query, key, value = (
            graph.add("Transpose", graph.add("Reshape", each, apart), perm=[0, 2, 1, 3])
            for each in (graph.add("Mul", query, scale), key, value)
        )
        scores = graph.add("MatMul", query, graph.add("Transpose", key, perm=[0, 1, 3, 2]))
        weights = graph.add("Softmax", graph.add("Add", scores, mask), axis=-1)
        read = graph.add("MatMul", weights, value)
        read = graph.add("Reshape", graph.add("Transpose", read, perm=[0, 2, 1, 3]), together)
        return graph.norm(
            graph.add("Add", x, graph.linear(read, units, shape.hidden)), shape.hidden
        )

    return attend


def _feed_forward(graph: _Graph, shape: Shape, neurons: int) -> Callable[[str], str]:
    activate = _activation(graph, shape.activation)

    def feed_forward(x: str) -> str:
        inner = activate(graph.linear(x, shape.hidden, neurons))
        outer = graph.linear(inner, neurons, shape.hidden)
        return graph.norm(graph.add("Add", x, outer), shape.hidden)

    return feed_forward


def _activation(graph: _Graph, name: str) -> Callable[[str], str]:
    """In the operators that exports of PaddlePaddle have."""
    if name == "relu":
        return lambda x: graph.add("Relu", x)
    one, half = (graph.constant(np.array(value, np.float32)) for value in (1.0, 0.5))
    if name == "gelu":
        root = graph.constant(np.array(2**0.5, np.float32))

        def gate(x: str) -> str:
            return graph.add("Erf", graph.add("Div", x, root))

    else:
        root, cubic = (
            graph.constant(np.array(value, np.float32)) for value in ((2 / np.pi) ** 0.5, 0.044715)
        )

        def gate(x: str) -> str:
            cube = graph.add("Mul", graph.add("Mul", graph.add("Mul", x, x), x), cubic)
            return graph.add("Tanh", graph.add("Mul", graph.add("Add", x, cube), root))

    def activate(x: str) -> str:
        return graph.add("Mul", graph.add("Mul", x, graph.add("Add", gate(x), one)), half)

    return activate


def _pooled_logits(graph: _Graph, shape: Shape, x: str) -> str:
    zero, one = (graph.constant(np.array([value], np.int64)) for value in (0, 1))
    first = graph.add("Squeeze", graph.add("Slice", x, zero, one, one), one)
    pooled = graph.add("Tanh", graph.linear(first, shape.hidden, shape.hidden))
    return graph.linear(pooled, shape.hidden, shape.labels, in_fp32=True)


# --- protocol buffers -----------------------------------------------------------------------


def _varint(value: int) -> bytes:
    value &= (1 << 64) - 1  # negative numbers as their two's complement
    done = bytearray()
    while value > 0x7F:
        done.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*done, value])


def _number(number: int, value: int) -> bytes:
    return _varint(number << 3) + _varint(value)


def _bytes(number: int, value: bytes) -> bytes:
    return _varint(number << 3 | 2) + _varint(len(value)) + value


def _text(number: int, value: str) -> bytes:
    return _bytes(number, value.encode())


def _attribute(name: str, value: Any) -> bytes:
    if isinstance(value, float):
        number = np.array(value, "<f4").tobytes()
        return _text(1, name) + _varint(2 << 3 | 5) + number + _number(20, ATTRIBUTE_FLOAT)
    if isinstance(value, int):
        return _text(1, name) + _number(3, value) + _number(20, ATTRIBUTE_INT)
    numbers = b"".join(_number(8, each) for each in value)
    return _text(1, name) + numbers + _number(20, ATTRIBUTE_INTS)


def _value(name: str, kind: int, shape: Sequence[int | None]) -> bytes:
    """An end of the graph."""
    sizes = b"".join(_bytes(1, b"" if size is OPEN else _number(1, size)) for size in shape)
    tensor = _number(1, kind) + _bytes(2, sizes)
    return _text(1, name) + _bytes(2, _bytes(1, tensor))
