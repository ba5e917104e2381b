"""Is a graph sound? Every value is made once, before it is read, and every node that attnopt wrote fits its operator.

    Add(x, nowhere) -> y        "'nowhere', read by node 'sum', is made by nothing"

The same question is asked of a model that is read, where an answer is the user's news, and of one that was edited,
where it is a defect of attnopt.
"""

from __future__ import annotations

from collections.abc import Iterable

import onnx
import onnx_ir as ir


def is_given(value: ir.Value) -> bool:
    """Whether the value needs no node: an input, an initializer, a constant."""
    return value.is_graph_input() or value.is_initializer() or value.const_value is not None


def broken_link(model: ir.Model) -> str:
    """The first value that is read and made by nothing, in words; "" where there is none."""
    for node in model.graph.all_nodes():
        for value in node.inputs:
            if value is not None and value.producer() is None and not is_given(value):
                return f"'{value.name}', read by node '{node.name}', is made by nothing"
    for graph in model.graphs():
        for value in graph.outputs:
            if value.producer() is None and not is_given(value):
                return f"its output '{value.name}' is made by nothing"
    return ""


def put_in_order(model: ir.Model) -> str:
    """Sort the nodes so that every value is made before it is read; what is wrong where they cannot be, else ""."""
    try:
        model.graph.sort()
    except ValueError:
        return "its nodes read each other in a circle"
    return ""


def verify(model: ir.Model, written: Iterable[ir.Node]) -> None:
    """Raise RuntimeError where an edit left the model unsound. `written` are the nodes that attnopt made.

    Only those are held against ONNX's schemas: a user's model may use what a runtime takes and ONNX does not name.
    """
    wrong = put_in_order(model) or broken_link(model)
    context = onnx.checker.C.CheckerContext()
    context.ir_version = model.ir_version
    context.opset_imports = {domain: version for domain, version in model.opset_imports.items() if version is not None}
    for node in written:
        if wrong:
            break
        if node.graph is None:  # dead already
            continue
        try:
            onnx.checker.check_node(ir.to_proto(node), context)
        except onnx.checker.ValidationError as failure:
            wrong = f"node '{node.name}': {str(failure).splitlines()[0]}"
    if wrong:
        raise RuntimeError(f"the rewritten ONNX model is not sound: {wrong}")
