"""Where keys or values meet a cache: new rows behind past ones, or in their places of a fixed cache.

concat(past [B, H, P, D], new [B, H, L, D], axis=2)   ->   CacheUpdate("concat", past, new)
scatter(cache [B, H, S, D], positions, new, axis=2)   ->   CacheUpdate("scatter", cache, new, indices)
"""

from __future__ import annotations

from dataclasses import replace

from attnopt.ir.block import CacheUpdate, origin
from attnopt.ir.graph import Graph, Node, Value
from attnopt.ir.layout import Axis, Operand
from attnopt.patterns.block.terms import NotRead, Term, Walk


def meets_cache(walk: Walk, term: Term) -> bool:
    """Whether the node at a term joins or replaces rows along positions."""
    node = term.node
    if node is None or node.op not in ("concat", "scatter"):
        return False
    return walk.coordinate(term, node.attrs["axis"]) is None


def cache_update(walk: Walk, term: Term, graph: Graph) -> tuple[CacheUpdate, Term]:
    """The update at a term, and the term of the new rows. Raises NotRead where rows are joined that are no cache."""
    node = term.node
    assert node is not None
    axis = node.attrs["axis"]
    present = leaving(node.output, graph)
    if node.op == "scatter":
        past, indices, new = node.inputs
        assert past is not None and new is not None
        if held(past, graph) is None:
            raise NotRead("what the rows are written into is no input of the model", node)
        return CacheUpdate("scatter", Operand(past, term.layout), new, axis, present, indices), rows(walk, term, new, axis)
    inputs = [i for i in node.inputs if i is not None]
    if len(inputs) != 2 or held(inputs[0], graph) is None:
        raise NotRead(f"rows of {len(inputs)} values are joined here, the first no input of the model", node)
    past, new = inputs
    return CacheUpdate("concat", Operand(past, rows(walk, term, past, axis).layout), new, axis, present), rows(
        walk, term, new, axis
    )


def held(value: Value, graph: Graph) -> Value | None:
    """The input of the graph (or the constant, a learned prefix) that a past comes from; layout and windows change nothing."""
    value = origin(value)
    return value if value in graph.inputs or value.is_constant else None


def rows(walk: Walk, term: Term, value: Value, axis: int) -> Term:
    """The term at one of the joined values: its positions are an axis of its own length."""
    walk.made += 1
    own = Axis(f"n{walk.made}", (value.shape or ())[axis])
    return replace(term, value=value, layout=(*term.layout[:axis], (own,), *term.layout[axis + 1 :]))


def leaving(value: Value, graph: Graph) -> Value | None:
    """The value itself, or its last window, where the graph returns it."""
    if value in graph.outputs:
        return value
    cut: list[Node] = [n for n in value.users if n.op == "slice" and n.output in graph.outputs]
    return cut[0].output if cut else None
