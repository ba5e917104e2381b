"""A model that is one attention and nothing else, in either host: what kernels are measured in.

    single_attention("onnx", {b: 1, h: 8, g: 2, q: 512, k: 512, d: 64, e: 64})   ->   softmax(q k') v, and inputs that specs load

Its inputs are q [B, H, Q, D], k [B, G, K, D], v [B, G, K, E], padding [B, K] (bool) and bias [1, H, Q, K].
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper
from torch import Tensor, nn

from attnopt.hosts.fx import FxHost, capture
from attnopt.hosts.onnx import OnnxHost

OPSET = 23  # the lowest that has every operator
TYPES = {"float32": TensorProto.FLOAT, "float16": TensorProto.FLOAT16, "bfloat16": TensorProto.BFLOAT16}


class Plain(nn.Module):
    def forward(self, q: Tensor, k: Tensor, v: Tensor, padding: Tensor, bias: Tensor) -> Tensor:
        ratio = q.shape[1] // k.shape[1]
        k, v = (x.repeat_interleave(ratio, 1) if ratio > 1 else x for x in (k, v))
        return (q @ k.mT).softmax(-1) @ v


def example(shape: Mapping[str, int], dtype: str = "float32", seed: int = 0) -> dict[str, Tensor]:
    """Random inputs; the last key of every sequence is padding, where there are several."""
    b, h, g, q, k, d, e = (shape[axis] for axis in "bhgqkde")
    generator = torch.Generator().manual_seed(seed)
    sizes = {"q": (b, h, q, d), "k": (b, g, k, d), "v": (b, g, k, e), "bias": (1, h, q, k)}
    made = {name: torch.randn(size, generator=generator).to(getattr(torch, dtype)) for name, size in sizes.items()}
    padding = torch.ones(b, k, dtype=torch.bool)
    padding[:, 1:][:, -1:] = False
    return {"q": made["q"], "k": made["k"], "v": made["v"], "padding": padding, "bias": made["bias"]}


def single_attention(host: str, shape: Mapping[str, int], dtype: str = "float32") -> FxHost | OnnxHost:
    """host: "torch" or "onnx". shape: b, h, g, q, k, d, e; lengths are open in ONNX, so that masks are made when it runs."""
    if host == "torch":
        return FxHost.from_captured(capture(Plain().eval(), example(shape, dtype), {}))
    return OnnxHost.from_model(onnx_model(shape, TYPES[dtype]))


def onnx_model(shape: Mapping[str, int], kind: int) -> onnx.ModelProto:
    h, g, d, e = (shape[axis] for axis in "hgde")
    b, q, k = "batch", "length", "length" if shape["q"] == shape["k"] else "keys"
    sizes = {"q": (b, h, q, d), "k": (b, g, k, d), "v": (b, g, k, e), "bias": (1, h, q, k)}
    inputs = [helper.make_tensor_value_info(name, kind, size) for name, size in sizes.items()]
    inputs.insert(3, helper.make_tensor_value_info("padding", TensorProto.BOOL, (b, k)))
    numbers, nodes, names = {}, [], {"k": "k", "v": "v"}
    if h != g:
        numbers["ratio"], numbers["two"] = np.array([1, 1, h // g, 1, 1]), np.array([2])
        for name, width in (("k", d), ("v", e)):
            numbers[f"{name}_shape"] = np.array([0, h, -1, width])
            nodes += [
                helper.make_node("Unsqueeze", [name, "two"], [f"{name}_apart"], name=f"{name}_apart"),
                helper.make_node("Expand", [f"{name}_apart", "ratio"], [f"{name}_many"], name=f"{name}_many"),
                helper.make_node("Reshape", [f"{name}_many", f"{name}_shape"], [f"{name}_all"], name=f"{name}_all"),
            ]
            names[name] = f"{name}_all"
    nodes += [
        helper.make_node("Transpose", [names["k"]], ["turned"], name="turned", perm=[0, 1, 3, 2]),
        helper.make_node("MatMul", ["q", "turned"], ["scores"], name="scores"),
        helper.make_node("Softmax", ["scores"], ["weights"], name="weights", axis=-1),
        helper.make_node("MatMul", ["weights", names["v"]], ["output"], name="product"),
    ]
    held = [onnx.numpy_helper.from_array(array, name) for name, array in numbers.items()]
    outputs = [helper.make_tensor_value_info("output", kind, (b, h, q, e))]
    graph = helper.make_graph(nodes, "attention", inputs, outputs, held)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=10)
