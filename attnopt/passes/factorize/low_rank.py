"""Compute linear layers in the few directions of their outputs that inputs reach: two narrow layers for one.

    y = x W' + b     ->     y = (x (U' W)') U' + b          W [out, in], U [out, r], r (in + out) products for in * out

    min over V of rank r  of  E |x (W - V)'|² = |(W - V) M^1/2|²,  M = E x' x      ->      V = U U' W

U are the first left singular vectors of W M^1/2: directions of the outputs, by how much of them calibration data show. With M = 1 it is
the truncation of W itself. Rank = width is the identity. Layers that hold one weight hold the same two afterwards, found on what all of
them read. Any linear layer is offered; layers that read one value, as q, k and v, are one decision. A closed form; no training.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from attnopt.errors import OutOfRange, PlanError
from attnopt.ir.graph import Node, Value
from attnopt.ir.site import Refusal
from attnopt.passes.candidate import Candidate, Evidence, Group, Per
from attnopt.passes.edits.heads.changes import SPARSE
from attnopt.passes.edits.heads.writer import applied
from attnopt.passes.edits.layers.ends import LayerEnds, ends_of
from attnopt.passes.edits.layers.linear_layers import matrix, suits


@dataclass(frozen=True)
class LowRank:
    """Compute linear layers in the few directions of their outputs that inputs reach.

    shares: of a layer's products that are left, in (0, 1). multiple: ranks are rounded down to one. smallest: width of a layer.
    """

    shares: tuple[float, ...] = (0.75, 0.5, 0.25)
    multiple: int = 8
    smallest: int = 64
    name: str = "low-rank"
    exact: bool = False
    per: Per = "linear"

    def __post_init__(self) -> None:
        if any(not 0 < s < 1 for s in self.shares) or self.multiple < 1:
            raise OutOfRange("shares of products in (0, 1), a multiple of at least 1", f"{self.shares}, {self.multiple}")

    def propose(self, group: Group, evidence: Evidence | None) -> list[Candidate] | Refusal:
        if evidence is None:
            return Refusal("its directions are found on calibration data", group.name)
        for node in group.linears:
            if (why := self.refusal(node, evidence)) is not None:
                return why
        made: list[Candidate] = []
        for share in self.shares:
            ranks = {n.name: self.rank(n, share) for n in group.linears}
            if min(ranks.values()) < 1:
                return made or Refusal(f"rank {self.multiple} would leave more than {share:g} of the products", group.name)
            what = ", ".join(f"{n.name} by rank {ranks[n.name]} of {min(matrix(n).shape)}" for n in group.linears)
            made.append(
                Candidate(
                    self.name,
                    False,
                    what,
                    "truncated singular values, weighted by activations",
                    nodes=tuple(group.linears),
                    options={"ranks": list(ranks.values())},
                    kind=f"{share:g} of the products",
                    changes=("weights",),
                    layers={n.name: as_one(n, ranks[n.name]) for n in group.linears},
                    needs="calibration",
                )
            )
        return made

    def refusal(self, node: Node, evidence: Evidence) -> Refusal | None:
        if not suits(node, self.smallest):
            return Refusal(f"it is no layer of real weights, {self.smallest} wide at least", node)
        if (zeros := float((matrix(node) == 0).double().mean())) > SPARSE:
            return Refusal(f"{zeros:.0%} of its weights are zero, which two layers would fill", node)
        if not evidence.sees(node):
            return Refusal("calibration did not see what it reads", node)
        found = ends_of(node)
        return found if isinstance(found, Refusal) else None

    def rank(self, node: Node, share: float) -> int:
        out, inside = matrix(node).shape
        return int(share * out * inside / (out + inside)) // self.multiple * self.multiple

    def arrays(self, candidate: Candidate, group: Group, evidence: Evidence) -> Mapping[str, Mapping[str, Tensor]] | Refusal:
        """down [r, in] and up [out, r] of each layer."""
        moments: dict[Value, Tensor] = {}
        for node in group.linears:
            seen, weight = evidence.second_moment(node), weight_of(node)
            if seen is None:
                return Refusal("calibration did not see what it reads", node)
            moments[weight] = moments[weight] + seen if weight in moments else seen
        made, known = {}, dict[Value, Mapping[str, Tensor]]()
        for node, rank in zip(group.linears, candidate.options["ranks"], strict=True):
            weight = weight_of(node)
            if weight not in known:
                down, up = factored(matrix(node), moments[weight], rank)
                known[weight] = {"down": down.float(), "up": up.float()}
            made[node.name] = known[weight]
        return made

    def apply(self, candidate: Candidate, group: Group) -> Group:
        """Edits the host of the group in place; give it a copy, and finish it. Raises PlanError for a candidate without its arrays."""
        held: dict[tuple[Value, bool], tuple[Value, Value]] = {}
        for node in group.linears:
            arrays, layer = candidate.arrays.get(node.name, {}), ends_of(node)
            if not arrays:
                raise PlanError(
                    f"the plan does not hold the numbers that '{self.name}' found",
                    next_move="Give the calibration data that the plan was found with, or use the model that was written with it.",
                )
            if isinstance(layer, Refusal):
                raise RuntimeError(str(layer))
            write(group, layer, arrays, held)
        return group


def factored(weight: Tensor, moment: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """(down [r, in], up [out, r]) in float64, of the least E |x (W - up down)'|² for inputs of this second moment [in, in]."""
    most = min(weight.shape)
    if not 1 <= rank <= most:
        raise OutOfRange(f"ranks from 1 to {most}", f"{rank}")
    energy, basis = torch.linalg.eigh(moment.double())
    reached = weight.double() @ (basis * energy.clamp(min=0).sqrt())  # W M^1/2 but for a rotation behind it
    up = torch.linalg.svd(reached, full_matrices=False).U[:, :rank].contiguous()
    return up.mT @ weight.double(), up


def write(
    group: Group, layer: LayerEnds, arrays: Mapping[str, Tensor], held: dict[tuple[Value, bool], tuple[Value, Value]]
) -> None:
    """The two layers in place of one. held: constants written before, by the weight that they stand for."""
    host, own = group.host, weight_of(layer.node)
    builder, linear = host.builder(layer.node), layer.node.op == "linear" and len(layer.input.shape or ()) > 2
    if (own, linear) not in held:
        down, up = (arrays[name] if linear else arrays[name].mT for name in ("down", "up"))
        held[own, linear] = builder.constant(down.contiguous(), own.dtype), builder.constant(up.contiguous(), own.dtype)
    down, up = held[own, linear]
    bias = [] if layer.bias is None or layer.bias.load is None else [builder.constant(layer.bias.load().reshape(-1), own.dtype)]
    made = applied(builder, applied(builder, layer.input, [down], linear), [up, *bias], linear)
    if made.shape != layer.end.shape:
        made = builder.emit("reshape", made, shape=layer.end.shape or (), dtype=made.dtype)
    before = layer.end.handle
    host.replace(layer.end, made)
    host.graph.moved(before, made.handle)  # a layer that reads this one may be written next


def as_one(node: Node, rank: int) -> tuple[int, int]:
    """(in, out) of one layer of as many products as both have: what they cost."""
    out, inside = matrix(node).shape
    return inside, round(rank * (out + inside) / inside)


def weight_of(node: Node) -> Value:
    weight = node.inputs[1]
    assert weight is not None
    return weight
