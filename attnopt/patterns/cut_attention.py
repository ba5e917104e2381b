"""Weights cut along the keys, each piece times values of its own, and the products summed  ->  one Site.

    p = softmax(scores);  p[:, :n] v1 + p[:, n:] v2      ->      p v,  v = concat([v1, v2])

Found where slices of the weights are the only parts of them that are read and together are the whole. From the sum back up to the
slices the axes are followed through every layout operation, as in `softmax_attention`, and the values joined as in `joining`.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from attnopt.ir.dims import Dim
from attnopt.ir.graph import LAYOUT, Node, Value
from attnopt.ir.layout import Axis, Layout, LayoutMismatch
from attnopt.ir.site import Site
from attnopt.patterns.assembly import Placed
from attnopt.patterns.joining import joined, part_axes
from attnopt.patterns.normalizer import Anchor
from attnopt.patterns.operands import broadcast_layout
from attnopt.patterns.score import NotAttention
from attnopt.patterns.softmax_attention import SoftmaxAttention

END = 1 << 30
SUMMED = "pieces of the weights, each multiplied by values of its own, whose products are added to one sum"


def cuts(anchor: Anchor) -> tuple[Node, ...]:
    """The slices that take the weights apart along the keys, in order; none where they leave something out."""
    value, axis = anchor.weights, anchor.axis
    while len(value.users) == 1 and value.users[0].op == "cast":
        value = value.users[0].output
    size = (value.shape or ())[axis]
    found = [n for n in value.users if n.op == "slice" and n.attrs["axis"] == axis and n.attrs["step"] == 1]
    places = {n: (counted(n.attrs["start"], size), counted(n.attrs["stop"], size)) for n in found}
    found.sort(key=lambda n: start if isinstance(start := places[n][0], int) else END)
    ends = [places[n][1] for n in found]
    whole = len(found) > 1 and places[found[0]][0] == 0 and (ends[-1] in (None, size) or is_end(ends[-1]))
    follow = all(places[a][1] is not None and places[a][1] == places[b][0] for a, b in pairwise(found))
    return tuple(found) if whole and follow else ()


def counted(bound: Any, size: Dim) -> Any:
    """A bound that counts from the end, from the start, where the size is a number."""
    return bound + size if isinstance(bound, int) and isinstance(size, int) and bound < 0 else bound


def is_end(stop: object) -> bool:
    return isinstance(stop, int) and stop > END


@dataclass
class CutAttention(SoftmaxAttention):
    """One attempt to read an anchor whose weights are cut."""

    def from_anchor(self, anchor: Anchor) -> Site:
        slices = cuts(anchor)
        self.weights_used = next((n for n in slices[0].inputs[0].users if n not in slices), None)  # type: ignore[union-attr]
        if anchor.weights in self.graph.outputs:
            self.weights_used = anchor.node
        products = [self.piece_product(node, anchor) for node in slices]
        total = self.sum_of([product.output for product, _ in products])
        self.reached = "sum of value products"
        try:
            layout, values = self.above_sum(total, products, slices, anchor)
            return self.from_weights(anchor, layout, values, (total, self.output), products[0][0])
        except LayoutMismatch as mismatch:
            raise NotAttention(str(mismatch), products[0][0]) from None

    def piece_product(self, node: Node, anchor: Anchor) -> tuple[Node, Value]:
        """The product that one piece of the weights enters, and the value that enters it."""
        product, weights, guarded = self.value_product(Anchor(anchor.scores, node.output, anchor.axis, node))
        if guarded or self.factors or self.mixing or self.dropped is not None:
            raise NotAttention("a piece of the weights is changed before it meets its values", node, SUMMED)
        return product, weights

    def sum_of(self, products: list[Value]) -> Value:
        """The value in which all the products are added, through layout operations and casts."""
        waiting = dict.fromkeys(products)
        while len(waiting) > 1:
            for value in waiting:
                users = value.users
                onward = len(users) == 1 and value not in self.graph.outputs
                if onward and users[0].op == "add" and all(i in waiting for i in users[0].inputs):
                    gone = users[0].inputs
                elif onward and (users[0].op in LAYOUT or users[0].op == "cast"):
                    gone = (value,)
                else:
                    continue
                waiting = dict.fromkeys([*(v for v in waiting if v not in gone), users[0].output])
                break
            else:
                culprit = next((n for v in waiting for n in v.users), None)
                reason = "pieces of the weights meet values of their own, and the products are not summed"
                raise NotAttention(reason, culprit or products[0].producer, SUMMED)  # type: ignore[arg-type]
        return next(iter(waiting))

    def above_sum(
        self, total: Value, products: list[tuple[Node, Value]], slices: tuple[Node, ...], anchor: Anchor
    ) -> tuple[Layout, Placed]:
        """Names the axes; returns the layout of the weights, and the joined values."""
        axes = tuple(Axis(f"j{i}", size) for i, size in enumerate(total.shape or ()))
        found: dict[Node, Layout] = {}
        self.up_to_products(total, tuple((a,) for a in axes), {p for p, _ in products}, found)
        pieces = part_axes([(node.output.shape or ())[anchor.axis] for node in slices])
        rows = [self.weights_first(product, weights) for product, weights in products]
        groups = [self.space.resolve(found[product])[-2:] for product, _ in products]
        queries = set.intersection(*({*(g[0] if first else g[1])} for g, first in zip(groups, rows, strict=True)))
        widths = {g[1] if first else g[0] for g, first in zip(groups, rows, strict=True)}
        whole = self.space.resolve(tuple((a,) for a in axes))
        q = [axis for group in whole for axis in group if axis in queries and axis.size != 1]
        if len(q) != 1 or len(widths) != 1 or len(next(iter(widths))) != 1:
            raise NotAttention(
                "the value products of the pieces do not share rows of queries and channels", products[0][0], SUMMED
            )
        self.q, (self.e,) = q[0], next(iter(widths))
        self.lead = tuple(axis for group in whole for axis in group if axis not in (self.q, self.e))
        self.k = Axis("k", (anchor.weights.shape or ())[anchor.axis])
        self.output = whole
        values: list[Placed] = []
        weights_layouts: set[Layout] = set()
        for (product, weights), first, piece, node in zip(products, rows, pieces, slices, strict=True):
            *lead, top, bottom = self.space.resolve(found[product])
            left, right = product.inputs if first else product.inputs[::-1]
            assert left is not None and right is not None
            own, other = (top, bottom) if first else (bottom, top)
            ordered = ((own, (piece,)), ((piece,), other)) if first else (((piece,), own), (other, (piece,)))
            values.append((right, (*self.batch_of(right, lead), *ordered[1])))
            layout = self.up_to_anchor(weights, node.output, (*self.batch_of(left, lead), *ordered[0]))
            if layout[anchor.axis] != (piece,):
                raise NotAttention("a piece of the weights is not summed over its keys", product, SUMMED)
            weights_layouts.add((*layout[: anchor.axis], (self.k,), *layout[anchor.axis + 1 :]))
        if len(weights_layouts) != 1:
            raise NotAttention("pieces of the weights are arranged in different ways", products[0][0], SUMMED)
        return weights_layouts.pop(), joined(self, values, pieces, self.k, (self.e,), products[0][0])

    def up_to_products(self, value: Value, layout: Layout, stop: set[Node], found: dict[Node, Layout]) -> None:
        """The layout at every product of the sum."""
        node = value.producer
        assert node is not None
        if node in stop:
            found[node] = self.space.resolve(layout)
            return
        for part in node.inputs[: 2 if node.op == "add" else 1]:
            assert part is not None
            before = self.space.before(node, layout) if node.op in LAYOUT else layout
            if node.op == "add" and (part.shape is None or broadcast_layout(part, layout) != layout):
                raise NotAttention("a value product is repeated where it is added", node, SUMMED)
            self.up_to_products(part, before, stop, found)

    @staticmethod
    def weights_first(product: Node, weights: Value) -> bool:
        return product.inputs[0] is weights

    @staticmethod
    def batch_of(value: Value, lead: list[tuple[Axis, ...]]) -> Layout:
        return broadcast_layout(Value(value.name, (value.shape or ())[:-2]), tuple(lead))
