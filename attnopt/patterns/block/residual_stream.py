"""The residual stream that runs through the blocks of a model, found from one of them and followed both ways.

    add(embedding, o_proj(…)) -> norm -> q, k, v        ->   ResidualStream(tables, writers, readers)

Everything that touches a value of the stream has to be known: a table or linear layer that is added to it, a norm (of rows, or of rows
less their mean) that only linear layers read, or an operation that lays rows out anew. Anything else is a refusal that names it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from attnopt.ir.block import Norm
from attnopt.ir.graph import Graph, Node, Value
from attnopt.ir.residual_stream import Reader, ResidualStream, Table, Writer
from attnopt.ir.site import Refusal
from attnopt.patterns.block.norms import norm_after, sides

CARRIES = ("reshape", "cast", "expand", "slice")  # where they keep the last dimension


class NotWhole(Exception):
    """Something touches the stream that is not known."""

    def __init__(self, reason: str, at: Node | Value | None = None) -> None:
        super().__init__(reason)
        self.reason, self.at = reason, at


def residual_stream(graph: Graph, start: Value) -> ResidualStream | Refusal:
    """The stream that this value belongs to."""
    width = (start.shape or (None,))[-1]
    if not isinstance(width, int):
        return Refusal("the width of the residual stream is not a number", start.name)
    walk = Walk(graph, width)
    try:
        walk.follow(start)
    except NotWhole as failure:
        return Refusal(failure.reason, failure.at)
    return ResidualStream(width, tuple(walk.tables), tuple(walk.writers), tuple(walk.readers))


@dataclass
class Walk:
    """Values of the stream that were met, and what touches them."""

    graph: Graph
    width: int
    met: dict[Value, None] = field(default_factory=dict)
    tables: list[Table] = field(default_factory=list)
    writers: list[Writer] = field(default_factory=list)
    readers: list[Reader] = field(default_factory=list)

    def follow(self, start: Value) -> None:
        queue = [start]
        while queue:
            value = queue.pop()
            if value in self.met:
                continue
            self.met[value] = None
            if value in self.graph.outputs:
                raise NotWhole("the model returns values of the residual stream", value.producer)
            queue += [*self.above(value), *self.below(value)]

    def above(self, value: Value) -> list[Value]:
        """The values of the stream that this one is made of; what else it is made of is noted."""
        node = value.producer
        if node is None:
            raise NotWhole(f"the residual stream begins with '{value.name}', which is no table of the model", value)
        if carries(node):
            return [node.inputs[0]]  # type: ignore[list-item]
        if node.op == "gather" and node.attrs["axis"] == 0 and node.inputs[0] is not None and node.inputs[0].is_constant:
            self.tables.append(Table(node, node.inputs[0]))
            return []
        if node.op == "mul" and any(other.scalar() is not None for _, other in sides(node)):
            return [main for main, other in sides(node) if other.scalar() is not None]
        if node.op != "add":
            raise NotWhole(f"'{node.attrs.get('operator', node.op)}' makes the residual stream", node)
        found = []
        for side in node.inputs[:2]:
            if side is None:
                raise NotWhole("an addition to the residual stream lacks a part", node)
            writer = written_by(side)
            if writer is None:
                found.append(side)
            elif side not in self.met:
                self.met[side] = None
                self.branch(side, node)
                self.writers.append(writer)
        return found

    def branch(self, value: Value, end: Node) -> None:
        """What a writer makes goes into the stream and nowhere else."""
        while True:
            others = [n for n in value.users if n is not end and not (n.op == "add" and leads(n, end))]
            others = [n for n in others if not carries(n)]
            if others or value in self.graph.outputs:
                raise NotWhole("what is added to the residual stream is read elsewhere too", others[0] if others else value)
            if value.producer is None or not carries(value.producer):
                return
            value = value.producer.inputs[0]  # type: ignore[assignment]

    def below(self, value: Value) -> list[Value]:
        """The values of the stream that this one makes; norms that read it are noted."""
        left = dict.fromkeys(value.users)
        found = []
        while left:
            node = next(iter(left))
            if node.op == "add" or carries(node):
                del left[node]
                if node.output not in self.met and not (node.op == "add" and is_norm_part(node, value)):
                    found.append(node.output)
                continue
            if node.op == "mul" and any(main is value and other.scalar() is not None for main, other in sides(node)):
                del left[node]
                found.append(node.output)
                continue
            norm = norm_after(value)
            inside = () if norm is None else between(value, norm.output)
            if norm is None or node not in inside:
                raise NotWhole(f"'{node.attrs.get('operator', node.op)}' reads the residual stream beside the norms", node)
            if norm.kind not in ("rms", "layer"):
                raise NotWhole(f"a {norm.kind} norm reads the residual stream", node)
            self.readers.append(Reader(norm, tuple(layers_below(norm, self.graph)), gain_reader(norm)))
            left = {n: None for n in left if n not in inside}
        return found


def carries(node: Node) -> bool:
    """Whether a node lays rows out anew and keeps the channels of each."""
    if node.op not in CARRIES or node.inputs[0] is None:
        return False
    before, after = node.inputs[0].shape, node.output.shape
    if node.op == "slice" and (before is None or node.attrs["axis"] == len(before) - 1):
        return False
    return bool(before) and bool(after) and before[-1] == after[-1]  # type: ignore[index]


def written_by(value: Value) -> Writer | None:
    """The linear layer whose output this value is, with its bias; None where it is something else."""
    bias: tuple[Node, Value] | None = None
    while value.producer is not None:
        node = value.producer
        if node.op in ("linear", "matmul") and constant_matrix(node):
            held = node.inputs[2] if len(node.inputs) > 2 else None
            return Writer(node, bias if held is None else (node, held)) if bias is None or held is None else None
        row = next((other for _, other in sides(node) if other.is_constant), None) if node.op == "add" else None
        if row is not None and bias is None and (row.shape or (0,))[-1] == (value.shape or (1,))[-1]:
            bias = (node, row)
            value = next(main for main, other in sides(node) if other is row)
        elif carries(node):
            value = node.inputs[0]  # type: ignore[assignment]
        else:
            return None
    return None


def constant_matrix(node: Node) -> bool:
    weight = node.inputs[1] if len(node.inputs) > 1 else None
    return weight is not None and weight.is_constant and len(weight.shape or ()) == 2


def leads(node: Node, end: Node) -> bool:
    """Whether a node is on the way from a writer to its addition."""
    return any(user is end or (carries(user) and leads(user, end)) for user in node.output.users)


def is_norm_part(node: Node, value: Value) -> bool:
    """An addition of eps that a norm is spelled with."""
    return any(other.scalar() is not None for main, other in sides(node) if main is value)


def cone(start: Value, end: Value) -> set[Node]:
    """The nodes that a value is made by, up to another one."""
    found: set[Node] = set()
    queue = [end]
    while queue:
        value = queue.pop()
        node = value.producer
        if value is start or node is None or node in found:
            continue
        found.add(node)
        queue += [v for v in node.inputs if v is not None]
    return found


def between(start: Value, end: Value) -> set[Node]:
    """The nodes on the ways from one value to another: those of the cone that the start is read by, directly or through others."""
    inside = cone(start, end)
    found: set[Node] = set()
    queue = [start]
    while queue:
        for node in queue.pop().users:
            if node in inside and node not in found:
                found.add(node)
                queue += node.outputs
    return found


def gain_reader(norm: Norm) -> Node | None:
    """The node that reads the weight of a norm, which other norms may read too."""
    if norm.weight is None:
        return None
    inside = cone(norm.input, norm.output)
    found = next((n for n in norm.weight.users if n in inside), None)
    if found is None or norm.weight.load is None:
        raise NotWhole("the weight of a norm is no constant", norm.output.producer)
    return found


def layers_below(norm: Norm, graph: Graph) -> Iterable[Node]:
    """The linear layers that read a norm. Raises NotWhole for anything else that does."""
    queue, found = [norm.output], dict[Node, None]()
    while queue:
        value = queue.pop()
        if value in graph.outputs:
            raise NotWhole("the model returns a norm of the residual stream", value.producer)
        for user in value.users:
            if carries(user) and user.inputs[0] is value:
                queue.append(user.output)
            elif user.op in ("linear", "matmul") and user.inputs[0] is value and constant_matrix(user):
                found[user] = None
            else:
                raise NotWhole(f"'{user.attrs.get('operator', user.op)}' reads a norm of the residual stream", user)
    return found
