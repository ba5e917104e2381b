"""From an ExportedProgram to a plain FX graph: flat inputs, flat outputs, parameters as attributes, nothing that only checks.

    forward(input_ids, attention_mask)  ->  (logits,)        %weight = get_attr[encoder.weight]; %linear = aten.linear(…)

Regions that only switch gradients off, or automatic mixed precision that is disabled, are written out in place: an attention
must not hide in them.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx
from torch.export import ExportedProgram

from attnopt.hosts.fx.state import with_own_state

CHECKS = ("_assert_tensor_metadata", "_guards_fn")


def flat_module(program: ExportedProgram) -> fx.GraphModule:
    """A GraphModule that takes and returns flat leaves; it shares the program's parameters, and has its own state."""
    module = program.module()
    graph = fx.Graph()
    output = graph.graph_copy(module.graph, {})
    graph.output(tuple(flatten_output(output)))
    flat = fx.GraphModule(module, graph)
    for node in list(flat.graph.nodes):
        if any(check in str(node.target) for check in CHECKS) and not node.users:
            flat.graph.erase_node(node)
    while any(inline(flat, node) for node in list(flat.graph.nodes)):
        pass
    flat.graph.eliminate_dead_code(has_effect)
    flat.graph.lint()
    flat.delete_all_unused_submodules()
    flat.recompile()
    return with_own_state(flat)


def has_effect(node: fx.Node) -> bool:
    """Whether a node that nobody reads must stay. A kernel that could draw random numbers (dropout) has none here."""
    return node.is_impure(impure_random=False)


def flatten_output(output: Any) -> list[Any]:
    return list(output) if isinstance(output, (tuple, list)) else [output]


def region_of(flat: fx.GraphModule, node: fx.Node) -> tuple[fx.GraphModule, tuple[Any, ...]] | None:
    """The body and the arguments of a region that changes nothing at inference time; None for anything else."""
    if node.op != "call_function":
        return None
    name = getattr(node.target, "__name__", "")
    if name == "wrap_with_set_grad_enabled":
        body, args = node.args[1], node.args[2:]
    elif name == "wrap_with_autocast" and node.args[2] is False:  # (device, dtype, enabled, cache, body, *args)
        body, args = node.args[4], node.args[5:]
    else:
        return None
    return (flat.get_submodule(body.target), args) if isinstance(body, fx.Node) else None  # type: ignore[arg-type, return-value]


def inline(flat: fx.GraphModule, node: fx.Node) -> bool:
    """Write the body of a region in place of the node; True where something was done."""
    region = region_of(flat, node)
    if region is None:
        return False
    body, args = region
    inputs = iter(args)
    copied: dict[fx.Node, Any] = {}
    with flat.graph.inserting_before(node):
        for inner in body.graph.nodes:
            if inner.op == "placeholder":
                copied[inner] = next(inputs)
            elif inner.op == "output":
                results = fx.node.map_arg(inner.args[0], lambda n: copied[n])
            elif inner.op == "get_attr":
                copied[inner] = adopt(flat, body, inner)
            else:
                copied[inner] = flat.graph.node_copy(inner, lambda n: copied[n])
    if not isinstance(results, (tuple, list)):
        node.replace_all_uses_with(results)
    for user in list(node.users):
        if user.target is operator.getitem:
            user.replace_all_uses_with(results[user.args[1]])  # type: ignore[index]
            flat.graph.erase_node(user)
    flat.graph.erase_node(node)
    return True


def adopt(flat: fx.GraphModule, body: fx.GraphModule, inner: fx.Node) -> fx.Node:
    """Bring an attribute of a region's body into the module."""
    value = body
    for part in str(inner.target).split("."):
        value = getattr(value, part)
    name = unused_attribute(flat, str(inner.target).replace(".", "_"))
    setattr(flat, name, value) if isinstance(value, torch.nn.Module) else flat.register_buffer(name, value)  # type: ignore[arg-type]
    made = flat.graph.get_attr(name)
    made.meta = dict(inner.meta)
    return made


def unused_attribute(module: torch.nn.Module, wanted: str) -> str:
    name, count = wanted, 0
    while hasattr(module, name):
        count += 1
        name = f"{wanted}_{count}"
    return name
