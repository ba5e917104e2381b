"""Attention inside of functions, branches and loops: found and rewritten there, sizes of each kept apart."""

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
from attnopt.ir.site import NotIsolated
from attnopt.patterns import recognise
from attnopt.patterns.block import find_blocks

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


def growing():
    """Three steps, each on the keys and values of the step before and one row more; a loop may call its sizes like those around it."""
    body = helper.make_graph(
        [
            helper.make_node("Identity", ["going"], ["go_on"]),
            helper.make_node("Concat", ["keys", "row"], ["more_keys"], axis=2),
            helper.make_node("Concat", ["held", "row"], ["more_held"], axis=2),
            *attention("in_", "state", "more_keys", "more_held", "next"),
        ],
        "body",
        [value("step", [], INT64), value("going", [], TensorProto.BOOL), *(value(n, SHAPE) for n in ("state", "keys", "held"))],
        [value("go_on", [], TensorProto.BOOL), *(value(n, SHAPE) for n in ("next", "more_keys", "more_held"))],
    )
    nodes = [
        helper.make_node("Gather", ["k", "zero"], ["row"], name="first_row", axis=2),
        helper.make_node("Loop", ["three", "true", "q", "k", "v"], ["y", "all_keys", "all_held"], name="grow", body=body),
    ]
    weights = SCALE | {"three": np.int64(3), "true": np.array(True), "zero": np.array([0])}
    return model(nodes, [value(n, SHAPE) for n in "qkv"], weights=weights)


def nested():
    """A branch inside of a loop."""
    one = helper.make_graph(attention("in_", "state", "k", "v", "attended"), "then", [], [value("attended", SHAPE)])
    other = helper.make_graph([helper.make_node("Neg", ["state"], ["turned"])], "else", [], [value("turned", SHAPE)])
    body = helper.make_graph(
        [
            helper.make_node("Identity", ["going"], ["go_on"]),
            helper.make_node("Equal", ["step", "two"], ["last"], name="last"),
            helper.make_node("If", ["last"], ["next"], name="choice", then_branch=one, else_branch=other),
        ],
        "body",
        [value("step", [], INT64), value("going", [], TensorProto.BOOL), value("state", SHAPE)],
        [value("go_on", [], TensorProto.BOOL), value("next", SHAPE)],
    )
    nodes = [
        *attention("out_", "q", "k", "v", "first"),
        helper.make_node("Loop", ["three", "true", "first"], ["y"], name="refine", body=body),
    ]
    weights = SCALE | {"two": np.int64(2), "three": np.int64(3), "true": np.array(True)}
    return model(nodes, [value(n, SHAPE) for n in "qkv"], weights=weights)


def operators(graph):
    """Of a graph and all that its nodes run."""
    for node in graph.node:
        yield node.op_type
        for attribute in node.attribute:
            yield from operators(attribute.g)


@pytest.mark.parametrize(
    ("proto", "names"),
    [
        (looped(), ["out_weights", "in_weights"]),
        (branched(), ["out_weights", "in_weights"]),
        (growing(), ["in_weights"]),
        (nested(), ["out_weights", "in_weights"]),
    ],
    ids=["loop", "if", "growing", "nested"],
)
@pytest.mark.parametrize("select", ["always", "measure"])
def test_attention_in_a_body_is_rewritten_there(proto, names, select, tmp_path):
    found = recognise(OnnxHost.from_model(proto).graph)
    assert [s.name for s in found.sites] == names
    assert found.refusals == ()
    assert [str(b) for b in find_blocks(OnnxHost.from_model(proto).graph, found.sites)]
    fast = attnopt.optimize(proto, {n: torch.randn(2, 4, 5, 8) for n in "qkv"}, select=select)
    if select == "always":
        assert fast.report.fused == len(names)
        path = fast.export(tmp_path / "fast.onnx")
        assert "Softmax" not in set(operators(onnx.load(path).graph))
        equal_after(proto, attnopt.load(path))
    equal_after(proto, fast)


def test_values_of_a_body_are_not_tapped():
    """Nothing outside holds them; so a kernel in a body is measured with the whole model alone."""
    host = OnnxHost.from_model(growing())
    (site,) = recognise(host.graph).sites
    with pytest.raises(NotIsolated, match="'more_keys' is made inside of a node's own graph"):
        host.tap([site.k.value], {n: torch.randn(2, 4, 5, 8) for n in "qkv"})


def test_sizes_of_a_loop_are_its_own():
    """What a loop calls `length` is another size at each step; what it reads from around it is the same at all."""
    graph = OnnxHost.from_model(growing()).graph
    ((_, _, body),) = graph.bodies()
    shapes = {v.name: v.shape for v in (*body.inputs, *(o for n in body.nodes for o in n.outputs))}
    around = {str(d) for v in graph.inputs for d in v.shape}
    assert "length" in around
    assert str(shapes["keys"][2]) == "length.grow"
    assert str(shapes["more_keys"][2]) == "length.grow + 1"
    assert [str(d) for d in shapes["row"]] == ["batch", "4", "1", "8"]


def test_what_is_equal_in_one_branch_need_not_be_in_the_other():
    added = helper.make_graph([helper.make_node("Add", ["a", "b"], ["sum"])], "then", [], [value("sum", None)])
    first = helper.make_graph([helper.make_node("Neg", ["a"], ["minus"])], "else", [], [value("minus", None)])
    nodes = [helper.make_node("If", ["which"], ["y"], name="choice", then_branch=added, else_branch=first)]
    proto = model(nodes, [value("which", [], TensorProto.BOOL), value("a", ["n"]), value("b", ["m"])])
    graph = OnnxHost.from_model(proto).graph
    assert [str(d) for v in graph.inputs[1:] for d in v.shape] == ["n", "m"]
    then, other = (body for _, _, body in graph.bodies())
    assert len({v.shape for v in then.inputs}) == 1
    assert [v.shape for v in other.nodes[0].outputs] == [graph.inputs[1].shape]


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
