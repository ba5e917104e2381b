"""Compute the projections of one input by one product.

    q = x Wq + bq, k = x Wk + bk, v = x Wv + bv        ->        q, k, v = split(x [Wq Wk Wv] + [bq bk bv])

The rows of the product are those of the layers, so no number changes but for the order of sums. One call reads x once; what is cut from
the result is a view in torch, and a copy in onnxruntime. In cross attention keys and values are packed, and queries stay. Where blocks
share their weights all are packed, on one stored matrix.

Source: the packed form in which GPT-2 and BLOOM are written.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from attnopt.ir.block import Block
from attnopt.ir.graph import Node, Value
from attnopt.ir.site import Refusal
from attnopt.passes.candidate import Candidate, Evidence, Group, Per
from attnopt.passes.edits.caches.nodes import Nodes
from attnopt.passes.edits.heads.writer import applied
from attnopt.passes.edits.layers.ends import LayerEnds, ends_of
from attnopt.passes.edits.layers.linear_layers import matrix, outputs


@dataclass(frozen=True)
class PackProjections:
    """Compute the projections of one input by one product."""

    name: str = "pack-projections"
    exact: bool = True
    per: Per = "block"

    def propose(self, group: Group, evidence: Evidence | None) -> list[Candidate] | Refusal:
        packs = [pack for block in group.blocks if isinstance(pack := packed(block), tuple)]
        if len(packs) != len(group.blocks):
            return next(r for block in group.blocks if isinstance(r := packed(block), Refusal))
        nodes = [e.node for pack in packs for e in pack]
        inside = {n.name for n in nodes}
        for node in nodes:
            weight = node.inputs[1]
            if weight is not None and any(user.name not in inside for user in weight.users):
                return Refusal("another layer reads the weight of a projection", node)
        shared = "" if len(packs) == 1 else f", in {len(packs)} blocks that share their weights"
        return [
            Candidate(
                self.name,
                True,
                f"{len(packs[0])} projections as one product{shared}",
                "the packed form of GPT-2",
                nodes=tuple(nodes),
                kind="packed",
                changes=("structure",),
                removes=tuple(e.node for pack in packs for e in pack[1:]),
                layers={pack[0].node.name: (inputs(pack[0].node), sum(outputs(e.node) for e in pack)) for pack in packs},
            )
        ]

    def apply(self, candidate: Candidate, group: Group) -> Group:
        """Edits the host of the group in place; give it a copy, and finish it."""
        held: dict[tuple[Value | None, ...], list[Value]] = {}
        order = {n: i for i, n in enumerate(group.host.graph.nodes)}
        for block in group.blocks:
            pack = packed(block)
            if isinstance(pack, Refusal):
                raise RuntimeError(f"projections cannot be packed: {pack}")
            write(group, sorted(pack, key=lambda e: order[e.node]), held)
        return group


def packed(block: Block) -> tuple[LayerEnds, ...] | Refusal:
    """The layers of q, k and v that read one value, in this order; or why there are not two of them."""
    layers = [block.projections(side) for side in "qkv"]
    if any(len(found) != 1 for found in layers):
        return next(iter(block.missing), Refusal("queries, keys or values are not made by one layer each"))
    nodes = dict.fromkeys(found[0].node for found in layers if found[0].down is None)
    ends = [ends_of(node) for node in nodes if plain(node)]
    by_input: dict[object, list[LayerEnds]] = {}
    for end in ends:
        if isinstance(end, LayerEnds):
            by_input.setdefault(end.reads, []).append(end)
    most = max(by_input.values(), key=len, default=[])
    if len(most) > 1:
        alike = {(e.node.op, None if e.node.inputs[1] is None else e.node.inputs[1].dtype) for e in most}
        return tuple(most) if len(alike) == 1 else Refusal("the projections are of different types", most[0].node)
    if len(nodes) == 1:
        return Refusal("queries, keys and values are made by one product already", next(iter(nodes)))
    refused = next((e for e in ends if isinstance(e, Refusal)), None)
    return refused or Refusal("no two projections read the same value", next(iter(nodes), None))


def plain(node: Node) -> bool:
    """Whether a node is a product with a constant matrix of real numbers."""
    weight = node.inputs[1] if node.op in ("linear", "matmul") and len(node.inputs) > 1 else None
    return weight is not None and weight.load is not None and len(weight.shape or ()) == 2 and "float" in weight.dtype


def inputs(node: Node) -> int:
    return int((node.inputs[1].shape or (0, 0))[1 if node.op == "linear" else 0])  # type: ignore[arg-type, union-attr]


def write(group: Group, pack: Sequence[LayerEnds], held: dict[tuple[Value | None, ...], list[Value]]) -> None:
    """The product in front of the first layer, and what each layer gave cut from it. held: constants that were written, by weights."""
    first = pack[0]
    builder = group.host.builder(first.node)
    linear = first.node.op == "linear" and len(first.input.shape or ()) > 2
    key = tuple(v for e in pack for v in (e.node.inputs[1], e.bias))
    if key not in held:
        held[key] = [builder.constant(data, first.node.inputs[1].dtype) for data in joined(pack, linear)]  # type: ignore[union-attr]
    whole = applied(builder, first.input, held[key], linear)
    n, start, axis = Nodes(builder), 0, len(whole.shape or ()) - 1
    for end in pack:
        size = outputs(end.node)
        part = n.cut(whole, axis, start, start + size, size)
        group.host.replace(end.end, n.reshaped(part, *(end.end.shape or ())))
        start += size


def joined(pack: Sequence[LayerEnds], linear: bool) -> Iterable[Tensor]:
    """The weights as one, and the biases, zero where a layer has none."""
    weight = torch.cat([matrix(e.node) for e in pack])
    yield weight if linear else weight.mT.contiguous()
    if any(e.bias is not None for e in pack):
        yield torch.cat([bias(e) for e in pack])


def bias(end: LayerEnds) -> Tensor:
    held = None if end.bias is None else end.bias.load
    return matrix(end.node).new_zeros(outputs(end.node)) if held is None else held().reshape(-1)
