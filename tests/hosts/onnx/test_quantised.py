"""Half precision and quantised graphs: rounding around q, k and v stays, rounding inside an attention is a refusal that names it."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
import torch
from hosts.onnx.small_models import model, value
from onnx import TensorProto, helper
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_dynamic, quantize_static

import attnopt
from attnopt.hosts.onnx import OnnxHost
from attnopt.patterns import recognise

RNG = np.random.default_rng(0)
PRODUCTS = ["scores", "output"]


def projected(kind=TensorProto.FLOAT):
    """x [batch, length, 32] through projections and an attention of 4 heads."""
    dtype = helper.tensor_dtype_to_np_dtype(kind)
    weights = {f"w_{n}": (RNG.standard_normal((32, 32)) * 0.2).astype(dtype) for n in "qkvo"}
    weights |= {"scale": np.asarray(8**-0.5, dtype), "apart": np.array([0, 0, 4, 8]), "merged": np.array([0, 0, 32])}
    nodes = []
    for name in "qkv":
        nodes.append(helper.make_node("MatMul", ["x", f"w_{name}"], [f"{name}_row"], name=f"project_{name}"))
        nodes.append(helper.make_node("Reshape", [f"{name}_row", "apart"], [f"{name}_apart"], name=f"split_{name}"))
        perm = [0, 2, 3, 1] if name == "k" else [0, 2, 1, 3]
        nodes.append(helper.make_node("Transpose", [f"{name}_apart"], [name], name=f"turn_{name}", perm=perm))
    nodes += [
        helper.make_node("MatMul", ["q", "k"], ["s"], name="scores"),
        helper.make_node("Mul", ["s", "scale"], ["m"], name="scaled"),
        helper.make_node("Softmax", ["m"], ["p"], name="weights", axis=-1),
        helper.make_node("MatMul", ["p", "v"], ["a"], name="output"),
        helper.make_node("Transpose", ["a"], ["turned"], name="turned", perm=[0, 2, 1, 3]),
        helper.make_node("Reshape", ["turned", "merged"], ["row"], name="merge"),
        helper.make_node("MatMul", ["row", "w_o"], ["y"], name="project_o"),
    ]
    made = model(nodes, [value("x", ["batch", "length", 32], kind)], weights=weights)
    made.graph.output[0].type.tensor_type.elem_type = kind
    return made


class Batches(CalibrationDataReader):
    def __init__(self):
        self.left = [{"x": RNG.standard_normal((2, 6, 32)).astype(np.float32)} for _ in range(3)]

    def get_next(self):
        return self.left.pop() if self.left else None


def static(folder, exclude=(), **options):
    target = folder / "static.onnx"
    onnx.save(projected(), folder / "float.onnx")
    quantize_static(
        folder / "float.onnx", target, Batches(), quant_format=QuantFormat.QDQ, nodes_to_exclude=list(exclude), **options
    )
    return onnx.load(target)


def equal_after(proto, tolerance, dtype=torch.float32):
    given = {"x": torch.randn(3, 9, 32).to(dtype)}
    host = OnnxHost.from_model(proto)
    fast = attnopt.optimize(proto, given, select="always")
    assert fast.report.fused == 1
    (wanted,), (got,) = host.runner()(given), fast(given)
    np.testing.assert_allclose(got, wanted.numpy(), atol=tolerance, rtol=tolerance)
    return fast


def test_half_precision():
    fast = equal_after(projected(TensorProto.FLOAT16), 4e-3, torch.float16)
    assert fast.report.sites[0].before == "softmax heads(4) width(8) scale(0.3535156)"  # as half precision holds it


def test_rounding_of_projections_stays(tmp_path):
    """Weights and activations of the projections are int8; the attention between them is in float."""
    proto = static(tmp_path, exclude=[*PRODUCTS, "weights", "scaled"], op_types_to_quantize=["MatMul"], per_channel=True)
    before = [n.op_type for n in proto.graph.node].count("QuantizeLinear")
    assert before
    fast = equal_after(proto, 1e-4)
    assert [n.op_type for n in fast._host.model.graph].count("QuantizeLinear") == before
    host = OnnxHost.from_model(proto)
    assert {n.attrs["operator"] for n in host.graph.of("opaque")} == {"QuantizeLinear", "DequantizeLinear"}


def test_weights_that_are_stored_rounded_are_constants(tmp_path):
    proto = static(tmp_path, exclude=PRODUCTS, op_types_to_quantize=["MatMul"], per_channel=True)
    host = OnnxHost.from_model(proto)
    weights = [n.inputs[1] for n in host.graph.of("matmul") if n.name.startswith("project")]
    assert len(weights) == 4
    held = [w.load() for w in weights]
    for mine, runtime in zip(held, host.copy().tap([unloaded(w) for w in weights], {"x": torch.randn(1, 2, 32)}), strict=True):
        torch.testing.assert_close(mine, runtime)


def unloaded(constant):
    """The same value as one that only the runtime knows."""
    return type(constant)(constant.name, constant.shape, constant.dtype, handle=constant.handle)


@pytest.mark.parametrize(
    ("exclude", "reason"),
    [
        (["output"], "the scores are rounded by 'DequantizeLinear' before the softmax"),
        (["scores"], "the weights are rounded by 'QuantizeLinear' before they meet values"),
        ([], "the weights are rounded by 'QuantizeLinear' before they meet values"),
    ],
)
def test_rounding_inside_is_refused(tmp_path, exclude, reason):
    proto = static(tmp_path, exclude=exclude, op_types_to_quantize=["MatMul"])
    found = recognise(OnnxHost.from_model(proto).graph)
    assert not found.sites
    assert [r.reason for r in found.refusals] == [reason]


def dynamic(folder, exclude=(), **options):
    onnx.save(projected(), folder / "float.onnx")
    target = folder / "dynamic.onnx"
    quantize_dynamic(
        folder / "float.onnx", target, weight_type=QuantType.QInt8, nodes_to_exclude=list(exclude), extra_options=options
    )
    return onnx.load(target)


def test_projections_in_whole_numbers_stay(tmp_path):
    fast = equal_after(dynamic(tmp_path), 1e-3)
    assert [n.op_type for n in fast._host.model.graph].count("MatMulInteger") == 4


@pytest.mark.parametrize(
    ("exclude", "reason"),
    [
        ([], "the weights are rounded by 'DynamicQuantizeLinear' before they meet values"),
        (["output"], "'MatMulInteger' multiplies queries and keys as whole numbers"),
    ],
)
def test_products_of_whole_numbers_are_refused(tmp_path, exclude, reason):
    found = recognise(OnnxHost.from_model(dynamic(tmp_path, exclude, MatMulConstBOnly=False)).graph)
    assert not found.sites
    assert [r.reason for r in found.refusals] == [reason]
