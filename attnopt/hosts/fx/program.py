"""Writing a torch host as a .pt2 file or an ONNX model, and reading .pt2 files back."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import fx
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree

from attnopt.errors import OutputNotWritable, UnreadableModel
from attnopt.hosts.fx.call import split
from attnopt.hosts.fx.capture import Captured, read_program

METADATA_FILE = "attnopt.metadata"


def program_of(module: fx.GraphModule, captured: Captured) -> ExportedProgram:
    """The edited graph as an ExportedProgram that is called like the original one."""
    graph = fx.Graph()
    original = captured.program.module()
    output = graph.graph_copy(module.graph, {})
    graph.output(output)
    graph.set_codegen(original.graph._codegen)
    whole = fx.GraphModule(module, graph)
    args, kwargs = split(captured.convention.signature, captured.convention.traced)
    shapes = dynamic_shapes(captured.program, graph._codegen.pytree_info.orig_args, args, kwargs)
    with torch.no_grad():
        return torch.export.export(whole, args, kwargs, dynamic_shapes=shapes, strict=False)


def dynamic_shapes(program: ExportedProgram, parameters: Sequence[str], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """The dimensions that vary in a program, in the form that torch.export takes: equal symbols share one Dim."""
    dims: dict[str, Any] = {}
    placeholders = {n.name: n.meta.get("val") for n in program.graph.nodes if n.op == "placeholder"}
    names = [s.arg.name for s in program.graph_signature.input_specs if s.kind.name == "USER_INPUT"]
    flat = []
    for name in names:
        value = placeholders.get(name)
        if not isinstance(value, torch.Tensor):
            flat.append(None)
            continue
        axes: dict[int, Any] = {}
        for axis, size in enumerate(value.shape):
            if isinstance(size, torch.SymInt):
                expr = size.node.expr
                axes[axis] = dims.setdefault(str(expr), torch.export.Dim(str(expr))) if expr.is_Symbol else torch.export.Dim.AUTO
        flat.append(axes or None)
    tree_args, tree_kwargs = pytree.tree_unflatten(flat, pytree.tree_flatten((args, dict(kwargs)))[1])
    return {**dict(zip(parameters, tree_args, strict=False)), **tree_kwargs}


def save_program(module: fx.GraphModule, captured: Captured, path: Path, metadata: Mapping[str, str]) -> None:
    """Write a .pt2 file beside its place, then move it there."""
    if not path.parent.is_dir():
        raise OutputNotWritable(f"there is no folder '{path.parent}'", next_move="Make it, or choose another place.")
    program = program_of(module, captured)
    try:
        handle, beside = tempfile.mkstemp(suffix=".pt2", prefix=f".{path.stem}", dir=path.parent)
        os.close(handle)
    except OSError as failure:
        raise OutputNotWritable(f"'{path}' cannot be written: {failure.strerror}", next_move="Choose another place.") from None
    try:
        torch.export.save(program, beside, extra_files=dict(metadata))
        os.replace(beside, path)
    except OSError as failure:
        raise OutputNotWritable(f"'{path}' cannot be written: {failure.strerror}", next_move="Choose another place.") from None
    finally:
        Path(beside).unlink(missing_ok=True)


def to_onnx(module: fx.GraphModule, captured: Captured) -> Any:
    """The edited graph as an onnx.ModelProto."""
    program = torch.onnx.export(program_of(module, captured), (), dynamo=True, verbose=False)
    return program.model_proto


def load_pt2(path: Path) -> tuple[Any, dict[str, str]]:
    """A callable with the saved model's signature, and the metadata inside the file."""
    from attnopt.hosts.fx.capture import from_program
    from attnopt.hosts.fx.host import FxHost

    metadata: dict[str, Any] = {"attnopt.report": ""}
    if not path.is_file():
        raise UnreadableModel(f"there is no file '{path}'", next_move="Check the path.")
    program = read_program(path, metadata)
    captured = from_program(program, None)
    host = FxHost.from_captured(captured)
    return host.callable(), {k: v for k, v in metadata.items() if v}
