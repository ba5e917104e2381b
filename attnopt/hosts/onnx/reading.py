"""From a path or a ModelProto to onnx-ir, with one clear error for everything that is not a sound ONNX model.

Weights in external files stay there and are read when asked for, so a model of many gigabytes is never in memory twice.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
from google.protobuf.message import DecodeError
from onnx_ir.passes.common import InlinePass, RemoveInitializersFromInputsPass

from attnopt.errors import UnreadableModel, UnsupportedFormat
from attnopt.hosts.onnx.checking import broken_link, put_in_order

OPSETS = range(13, 26)
EXPORT = "Export it again, or check that the whole file arrived."
DAMAGED = (DecodeError, ir.serde.SerdeError, ValueError, KeyError, TypeError, AttributeError, UnicodeDecodeError)


def read(model: Any) -> ir.Model:
    """An own copy of the model as onnx-ir, functions written out in place. Raises UnreadableModel, UnsupportedFormat."""
    where = str(model) if isinstance(model, (str, Path)) else ""
    loaded = from_file(Path(model)) if where else from_proto(model)
    if "ai.onnx" in loaded.opset_imports:  # the long name of the default domain
        loaded.opset_imports.setdefault("", loaded.opset_imports.pop("ai.onnx"))
    check(loaded, where)
    if loaded.functions:
        InlinePass()(loaded)
    loaded.ir_version = max(loaded.ir_version, 4)  # before that, every weight had to be listed among the inputs
    RemoveInitializersFromInputsPass()(loaded)
    return loaded


def from_file(path: Path) -> ir.Model:
    if path.is_dir():
        raise UnreadableModel(f"'{path}' is a folder, not a model", next_move="Give the .onnx file inside it.")
    if not path.is_file():
        raise UnreadableModel(f"there is no file '{path}'", next_move="Check the path.")
    try:
        return ir.load(path)
    except OSError as failure:
        reason = failure.strerror or str(failure)
        raise UnreadableModel(f"'{path}' cannot be read: {reason}", next_move="Check its permissions.") from None
    except DAMAGED as failure:
        raise UnreadableModel(f"'{path}' is not an ONNX model: {innermost(failure)}", next_move=EXPORT) from None


def from_proto(model: Any) -> ir.Model:
    if not isinstance(model, onnx.ModelProto):
        kind = type(model).__name__
        raise UnsupportedFormat(f"a {kind} is not a whole model", next_move="Give a path or an onnx.ModelProto.")
    try:
        return ir.serde.deserialize_model(model)
    except DAMAGED as failure:
        raise UnreadableModel(f"the model is damaged: {innermost(failure)}", next_move=EXPORT) from None


def innermost(failure: BaseException) -> str:
    """The first line of what went wrong at the bottom: onnx-ir wraps each error in the names of what holds it."""
    while failure.__cause__ is not None:
        failure = failure.__cause__
    return str(failure).splitlines()[0] if str(failure) else type(failure).__name__


def check(model: ir.Model, where: str) -> None:
    """Refuse what would fail later in a less clear way; nodes in a wrong order are put right."""
    named = f"'{where}'" if where else "the model"
    if not model.opset_imports or not (len(model.graph) or len(model.graph.outputs)):
        raise UnreadableModel(f"{named} is not an ONNX model: it has no graph", next_move=EXPORT)
    opset = model.opset_imports.get("", OPSETS.start)
    if opset not in OPSETS:
        raise UnsupportedFormat(
            f"{named} uses opset {opset}; attnopt reads {OPSETS.start} to {OPSETS.stop - 1}",
            next_move=f"Convert it: onnx.version_converter.convert_version(model, {max(OPSETS.start, min(opset, OPSETS.stop - 1))}).",
        )
    wrong = broken_link(model) or put_in_order(model) or cut_off(model)
    if wrong:
        raise UnreadableModel(f"{named} is damaged: {wrong}", next_move=EXPORT)
    for tensor in external_tensors(model):
        check_external(tensor, named)


def cut_off(model: ir.Model) -> str:
    """The first weight inside the model that has fewer bytes than its shape asks for, in words."""
    for value in model.graph.initializers.values():
        tensor = value.const_value
        held = tensor.raw if isinstance(tensor, ir.TensorProtoTensor) else None
        if tensor is not None and held is not None and held.HasField("raw_data") and len(held.raw_data) < tensor.nbytes:
            return f"weight '{value.name}' has {len(held.raw_data)} bytes of {tensor.nbytes}"
    return ""


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
