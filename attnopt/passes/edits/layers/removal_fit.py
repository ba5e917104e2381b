"""Fit what writes into the residual stream next, once attention sublayers are gone: those layers make up for them as far as they can.

    s = x + attention(norm(x)),  y = s + W h(s)      ->      y' = x + W' h(x)

    min over W' of  E |y - x - W' h(x)|² + l |W' - W|²     ->     W' = (C + l W) (A + l)^-1,   A = E h h^T,  C = E (y - x) h^T
    one factor for the whole layer, W' = s W                                                   where rows are few

The next writer is the output layer of the MLP beside the removed attention. A closed form of second moments, added up batch by batch: the
model as it was and a copy whose attention gives zeros read the same calibration data, at most ROWS rows of them. Several are fitted in
the order of the graph: x and h are then those of a copy in which what was removed before is gone and what was fitted before is in place,
so that each layer makes up for what those before it could not.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from attnopt.analysis.padding import Padding, real
from attnopt.errors import PlanError
from attnopt.ir.block import Block
from attnopt.ir.graph import Node, Value
from attnopt.ir.site import Host, NotIsolated, Refusal
from attnopt.ir.sublayer import Sublayer
from attnopt.passes.candidate import Candidate, Evidence, Group
from attnopt.passes.edits.heads.output_fit import FEW, RIDGE, ROWS
from attnopt.passes.edits.layers.linear_layers import matrix, suits

MOST_NODES = 8  # between a linear layer and the addition of what it makes


@dataclass(frozen=True, eq=False)
class NextWriter:
    """`layer` makes what `ending` adds to `stream`, one of its two inputs; bias is the constant that is added before."""

    layer: Node
    ending: Node
    stream: Value
    bias: Tensor | None = None

    @property
    def side(self) -> int:
        return 0 if self.ending.inputs[0] is self.stream else 1


def next_writer(gone: Sublayer) -> NextWriter | Refusal:
    """The linear layer whose output is added next to what the sublayer ends in, or to the norm of that."""
    residual = gone.block.residual
    if residual is not None and residual.o_norm is not None:
        return Refusal("what the attention gives is normalised before it is added", gone.ending)
    norm = None if residual is None else residual.post_norm
    for stream in (gone.ending.output, None if norm is None else norm.output):
        for node in () if stream is None else stream.users:
            other = next((v for v in node.inputs if v is not stream), None) if node.op == "add" else None
            if stream is not None and other is not None and not other.is_constant:
                found = made_by(other)
                if found is not None:
                    return NextWriter(found[0], node, stream, found[1])
    return Refusal("no linear layer writes into the residual stream behind it", gone.ending)


def made_by(value: Value) -> tuple[Node, Tensor | None] | None:
    """The linear layer below a value, and the bias that is added to what it makes."""
    bias: Tensor | None = None
    for _ in range(MOST_NODES):
        node = value.producer
        if node is None or len(value.users) != 1:
            return None
        if node.op in ("linear", "matmul"):
            held = node.inputs[2] if len(node.inputs) > 2 else None
            bias = bias if held is None else held.load() if held.load is not None else None
            shared = node.inputs[1] is not None and len(node.inputs[1].users) > 1
            return (node, bias) if suits(node, 1) and not shared and (held is None or bias is not None) else None
        below = [v for v in node.inputs if v is not None and not v.is_constant]
        if node.op not in ("add", "reshape", "cast") or len(below) != 1:
            return None
        if node.op == "add":
            constant = next(v for v in node.inputs if v is not None and v.is_constant)
            if bias is not None or constant.load is None:
                return None
            bias = constant.load()
        value = below[0]
    return None


def next_writers(gone: Sequence[Sublayer]) -> dict[Node, tuple[NextWriter, int]] | Refusal:
    """The layers that can make up for these sublayers, each with how many of those, in order, are gone where it writes.

    One that goes itself makes up for nothing.
    """
    removed = {node.name for s in gone for node in s.removed}
    found: dict[Node, tuple[NextWriter, int]] = {}
    for count, sublayer in enumerate(gone, 1):
        writer = next_writer(sublayer)
        if isinstance(writer, Refusal):
            return writer
        if writer.layer.name not in removed:
            found[writer.layer] = writer, count
    return found or Refusal("what writes into the residual stream behind it goes as well", gone[0].ending)


def fitted(group: Group, gone: Sequence[Sublayer], evidence: Evidence) -> dict[Node, Tensor] | Refusal:
    """The next writers and their new weights [out, in]. gone: in the order of the graph."""
    writers = next_writers(gone)
    if isinstance(writers, Refusal):
        return writers
    weights: dict[Node, Tensor] = {}
    for layer, (writer, count) in writers.items():
        found = fitted_one(group, writer, gone[:count], weights, evidence)
        if isinstance(found, Refusal):
            return found
        weights[layer] = found
    return weights


def fitted_one(
    group: Group, found: NextWriter, gone: Sequence[Sublayer], weights: dict[Node, Tensor], evidence: Evidence
) -> Tensor | Refusal:
    """The new weight of one writer, from a copy of the host in which sublayers give zeros and layers have the weights found so far."""
    made = group.host.copy()
    for sublayer in gone:
        silence(made, sublayer.block)
    for node, weight in weights.items():
        if (there := twin(made, node)) is not None:
            set_weight(made, there, weight)
    made.finish()
    layer, ending = twin(made, found.layer), twin(made, found.ending)
    if layer is None or ending is None or None in (layer.inputs[0], ending.inputs[found.side]):
        return Refusal("the layer that follows is not found again in a copy", found.layer)
    try:
        seen = moments(group, found, made, [layer.inputs[0], ending.inputs[found.side]], evidence)  # type: ignore[list-item]
    except NotIsolated as failure:
        return Refusal(f"what the layer that follows reads cannot be tapped: {failure}", found.layer)
    return solved(matrix(found.layer).double(), *seen)


def put(candidate: Candidate, group: Group) -> None:
    """Give the layers of a fitted candidate their weights, in the host of the group. Raises PlanError where the numbers are not there."""
    for layer in candidate.nodes:
        node = next(n for n in group.host.graph.of("linear", "matmul") if n.name == layer.name)
        weight = candidate.arrays.get(layer.name, {}).get("weight")
        if weight is None:
            raise PlanError(
                f"the plan does not hold the numbers that '{candidate.pass_name}' found: '{layer.name}' was fitted on calibration data",
                next_move="Give the calibration data that the plan was found with, or use the model that was written with it.",
            )
        set_weight(group.host, node, weight)


def set_weight(host: Host, node: Node, weight: Tensor) -> None:
    """weight: [out, in]."""
    held = node.inputs[1]
    assert held is not None and held.load is not None
    host.set_input(node, held, (weight if node.op == "linear" else weight.mT).to(held.load().dtype).contiguous())


def silence(host: Host, block: Block) -> None:
    """Let the output projection of a block give zeros in an equal host: what remains is what removal leaves."""
    assert block.o is not None
    for held in (block.o.weight, block.o.bias):
        for reader in () if held is None or held.load is None else held.users:
            there, at = twin(host, reader), next(i for i, v in enumerate(reader.inputs) if v is held)
            value = None if there is None else there.inputs[at]
            if there is not None and value is not None and held is not None and held.load is not None:
                host.set_input(there, value, torch.zeros_like(held.load()))


def twin(host: Host, node: Node) -> Node | None:
    """The node in an equal host; a product and the addition of its bias may have one name."""
    return next((n for n in host.graph.nodes if (n.name, n.op) == (node.name, node.op)), None)


def moments(group: Group, found: NextWriter, made: Host, reads: list[Value], evidence: Evidence) -> tuple[Tensor, Tensor, int]:
    """(A, C, rows) as sums."""
    tap, padding, bias = made.tapper(reads), Padding.of(group.host.graph), found.bias
    width, outputs = matrix(found.layer).shape[1], matrix(found.layer).shape[0]
    own, cross, count = torch.zeros(width, width).double(), torch.zeros(outputs, width).double(), 0
    for inputs, (y,) in evidence.hold([found.ending.output]):
        h, x = tap(inputs)
        rows = padding.leading(found.ending.output.shape, y, inputs)
        target = real(y, rows).double() - real(x, rows).double() - (0 if bias is None else bias.double())
        h = h.reshape(-1, width).double()
        h = h if rows is None else h[rows.flatten()]
        own, cross, count = own + h.mT @ h, cross + target.mT @ h, count + len(h)
        if count >= ROWS:
            break
    return own, cross, count


def solved(weight: Tensor, own: Tensor, cross: Tensor, rows: int) -> Tensor:
    if rows < FEW * len(own):
        return weight * float((cross * weight).sum() / ((weight @ own) * weight).sum().clamp(min=1e-30))
    ridge = RIDGE * own.diagonal().mean()
    return torch.linalg.solve(own + ridge * torch.eye(len(own), dtype=own.dtype), (cross + ridge * weight).mT).mT
