"""State that a model keeps between calls, such as a cache of fixed size in its buffers, as buffers of its program.

    %c_lifted = the tensor of buffer `key_cache`;  index_copy_(%c_lifted, …)   ->   index_copy_(%b_key_cache, …)
    %c_lifted = a tensor that is no buffer;        index_copy_(%c_lifted, …)   ->   the same, and %c_lifted a buffer

A tensor that the model reaches through its own objects (a cache in a list) is to torch.export a constant, even where it is
registered as a buffer as well. torch makes no program with constants that are written, or with one tensor under two names, functional.

A functional program ends by copying the new state into its buffers. Measurements leave that out, so that each run starts alike.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind

IN_PLACE = {
    torch.ops.aten.index_copy.default: torch.ops.aten.index_copy_.default,
    torch.ops.aten.index_put.default: torch.ops.aten.index_put_.default,
}


def writes(node: fx.Node) -> bool:
    """Whether a node writes into one of its inputs."""
    schema = getattr(node.target, "_schema", None)
    return node.op == "call_function" and schema is not None and schema.is_mutable


def with_state(program: ExportedProgram) -> ExportedProgram:
    """The program with one name for each tensor, a buffer where it was a constant; it shares all tensors."""
    signature = program.graph_signature
    held = {**program.state_dict, **program.constants}
    graph = fx.Graph()
    copied: dict[fx.Node, fx.Node] = {}
    graph.output(graph.graph_copy(program.graph, copied))
    own = {node.name: node for node in graph.nodes if node.op == "placeholder"}
    buffers = {identity(held[s.target]): own[s.arg.name] for s in signature.input_specs if s.kind is InputKind.BUFFER}
    specs = []
    for spec in signature.input_specs:
        if spec.kind is InputKind.CONSTANT_TENSOR:
            node, same = own[spec.arg.name], buffers.setdefault(identity(held[spec.target]), own[spec.arg.name])
            if same is not node:
                node.replace_all_uses_with(same)
                graph.erase_node(node)
                continue
            spec = replace(spec, kind=InputKind.BUFFER, persistent=False)
        specs.append(spec)
    return program._update(fx.GraphModule(program.graph_module, graph), replace(signature, input_specs=specs))


def writes_state(node: fx.Node) -> bool:
    """Whether a node writes an attribute or an input of the model, and nothing reads its result."""
    target = node.args[0] if writes(node) and node.args else None
    return isinstance(target, fx.Node) and target.op in ("get_attr", "placeholder") and not node.users


def written(module: fx.GraphModule) -> list[str]:
    """The attributes that the module writes when it runs."""
    targets = [node.args[0] for node in module.graph.nodes if writes(node)]
    return list(dict.fromkeys(str(t.target) for t in targets if isinstance(t, fx.Node) and t.op == "get_attr"))


def with_own_state(module: fx.GraphModule) -> fx.GraphModule:
    """The module with copies of all tensors that it writes; itself where it writes none."""
    targets = written(module)
    if not targets:
        return module
    graph = fx.Graph()
    graph.output(graph.graph_copy(module.graph, {}))
    made = fx.GraphModule(module, graph)
    for target in targets:
        path, _, name = target.rpartition(".")
        holder = made.get_submodule(path)
        setattr(holder, name, getattr(holder, name).detach().clone())
    return made


def in_place(module: fx.GraphModule) -> fx.GraphModule:
    """The module with rows of its state written where they belong, as the model itself does: no copy of a cache at each step.

    %new = index_copy(%cache, …); copy_(%cache, %new)   ->   %new = index_copy_(%cache, …)      where nothing else reads %cache
    """
    for node in list(module.graph.nodes):
        if node.target is not torch.ops.aten.copy_.default or not writes_state(node):
            continue
        state, new = node.args
        row_write = IN_PLACE.get(new.target) if isinstance(new, fx.Node) else None
        alone = row_write is not None and new.args[0] is state and set(state.users) == {new, node}
        if alone and state.op == "get_attr" and not leaves(new):
            new.target = row_write
            module.graph.erase_node(node)
    module.graph.lint()
    module.recompile()
    return module


def leaves(node: fx.Node) -> bool:
    """Whether the model returns a view of what a node makes."""
    for user in node.users:
        schema = getattr(user.target, "_schema", None)
        views = schema is None or any(result.alias_info is not None for result in schema.returns)
        if user.op == "output" or (views and leaves(user)):
            return True
    return False


def without_writes(graph: fx.Graph) -> None:
    """Erase the nodes that write state: the graph computes what it did and leaves everything as it was."""
    for node in list(graph.nodes):
        if writes_state(node):
            graph.erase_node(node)


def identity(tensor: Any) -> Any:
    """Equal for two tensors that are the same numbers in memory."""
    if not isinstance(tensor, Tensor) or tensor.is_meta:
        return id(tensor)
    return tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype, tensor.device
