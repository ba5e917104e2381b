"""The same model at a higher opset, by ONNX's own converter on a copy without its weights.

    opset 20, 12 GB of weights   ->   opset 23, the same weights, the same modules and lines beside its nodes

The converter works on one protobuf message, which holds 2 GB at most and no external files, and it forgets the metadata
of nodes. So large weights are declared as inputs while it works, and both are put back by name afterwards.
"""

from __future__ import annotations

import onnx
import onnx_ir as ir

from attnopt.ir.site import Refusal

HEAVY = 1024  # bytes; smaller constants may hold axes and shapes, which the converter must see


def convert(model: ir.Model, to: int) -> ir.Model | Refusal:
    """A new model at opset `to` that shares the weights, checked by ONNX; or why there is none."""
    have = model.opset_imports.get("", 0)
    if to < have:
        return Refusal(f"the model has opset {have}, which is above {to} already")
    light = model.clone()
    inputs = len(light.graph.inputs)
    heavy = set_aside(light)
    try:
        proto = onnx.version_converter.convert_version(ir.to_proto(light), to)
        onnx.checker.check_model(proto)
        converted = ir.serde.deserialize_model(proto)
    except Exception as failure:  # the converter raises whatever its C++ throws
        return Refusal(f"the model does not convert to opset {to}: {str(failure).splitlines()[0][:160]}")
    graph = converted.graph
    declared = {value.name: value for value in graph.inputs[inputs:]}
    if set(declared) != set(heavy):
        return Refusal(f"the model does not convert to opset {to}: the converter lost weights")
    del graph.inputs[inputs:]
    for name, value in declared.items():
        value.const_value = heavy[name]
        graph.register_initializer(value)
    converted.metadata_props.update(model.metadata_props)
    origins = {node.name: node.metadata_props for node in model.graph}
    for node in graph:
        node.metadata_props.update(origins.get(node.name, {}))
    return converted


def set_aside(model: ir.Model) -> dict[str, ir.TensorProtocol]:
    """Turn heavy weights and those in files into inputs at the end of the list; returns their data by name."""
    heavy: dict[str, ir.TensorProtocol] = {}
    for name, value in list(model.graph.initializers.items()):
        tensor = value.const_value
        if tensor is None or value.is_graph_input():
            continue
        if isinstance(tensor, ir.ExternalTensor) or tensor.nbytes > HEAVY:
            heavy[name] = tensor
            del model.graph.initializers[name]
            value.shape, value.type, value.const_value = ir.Shape(tensor.shape), ir.TensorType(tensor.dtype), None
            model.graph.inputs.append(value)
    return heavy
