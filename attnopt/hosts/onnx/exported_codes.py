"""Layers and tables in codes that torch's exporter wrote as operators of ours, in onnxruntime's.

    attnopt::rounded_linear(x, codes, steps, zeros, bias)   ->   MatMulNBits(x, …), Add(bias)
    attnopt::rounded_rows(ids, codes, steps, zeros)         ->   GatherBlockQuantized(…, ids, …)

What a layer reads is not rounded here: the model computes what it did, to float32.
"""

from __future__ import annotations

import onnx_ir as ir
import torch

from attnopt.errors import UnsupportedFormat
from attnopt.hosts.onnx.places import Names
from attnopt.hosts.onnx.rounded_weights import FLOAT_INPUTS, refusal, store_rounded, store_table
from attnopt.ir.site import Refusal
from attnopt.rounding.bit_packing import unpacked
from attnopt.rounding.rounded_weight import RoundedWeight
from attnopt.rounding.weight_format import WeightFormat

DOMAIN, LINEAR, ROWS = "attnopt", "rounded_linear", "rounded_rows"


def store_codes(model: ir.Model) -> None:
    """Write every such node in place. Raises UnsupportedFormat for rows that the operators cannot hold."""
    ours = [n for n in model.graph if n.domain == DOMAIN and n.op_type in (LINEAR, ROWS)]
    if not ours:
        return
    names = Names(value.name or "" for node in model.graph for value in node.outputs)
    names |= {node.name or "" for node in model.graph} | set(model.graph.initializers)
    for node in ours:
        x, codes, steps, zeros, bias = (*node.inputs, None, None)[:5]
        middle, channels = node.attributes["middle"].as_float(), node.attributes["channels"].as_int()
        weight = held(codes, steps, zeros, node.attributes["bits"].as_int(), middle, channels)
        why = refusal(weight.format, channels)
        if node.op_type == LINEAR and x.dtype != ir.DataType.FLOAT:
            why = Refusal(f"it reads {x.dtype}, and layers of floats are written")
        if why is not None:
            raise UnsupportedFormat(
                f"onnxruntime cannot hold codes '{weight.format}': {why.reason}",
                where=node.name or "",
                next_move="Export it as .pt2, or optimise the original for ONNX.",
            )
        if node.op_type == ROWS:
            store_table(model, standing_for(node, "Gather", [codes, x]), weight, names, [], {})
        else:
            store_rounded(model, standing_for(node, "Gemm", [x, codes, bias]), weight, names, [], level=FLOAT_INPUTS)
    model.opset_imports.pop(DOMAIN, None)
    used = {id(value) for node in model.graph.all_nodes() for value in node.inputs}
    for name, value in list(model.graph.initializers.items()):
        if id(value) not in used and not value.is_graph_output():
            del model.graph.initializers[name]


def held(codes: ir.Value, steps: ir.Value, zeros: ir.Value | None, bits: int, middle: float, channels: int) -> RoundedWeight:
    """What the constants of a node stand for; rows of so many channels."""
    read = [None if v is None else torch.from_numpy(v.const_value.numpy().copy()) for v in (codes, steps, zeros)]  # type: ignore[union-attr]
    data, widths, points = read
    assert data is not None and widths is not None
    group = 0 if widths.shape[1] == 1 else channels // widths.shape[1]
    format = WeightFormat(bits, group, points is not None)
    return RoundedWeight(format, unpacked(data, bits, channels), widths.float(), middle if points is None else points.float())


def standing_for(node: ir.Node, op_type: str, inputs: list[ir.Value | None]) -> ir.Node:
    """A node of a standard operator in place of one, which `rounded_weights` writes anew."""
    made = ir.node(op_type, inputs, num_outputs=1, name=node.name)
    (old,), (new,) = node.outputs, made.outputs
    new.name, new.shape, new.type = old.name, old.shape, old.type
    node.graph.insert_before(node, made)  # type: ignore[union-attr]
    ir.convenience.replace_all_uses_with(old, new, replace_graph_outputs=old.is_graph_output())
    node.graph.remove(node, safe=True)  # type: ignore[union-attr]
    return made
