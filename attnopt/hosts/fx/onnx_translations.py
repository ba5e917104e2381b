"""Operators of ours in the words of ONNX, for torch's exporter.

    attnopt.linear_dynamic_int8(x, W, s_w, b)   ->   DynamicQuantizeLinear(x), MatMulInteger(…, W'), Cast, Mul(s_x s_w), Add(b)

    attnopt.int8_rows(ids, W, s_w, f)           ->   Cast(Gather(W, ids)), Mul(Gather(s_w, ids)), Mul(f)

They come into a model that is exported when its layers hold weights in codes already, as those of a live model do. onnxruntime runs the
nodes as one kernel. Weights of fewer bits have no such form here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


def translations() -> dict[Callable[..., Any], Callable[..., Any]]:
    """By operator; made when asked for, so that nothing else imports onnxscript."""
    from onnxscript import opset18 as op

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

    return {
        torch.ops.attnopt.linear_dynamic_int8.default: linear_dynamic_int8,
        torch.ops.attnopt.int8_rows.default: int8_rows,
    }


def untranslated(graph: torch.fx.Graph) -> str:
    """The first of our operators in a graph that ONNX has no words for; empty where there is none."""
    known = translations()
    found = (n.target for n in graph.nodes if n.op == "call_function" and str(n.target).startswith("attnopt."))
    return next((str(target) for target in found if target not in known), "")
