"""Linear layers on int8 weights in standard operators, as onnxruntime's own dynamic quantiser writes them.

MatMul(x, W)   ->   DynamicQuantizeLinear(x), MatMulInteger(…, W_int8), Cast, Mul(s_x * s_w)       which onnxruntime runs as one kernel
Gemm(x, W, b)  ->   the same, Add(b)

Gather(W', i)  ->   Mul(Cast(Gather(W_int8', i)), Gather(s_w, i))       where a table is tied to the layer: the codes stand once

The weight is symmetric with one scale for each output channel. Layers that read one value share its quantisation.
"""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir
import torch
from torch import Tensor

from attnopt.hosts.onnx.element_types import as_onnx
from attnopt.hosts.onnx.places import Names
from attnopt.hosts.onnx.provenance import inherit
from attnopt.runtime.dynamic_int8 import quantize_weight


@dataclass(frozen=True)
class Writer:
    """Inserts before one node; `written` notes what was made."""

    model: ir.Model
    before: ir.Node
    names: Names
    written: list[ir.Node]

    def node(
        self, op_type: str, inputs: list[ir.Value], kinds: list[ir.DataType], domain: str = "", **attrs: int | list[int]
    ) -> tuple[ir.Value, ...]:
        name = self.names.unique(f"{self.before.name}_{op_type}")
        made = ir.node(op_type, inputs, attrs, domain=domain, num_outputs=len(kinds), name=name)
        inherit(made, self.before, self.written)
        for i, (value, kind) in enumerate(zip(made.outputs, kinds, strict=True)):
            value.name = self.names.unique(f"{made.name}_output_{i}")
            value.type = ir.TensorType(kind)
        self.before.graph.insert_before(self.before, made)  # type: ignore[union-attr]
        self.written.append(made)
        return tuple(made.outputs)

    def constant(self, data: Tensor) -> ir.Value:
        name = self.names.unique(f"{self.before.name}_constant")
        held = ir.Value(name=name, const_value=as_onnx(data, name))
        held.type, held.shape = ir.TensorType(held.const_value.dtype), ir.Shape(list(data.shape))  # type: ignore[union-attr]
        self.model.graph.register_initializer(held)
        return held

    def instead(self, result: ir.Value, output: ir.Value) -> ir.Value:
        """Let everything read `result` in place of what the node made, and take the node out; a graph output keeps its name."""
        result.shape = output.shape
        is_output = output.is_graph_output()
        ir.convenience.replace_all_uses_with(output, result, replace_graph_outputs=is_output)
        if is_output:
            name, output.name = output.name, self.names.unique(f"{output.name}_replaced")
            result.name, result.type = name, output.type
        self.before.graph.remove(self.before, safe=True)  # type: ignore[union-attr]
        return result


@dataclass
class Codes:
    """The codes of one layer's weight, where others read them too. factors [in]: what its channels were multiplied by.

    codes: int8, by rows of the table. steps: float32, one for each row.
    """

    model: ir.Model
    names: Names
    written: list[ir.Node]
    factors: Tensor | None = None
    codes: ir.Value | None = None
    steps: ir.Value | None = None

    def looked_up(self, node: ir.Node) -> ir.Value:
        """Write a look-up of rows in place of a Gather node; the codes are there."""
        write = Writer(self.model, node, self.names, self.written)
        ids, output = node.inputs[1], node.outputs[0]
        assert ids is not None and self.codes is not None and self.steps is not None
        (codes,) = write.node("Gather", [self.codes, ids], [ir.DataType.INT8], axis=0)
        (real,) = write.node("Cast", [codes], [ir.DataType.FLOAT], to=int(ir.DataType.FLOAT))
        (column,) = write.node("Unsqueeze", [self.steps, write.constant(torch.tensor([1]))], [ir.DataType.FLOAT])
        (steps,) = write.node("Gather", [column, ids], [ir.DataType.FLOAT], axis=0)
        (result,) = write.node("Mul", [real, steps], [ir.DataType.FLOAT])
        if self.factors is not None:
            (result,) = write.node("Mul", [result, write.constant(1.0 / self.factors)], [ir.DataType.FLOAT])
        return write.instead(result, output)


def quantize_layer(node: ir.Node, weight: Tensor, held: Codes, by_rows: bool = False) -> ir.Value:
    """Write the int8 layer in place of a MatMul or Gemm node; `weight` is what it multiplies by, [in, out] float32.

    by_rows: the codes stand as [out, in], so that rows can be looked up; runtimes turn the constant once, when they load the model.
    """
    write = Writer(held.model, node, held.names, held.written)
    x, output = node.inputs[0], node.outputs[0]
    assert x is not None
    alpha, beta = (1.0 if (a := node.attributes.get(n)) is None else a.as_float() for n in ("alpha", "beta"))
    stored, scales = quantize_weight(weight.T)
    data, scale, zero = quantized(write, x)
    if by_rows:
        held.codes, held.steps = write.constant(stored), write.constant(scales)
        (turned,) = write.node("Transpose", [held.codes], [ir.DataType.INT8], perm=[1, 0])
    else:
        turned = write.constant(stored.T.contiguous())
    (product,) = write.node("MatMulInteger", [data, turned, zero], [ir.DataType.INT32])
    (real,) = write.node("Cast", [product], [ir.DataType.FLOAT], to=int(ir.DataType.FLOAT))
    steps = held.steps if held.steps is not None and alpha == 1.0 else write.constant(scales * alpha)
    (factor,) = write.node("Mul", [scale, steps], [ir.DataType.FLOAT])
    (result,) = write.node("Mul", [real, factor], [ir.DataType.FLOAT])
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    if bias is not None:
        if beta != 1.0:
            (bias,) = write.node("Mul", [bias, write.constant(torch.tensor(beta))], [ir.DataType.FLOAT])
        (result,) = write.node("Add", [result, bias], [ir.DataType.FLOAT])
    return write.instead(result, output)


def quantized(write: Writer, x: ir.Value) -> tuple[ir.Value, ...]:
    """(integers, scale, zero point) of a value: those of a node that is there already, else of a new one."""
    for user in x.consumers():
        if user.op_type == "DynamicQuantizeLinear" and user.graph is write.before.graph:
            return tuple(user.outputs)  # it may stand later: the caller sorts
    return write.node("DynamicQuantizeLinear", [x], [ir.DataType.UINT8, ir.DataType.FLOAT, ir.DataType.UINT8])
