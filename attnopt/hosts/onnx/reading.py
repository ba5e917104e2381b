"""From a path or a ModelProto to onnx-ir, with one clear error for everything that is not a sound ONNX model.

Weights in external files stay there and are read when asked for, so a model of many gigabytes is never in memory twice.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx_ir as ir
from google.protobuf.message import DecodeError
from onnx_ir.passes.common import InlinePass, RemoveInitializersFromInputsPass

from attnopt.errors import UnreadableModel, UnsupportedFormat

OPSETS = range(13, 26)
EXPORT = "Export it again, or check that the whole file arrived."


def read(model: Any) -> ir.Model:
    """An own copy of the model as onnx-ir, functions written out in place. Raises UnreadableModel, UnsupportedFormat."""
    where = str(model) if isinstance(model, (str, Path)) else ""
    loaded = from_file(Path(model)) if where else ir.serde.deserialize_model(model)
    check(loaded, where)
    if loaded.functions:
        InlinePass()(loaded)
    if loaded.ir_version >= 4:
        RemoveInitializersFromInputsPass()(loaded)
    return loaded


def from_file(path: Path) -> ir.Model:
    if path.is_dir():
        raise UnreadableModel(f"'{path}' is a folder, not a model", next_move="Give the .onnx file inside it.")
    if not path.is_file():
        raise UnreadableModel(f"there is no file '{path}'", next_move="Check the path.")
    try:
        return ir.load(path)
    except (DecodeError, ValueError, KeyError, TypeError, AttributeError, UnicodeDecodeError) as failure:
        reason = str(failure).splitlines()[0] if str(failure) else type(failure).__name__
        raise UnreadableModel(f"'{path}' is not an ONNX model: {reason}", next_move=EXPORT) from None


def check(model: ir.Model, where: str) -> None:
    """Refuse what would fail later in a less clear way."""
    named = f"'{where}'" if where else "the model"
    if not model.opset_imports or not (len(model.graph) or len(model.graph.outputs)):
        raise UnreadableModel(f"{named} is not an ONNX model: it has no graph", next_move=EXPORT)
    opset = model.opset_imports.get("", OPSETS.start)
    if opset not in OPSETS:
        raise UnsupportedFormat(
            f"{named} uses opset {opset}; attnopt reads {OPSETS.start} to {OPSETS.stop - 1}",
            next_move=f"Convert it: onnx.version_converter.convert_version(model, {max(OPSETS.start, min(opset, OPSETS.stop - 1))}).",
        )
    for node in model.graph:
        for value in node.inputs:
            if value is not None and value.producer() is None and not is_given(value):
                raise UnreadableModel(
                    f"{named} is damaged: '{value.name}', read by node '{node.name}', is made by nothing", next_move=EXPORT
                )
    for tensor in external_tensors(model):
        check_external(tensor, named)


def is_given(value: ir.Value) -> bool:
    return value.is_graph_input() or value.is_initializer() or value.const_value is not None


def external_tensors(model: ir.Model) -> list[ir.ExternalTensor]:
    held = [v.const_value for v in model.graph.initializers.values()]
    return [t for t in held if isinstance(t, ir.ExternalTensor)]


def check_external(tensor: ir.ExternalTensor, named: str) -> None:
    path = Path(tensor.path)
    if not path.is_file():
        raise UnreadableModel(
            f"{named} keeps weights in '{path.name}', which is not there", next_move="Put the file beside the model."
        )
    end = (tensor.offset or 0) + (tensor.length or tensor.nbytes)
    if path.stat().st_size < end:
        raise UnreadableModel(
            f"'{path.name}' is cut off: {named} needs {end} bytes of it and it has {path.stat().st_size}", next_move=EXPORT
        )
