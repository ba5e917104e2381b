"""Attention inside of functions, branches and loops: found where it can be written anew, named where it cannot."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from hosts.onnx.small_models import INT64, model, value
from onnx import TensorProto, helper

import attnopt
from attnopt.hosts.onnx import OnnxHost
from attnopt.patterns import recognise

SHAPE = ["batch", 4, "length", 8]
SCALE = {"scale": np.float32(8**-0.5)}


def attention(prefix, q, k, v, out, **names):
    return [
        helper.make_node("Transpose", [k], [f"{prefix}kt"], name=f"{prefix}turned", perm=[0, 1, 3, 2]),
        helper.make_node("MatMul", [q, f"{prefix}kt"], [f"{prefix}s"], name=f"{prefix}scores"),
        helper.make_node("Mul", [f"{prefix}s", names.get("scale", "scale")], [f"{prefix}m"], name=f"{prefix}scaled"),
        helper.make_node("Softmax", [f"{prefix}m"], [f"{prefix}p"], name=f"{prefix}weights", axis=-1),
        helper.make_node("MatMul", [f"{prefix}p", v], [out], name=f"{prefix}output"),
    ]


def looped():
    """Two steps of attention whose result is the next query; its keys and values come from around the loop."""
    body = helper.make_graph(
        [helper.make_node("Identity", ["going"], ["go_on"]), *attention("in_", "state", "k", "v", "next")],
        "body",
        [value("step", [], INT64), value("going", [], TensorProto.BOOL), value("state", SHAPE)],
        [value("go_on", [], TensorProto.BOOL), value("next", SHAPE)],
    )
    nodes = [
        *attention("out_", "q", "k", "v", "first"),
        helper.make_node("Loop", ["two", "true", "first"], ["y"], name="refine", body=body),
    ]
    weights = SCALE | {"two": np.int64(2), "true": np.array(True)}
    return model(nodes, [value(n, SHAPE) for n in "qkv"], weights=weights)


def branched():
    one = helper.make_graph(attention("in_", "q", "k", "v", "attended"), "then", [], [value("attended", SHAPE)])
    other = helper.make_graph([helper.make_node("Neg", ["first"], ["turned"])], "else", [], [value("turned", SHAPE)])
    nodes = [
        *attention("out_", "q", "k", "v", "first"),
        helper.make_node("ReduceSum", ["first"], ["total"], name="total", keepdims=0),
        helper.make_node("Greater", ["total", "scale"], ["positive"], name="positive"),
        helper.make_node("If", ["positive"], ["y"], name="choice", then_branch=one, else_branch=other),
    ]
    return model(nodes, [value(n, SHAPE) for n in "qkv"], weights=SCALE)


def in_function():
    """A model-local function, as onnxscript and old torch exporters make them, called twice."""
    function = helper.make_function(
        "local",
        "Attend",
        ["a", "b", "c"],
        ["r"],
        [
            helper.make_node("Constant", [], ["s"], value=onnx.numpy_helper.from_array(SCALE["scale"])),
            *attention("f_", "a", "b", "c", "r", scale="s"),
        ],
        [helper.make_opsetid("", 17)],
    )
    nodes = [
        helper.make_node("Attend", ["q", "k", "v"], ["first"], domain="local", name="layer0"),
        helper.make_node("Attend", ["first", "k", "v"], ["y"], domain="local", name="layer1"),
    ]
    made = model(nodes, [value(n, SHAPE) for n in "qkv"])
    made.functions.append(function)
    made.opset_import.append(helper.make_opsetid("local", 1))
    return made


def equal_after(proto, fast):
    for batch, length in ((2, 5), (1, 9)):
        given = {n: torch.randn(batch, 4, length, 8) for n in "qkv"}
        wanted = onnxruntime.InferenceSession(proto.SerializeToString()).run(None, {n: x.numpy() for n, x in given.items()})
        for a, b in zip(wanted, fast(given), strict=True):
            np.testing.assert_allclose(b, a, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("proto", "where"), [(looped(), "body of Loop 'refine'"), (branched(), "then branch of If 'choice'")], ids=["loop", "if"]
)
def test_attention_in_a_body_is_named_and_what_is_around_it_rewritten(proto, where):
    found = recognise(OnnxHost.from_model(proto).graph)
    assert [s.name for s in found.sites] == ["out_weights"]
    (refusal,) = found.refusals
    assert refusal.reason.startswith(f"inside the {where} is an attention: softmax heads(4) width(8)")
    assert refusal.node.startswith("in_")
    fast = attnopt.optimize(proto, select="always")
    assert fast.report.fused == 1
    equal_after(proto, fast)


def test_a_near_miss_in_a_body_says_where():
    proto = branched()
    inner = next(a.g for a in proto.graph.node[-1].attribute if a.name == "then_branch")
    next(n for n in inner.node if n.op_type == "Softmax").attribute[0].i = 2
    (refusal,) = recognise(OnnxHost.from_model(proto).graph).refusals
    assert "inside the then branch of If 'choice': the softmax runs over" in refusal.reason


def test_functions_are_looked_into():
    proto = in_function()
    found = recognise(OnnxHost.from_model(proto).graph)
    assert len(found.sites) == 2
    fast = attnopt.optimize(proto, select="always")
    assert fast.report.fused == 2
    equal_after(proto, fast)
