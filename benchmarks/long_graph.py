"""An ONNX decoder of any number of layers, written down without exporting: for the question how recognition grows.

Layers are spelled as exporters spell them: RMS norm from its parts, shapes by Shape, Gather and Concat, rotary embedding, repeated key
heads, a causal mask and padding made once and added in every layer.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper

WIDTH, HEADS, GROUPS, HEAD = 16, 2, 1, 8


@dataclass
class Writer:
    """Appends nodes; every value gets a name of its own."""

    nodes: list[onnx.NodeProto] = field(default_factory=list)
    constants: dict[str, np.ndarray] = field(default_factory=dict)

    def __call__(self, op: str, *inputs: str, **attrs: Any) -> str:
        name = f"{op}_{len(self.nodes)}"
        self.nodes.append(helper.make_node(op, list(inputs), [f"{name}_output"], name=name, **attrs))
        return f"{name}_output"

    def constant(self, name: str, data: Any, dtype: type = np.float32) -> str:
        self.constants.setdefault(name, np.asarray(data, dtype=dtype))
        return name

    def vector(self, *numbers: int) -> str:
        return self.constant("numbers_" + "_".join(map(str, numbers)).replace("-", "m"), numbers, np.int64)

    def weight(self, rows: int, columns: int) -> str:
        return self.constant(f"weight_{rows}_{columns}", np.eye(rows, columns))


def model(layers: int) -> onnx.ModelProto:
    """hidden [batch, length, 16], attention_mask [batch, length]  ->  hidden [batch, length, 16]"""
    w = Writer()
    x = "hidden"
    mask = mask_of(w)
    for _ in range(layers):
        x = w("Add", x, attention(w, norm(w, x), mask))
        x = w("Add", x, mlp(w, norm(w, x)))
    held = [onnx.numpy_helper.from_array(array, name) for name, array in w.constants.items()]
    shape = ["batch", "length", WIDTH]
    inputs = [
        helper.make_tensor_value_info("hidden", TensorProto.FLOAT, shape),
        helper.make_tensor_value_info("attention_mask", TensorProto.INT64, ["batch", "length"]),
    ]
    outputs = [helper.make_tensor_value_info(x, TensorProto.FLOAT, shape)]
    graph = helper.make_graph(w.nodes, "long", inputs, outputs, held)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)


def mask_of(w: Writer) -> str:
    """0 where a key is no padding and not ahead, the smallest finite number elsewhere: [batch, 1, length, length]."""
    length = w("Squeeze", w("Gather", w("Shape", "attention_mask"), w.vector(1)), w.vector(0))
    line = w("Range", w.constant("zero", 0, np.int64), length, w.constant("one", 1, np.int64))
    ahead = w("LessOrEqual", w("Unsqueeze", line, w.vector(0)), w("Unsqueeze", line, w.vector(1)))
    seen = w("Unsqueeze", w("Cast", "attention_mask", to=TensorProto.BOOL), w.vector(1, 2))
    return w("Where", w("And", ahead, seen), w.constant("shown", 0.0), w.constant("hidden_score", np.finfo(np.float32).min))


def norm(w: Writer, x: str) -> str:
    squares = w("ReduceMean", w("Pow", x, w.constant("two", 2.0)), w.vector(-1))
    root = w("Reciprocal", w("Sqrt", w("Add", squares, w.constant("epsilon", 1e-6))))
    return w("Mul", w("Mul", x, root), w.constant("gain", np.ones(WIDTH)))


def sizes(w: Writer, x: str, *rest: int) -> str:
    """batch and length of x as they are when the model runs, then numbers."""
    shape = w("Shape", x)
    return w("Concat", w("Gather", shape, w.vector(0)), w("Gather", shape, w.vector(1)), w.vector(*rest), axis=0)


def heads(w: Writer, x: str, count: int) -> str:
    projected = w("MatMul", x, w.weight(WIDTH, count * HEAD))
    return w("Transpose", w("Reshape", projected, sizes(w, x, count, HEAD)), perm=[0, 2, 1, 3])


def rotated(w: Writer, x: str) -> str:
    half = HEAD // 2
    first = w("Slice", x, w.vector(0), w.vector(half), w.vector(3))
    second = w("Slice", x, w.vector(half), w.vector(HEAD), w.vector(3))
    other = w("Concat", w("Neg", second), first, axis=3)
    cos, sin = (w.constant(name, np.full((1, 1, 1, HEAD), angle)) for name, angle in (("cos", 0.8), ("sin", 0.6)))
    return w("Add", w("Mul", x, cos), w("Mul", other, sin))


def repeated(w: Writer, x: str, like: str) -> str:
    shape = w("Shape", like)
    batch, length = (w("Gather", shape, w.vector(i)) for i in (0, 1))
    wide = w("Concat", batch, w.vector(GROUPS, HEADS // GROUPS), length, w.vector(HEAD), axis=0)
    merged = w("Concat", batch, w.vector(HEADS), length, w.vector(HEAD), axis=0)
    return w("Reshape", w("Expand", w("Unsqueeze", x, w.vector(2)), wide), merged)


def attention(w: Writer, x: str, mask: str) -> str:
    q, k, v = rotated(w, heads(w, x, HEADS)), rotated(w, heads(w, x, GROUPS)), heads(w, x, GROUPS)
    k, v = repeated(w, k, x), repeated(w, v, x)
    scores = w("Mul", w("MatMul", q, w("Transpose", k, perm=[0, 1, 3, 2])), w.constant("scale", HEAD**-0.5))
    weights = w("Softmax", w("Add", scores, mask), axis=-1)
    merged = w("Transpose", w("MatMul", weights, v), perm=[0, 2, 1, 3])
    return w("MatMul", w("Reshape", merged, sizes(w, x, WIDTH)), w.weight(WIDTH, WIDTH))


def mlp(w: Writer, x: str) -> str:
    gate = w("MatMul", x, w.weight(WIDTH, 2 * WIDTH))
    return w("MatMul", w("Mul", gate, w("Sigmoid", gate)), w.weight(2 * WIDTH, WIDTH))
