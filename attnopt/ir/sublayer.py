"""One attention sublayer with all that would go if it were removed: norm, projections, residual addition, slots of the cache.

    y = x + o_proj(attention(norm(x), past))   ->   y = x        inputs: past keys and values      outputs: present ones

What is left is the other side of the addition, so the result is that of an output projection of zeros. A norm after the addition
stays. What would have to be computed anyway (weights or keys that others read) makes a sublayer one that cannot go.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from attnopt.ir.block import Block, Projection, caches, origin, projections
from attnopt.ir.graph import LAYOUT, Graph, Node, Value
from attnopt.ir.site import Refusal, Site

MOST_NODES = 16
COMPUTES = ("linear", "matmul", "softmax", "attention", "opaque")


@dataclass(frozen=True, eq=False)
class Sublayer:
    """`ending` adds what the attention gives to `stream`. inputs and outputs: those of the graph that exist for it alone."""

    site: Site
    block: Block
    ending: Node
    stream: Value
    inputs: tuple[Value, ...] = ()
    outputs: tuple[Value, ...] = ()

    @property
    def removed(self) -> tuple[Node, ...]:
        """The nodes that hold its weights and its attention, and nothing that other layers read as well, such as a mask."""
        last = [] if self.block.o is None else [self.block.o.node]
        held = dict.fromkeys([*layers(self.block), *self.site.nodes, *last])
        return tuple(node for node in held if not self.shared(node, held))

    def shared(self, node: Node, held: Collection[Node]) -> bool:
        """Whether something else computes with it: a way leads past the residual addition to a node that is not held."""
        stack, seen = [node], {self.ending}
        while stack:
            at = stack.pop()
            if at in seen:
                continue
            seen.add(at)
            if at.op in COMPUTES and at not in held:
                return True
            stack += [user for value in at.outputs for user in value.users]
        return False


def sublayer(graph: Graph, site: Site, block: Block) -> Sublayer | Refusal:
    """The sublayer around a site of `graph` itself (not of a body in it), or why it cannot be removed."""
    if site.weights_used is not None:
        return Refusal("the attention weights themselves are read", site.weights_used)
    if block.cross:
        return Refusal("it attends to another sequence", site.name)
    if block.residual is None or block.o is None:
        return next(iter(block.missing), Refusal("no residual addition ends it", site.name))
    found = ending(graph, block)
    if isinstance(found, Refusal):
        return found
    node, stream = found
    if (stream.shape, stream.dtype) != (node.output.shape, node.output.dtype):
        return Refusal(f"the stream {stream!r} is of another form than the sum {node.output!r}", node)
    if stream.handle is None or node.output.handle is None:
        return Refusal("its residual addition is inside of a larger operator", node)
    past = past_inputs(graph, block)
    outputs = reached_outputs(graph, site, block, past)
    return outputs if isinstance(outputs, Refusal) else Sublayer(site, block, node, stream, past, outputs)


def ending(graph: Graph, block: Block) -> tuple[Node, Value] | Refusal:
    """The first addition of something that is no constant below the output projection, and its other side."""
    assert block.o is not None and block.residual is not None
    value, norm = block.o.node.output, block.residual.o_norm
    for _ in range(MOST_NODES):
        if any(value is output for output in graph.outputs):
            return Refusal("what it gives is an output of the model", value.producer)
        if norm is not None and value is norm.input:
            value = norm.output
            continue
        if len(value.users) != 1:
            return Refusal("what it gives is read by several nodes", value.producer)
        (node,) = value.users
        if node.op == "add":
            other = node.inputs[1] if node.inputs[0] is value else node.inputs[0]
            assert other is not None
            if not other.is_constant:
                return node, other
        elif node.op not in ("reshape", "cast", "mul"):
            return Refusal(f"'{node.attrs.get('operator', node.op)}' stands between it and the residual addition", node)
        value = node.output
    return Refusal("no residual addition ends it", block.o.node)


def layers(block: Block) -> list[Node]:
    """The linear layers that queries, keys and values come from; of a low-rank pair both."""
    found: list[Projection] = [p for name in "qkv" for p in projections(block.streams.get(name, ()))]
    return list(dict.fromkeys(p.node for up in found for p in (up, up.lowest)))


def past_inputs(graph: Graph, block: Block) -> tuple[Value, ...]:
    """The inputs of the graph in which its past keys and values come."""
    given = [origin(cache.past.value) for name in "kv" for cache in caches(block.streams.get(name, ()))]
    return tuple(dict.fromkeys(v for v in given if any(v is i for i in graph.inputs)))


def reached_outputs(graph: Graph, site: Site, block: Block, past: Sequence[Value]) -> tuple[Value, ...] | Refusal:
    """The outputs of the graph that its keys and values reach without the attention; a refusal where another node computes with them."""
    inside = {n for n in (*site.nodes, site.output.value.producer) if n is not None and n.op not in LAYOUT}
    own = layers(block)
    stack = [*own, *(user for value in past for user in value.users)]
    seen: set[Node] = set()
    outputs: dict[Value, None] = {}
    while stack:
        node = stack.pop()
        if node in seen or node in inside:
            continue
        if node.op in COMPUTES and node not in own:
            return Refusal("its queries, keys or values are read by another node as well", node)
        seen.add(node)
        for value in node.outputs:
            outputs |= {value: None} if any(value is output for output in graph.outputs) else {}
            stack += value.users
    return tuple(outputs)
