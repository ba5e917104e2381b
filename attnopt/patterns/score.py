"""Walk from the softmax up to the product of queries and keys, collecting what happens to the scores on the way.

    softmax(where(mask, 30 * tanh(q k' * 0.125 / 30) + bias, -inf))
        ->  scale(0.125) softcap(30.0) add(load(bias0, b, h, row, k))   mask load(mask0, b, 0, row, k)   empty zero

The grammar, from the outside in: cast | layout | add | sub | mul | div | where (mask) | softcap, in any order and number, then
one matmul of two activations, or a concat of such scores (`joining` goes on from there). Anything else is a refusal that names the
node.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

from attnopt.ir.clause import Clause
from attnopt.ir.expr import Apply, Const, Expr, apply, conjunction
from attnopt.ir.graph import LAYOUT, Node, Value
from attnopt.ir.layout import AxisSpace, Layout, LayoutMismatch, Operand
from attnopt.ir.site import Refusal
from attnopt.patterns.operands import broadcast_layout, constant_factor
from attnopt.patterns.rounding import multiplies, operator, rounds
from attnopt.patterns.talking_heads import REMEDY, Mix, mix_of, mixes_heads

MASK_FILL = -1e4  # a fill this low underflows to weight zero beside any other score
ELEMENTWISE_SCORE = ("add", "sub", "mul", "div", "where", "cast", "tanh", "neg", "maximum", "minimum", "softmax")


PRODUCT = "scores that are a matmul of queries and keys, both computed from the inputs"
SCORES = "only scale, soft cap, biases, masks, casts and layout operations on the scores"


class NotAttention(Exception):
    """Internal: the grammar cannot go on. Carries the refusal."""

    def __init__(self, reason: str, at: Node, remedy: str = "") -> None:
        super().__init__(reason)
        self.refusal = Refusal(reason, at, remedy=remedy)


@dataclass
class Score:
    """What the walk found: terms innermost first, the mask, the product node and the layout of its output."""

    terms: list[Clause] = field(default_factory=list)
    masks: list[Expr] = field(default_factory=list)
    sink: Expr | None = None
    factors: list[tuple[Expr, bool]] = field(default_factory=list)  # on the weights: a tensor, or a condition to keep them
    weighting: list[Clause] = field(default_factory=list)  # mixes of the weights, in order
    empty_row: str = "mean"
    product: Node | None = None
    layout: Layout = ()

    @property
    def mask(self) -> Expr | None:
        return conjunction(*self.masks)


Loader = Callable[[Value, Layout, str], Expr]
Mixer = Callable[[Mix, Layout], str]


@dataclass
class ScoreWalk:
    """One walk. `load` turns a mask or bias value with its layout into an expression and remembers the operand; `mix` names a mix."""

    space: AxisSpace
    load: Loader
    strength: Callable[[Value], int]  # how surely a value holds scores, 0 for not at all
    score: Score = field(default_factory=Score)
    mix: Mixer | None = None
    floored: bool = False  # minus infinity becomes a finite number further out
    mixed: bool = False  # across heads, further out

    def up(self, value: Value, layout: Layout) -> Score:
        """From the input of the softmax, with its layout, to the product, or to where the products of several are joined."""
        outer: list[Clause] = []
        while True:
            node = value.producer
            if node is None:
                raise NotAttention(
                    "the scores are an input of the graph, not a product of queries and keys", _pseudo(value), PRODUCT
                )
            if (node.op == "matmul" and not mixes_heads(node)) or self.joins(node):
                break
            try:
                value, layout = self.step(node, layout, outer)
            except LayoutMismatch as mismatch:
                raise NotAttention(str(mismatch), node) from None
        self.score.terms = outer[::-1]
        self.score.product, self.score.layout = node, self.space.resolve(layout)
        return self.score

    def joins(self, node: Node) -> bool:
        """Whether the node lays scores side by side."""
        return node.op == "concat" and all(i is not None and self.strength(i) for i in node.inputs)

    def step(self, node: Node, layout: Layout, outer: list[Clause]) -> tuple[Value, Layout]:
        """Cross one node: returns the score side of its inputs; appends what it did to `outer` (outermost first)."""
        if node.op == "cast" and node.inputs[0] is not None:
            return node.inputs[0], layout
        if node.op in LAYOUT and node.inputs[0] is not None:
            return node.inputs[0], self.space.before(node, layout)
        if node.op in ("mul", "div"):
            return self.cross_factor(node, layout, outer)
        if node.op in ("add", "sub"):
            return self.cross_bias(node, layout, outer)
        if node.op == "where":
            return self.cross_mask(node, layout)
        if node.op in ("maximum", "minimum"):
            # max(scores, smallest finite number) keeps every finite score, and so does min with the largest.
            for side, other in (node.inputs, node.inputs[::-1]):
                bound = other.scalar() if side is not None and other is not None else None
                if bound is not None and (bound <= -1e30 if node.op == "maximum" else bound >= 1e30):
                    self.floored |= node.op == "maximum"
                    return side, layout  # type: ignore[return-value]
        if (mix := mix_of(node)) is not None and self.mix is not None:
            if mix.bias is not None:
                held = (layout[mix.axis],) if node.op == "opaque" else broadcast_layout(mix.bias, layout)
                outer.append(Clause("add", (self.load(mix.bias, held, "bias"),)))
            outer.append(Clause("mix", (self.mix(mix, layout),)))
            self.mixed = True
            return mix.x, layout
        named = operator(node)
        if rounds(node):
            raise NotAttention(f"the scores are rounded by '{named}' before the softmax", node, SCORES)
        if multiplies(node):
            raise NotAttention(f"'{named}' multiplies queries and keys as whole numbers", node, PRODUCT)
        raise NotAttention(f"'{named}' stands between the product of queries and keys and the softmax", node, SCORES)

    def side(self, node: Node, layout: Layout) -> tuple[Value, Value, bool]:
        """(score, other, score is the first input) of a binary node."""
        first, second = node.inputs[:2]
        assert first is not None and second is not None
        one, other = self.strength(first), self.strength(second)
        if not one and not other:
            raise NotAttention("neither side comes from a product of two activations", node, PRODUCT)
        left = one > other
        if one == other:
            left = first.shape is not None and second.shape is not None and len(first.shape) >= len(second.shape)
        score, beside = (first, second) if left else (second, first)
        if score.shape is None or len(score.shape) != len(layout) or broadcast_layout(score, layout) != layout:
            raise NotAttention("the scores themselves are broadcast here", node, "one score for each pair of query and key")
        return score, beside, left

    def cross_factor(self, node: Node, layout: Layout, outer: list[Clause]) -> tuple[Value, Layout]:
        capped = softcap(node)
        if capped is not None:
            inner, cap = capped
            outer.append(Clause("softcap", (cap,)))
            return inner, layout
        scaled = constant_factor(node)
        if scaled is not None:
            outer.append(Clause("scale", (Const(scaled[1]),)))
            return scaled[0], layout
        score, other, first = self.side(node, layout)
        if node.op == "div" and not first:
            raise NotAttention("a tensor is divided by the scores", node, "scores divided by a scale")
        factor = self.load(other, broadcast_layout(other, layout), "scale")
        outer.append(Clause("scale", (apply("div", 1.0, factor) if node.op == "div" else factor,)))
        return score, layout

    def cross_bias(self, node: Node, layout: Layout, outer: list[Clause]) -> tuple[Value, Layout]:
        score, other, first = self.side(node, layout)
        number = other.scalar()
        bias: Expr = Const(float(number)) if number is not None else self.load(other, broadcast_layout(other, layout), "bias")
        if node.op == "sub":
            if not first:
                raise NotAttention("the scores are subtracted, not added", node, "a bias added to the scores")
            bias = apply("neg", bias)
        outer.append(Clause("add", (bias,)))
        return score, layout

    def cross_mask(self, node: Node, layout: Layout) -> tuple[Value, Layout]:
        if self.mixed:
            raise NotAttention("scores are hidden before they are mixed across heads", node, REMEDY)
        condition, kept, filled = node.inputs
        assert condition is not None and kept is not None and filled is not None
        if self.strength(filled) and kept.scalar() is not None and never_of_finite(condition, self.strength):
            self.floored |= float(kept.scalar() or 0.0) <= MASK_FILL
            return filled, layout
        negated = not self.strength(kept)
        score, fill = (filled, kept) if negated else (kept, filled)
        value = fill.scalar()
        if not self.strength(score):
            raise NotAttention("neither branch comes from a product of two activations", node, PRODUCT)
        if value is None or not value <= MASK_FILL:
            shown = "a tensor" if value is None else f"{value:g}"
            reason = f"masked scores become {shown}; a mask fills with {MASK_FILL:g} or less"
            raise NotAttention(reason, node, "a fill with minus infinity or the smallest finite number")
        visible = self.load(condition, broadcast_layout(condition, layout), "mask")
        self.score.masks.append(negation(visible) if negated else visible)
        if math.isinf(value) and not self.floored:
            self.score.empty_row = "zero"
        return score, layout


def never_of_finite(condition: Value, strength: Callable[[Value], int]) -> bool:
    """isnan(s), isinf(s), and both of them & anything: false for all finite scores."""
    node = condition.producer
    if node is None:
        return False
    if node.op == "and":
        return any(i is not None and never_of_finite(i, strength) for i in node.inputs)
    return node.op in ("isnan", "isinf") and node.inputs[0] is not None and bool(strength(node.inputs[0]))


def negation(expr: Expr) -> Expr:
    return expr.args[0] if isinstance(expr, Apply) and expr.op == "not" else apply("not", expr)


def softcap(node: Node) -> tuple[Value, float] | None:
    """(x, c) where the node is c * tanh(x / c)."""
    outer = constant_factor(node)
    if outer is None:
        return None
    squashed, cap = outer
    while squashed.producer is not None and squashed.producer.op == "cast":
        squashed = squashed.producer.inputs[0]  # type: ignore[assignment]
    tanh = squashed.producer
    if tanh is None or tanh.op != "tanh" or tanh.inputs[0] is None or tanh.inputs[0].producer is None:
        return None
    inner = constant_factor(tanh.inputs[0].producer)
    if inner is None or not math.isclose(inner[1] * cap, 1.0, rel_tol=1e-5):
        return None
    return inner[0], cap


def _pseudo(value: Value) -> Node:
    return Node("opaque", (), (value,), {"name": "input"}, name=value.name)


__all__ = ["NotAttention", "Operand", "Score", "ScoreWalk", "softcap"]
