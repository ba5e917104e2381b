"""Centre what writes into the residual stream, so that norms need not take the mean off.

    x = table[i] + … + W' h + b       ->       x = (table P)[i] + … + (W P)' h + b P            P = 1 - 11'/D: mean(x) = 0 always
    layer_norm(x) * g + c -> V        ->       rms_norm(x) * g -> V, b + V c

Every writer has to be centred: tables, output projections, the last layers of MLPs. A table that another layer reads too, as a tied
head does, stays as it is, and its rows are centred when they are looked up. The bias c of a norm goes into the biases of the layers that
read it; a norm before a layer without one keeps its form, which is exact as well. Where blocks share a weight it is centred once.

With layer norms gone the stream can be rotated (`passes.rotation`).
Source: "On the Expressivity Role of LayerNorm in Transformers' Attention" (the decomposition; the fold is standard algebra).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from attnopt.ir.graph import Node, Value
from attnopt.ir.residual_stream import Reader, ResidualStream, Table
from attnopt.ir.site import Host, Refusal
from attnopt.passes.candidate import Candidate, Evidence, Group, Per
from attnopt.passes.edits.caches.nodes import Nodes
from attnopt.passes.edits.layers.ends import LayerEnds, ends_of
from attnopt.passes.edits.layers.linear_layers import matrix
from attnopt.passes.edits.layers.writer import as_wide, set_bias


@dataclass(frozen=True)
class CenterStream:
    """Centre what writes into the residual stream, so that norms need not take the mean off."""

    name: str = "center-stream"
    exact: bool = True
    per: Per = "model"

    def propose(self, group: Group, evidence: Evidence | None) -> list[Candidate] | Refusal:
        stream = group.stream
        if not isinstance(stream, ResidualStream):
            return stream or Refusal("there is no residual stream", group.name)
        unfit = next((r.norm for r in stream.readers if r.norm.kind != "layer"), None)
        if unfit is not None:
            return Refusal(f"a {unfit.kind} norm reads the stream: it sees the mean", unfit.output.producer)
        changed = [r for r in stream.readers if refuses(r) is None]
        if not changed:
            return next((why for r in stream.readers if (why := refuses(r)) is not None), Refusal("no norm reads the stream"))
        left = len(stream.readers) - len(changed)
        more = f", {left} of them as they are" if left else ""
        tied = sum(is_tied(t) for t in stream.tables)
        rows = f", rows of {tied} shared tables centred when they are read" if tied else ""
        return [
            Candidate(
                self.name,
                True,
                f"{len(stream.readers)} norms of a centred stream by root mean square{more}{rows}",
                "On the Expressivity Role of LayerNorm",
                nodes=(*(w.node for w in stream.writers), *(n for r in changed for n in r.layers)),
                kind="centred",
                changes=("structure",),
            )
        ]

    def apply(self, candidate: Candidate, group: Group) -> Group:
        """Edits the host of the group in place; give it a copy, and finish it."""
        stream, host = group.stream, group.host
        if not isinstance(stream, ResidualStream):
            raise RuntimeError(f"the residual stream cannot be centred: {stream}")
        for table in stream.tables:
            center_table(host, table)
        nodes = [w.node for w in stream.writers]
        for node in nodes:
            weight = node.inputs[1]
            assert weight is not None and weight.load is not None
            centred = center(as_wide(matrix(node)), 0)
            store(host, node, weight, centred if node.op == "linear" else centred.T, nodes)
        biases = [w.bias for w in stream.writers if w.bias is not None]
        for adds, value in biases:
            assert value.load is not None
            store(host, adds, value, center(as_wide(value.load()), -1), [n for n, _ in biases])
        for reader in stream.readers:
            if refuses(reader) is None:
                without_mean(host, reader)
        return group


def center(rows: Tensor, axis: int) -> Tensor:
    return rows - rows.mean(axis, keepdim=True)


def is_tied(table: Table) -> bool:
    return any(user is not table.node for user in table.value.users)


def center_table(host: Host, table: Table) -> None:
    assert table.value.load is not None
    if not is_tied(table):
        store(host, table.node, table.value, center(as_wide(table.value.load()), -1), [table.node])
        return
    rows = table.node.output
    builder = host.builder(table.node)
    again = builder.emit("gather", *table.node.inputs, shape=rows.shape or (), dtype=rows.dtype, axis=0)
    n = Nodes(builder)
    host.replace(rows, n.sub(again, n.reduced("mean", again)))


def store(host: Host, node: Node, value: Value, data: Tensor, alike: Sequence[Node]) -> None:
    """Once for all nodes that read a constant where all of them are changed alike; else for this one."""
    assert value.load is not None
    held = data.to(value.load().dtype).reshape(value.load().shape).contiguous()
    if len(value.users) == 1 or all(user in alike for user in value.users):
        if node is next(user for user in value.users if user in alike or user is node):
            host.set_constant(value, held)
    else:
        host.set_input(node, value, held)


def refuses(reader: Reader) -> Refusal | None:
    """Why a norm keeps its form: the bias it has would cost an addition elsewhere."""
    norm = reader.norm
    if norm.output.handle is None or norm.input.dtype != norm.output.dtype:
        return Refusal("the norm changes the type of its rows", norm.output.producer)
    ends = [ends_of(node) for node in reader.layers]
    offset = norm.offset()
    if offset is None or not bool(offset.any()):
        return None
    if not ends or any(isinstance(e, Refusal) or e.bias is None for e in ends):
        return Refusal("a layer after the norm has no bias, into which that of the norm could go", norm.output.producer)
    return None


def without_mean(host: Host, reader: Reader) -> None:
    norm, offset = reader.norm, reader.norm.offset()
    for node in reader.layers if offset is not None and bool(offset.any()) else ():
        layer = ends_of(node)
        assert isinstance(layer, LayerEnds) and layer.bias is not None and layer.bias.load is not None and offset is not None
        set_bias(host, layer, as_wide(layer.bias.load().reshape(-1)) + as_wide(matrix(node)) @ as_wide(offset))
    made = norm.output.producer
    assert made is not None
    builder, gain = host.builder(made), norm.gain()
    held = () if gain is None else (norm.weight if not norm.shift else builder.constant(gain, norm.output.dtype),)
    shape = norm.output.shape or ()
    host.replace(norm.output, builder.emit("rms_norm", norm.input, *held, shape=shape, dtype=norm.output.dtype, eps=norm.eps))
