"""Writing a torch host as a .pt2 file or an ONNX model, and reading .pt2 files back."""

from __future__ import annotations

import inspect
import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import fx
from torch.export import Dim, ExportedProgram
from torch.utils import _pytree as pytree

from attnopt.errors import OutputNotWritable, UnsupportedFormat
from attnopt.hosts.fx.call import Convention, split
from attnopt.hosts.fx.capture import Captured, from_program, read_program
from attnopt.hosts.fx.dynamic import shapes_tree
from attnopt.hosts.fx.logs import quiet
from attnopt.hosts.fx.onnx_translations import translations, untranslated
from attnopt.hosts.fx.symbols import name_symbols
from attnopt.hosts.onnx.exported_codes import store_codes

PARAMETERS = "attnopt.parameters"


def program_of(module: fx.GraphModule, captured: Captured) -> ExportedProgram:
    """The edited graph as an ExportedProgram that is called like the original one."""
    graph = fx.Graph()
    output = graph.graph_copy(module.graph, {})
    graph.output(output)
    graph.set_codegen(calling(captured))
    whole = fx.GraphModule(module, graph)
    args, kwargs = split(captured.convention.signature, captured.convention.traced)
    parameters = graph._codegen.pytree_info.orig_args
    inputs = [node for node in graph.nodes if node.op == "placeholder"]
    with torch.no_grad(), quiet("torch"):
        try:
            shapes = dynamic_shapes(captured.program, inputs, parameters, args, kwargs)
            return torch.export.export(whole, args, kwargs, dynamic_shapes=shapes, strict=False)
        except torch._dynamo.exc.UserError:  # tracing again may find a condition on a size that no Dim can state, such as s != 7
            shapes = dynamic_shapes(captured.program, inputs, parameters, args, kwargs, automatic=True)
            program = torch.export.export(whole, args, kwargs, dynamic_shapes=shapes, strict=False)
    if fixed := set(varying(inputs)) - set(varying(program_inputs(program))):
        at, axis = min(fixed)
        raise UnsupportedFormat(
            f"torch.export cannot save this model with dimension {axis} of '{inputs[at].name}' left open",
            next_move="Export it as .onnx, or optimise with dynamic_shapes that fix this dimension.",
        )
    return program


def calling(captured: Captured) -> Any:
    """How the generated code takes and returns trees: as the program did, but for what it takes and returns no more."""
    original = captured.program.module().graph._codegen
    convention, spec = captured.convention, captured.program.call_spec
    if (convention.in_spec, convention.out_spec) == (spec.in_spec, spec.out_spec):
        return original
    info = original.pytree_info
    names = [name for name in info.orig_args if name not in captured.gone]
    return fx.graph._PyTreeCodeGen(info._replace(orig_args=names, in_spec=convention.in_spec, out_spec=convention.out_spec))


def program_inputs(program: ExportedProgram) -> list[fx.Node]:
    """The placeholders of what a user gives."""
    given = {s.arg.name for s in program.graph_signature.input_specs if s.kind.name == "USER_INPUT"}
    return [n for n in program.graph.nodes if n.op == "placeholder" and n.name in given]


def varying(inputs: Sequence[fx.Node]) -> list[tuple[int, int]]:
    """(input, dimension) of every size that is not fixed."""
    tensors = [(i, n.meta["val"]) for i, n in enumerate(inputs) if isinstance(n.meta.get("val"), torch.Tensor)]
    return [(i, axis) for i, t in tensors for axis, size in enumerate(t.shape) if isinstance(size, torch.SymInt)]


def dynamic_shapes(
    program: ExportedProgram,
    inputs: Sequence[fx.Node],
    parameters: Sequence[str],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    *,
    automatic: bool = False,
) -> Any:
    """The dimensions of the inputs that vary in a program, in the form that torch.export takes: equal symbols share one Dim.

    automatic: leave all of them to torch instead.
    """
    dims: dict[str, Any] = {}
    flat: list[Any] = []
    for value in (node.meta.get("val") for node in inputs):
        if not isinstance(value, torch.Tensor):
            flat.append(None)
            continue
        axes: dict[int, Any] = {}
        for axis, size in enumerate(value.shape):
            if isinstance(size, torch.SymInt):
                expr = size.node.expr
                axes[axis] = dims.setdefault(str(expr), ranged(program, expr)) if expr.is_Symbol and not automatic else Dim.AUTO
        flat.append(axes or None)
    tree_args, tree_kwargs = shapes_tree(flat, pytree.tree_flatten((args, dict(kwargs)))[1])
    return {**dict(zip(parameters, tree_args, strict=False)), **tree_kwargs}


def ranged(program: ExportedProgram, symbol: Any) -> Any:
    """A Dim with the limits that tracing found for the symbol (a position table of 512 rows allows no more)."""
    low, high = limits(program, symbol)
    return Dim(str(symbol), min=low, max=high)


def limits(program: ExportedProgram, symbol: Any) -> tuple[int | None, int | None]:
    """The smallest and largest size that the trace is valid for. torch always assumes at least 2; that is no limit."""
    found = program.range_constraints.get(symbol)
    if found is None:
        return None, None
    low = int(found.lower) if found.lower.is_Integer and found.lower > 2 else None
    return low, int(found.upper) if found.upper.is_Integer else None


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
        extra = {**metadata, PARAMETERS: json.dumps(parameters(captured.convention.signature))}
        torch.export.save(program, beside, extra_files=extra)
        os.replace(beside, path)
    except OSError as failure:
        raise OutputNotWritable(f"'{path}' cannot be written: {failure.strerror}", next_move="Choose another place.") from None
    finally:
        Path(beside).unlink(missing_ok=True)


def to_onnx(module: fx.GraphModule, captured: Captured, output_names: Sequence[str], *, edited: bool) -> Any:
    """The graph as an onnx.ModelProto by torch's exporter, with readable names for outputs and for sizes that vary."""
    program = program_of(module, captured) if edited else captured.program
    placeholders = [n for n in program.graph.nodes if n.op == "placeholder"]
    outputs = apart(output_names, [n.name for n in placeholders])
    if operator := untranslated(program.graph):
        raise UnsupportedFormat(
            f"ONNX has no form of '{operator}', which this model computes",
            next_move="Export it as .pt2, or optimise the original for ONNX: its passes write such layers by onnxruntime's operators.",
        )
    options: dict[str, Any] = {"dynamo": True, "verbose": False, "custom_translation_table": translations()}
    with quiet("torch.onnx"):
        try:
            exported = torch.onnx.export(program, (), output_names=outputs, **options)
        except torch.onnx.OnnxExporterError:  # the exporter may take a reshape of a permuted tensor for a view
            program = program_of(with_copies(module), captured)
            exported = torch.onnx.export(program, (), output_names=outputs, **options)
    store_codes(exported.model)
    names = name_symbols(placeholders).names
    proto = exported.model_proto
    for value in (*proto.graph.input, *proto.graph.output, *proto.graph.value_info):
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param in names:
                dim.dim_param = names[dim.dim_param]
    return proto


def apart(outputs: Sequence[str], inputs: Sequence[str]) -> list[str]:
    """Output names of which none is that of an input: past_key_values_key_cache_0 leaves as present_key_values_key_cache_0."""

    def other(name: str) -> str:
        return f"present{name.removeprefix('past')}" if name.startswith("past") else f"{name}_output"

    return [other(name) if name in inputs else name for name in outputs]


def with_copies(module: fx.GraphModule) -> fx.GraphModule:
    """The module with an explicit copy before every reshape; ONNX knows no strides, so the copies vanish there."""
    graph = fx.Graph()
    graph.output(graph.graph_copy(module.graph, {}))
    for node in list(graph.nodes):
        if node.target in (torch.ops.aten.reshape.default, torch.ops.aten.view.default):
            with graph.inserting_before(node):
                copied = graph.call_function(
                    torch.ops.aten.clone.default, (node.args[0],), {"memory_format": torch.contiguous_format}
                )
            node.args = (copied, *node.args[1:])
            node.target = torch.ops.aten.view.default
    return fx.GraphModule(module, graph)


def read_with_metadata(path: Path) -> tuple[Captured, dict[str, str]]:
    """A saved program with its calling convention, and the metadata inside the file."""
    metadata: dict[str, Any] = {"attnopt.report": "", PARAMETERS: ""}
    captured = from_program(read_program(path, metadata), None)
    order = json.loads(metadata.pop(PARAMETERS) or "[]")
    captured = replace(captured, convention=by_position(captured.convention, order))
    return captured, {name: text for name, text in metadata.items() if text}


def parameters(signature: inspect.Signature) -> list[tuple[str, bool, Any]]:
    """(name, whether it must be given, else its default) of each that may come by position: a program keeps what was traced."""
    found = [p for p in signature.parameters.values() if p.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD]
    plain = {p.name: p.default if isinstance(p.default, (bool, int, float, str)) else None for p in found}
    return [(p.name, p.default is inspect.Parameter.empty, plain[p.name]) for p in found]


def by_position(convention: Convention, order: Sequence[tuple[str, bool, Any]]) -> Convention:
    """The convention of a program that was traced with keywords, with the order that its parameters had when it was saved.

    (*, input_ids, attention_mask)   ->   (input_ids, attention_mask=None, position_ids=None)
    """
    traced = convention.signature.parameters
    if any(p.kind is not inspect.Parameter.KEYWORD_ONLY for p in traced.values()):
        return convention
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    made = [inspect.Parameter(n, kind, default=inspect.Parameter.empty if needed else value) for n, needed, value in order]
    rest = [p for name, p in traced.items() if name not in {parameter.name for parameter in made}]
    return replace(convention, signature=inspect.Signature([*made, *rest]))
