"""Read the rewritten graph of a live model back as changes of its modules.

    %linear = linear(x, W)   in layers.0.mlp.up_proj      ->   %int8 = linear_dynamic_int8(x, codes, scales)   there     Change("int8", …)

A node keeps its name, and one written in its place the path of the module that made it. A node of before that reads another constant now
says which parameter has other numbers; a layer of another kind, or two in place of one, stands under the path of the old one; an attention
of which no node is left is gone. An attention whose block was written anew is read as a block again. What fits none of these is a refusal:
the model as a whole is compared with the graph afterwards, so nothing that is overlooked here goes unseen.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from attnopt.hosts.fx import FxHost
from attnopt.hosts.fx.translate import source_of
from attnopt.hosts.module.changes import Change
from attnopt.hosts.module.layers import Holding
from attnopt.ir.graph import Node
from attnopt.ir.site import Refusal
from attnopt.rounding.hadamard import is_hadamard

INT8 = torch.ops.attnopt.linear_dynamic_int8.default
LINEAR = torch.ops.attnopt.rounded_linear.default
ROWS = torch.ops.attnopt.rounded_rows.default
INT8_ROWS = torch.ops.attnopt.int8_rows.default


def changes_between(before: FxHost, after: FxHost, model: nn.Module, gone: Sequence[str]) -> list[Change] | Refusal:
    """gone: paths of attention modules of which nothing is left."""
    changes: dict[str, Change] = {}
    for change in (*stored_layers(after, model), *low_rank(after, model), *removed(before, after, model, gone)):
        if isinstance(change, Refusal):
            return change
        changes[change.path] = change
    constants = new_constants(before, after)
    if isinstance(constants, Refusal):
        return constants
    for path, data in constants.items():
        owner = path.rpartition(".")[0]
        if owner not in changes and not any(owner.startswith(f"{top}.") for top in gone):
            changes[path] = Change("constant", path, tensors={"": data})
    return list(changes.values())


def constant_of(host: FxHost, node: Any) -> Tensor | None:
    """The data of a node that reads an attribute."""
    if not isinstance(node, fx.Node) or node.op != "get_attr":
        return None
    found: Any = host.module
    for part in str(node.target).split("."):
        found = getattr(found, part)
    return found.detach() if isinstance(found, Tensor) else None


def new_constants(before: FxHost, after: FxHost) -> dict[str, Tensor] | Refusal:
    """Parameters that nodes of the same name read otherwise now."""
    old = {n.name: n for n in before.module.graph.nodes if n.op == "call_function"}
    found: dict[str, Tensor] = {}
    kept: set[str] = set()
    for node in after.module.graph.nodes:
        was = old.get(node.name)
        if was is None or was.target is not node.target:
            continue
        for read, now in zip(was.all_input_nodes, node.all_input_nodes, strict=False):
            if read.op != "get_attr":
                continue
            data = constant_of(after, now)
            if data is None:
                continue
            if str(read.target) == str(now.target):
                kept.add(str(read.target))
            elif (
                str(read.target) in found
                and found[str(read.target)] is not data
                and not torch.equal(found[str(read.target)], data)
            ):
                return Refusal(f"'{read.target}' is read in two forms, and a module holds one", node.name)
            else:
                found[str(read.target)] = data
    if both := kept & found.keys():
        return Refusal(f"'{min(both)}' is read both as it was and changed, and a module holds one form", min(both))
    return found


def stored_layers(after: FxHost, model: nn.Module) -> Iterator[Change | Refusal]:
    """Layers and tables in codes, each under the path of the module in whose place it stands."""
    for node in after.module.graph.nodes:
        if node.target not in (INT8, LINEAR, ROWS, INT8_ROWS):
            continue
        path = source_of(node).module
        module = model.get_submodule(path) if path else model
        if isinstance(module, Holding):  # of an earlier plan
            continue
        table = node.target in (ROWS, INT8_ROWS)
        if table != (type(module) is nn.Embedding) or type(module).__name__ not in ("Linear", "Conv1D", "Embedding"):
            yield Refusal(
                f"the {type(module).__name__} at '{path}' does more than one product, so no layer in codes replaces it", path
            )
            continue
        yield coded(after, node, path)


def coded(after: FxHost, node: fx.Node, path: str) -> Change:
    args = list(node.args)
    x = args[0]
    if node.target is ROWS:
        table = apart(after, args[1], tensors_of(after, ("codes", "steps", "zeros"), args[1:4]))
        return Change("rows", path, {"bits": args[4], "middle": args[5], "channels": args[6]}, table)
    if node.target is INT8_ROWS:
        table = apart(after, args[1], tensors_of(after, ("weight", "scales", "factors"), args[1:4]))
        return Change("int8-rows", path, {}, table)
    kind, names = (
        ("int8", ("weight", "scales", "bias")) if node.target is INT8 else ("rounded", ("codes", "steps", "zeros", "bias"))
    )
    options = {} if node.target is INT8 else {"bits": args[5], "middle": args[6]}
    tensors = tensors_of(after, names, args[1 : 1 + len(names)])
    if (block := mixed(after, x)) is not None:
        options["mixed"], x = block, x.args[0].args[0].args[0]
    if isinstance(x, fx.Node) and x.target is torch.ops.aten.mul.Tensor and source_of(x).module == path:
        factors = constant_of(after, x.args[1])
        if factors is not None:  # smoothing in front of the layer
            tensors["factors"] = factors
    return Change(kind, path, options, tensors)


def mixed(after: FxHost, x: Any) -> int | None:
    """The width of the Hadamard blocks that a layer's input is mixed in on its way, as `edits.layers.mixed_inputs` writes it."""
    chain = [x]
    for _ in range(2):
        chain.append(chain[-1].args[0] if isinstance(chain[-1], fx.Node) and chain[-1].args else None)
    targets = [getattr(n, "target", None) for n in chain]
    if targets[1] is not torch.ops.aten.matmul.default or not targets[0] is targets[2] is torch.ops.aten.reshape.default:
        return None
    matrix = constant_of(after, chain[1].args[1])
    return len(matrix) if matrix is not None and is_hadamard(matrix) else None


def apart(after: FxHost, codes: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """What a table holds, copied where it reads the codes of a layer: a checkpoint names each tensor once."""
    readers = [n for n in after.module.graph.nodes if n.op == "get_attr" and n.target == codes.target]
    return {name: data.clone() for name, data in tensors.items()} if len(readers) > 1 else tensors


def low_rank(after: FxHost, model: nn.Module) -> Iterator[Change]:
    """Linear layers that are two products now, under the path of the one."""
    found: dict[str, list[tuple[Node, Tensor]]] = {}
    for node in after.graph.nodes:
        weight = node.inputs[1] if node.op in ("linear", "matmul") else None
        if weight is not None and weight.load is not None and len(weight.shape or ()) == 2 and node.source.module:
            held = weight.load()
            found.setdefault(node.source.module, []).append((node, held if node.op == "linear" else held.mT))
    for path, made in found.items():
        module = model.get_submodule(path)
        if len(made) != 2 or type(module).__name__ not in ("Linear", "Conv1D"):
            continue
        tensors = {"down": made[0][1].contiguous(), "up": made[1][1].contiguous(), "bias": module.bias}
        yield Change("low-rank", path, tensors={name: x.detach() for name, x in tensors.items() if isinstance(x, Tensor)})


def tensors_of(after: FxHost, names: Sequence[str], nodes: Sequence[Any]) -> dict[str, Tensor]:
    found = {name: constant_of(after, node) for name, node in zip(names, nodes, strict=True)}
    return {name: data for name, data in found.items() if data is not None}


def removed(before: FxHost, after: FxHost, model: nn.Module, gone: Sequence[str]) -> Iterator[Change]:
    """Attention modules that are gone, and the norms that only they read."""
    left = modules_of(after)
    for path in gone:
        yield Change("no-attention", path, {"layer_idx": getattr(model.get_submodule(path), "layer_idx", None)})
    parents = {path.rpartition(".")[0] for path in gone}
    for path in modules_of(before).keys() - left.keys():
        parent = path.rpartition(".")[0]
        if parent in parents and path not in gone and "norm" in type(model.get_submodule(path)).__name__.lower():
            yield Change("no-norm", path)


def modules_of(host: FxHost) -> Mapping[str, list[fx.Node]]:
    """The nodes that each module made."""
    found: dict[str, list[fx.Node]] = {}
    for node in host.module.graph.nodes:
        if node.op == "call_function" and (path := source_of(node).module):
            found.setdefault(path, []).append(node)
    return found
