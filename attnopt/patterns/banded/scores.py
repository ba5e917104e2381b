"""What one score of a banded softmax is: a product of a query and a key, what was added to it, or a number that hides it.

    concat(where(corner, -inf, s), …)[b, q, h, j]   ->   -inf for some (q, j), q . k and the terms above it for the others

Follows elements up through layout (tracing) and through the arithmetic of scores. Conditions that are constants decide element by
element which branch is read.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt

from attnopt.ir.graph import Node, Value
from attnopt.patterns.activations import Activations
from attnopt.patterns.banded.affine import Affine, Numbers, Unreadable, number
from attnopt.patterns.banded.tracing import CROSSED, Elements, Trace, aligned
from attnopt.patterns.operands import constant_factor
from attnopt.patterns.rounding import operator
from attnopt.patterns.score import PRODUCT, SCORES, NotAttention

Floats = npt.NDArray[np.float64]
COMPARED = {"lt": (0, 1, False), "gt": (1, 0, False), "ge": (0, 1, True), "le": (1, 0, True)}


@dataclass(frozen=True, eq=False)
class Term:
    """scale or add: by a number or a tensor; mask: seen where the condition `by` is true (negated: is false)."""

    kind: str
    by: float | Elements
    negated: bool = False


@dataclass(frozen=True, eq=False)
class Cell:
    """Scores of one making: `leaf` is the product (elements of a matmul) or a number, `terms` act on it in order."""

    which: Numbers
    leaf: Elements | float
    terms: tuple[Term, ...] = ()

    def then(self, term: Term) -> Cell:
        return replace(self, terms=(*self.terms, term))


@dataclass
class Scores:
    trace: Trace
    activations: Activations
    known: dict[Value, bool] = field(default_factory=dict)

    def cells(self, elements: Elements) -> Iterator[Cell]:
        """Raises NotAttention where something else than a score stands in the way."""
        for part in self.trace.back(elements, never):
            numbers = self.numbers(part)
            if numbers is not None:
                for found in np.unique(numbers):
                    yield Cell(part.which[numbers == found], float(found))
                continue
            node = part.value.producer
            if node is None:
                raise NotAttention("the scores are an input of the graph", Node("opaque", (), (), {}, part.value.name), PRODUCT)
            yield from self.crossed(node, part)

    def crossed(self, node: Node, part: Elements) -> Iterator[Cell]:
        scaled = constant_factor(node)
        if node.op == "matmul":
            yield Cell(part.which, part)
        elif scaled is not None:
            for cell in self.cells(self.input(part, scaled[0])):
                yield cell.then(Term("scale", scaled[1]))
        elif node.op in ("add", "sub"):
            yield from self.added(node, part)
        elif node.op == "where":
            yield from self.chosen(node, part)
        elif node.op in CROSSED:
            raise NotAttention(f"the indices of '{operator(node)}' are no sums of positions", node, SCORES)
        else:
            raise NotAttention(f"'{operator(node)}' stands between the product of queries and keys and the softmax", node, SCORES)

    def added(self, node: Node, part: Elements) -> Iterator[Cell]:
        first, second = node.inputs
        assert first is not None and second is not None
        left, right = self.has_product(first), self.has_product(second)
        if left == right or (right and node.op == "sub"):
            raise NotAttention("one side of a sum must hold the product of queries and keys", node, PRODUCT)
        score, other = (first, second) if left else (second, first)
        beside = self.input(part, other)
        for cell in self.cells(self.input(part, score)):
            yield cell.then(Term("add", beside.select(np.isin(part.which, cell.which)), negated=node.op == "sub"))

    def chosen(self, node: Node, part: Elements) -> Iterator[Cell]:
        condition, a, b = node.inputs
        assert condition is not None and a is not None and b is not None
        decided = self.numbers(self.input(part, condition))
        if decided is not None:
            for side, taken in ((a, decided != 0), (b, decided == 0)):
                yield from self.cells(self.input(part, side).select(taken))
            return
        negated = not self.has_product(a)
        score, fill = (b, a) if negated else (a, b)
        number = fill.scalar()
        if not self.has_product(score) or number != -math.inf:
            shown = "a tensor" if number is None else f"{number:g}"
            raise NotAttention(f"masked scores of a band become {shown}", node, "a fill with minus infinity")
        test = self.input(part, condition)
        for cell in self.cells(self.input(part, score)):
            yield cell.then(Term("mask", test.select(np.isin(part.which, cell.which)), negated))

    @staticmethod
    def input(part: Elements, value: Value) -> Elements:
        """The same elements of an input of the element-wise node that makes them."""
        return replace(part, value=value, at=aligned(value.shape or (), part.value.shape or (), part.at))

    def has_product(self, value: Value) -> bool:
        """Whether a product of two activations reaches the value as a score."""
        if value not in self.known:
            self.known[value] = False
            node = value.producer
            if node is not None and node.op == "matmul":
                self.known[value] = all(i is not None and self.activations.is_operand(i) for i in node.inputs)
            elif node is not None and node.op in (*CROSSED, "add", "sub", "mul", "div", "where"):
                self.known[value] = any(i is not None and self.has_product(i) for i in node.inputs)
        return self.known[value]

    # Tensors beside the scores.

    def sources(self, elements: Elements, stop: object) -> Iterator[Elements | Cell]:
        """Where a tensor beside the scores comes from: numbers (as cells) and the elements at which `stop` holds."""
        for part in self.trace.back(elements, stop):  # type: ignore[arg-type]
            numbers = self.numbers(part)
            node = part.value.producer
            if numbers is not None:
                for found in np.unique(numbers):
                    yield Cell(part.which[numbers == found], float(found))
            elif stop(part) or node is None:  # type: ignore[operator]
                yield part
            elif node.op == "where" and (decided := self.numbers(self.input(part, node.inputs[0]))) is not None:  # type: ignore[arg-type]
                for side, taken in ((node.inputs[1], decided != 0), (node.inputs[2], decided == 0)):
                    yield from self.sources(self.input(part, side).select(taken), stop)  # type: ignore[arg-type]
            elif (single := self.of_width_one(node, part)) is not None:
                yield from self.sources(single, stop)
            else:
                yield part

    def of_width_one(self, node: Node, part: Elements) -> Elements | None:
        """ones [Q, 1] @ m [1, K] at (q, k) is m at k."""
        if node.op != "matmul" or any(i is None or i.shape is None for i in node.inputs) or node.inputs[0].shape[-1] != 1:  # type: ignore[union-attr, index]
            return None
        left, right = factors(part, number(0))
        for one, other in ((left, right), (right, left)):
            held = self.numbers(one)
            if held is not None and bool((held == 1).all()):
                return other
        return None

    def numbers(self, elements: Elements) -> Floats | None:
        """The elements themselves, where they are constants."""
        result = np.full(elements.which.shape, np.nan)
        for part in self.trace.back(elements, never):
            found = self.constant(part)
            if found is None:
                return None
            result[np.isin(elements.which, part.which)] = found
        return result

    def constant(self, part: Elements) -> Floats | None:
        value, node, region = part.value, part.value.producer, self.trace.region
        if (single := value.scalar()) is not None:
            return np.full(part.which.shape, float(single))
        try:
            if value.load is not None:
                at = [region.fixed(i).numbers for i in part.at]
                if any(i is None for i in at):
                    return None
                return np.broadcast_to(value.load().double().numpy()[tuple(at)], part.which.shape)  # type: ignore[arg-type]
            if node is not None and node.op == "triangle" and node.inputs[0] is not None:
                beyond = part.at[-1] - part.at[-2] - number(node.attrs["diagonal"])
                gone = region.negative(beyond) if node.attrs["upper"] else region.negative(beyond * -1)
                held = self.numbers(replace(part, value=node.inputs[0]))
                return None if held is None else np.where(np.broadcast_to(gone, held.shape), 0.0, held)
            if node is not None and node.op == "cast" and node.inputs[0] is not None:
                held = self.numbers(replace(part, value=node.inputs[0]))
                return None if held is None else (held != 0).astype(np.float64) if value.dtype == "bool" else np.trunc(held)
            if node is not None and node.op in COMPARED:
                first, second, flipped = COMPARED[node.op]
                sides = [
                    self.trace.counted(i, aligned(i.shape or (), value.shape or (), part.at))
                    for i in node.inputs
                    if i is not None
                ]
                below = region.negative(sides[first] - sides[second])
                return np.broadcast_to(below != flipped, part.which.shape).astype(np.float64)
        except Unreadable:
            return None
        return None


def never(elements: Elements) -> bool:
    return False


def factors(part: Elements, inner: Affine) -> tuple[Elements, Elements]:
    """The elements of both inputs of a matmul that are multiplied, at the index `inner` of what is summed over."""
    node = part.value.producer
    assert node is not None and part.value.shape is not None
    left, right = node.inputs
    assert left is not None and right is not None and left.shape is not None and right.shape is not None
    lead, row, column = part.at[:-2], part.at[-2], part.at[-1]
    one, other = (aligned(x.shape[:-2], part.value.shape[:-2], lead) for x in (left, right) if x.shape is not None)
    return replace(part, value=left, at=(*one, row, inner)), replace(part, value=right, at=(*other, inner, column))


def is_minus_infinity(x: object) -> bool:
    return isinstance(x, float) and math.isinf(x) and x < 0
