"""The proof that one band of scores is attention, for the chunks of one region.

    scores[b, q, h, j] = q[b, h, q] . k[b, h, q + j - w] + …       wherever that key exists, minus infinity elsewhere
    out[b, h, q] = sum over j of weights[b, q, h, j] * v[b, h, q + j - w]

Rows x of a chunk and columns j of the band are written out; the chunk, batch, heads and widths stay symbols. A `Finding` is what
must come out alike for every region.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from attnopt.ir.graph import Node, Value
from attnopt.ir.layout import Axis, AxisSpace, Layout, LayoutMismatch
from attnopt.patterns.banded.affine import CHUNK, Affine, Numbers, Region, atom, number, size
from attnopt.patterns.banded.placement import Placement, along, held
from attnopt.patterns.banded.scores import Cell, Scores, Term, factors, is_minus_infinity, never
from attnopt.patterns.banded.tracing import Elements
from attnopt.patterns.normalizer import Anchor
from attnopt.patterns.reweighing import is_zero
from attnopt.patterns.score import PRODUCT, NotAttention

Bools = npt.NDArray[np.bool_]
Placed = tuple[Value, Layout]
Said = tuple[str, float | Placed, bool]  # a term or factor: kind, number or placed tensor, negated
GARBAGE = "minus infinity for every column of the band whose key lies outside of the sequence"


@dataclass(frozen=True)
class Axes:
    """lead: the dimensions of the scores beside queries and columns, in order; d and e: the widths of keys and values."""

    lead: tuple[Axis, ...]
    q: Axis
    k: Axis
    d: Axis
    e: Axis


@dataclass(frozen=True)
class Finding:
    """queries, keys and values with the axes they hold; `columns` of the band that are seen; output: its layout."""

    product: Node
    behind: int  # w: column j is the key q + j - w
    queries: Placed
    keys: Placed
    values: Placed
    terms: tuple[Said, ...]
    factors: tuple[Said, ...]
    output: Layout


@dataclass
class Band:
    """One region of one reading: the softmax runs over `columns` columns, chunks have `rows` rows."""

    anchor: Anchor
    weights_product: Node
    scores: Scores
    axes: Axes
    place: int  # the dimension of the scores that holds the queries
    rows: int
    columns: int

    @property
    def region(self) -> Region:
        return self.scores.trace.region

    def finding(self) -> tuple[Finding, Bools, Bools]:
        """(what was found, seen, valid): the last two for each row and column. Raises NotAttention, Undecided, OtherPeriod."""
        count = self.rows * self.columns
        which = np.arange(count, dtype=np.int64)
        x, j = which // self.columns, which % self.columns
        query, column = Affine({CHUNK: self.rows}, x), Affine({}, j)
        cells = list(self.scores.cells(self.at_anchor(self.anchor.scores, which, query, column)))
        product = self.product(cells)
        behind = self.offset(cells, query, j)
        key = query + column - number(behind)
        valid = ~self.region.negative(key) & self.region.negative(key - size(self.axes.k.size))
        valid = np.broadcast_to(valid, which.shape)
        placement = Placement(self.region, self.forms(query, key))
        seen = np.zeros(count, dtype=np.bool_)
        visible: list[Cell] = []
        for cell in cells:
            shown = self.shown(cell, valid, placement)
            if shown.any():
                seen[cell.which[shown]] = True
                visible.append(only(cell, shown))
        if not visible:
            raise NotAttention("every score of a band is hidden", product, PRODUCT)
        queries, keys = self.operands(visible, placement)
        terms = self.terms(visible, placement)
        values, reweighed, output = self.values(query, key, seen, placement)
        return Finding(product, behind, queries, keys, values, terms, reweighed, output), seen, valid

    def forms(self, query: Affine, key: Affine) -> dict[Axis, Affine]:
        a = self.axes
        return {**{axis: atom(axis) for axis in (*a.lead, a.d, a.e)}, a.q: query, a.k: key}

    def at_anchor(self, value: Value, which: Numbers, query: Affine, column: Affine) -> Elements:
        lead = iter(self.axes.lead)
        at = [query if i == self.place else column if i == self.anchor.axis else None for i in range(len(value.shape or ()))]
        return Elements(value, tuple(atom(next(lead)) if index is None else index for index in at), which)

    # Scores.

    def product(self, cells: list[Cell]) -> Node:
        products = [cell.leaf.value.producer for cell in cells if isinstance(cell.leaf, Elements)]
        if not products or products[0] is None:
            raise NotAttention("no product of queries and keys reaches the band", self.anchor.node, PRODUCT)
        if any(node is not products[0] for node in products):
            raise NotAttention("the columns of the band come from different products", products[0], PRODUCT)
        if not self.scores.has_product(products[0].output) or products[0].inputs[0].shape[-1] != self.axes.d.size:  # type: ignore[union-attr, index]
            raise NotAttention("the product is not one of queries and keys over their width", products[0], PRODUCT)
        return products[0]

    def offset(self, cells: list[Cell], query: Affine, j: Numbers) -> int:
        """How many columns of the band lie before the query itself: the most frequent answer, proved later for all of them."""
        length = self.axes.q.size
        answers: list[Numbers] = []

        def row_index(elements: Elements) -> Affine | None:
            for dim, index in zip(elements.value.shape or (), elements.at, strict=True):
                apart = self.region.fixed(query.take(elements.which)) - self.region.fixed(index)
                if dim == length and not apart.terms:
                    return apart
            return None

        for cell in cells:
            if not isinstance(cell.leaf, Elements):
                continue
            for side in factors(cell.leaf, atom(self.axes.d)):
                for part in self.scores.trace.back(side, lambda e: row_index(e) is not None):
                    apart = row_index(part)
                    if apart is not None and apart.constant.any():
                        answers.append(np.broadcast_to(apart.constant, part.which.shape) + j[part.which])
        if not answers:
            raise NotAttention(
                "the columns of the band are not keys beside the query",
                self.anchor.node,
                "scores whose column j is the key q + j - w, for queries and keys of one length",
            )
        found, counts = np.unique(np.concatenate(answers), return_counts=True)
        return int(found[counts.argmax()])

    def shown(self, cell: Cell, valid: Bools, placement: Placement) -> Bools:
        """Which scores of a cell take part. Raises NotAttention where one without a key does."""
        hidden = np.zeros(cell.which.shape, dtype=np.bool_)
        if not isinstance(cell.leaf, Elements):
            if not is_minus_infinity(cell.leaf) and valid[cell.which].any():
                raise NotAttention("a score within the band is a number, not a product", self.anchor.node, PRODUCT)
            hidden |= is_minus_infinity(cell.leaf)
        for term in cell.terms:
            if term.kind == "add" and isinstance(term.by, Elements):
                for found in self.scores.sources(term.by, never):
                    if isinstance(found, Cell) and is_minus_infinity(found.leaf) and not term.negated:
                        hidden |= np.isin(cell.which, found.which)
        if hidden.any() and any(t.kind == "scale" and not (isinstance(t.by, float) and t.by > 0) for t in cell.terms):
            raise NotAttention("hidden scores are scaled by a number that may bring them back", self.anchor.node, GARBAGE)
        if (~hidden & ~valid[cell.which]).any():
            raise NotAttention(
                "scores without a key are not hidden: the band shows what is no product", self.anchor.node, GARBAGE
            )
        return ~hidden

    def operands(self, cells: list[Cell], placement: Placement) -> tuple[Placed, Placed]:
        """Queries and keys of the product, whole, with the axes that they hold."""
        pairs = [factors(cell.leaf, atom(self.axes.d)) for cell in cells if isinstance(cell.leaf, Elements)]
        if len(pairs) != len(cells):
            raise NotAttention("a score that is seen is a number, not a product", self.anchor.node, PRODUCT)
        q, k, d = self.axes.q, self.axes.k, self.axes.d
        one, other = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
        try:
            return self.placed(one, placement, {q, d}, {k}, "queries"), self.placed(other, placement, {k, d}, {q}, "keys")
        except NotAttention as straight:
            try:
                return self.placed(other, placement, {q, d}, {k}, "queries"), self.placed(one, placement, {k, d}, {q}, "keys")
            except NotAttention:
                raise straight from None

    def placed(self, parts: list[Elements], placement: Placement, required: set[Axis], excluded: set[Axis], what: str) -> Placed:
        """The first tensor on the way back in which all these elements are read at whole axes, those required among them."""

        def fitting(part: Elements) -> set[Layout]:
            return {found for found in placement.layouts(part) if required <= held(found) and not excluded & held(found)}

        ends = [end for part in parts for end in self.scores.trace.back(part, lambda e: bool(fitting(e)))]
        return self.one(ends, [fitting(end) for end in ends], what)

    def one(self, ends: list[Elements], layouts: list[set[Layout]], what: str) -> Placed:
        """One tensor with one layout for all elements."""
        common = set.intersection(*layouts) if layouts else set()
        if len({end.value for end in ends}) == 1 and common:
            return ends[0].value, min(common, key=str)
        at = next(
            (end.value.producer for end, found in zip(ends, layouts, strict=True) if not found and end.value.producer),
            self.anchor.node,
        )
        raise NotAttention(
            f"the {what} of a band are not those of one position each", at, "chunks of one tensor, in step with the band"
        )

    def terms(self, cells: list[Cell], placement: Placement) -> tuple[Said, ...]:
        """What acts on the products: numbers and tensors with their axes; adding zero is left out."""
        kinds = [[(term.kind, term.negated) for term in cell.terms] for cell in cells]
        if any(found != kinds[0] for found in kinds):
            raise NotAttention("the scores of a band are made in different ways", self.anchor.node, PRODUCT)
        said = [self.read(list(same), placement) for same in zip(*(cell.terms for cell in cells), strict=True)]
        return tuple(term for term in said if term[:2] != ("add", 0.0))

    def read(self, same: list[Term], placement: Placement) -> Said:
        """One term of all cells: a number, or the first tensor that is read at whole axes: of keys, of queries, of neither."""
        kind, negated, failure = same[0].kind, same[0].negated, None
        for required in ({self.axes.k}, {self.axes.q}, set[Axis]()):

            def fitting(part: Elements, required: set[Axis] = required) -> set[Layout]:
                return {found for found in placement.layouts(part) if required <= held(found)}

            parts: list[Elements | Cell | float] = []
            for term in same:
                elements = isinstance(term.by, Elements)
                parts += self.scores.sources(term.by, lambda e: bool(fitting(e))) if elements else [term.by]  # type: ignore[arg-type, list-item]
            numbers = {part.leaf if isinstance(part, Cell) else part for part in parts if not isinstance(part, Elements)}
            tensors = [part for part in parts if isinstance(part, Elements)]
            if len(numbers) == 1 and not tensors:
                return kind, float(numbers.pop()), negated  # type: ignore[arg-type]
            if numbers:
                raise NotAttention("what is added to a band differs from place to place", self.anchor.node, PRODUCT)
            try:
                return kind, self.one(tensors, [fitting(part) for part in tensors], "biases and masks"), negated
            except NotAttention as found:
                failure = failure or found
        assert failure is not None
        raise failure

    # Values.

    def values(self, query: Affine, key: Affine, seen: Bools, placement: Placement) -> tuple[Placed, tuple[Said, ...], Layout]:
        """The values, the factors on the weights, and the layout of the product with the values."""
        node = self.weights_product
        output = node.output.shape or ()
        last: NotAttention | None = None
        for layout in self.output_layouts():
            at = self.output_index(layout, query)
            if at is None or len(at) != len(output):
                continue
            try:
                values, reweighed = self.summed(at, query, seen, key, placement)
                return values, reweighed, layout
            except NotAttention as failure:
                last = failure
        raise last or NotAttention("the product with values does not keep the queries in order", node, "chunks put side by side")

    def output_layouts(self) -> Iterator[Layout]:
        """Ways in which the product's dimensions can hold batch, heads, queries and value width."""
        shape = self.weights_product.output.shape or ()
        for place in range(len(self.axes.lead), -1, -1):
            order = [*self.axes.lead[:place], self.axes.q, *self.axes.lead[place:]]
            for ending in ((self.axes.e,), ()):
                axes = [*order, *ending] if ending else [*order[:-1], self.axes.e, order[-1]]
                try:
                    yield AxisSpace().regroup(tuple((axis,) for axis in axes), shape)
                except LayoutMismatch:
                    continue

    def output_index(self, layout: Layout, query: Affine) -> tuple[Affine, ...] | None:
        """Indices of the product's output for the queries of a chunk; rows are written out."""
        forms: dict[Axis, Affine] = {axis: atom(axis) for axis in (*self.axes.lead, self.axes.e)} | {self.axes.q: query}
        pieces = [axis for group in layout for axis in group if axis not in forms]
        rest = query
        for axis in reversed(pieces[1:]):
            if not isinstance(axis.size, int):
                return None
            rest, forms[axis] = self.region.split(rest, axis.size)
        forms |= dict.fromkeys(pieces[:1], rest)
        found = [along(group, forms) if group else number(0) for group in layout]
        return None if any(i is None for i in found) else tuple(i for i in found if i is not None)

    def summed(
        self, at: tuple[Affine, ...], query: Affine, seen: Bools, key: Affine, placement: Placement
    ) -> tuple[Placed, tuple[Said, ...]]:
        """Every weight that is seen meets the value of its own key, once, and nothing else meets one."""
        node, columns = self.weights_product, self.columns
        inner = node.inputs[0].shape[-1]  # type: ignore[union-attr, index]
        if not isinstance(inner, int):
            raise NotAttention("the length of what is summed over is no number", node, "chunks of fixed length")
        first = np.arange(self.rows, dtype=np.int64) * columns  # the first column of each row: where `at` and `query` are read
        which = np.arange(self.rows * inner, dtype=np.int64)
        row, y = which // inner, which % inner
        spread = Elements(node.output, tuple(i.take(first[row]) for i in at), which)
        sides = factors(spread, Affine({}, y))
        weights, values = sides if self.reaches_anchor(sides[0].value) else sides[::-1]
        partner = np.full(self.rows * columns, -1, dtype=np.int64)  # which y each weight meets
        tests: list[tuple[Value, bool, Elements]] = []
        for part, passed in self.weights(weights, ()):
            column = self.region.fixed(part.at[self.anchor.axis]).numbers
            wanted = self.at_anchor(part.value, part.which, query.take(first[row[part.which]]), number(0)).at
            same = all(
                self.region.fixed(a).equals(self.region.fixed(b))
                for i, (a, b) in enumerate(zip(part.at, wanted, strict=True))
                if i != self.anchor.axis
            )
            if column is None or not same:
                raise NotAttention("weights of one query enter the output of another", node, "diagonals back in their chunks")
            met = row[part.which] * columns + np.broadcast_to(column, part.which.shape)
            if (partner[met] >= 0).any() or np.unique(met).size != met.size:
                raise NotAttention("a weight meets two values", node, "diagonals back in their chunks")
            partner[met] = y[part.which]
            tests += [(test.value, negated, renumbered(test, met, part.which)) for test, negated in passed]
        if (partner[seen] < 0).any():
            raise NotAttention("a weight within the band meets no value", node, "every column of the band in the product")
        shown = np.flatnonzero(seen)
        place = (shown // columns) * inner + partner[shown]
        met_values = Elements(values.value, tuple(i.take(place) for i in values.at), shown)
        return (
            self.placed([met_values], placement, {self.axes.k, self.axes.e}, {self.axes.q}, "values"),
            self.factors_of(tests, seen, placement),
        )

    def factors_of(self, tests: list[tuple[Value, bool, Elements]], seen: Bools, placement: Placement) -> tuple[Said, ...]:
        """Conditions to keep a weight, each alike for all weights that are seen."""
        kept: dict[tuple[Value, bool], list[Elements]] = {}
        for value, negated, elements in tests:
            shown = elements.select(seen[elements.which])
            if shown.which.size:
                kept.setdefault((value, negated), []).append(shown)
        if any(sum(part.which.size for part in parts) != int(seen.sum()) for parts in kept.values()):
            raise NotAttention("only a part of the weights is zeroed", self.weights_product, "one condition for all of them")
        placed = {key: self.placed(parts, placement, set(), set(), "conditions on the weights") for key, parts in kept.items()}
        return tuple(("factor", found, negated) for (_, negated), found in placed.items())

    def weights(
        self, elements: Elements, passed: tuple[tuple[Elements, bool], ...]
    ) -> Iterator[tuple[Elements, tuple[tuple[Elements, bool], ...]]]:
        """Where what enters the product with values comes from: weights, with the conditions that set them to zero; zeros end."""
        for part in self.scores.trace.back(elements, lambda e: e.value is self.anchor.weights):
            node = part.value.producer
            if part.value is self.anchor.weights:
                yield part, tuple((test.select(np.isin(test.which, part.which)), negated) for test, negated in passed)
                continue
            numbers = self.scores.numbers(part)
            if numbers is not None and not numbers.any():
                continue
            condition, a, b = node.inputs if node is not None and node.op == "where" else (None, None, None)
            if condition is None or not (is_zero(a) or is_zero(b)):
                at = node or self.weights_product
                raise NotAttention("something else than weights meets the values of a band", at, "zeros around the weights")
            kept, negated = (b, True) if is_zero(a) else (a, False)
            test = self.scores.input(part, condition)
            yield from self.weights(self.scores.input(part, kept), (*passed, (test, negated)))  # type: ignore[arg-type]

    def reaches_anchor(self, value: Value) -> bool:
        stack, met = [value], set()
        while stack:
            value = stack.pop()
            if value is self.anchor.weights:
                return True
            if value not in met and value.producer is not None:
                met.add(value)
                stack += [i for i in value.producer.inputs if i is not None]
        return False


def only(cell: Cell, shown: Bools) -> Cell:
    """The shown scores of a cell, with what acts on them."""

    def cut(part: Elements) -> Elements:
        return part.select(np.isin(part.which, cell.which[shown]))

    terms = tuple(replace(t, by=cut(t.by)) if isinstance(t.by, Elements) else t for t in cell.terms)
    return Cell(cell.which[shown], cut(cell.leaf) if isinstance(cell.leaf, Elements) else cell.leaf, terms)


def renumbered(test: Elements, met: Numbers, which: Numbers) -> Elements:
    """The elements of a condition by the weights that they act on."""
    order = np.argsort(which)
    return replace(test, which=met[order][np.searchsorted(which[order], test.which)])
