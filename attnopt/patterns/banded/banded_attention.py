"""softmax over the diagonals of chunk products   ->   a Site with mask window(w + 1) & lookahead(w + 1).

scores [B, Q, H, 2w + 1], weights -> chunks -> product with chunks of v    ->    q, k, v [B, H, L, D] as they were before
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from attnopt.ir.clause import Clause
from attnopt.ir.dims import divide
from attnopt.ir.expr import Const, Expr, Index, apply
from attnopt.ir.graph import Node, Value
from attnopt.ir.layout import Axis, AxisSpace, Layout, LayoutMismatch
from attnopt.ir.site import Site
from attnopt.patterns.activations import SCORE_OPS, Activations
from attnopt.patterns.assembly import Assembly, Placed
from attnopt.patterns.banded.affine import OtherPeriod, Region, Undecided, Unreadable, number, size
from attnopt.patterns.banded.band import Axes, Band, Bools, Finding
from attnopt.patterns.banded.scores import Scores
from attnopt.patterns.banded.tracing import CROSSED, Trace
from attnopt.patterns.normalizer import Anchor
from attnopt.patterns.score import PRODUCT, NotAttention, Score, negation

LARGEST = 1 << 22  # scores of one chunk that are followed
REGIONS = 24  # pieces into which the chunks may fall: the first, the last, those between
PARTS = ("slice", "concat", "gather")  # what makes diagonals of chunks
ONE_LENGTH = "queries and keys of one length, cut into chunks of a fixed length"


@dataclass(frozen=True)
class Reading:
    """One way to read the scores: `place` is the dimension of the queries, in chunks of `rows`."""

    anchor: Anchor
    product: Node
    activations: Activations
    axes: Axes
    place: int
    rows: int
    columns: int

    def band(self, region: Region) -> Band:
        scores = Scores(Trace(region), self.activations)
        return Band(self.anchor, self.product, scores, self.axes, self.place, self.rows, self.columns)


def in_regions(reading: Reading, whole: Region) -> tuple[Finding, Bools]:
    """What holds for every chunk, and which columns of the band are seen. Chunks are parted where a border needs it."""
    anchor, shape = reading.anchor, (reading.rows, reading.columns)
    found: list[tuple[Finding, Bools, Bools]] = []
    waiting, cuts = [whole], 0
    while waiting:
        region = waiting.pop()
        try:
            found.append(reading.band(region).finding())
        except Undecided as border:
            cuts += 1
            if cuts > REGIONS:
                raise NotAttention("the chunks of a band fall into too many kinds", anchor.node, ONE_LENGTH) from None
            waiting += region.cut(border.at)
    first = found[0][0]
    if any(finding != first for finding, _, _ in found):
        raise NotAttention("the chunks of a band are made in different ways", anchor.node, ONE_LENGTH)
    columns: Bools = np.any([seen.reshape(shape).any(0) for _, seen, _ in found], axis=0)
    if any((seen.reshape(shape) != (valid.reshape(shape) & columns)).any() for _, seen, valid in found):
        raise NotAttention("a column of the band is hidden for some queries only", anchor.node, "one band for all queries")
    return first, columns


@dataclass
class BandedAttention(Assembly):
    """One attempt to read an anchor as a band. `reached` is how far it came."""

    activations: Activations
    reached: str = "softmax"
    rows: int = 1  # of a chunk, as far as they are known

    def from_anchor(self, anchor: Anchor) -> Site | None:
        """None where the weights do not go through diagonals into a product. Raises NotAttention where they are no band."""
        products = list(self.value_products(anchor.weights))
        if not products or anchor.scores.shape is None:
            return None
        self.reached = "value product"
        if len(products) > 1:
            raise NotAttention("the weights of a band enter several products", products[0], "one product with values")
        failures: list[tuple[int, NotAttention]] = []
        for place, dim in enumerate(anchor.scores.shape):
            if place == anchor.axis or dim == 1:
                continue
            self.rows = 1
            try:
                return self.read(anchor, products[0], place)
            except NotAttention as failure:
                failures.append((self.rows, failure))
        # Only the queries are cut into chunks: what failed there is the reason.
        raise (
            max(failures, key=lambda f: f[0])[1] if failures else NotAttention("the band has no queries", anchor.node, ONE_LENGTH)
        )

    def value_products(self, weights: Value) -> Iterator[Node]:
        """The products with activations that the weights reach through diagonals."""
        stack, met = [(weights, False)], set()
        while stack:
            value, cut = stack.pop()
            for node in value.users:
                if node in met:
                    continue
                if node.op == "matmul":
                    met.add(node)
                    if cut and all(i is not None and self.activations.is_operand(i) for i in node.inputs):
                        yield node
                elif node.op in CROSSED or node.op == "where":
                    met.add(node)
                    stack.append((node.output, cut or node.op in PARTS))

    def read(self, anchor: Anchor, product: Node, place: int) -> Site:
        finding, columns, axes = self.proved(anchor, product, place)
        self.reached = "band"
        self.lead, self.q, self.k, self.d, self.e = axes.lead, axes.q, axes.k, axes.d, axes.e
        self.weights_used = self.other_use(anchor.weights, product)
        score = Score(product=finding.product, empty_row="zero")
        for kind, by, negated in finding.terms:
            self.say(score, kind, by, negated)
        score.masks = [*self.band_mask(finding, columns, anchor), *score.masks]
        for _, by, negated in finding.factors:
            assert isinstance(by, tuple)
            self.reweigh(score, by, negated)
        value, layout = self.written(product.output, finding.output)
        try:
            return self.site(anchor.node, finding.queries, finding.keys, finding.values, (value, layout), score)
        except LayoutMismatch as mismatch:
            raise NotAttention(str(mismatch), product) from None

    # The proof.

    def proved(self, anchor: Anchor, product: Node, place: int) -> tuple[Finding, Bools, Axes]:
        """What holds for every chunk, and which columns are seen."""
        shape, columns = anchor.scores.shape or (), (anchor.scores.shape or ())[anchor.axis]
        if not isinstance(columns, int):
            raise NotAttention(f"the band has {columns} columns: a number is needed", anchor.node, "a window of fixed length")
        rows = 1
        while True:
            chunks = divide(shape[place], rows)
            if chunks is None:
                reason = f"a length of {shape[place]} is not shown to be a multiple of the chunks' {rows}"
                raise NotAttention(reason, anchor.node, ONE_LENGTH)
            if rows * columns > LARGEST:
                raise NotAttention(f"chunks of {rows} with {columns} columns are not followed", anchor.node)
            reading = Reading(anchor, product, self.activations, self.band_axes(anchor, product, place), place, rows, columns)
            try:
                count = size(chunks)
                return *in_regions(reading, Region(number(0), count - number(1), frozenset(count.terms))), reading.axes
            except OtherPeriod as other:
                self.rows = rows = math.lcm(rows, other.length)
            except Unreadable as failure:
                raise NotAttention(f"the places of a band are not read: {failure}", anchor.node, ONE_LENGTH) from None

    def band_axes(self, anchor: Anchor, product: Node, place: int) -> Axes:
        shape = anchor.scores.shape or ()
        lead = tuple(Axis(f"j{i}", dim) for i, dim in enumerate(shape) if i not in (place, anchor.axis))
        length, scored = shape[place], self.score_product(anchor)
        width = scored.inputs[0].shape[-1]  # type: ignore[union-attr, index]
        return Axes(lead, Axis("q", length), Axis("k", length), Axis("d", width), Axis("e", (product.output.shape or (0,))[-1]))

    def score_product(self, anchor: Anchor) -> Node:
        """The first product of two activations on the way up from the scores."""
        stack, met = [anchor.scores], set()
        while stack:
            node = stack.pop().producer
            if node is None or node in met:
                continue
            met.add(node)
            if node.op == "matmul" and all(
                i is not None and i.shape is not None and self.activations.is_operand(i) for i in node.inputs
            ):
                return node
            if node.op in SCORE_OPS or node.op in CROSSED:
                stack += [i for i in node.inputs if i is not None]
        raise NotAttention("no product of queries and keys reaches the softmax", anchor.node, PRODUCT)

    # The site.

    def band_mask(self, finding: Finding, columns: Bools, anchor: Anchor) -> list[Expr]:
        seen = np.flatnonzero(columns)
        if seen.size == 0 or seen.size != seen[-1] - seen[0] + 1:
            raise NotAttention(
                "the columns of the band that are seen are not neighbours", anchor.node, "one band for all queries"
            )
        behind, ahead = finding.behind - int(seen[0]), int(seen[-1]) - finding.behind
        row, key = Index("row"), Index("k")
        return [
            apply("lt", apply("sub", row, key), behind + 1),
            apply("le", key, row) if ahead == 0 else apply("lt", apply("sub", key, row), ahead + 1),
        ]

    def say(self, score: Score, kind: str, by: float | Placed, negated: bool) -> None:
        said: Expr = Const(float(by)) if not isinstance(by, tuple) else self.load(*by, "mask" if kind == "mask" else "bias")
        if kind == "mask":
            score.masks.append(negation(said) if negated else said)
        else:
            score.terms.append(Clause(kind, (apply("neg", said) if negated else said,)))

    def reweigh(self, score: Score, by: Placed, negated: bool) -> None:
        """A condition on the query alone leaves an empty row, which is zero here; any other is a factor."""
        read = self.load(*by, "mask")
        kept = negation(read) if negated else read
        if self.k in {axis for group in by[1] for axis in group}:
            score.factors.append((kept, True))
        else:
            score.masks.append(kept)

    def written(self, value: Value, layout: Layout) -> Placed:
        """The output where chunks are side by side again, as far as that is its only use."""
        space = AxisSpace()
        pieces = tuple(axis for group in layout for axis in group if axis not in (*self.lead, self.e, self.q))
        last, held = value, layout
        while len(value.users) == 1 and value not in self.graph.outputs and value.users[0].op in ("permute", "reshape"):
            try:
                layout = space.after(value.users[0], layout)
            except LayoutMismatch:
                break
            value = value.users[0].output
            if any(group == pieces for group in layout):
                return value, tuple((self.q,) if group == pieces else group for group in layout)
        if pieces:
            self.space.splits[self.q] = pieces  # type: ignore[assignment]
        return last, held

    def other_use(self, weights: Value, product: Node) -> Node | None:
        """Who reads the weights besides the product with the values."""
        inside: set[Node] = set()
        stack = [i for i in product.inputs if i is not None]
        while stack:
            node = stack.pop().producer
            if node is not None and node not in inside:
                inside.add(node)
                stack += [i for i in node.inputs if i is not None]
        stack, met = [weights], {weights}
        while stack:
            value = stack.pop()
            if value in self.graph.outputs:
                return value.producer
            for node in value.users:
                if node is not product and node not in inside:
                    return node
                if node is not product and node.output not in met:
                    met.add(node.output)
                    stack.append(node.output)
        return None
