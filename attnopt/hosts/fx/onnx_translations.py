"""Operators of ours in the words of ONNX, for torch's exporter.

    attnopt.linear_dynamic_int8(x, W, s_w, b)   ->   DynamicQuantizeLinear(x), MatMulInteger(…, W'), Cast, Mul(s_x s_w), Add(b)
    attnopt.rounded_linear(x, codes, …)         ->   the same as an operator of ours, which `hosts/onnx/exported_codes.py` writes anew
    attnopt.int8_rows(ids, W, s_w, f)           ->   Cast(Gather(W, ids)), Mul(Gather(s_w, ids)), Mul(f)

They come into a model that is exported when its layers hold weights in codes already, as those of a live model do. onnxruntime runs the
nodes of the first as one kernel; the constants of the others are known only when the model is written.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from attnopt.hosts.onnx.exported_codes import DOMAIN, LINEAR, ROWS

FLOAT, BYTES, IDS = "tensor(float)", "tensor(uint8)", "tensor(int64)"


def translations() -> dict[Callable[..., Any], Callable[..., Any]]:
    """By operator; made when asked for, so that nothing else imports onnxscript."""
    from onnxscript import opset18 as op

    linear = operator(LINEAR, {"x": FLOAT, "codes": BYTES, "steps": FLOAT}, {"zeros": BYTES, "bias": FLOAT})
    rows = operator(ROWS, {"ids": IDS, "codes": BYTES, "steps": FLOAT}, {"zeros": BYTES})

    def linear_dynamic_int8(x: Any, weight: Any, scales: Any, bias: Any = None) -> Any:
        data, scale, zero = op.DynamicQuantizeLinear(x)
        product = op.Cast(op.MatMulInteger(data, op.Transpose(weight, perm=[1, 0]), zero), to=1)
        found = op.Mul(product, op.Mul(scale, scales))
        return found if bias is None else op.Add(found, bias)

    def int8_rows(ids: Any, weight: Any, scales: Any, factors: Any = None) -> Any:
        rows = op.Cast(op.Gather(weight, ids, axis=0), to=1)
        last: Any = op.Constant(value_ints=[1])
        found = op.Mul(rows, op.Gather(op.Unsqueeze(scales, last), ids, axis=0))
        return found if factors is None else op.Mul(found, factors)

    def rounded_linear(x: Any, codes: Any, steps: Any, zeros: Any, bias: Any, bits: int, middle: float) -> Any:
        wide = x.shape[-1]
        channels = wide if isinstance(wide, int) else int(codes.shape[1]) * 8 // bits  # a layer alone is traced with open sizes
        return linear(x, codes, steps, zeros, bias, bits=bits, middle=float(middle), channels=channels)

    def rounded_rows(ids: Any, codes: Any, steps: Any, zeros: Any, bits: int, middle: float, channels: int) -> Any:
        return rows(ids, codes, steps, zeros, bits=bits, middle=float(middle), channels=channels)

    return {
        torch.ops.attnopt.linear_dynamic_int8.default: linear_dynamic_int8,
        torch.ops.attnopt.int8_rows.default: int8_rows,
        torch.ops.attnopt.rounded_linear.default: rounded_linear,
        torch.ops.attnopt.rounded_rows.default: rounded_rows,
    }


def operator(name: str, needs: Mapping[str, str], takes: Mapping[str, str]) -> Any:
    """An operator of ours of one output of numbers; types of the inputs that it needs, and of those that it takes."""
    from onnx.defs import OpSchema
    from onnxscript.values import Op, Opset

    given, kind = OpSchema.FormalParameter, OpSchema.AttrType
    maybe = OpSchema.FormalParameterOption.Optional
    inputs = [*(given(n, t) for n, t in needs.items()), *(given(n, t, param_option=maybe) for n, t in takes.items())]
    attributes = [OpSchema.Attribute(n, t) for n, t in (("bits", kind.INT), ("middle", kind.FLOAT), ("channels", kind.INT))]
    schema = OpSchema(name, DOMAIN, 1, inputs=inputs, outputs=[given("y", FLOAT)], attributes=attributes)
    return Op(Opset(DOMAIN, 1), name, schema)


def untranslated(graph: torch.fx.Graph) -> str:
    """The first of our operators in a graph that ONNX has no words for; empty where there is none."""
    known = translations()
    found = (n.target for n in graph.nodes if n.op == "call_function" and str(n.target).startswith("attnopt."))
    return next((str(target) for target in found if target not in known), "")
