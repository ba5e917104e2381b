"""What exact algebra left of norms, of linear layers and of tables, read from the rewritten graph.

    norm(x) = rms(x) * gain        ->   rms(x)                    Change("norm", "layers.0.input_layernorm", {kind: rms, eps})
    linear(x, W, b)                ->   linear(x, W'), anew       Change("linear", "layers.0.self_attn.k_proj", {weight})
    q_proj, k_proj, v_proj         ->   one product, cut apart    Change("packed", "layers.0.self_attn.q_proj", {others: …}, {layer.weight})
    table[ids]                     ->   table[ids] less its mean  Change("centred-rows", "model.embed_tokens")

A node that kept its name and reads another constant is no concern of this file: `hosts.module.reading` sees it.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch import Tensor, nn

from attnopt.hosts.fx import FxHost
from attnopt.hosts.module.changes import Change
from attnopt.ir.block import Norm
from attnopt.ir.graph import Node
from attnopt.ir.site import Refusal
from attnopt.passes.value_scaling import bias_of
from attnopt.patterns.block.norms import norm_at, peeled
from attnopt.plan.options.groups import linears_of

CENTRED = ["gather", "reduce_mean", "sub"]


@dataclass(frozen=True)
class Made:
    """The nodes of a graph by the paths of the modules that made them, in order."""

    host: FxHost

    @cached_property
    def nodes(self) -> Mapping[str, list[Node]]:
        found: dict[str, list[Node]] = {}
        for node in self.host.graph.nodes:
            if node.source.module:
                found.setdefault(node.source.module, []).append(node)
        return found

    @cached_property
    def names(self) -> set[str]:
        return {node.name for node in self.host.graph.nodes}

    @cached_property
    def products(self) -> Mapping[str, list[Node]]:
        found: dict[str, list[Node]] = {}
        for node in linears_of(self.host.graph):
            found.setdefault(node.source.module, []).append(node)
        return found

    def product(self, path: str) -> Node | None:
        """The only product with a constant matrix that a module makes."""
        found = self.products.get(path, [])
        return found[0] if len(found) == 1 else None

    def norm(self, path: str) -> Norm | None:
        """What a module computes, where that is a norm of what it is given."""
        nodes = self.nodes.get(path)
        found = norm_at(nodes[-1].output) if nodes else None
        return None if found is None or peeled(found.input).producer in nodes else found  # type: ignore[operator]


def folded(before: FxHost, after: FxHost, model: nn.Module, stored: Collection[str] = ()) -> Iterator[Change | Refusal]:
    """Each under the path of the module that it is read into. stored: paths of modules that are something else already."""
    old, new = Made(before), Made(after)
    for path, nodes in old.nodes.items():
        if path in stored:
            continue
        module = model.get_submodule(path)
        if type(module).__name__ in ("Linear", "Conv1D"):
            yield from layer(old, new, path)
        elif isinstance(module, nn.Embedding):
            yield from table(nodes, new.nodes.get(path, []), module, path)
        elif path in new.nodes and not list(module.children()):
            yield from norm(old.norm(path), new.norm(path), path)


def norm(was: Norm | None, now: Norm | None, path: str) -> Iterator[Change]:
    """A norm of another kind, or without its gain or its bias."""
    if was is None or now is None or now.floor or now.kind not in ("rms", "layer") or form(was) == form(now):
        return
    held = {"weight": now.gain(), "bias": now.offset()}
    yield Change(
        "norm", path, {"kind": now.kind, "eps": now.eps}, {name: x.detach() for name, x in held.items() if x is not None}
    )


def form(norm: Norm) -> tuple[object, ...]:
    return norm.kind, norm.weight is None, norm.bias is None


def table(was: list[Node], now: list[Node], module: nn.Embedding, path: str) -> Iterator[Change | Refusal]:
    """A table whose rows are centred when they are read."""
    ops = sorted({n.op for n in now})
    if "reduce_mean" not in ops or "reduce_mean" in {n.op for n in was}:
        return
    if ops == CENTRED and type(module) is nn.Embedding:
        yield Change("centred-rows", path)
    else:
        yield Refusal(f"the {type(module).__name__} does more than look rows up, so its rows cannot be centred there", path)


def layer(old: Made, new: Made, path: str) -> Iterator[Change | Refusal]:
    """A layer that was written anew, with those whose rows it took."""
    was, now = old.product(path), new.product(path)
    if was is None or now is None or now.name in old.names:
        return
    found, gap = tensors(now), outputs(now) - outputs(was)
    if gap < 0:  # of fewer heads, or narrower ones, which are read from their block
        return
    if not gap:
        yield Change("linear", path, tensors=found)
        return
    taken = [p for p in siblings(old, path) if p not in new.nodes]
    others = {p: outputs(node) for p in taken if (node := old.product(p)) is not None}
    if sum(others.values()) != gap:
        yield Refusal(f"the layer makes {gap} channels more, of layers that are not known", path)
        return
    yield Change("packed", path, {"own": outputs(was), "others": others}, {f"layer.{name}": x for name, x in found.items()})


def siblings(made: Made, path: str) -> list[str]:
    """The other modules of the same parent, in the order in which they are called."""
    parent = path.rpartition(".")[0]
    return [p for p in made.nodes if p != path and p.rpartition(".")[0] == parent]


def outputs(node: Node) -> int:
    shape: Any = node.inputs[1].shape  # type: ignore[union-attr]
    return int(shape[0 if node.op == "linear" else 1])


def tensors(node: Node) -> dict[str, Tensor]:
    """weight [out, in], and bias [out] where there is one."""
    weight: Tensor = node.inputs[1].load()  # type: ignore[union-attr, misc]
    held = {"weight": weight if node.op == "linear" else weight.mT}
    if (found := bias_of(node)) is not None and (load := found[1].load) is not None:
        held["bias"] = load().reshape(-1)
    return {name: x.detach().contiguous() for name, x in held.items()}
