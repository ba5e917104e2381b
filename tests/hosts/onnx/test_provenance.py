"""Nodes written in place of one: all tell the module, one of them the lines of the user's source."""

from __future__ import annotations

import onnx_ir as ir

from attnopt.hosts.onnx.provenance import LONG, TRACE, inherit


def node(**texts):
    made = ir.node("Relu", [])
    made.metadata_props.update({f"pkg.torch.onnx.{key}": text for key, text in texts.items()})
    return made


def test_long_texts_stand_once():
    first, second = node(stack_trace="line 1", name_scopes="a"), node(stack_trace="line 2", name_scopes="b")
    written = []
    for origin in (first, first, second, first):
        made = ir.node("Mul", [])
        inherit(made, origin, written)
        written.append(made)
    assert [n.metadata_props.get(TRACE) for n in written] == ["line 1", None, "line 2", None]
    assert [n.metadata_props["pkg.torch.onnx.name_scopes"] for n in written] == ["a", "a", "b", "a"]
    assert all(key not in written[1].metadata_props for key in LONG)


def test_without_a_trace_all_is_kept():
    written = []
    for _ in range(2):
        made = ir.node("Mul", [])
        inherit(made, node(namespace="classes"), written)
        written.append(made)
    assert all(n.metadata_props == {"pkg.torch.onnx.namespace": "classes"} for n in written)
