"""Where things stand in a graph: which names are taken, which value first has a dimension of some size.

Both are asked for again and again while a graph is edited; each answer takes the same time in graphs of any length.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from attnopt.ir.dims import Dim
from attnopt.ir.graph import Graph, Node, Value


class Names(set[str]):
    """The names that are taken."""

    def __init__(self, names: Iterable[str] = ()) -> None:
        super().__init__(names)
        self.counts: dict[str, int] = {}  # where counting stopped

    def unique(self, wanted: str) -> str:
        """The name, or the name with a number; it is taken from now on."""
        name, count = wanted, self.counts.get(wanted, 0)
        while name in self:
            count += 1
            name = f"{wanted}_{count}"
        self.counts[wanted] = count
        self.add(name)
        return name


@dataclass
class Places:
    """Of a canonical graph. `first` is where the nodes of a name begin; `holders` has per size the first value and its axis.

    around: of a body, the places of the graph around it, and the name of the node there that runs it.
    """

    order: dict[Node, int] = field(default_factory=dict)
    first: dict[str, int] = field(default_factory=dict)
    holders: dict[Dim, tuple[int, Value, int]] = field(default_factory=dict)
    around: tuple[Places, str] | None = None

    @classmethod
    def of(cls, graph: Graph, around: tuple[Places, str] | None = None) -> Places:
        places = cls(around=around)
        for value in graph.inputs:
            places.take_in(value, -1)
        for at, node in enumerate(graph.nodes):
            places.order[node] = at
            places.first.setdefault(node.name, at)
            for value in node.outputs:
                if value.handle is not None:
                    places.take_in(value, at)
        return places

    def take_in(self, value: Value, at: int) -> None:
        for axis, dim in enumerate(value.shape or ()):
            if not isinstance(dim, int):
                self.holders.setdefault(dim, (at, value, axis))

    def before(self, name: str, dim: Dim) -> tuple[Value, int] | None:
        """A value that exists before the nodes of this name and has this dimension, and where."""
        at, value, axis = self.holders.get(dim, (len(self.order), None, 0))
        if value is not None and at < self.first.get(name, len(self.order)):
            return value, axis
        return None if self.around is None else self.around[0].before(self.around[1], dim)


def by_node(graph: Graph, around: tuple[Places, str] | None = None) -> dict[Node, tuple[Graph, Places]]:
    """For every node, however deep, the graph it stands in and the places there."""
    own = Places.of(graph, around)
    found = dict.fromkeys(graph.nodes, (graph, own))
    for node, _, body in graph.bodies():
        found |= by_node(body, (own, node.name))
    return found
