"""softmax(score(q k') + …) v, in any spelling  ->  a Site with its AttentionSpec.

The walk starts at the softmax, goes down to the product with v, which names the axes, and from there up again:

    out[j…, q, e] = sum_k weights[j…, q, k] * v[j…, k, e]          j…: batch and heads in any arrangement
    weights = softmax over k of score terms over q[j…, q, d] * k[j…, k, d]

Axes are followed through every layout operation, so that grouped heads (expand, repeat, broadcast), packed and folded batch
dimensions and einsum come out alike: as axes b, g, r, q, k, d, e of the site.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from attnopt.ir.clause import Clause
from attnopt.ir.graph import LAYOUT, Node, Value
from attnopt.ir.layout import Axis, Layout, LayoutMismatch
from attnopt.ir.site import Site
from attnopt.patterns.activations import Activations
from attnopt.patterns.assembly import Assembly, Placed
from attnopt.patterns.joining import joined_operands
from attnopt.patterns.normalizer import Anchor
from attnopt.patterns.operands import broadcast_layout
from attnopt.patterns.reweighing import Reweighing, nan_guard, reweighing, weights_of
from attnopt.patterns.rounding import operator, rounds
from attnopt.patterns.sampling import REASON, sampler
from attnopt.patterns.score import PRODUCT, NotAttention, Score, ScoreWalk, negation
from attnopt.patterns.sink import drops_sink, split_sink
from attnopt.patterns.talking_heads import Mix, added_to, mix_of

VALUES = "weights that go through casts and layout operations only into a matmul with values computed from the inputs"


@dataclass
class SoftmaxAttention(Assembly):
    """One attempt to read an anchor as attention. `reached` is how far it came; `only`, of several value products, the one to read."""

    activations: Activations
    only: Node | None = None
    dropped: Node | None = None
    factors: list[Reweighing] = field(default_factory=list)
    mixing: list[Mix] = field(default_factory=list)
    weighting: list[Clause] = field(default_factory=list)
    reweighed: list[tuple[Reweighing, Layout]] = field(default_factory=list)
    reached: str = "softmax"

    def from_anchor(self, anchor: Anchor) -> Site:
        """Raises NotAttention (with a refusal) where the grammar does not fit."""
        product, weights, guarded = self.value_product(anchor)
        self.reached = "value product"
        layout = self.name_axes(product, weights)
        try:
            layout = self.up_to_anchor(weights, anchor.weights, layout)
        except LayoutMismatch as mismatch:
            raise NotAttention(
                f"the weights do not keep their axes on the way to the value product: {mismatch}",
                product,
                "reshapes of the weights that only regroup batch and heads",
            ) from None
        return self.from_weights(anchor, layout, self.value, (product.output, self.output), product, guarded)

    def from_weights(
        self, anchor: Anchor, layout: Layout, values: Placed, output: Placed, product: Node, guarded: bool = False
    ) -> Site:
        """From the weights, with their layout, up to queries and keys, and all of it put together."""
        if layout[anchor.axis] != self.space.resolve_group((self.k,)):
            over = " ".join(map(str, layout[anchor.axis])) or "a dimension of one"
            reason = f"the softmax runs over {over}, not over the keys"
            raise NotAttention(reason, anchor.node, "a softmax along the axis that the value product sums over")
        self.reached = "softmax over the keys"
        scores = anchor.scores
        sink: tuple[Value, Layout] | None = None
        if self.dropped is not None:
            scores, column = split_sink(anchor, self.dropped)
            sink = (column, tuple(() if i == anchor.axis else g for i, g in enumerate(layout)))
        walk = ScoreWalk(self.space, self.load, self.activations.strength, mix=self.mixed)
        score = walk.up(scores, layout)
        self.reached = "product of queries and keys"
        if sink is not None:
            score.sink = self.load(*(sink[0], broadcast_layout(*sink)), "sink")
        if guarded:
            score.empty_row = "zero"
        score.weighting = self.weighting[::-1]
        for factor, place in self.reweighed:
            where = broadcast_layout(factor.by, self.space.resolve(place))
            read = self.load(factor.by, where, "mask" if factor.condition else "scale")
            score.factors.append((negation(read) if factor.negated else read, factor.condition))
        try:
            queries, keys = self.score_operands(score)
            return self.site(anchor.node, queries, keys, values, output, score)
        except LayoutMismatch as mismatch:
            raise NotAttention(str(mismatch), product) from None

    def value_product(self, anchor: Anchor) -> tuple[Node, Value, bool]:
        """The matmul that the weights feed, the value that enters it, and whether NaN rows are set to zero on the way."""
        value, guarded = anchor.weights, False
        while True:
            onward = [
                n
                for n in value.users
                if n.op in ("matmul", "cast") or n.op in LAYOUT or (nan_guard(n, value) and not self.mixing)
            ]
            onward += [n for n in value.users if n not in onward and self.goes_on_mixing(n, value)]
            onward = [self.only] if self.only is not None and self.only in onward else onward
            factors = {n: found for n in value.users if n not in onward and (found := reweighing(n, value)) is not None}
            onward += factors if not onward and not self.mixing else ()
            if self.dropped is None and value is anchor.weights:
                onward += [n for n in value.users if drops_sink(n, anchor.axis)]
            others = [n for n in value.users if n not in onward and n.op != "isnan" and self.only not in onward]
            if len(onward) > 1:
                products = [n for n in onward if n.op == "matmul"]
                others += [n for n in onward if n not in products[:1]]
                onward = products[:1] or onward[:1]
            if value in self.graph.outputs or (others and onward):
                self.weights_used = others[0] if others else anchor.node
            if not onward:
                culprit = others[0] if others else anchor.node
                if rounds(culprit):
                    raise NotAttention(
                        f"the weights are rounded by '{operator(culprit)}' before they meet values", culprit, VALUES
                    )
                if (source := sampler(culprit, value)) is not None:
                    raise NotAttention(REASON.format(operator=operator(source)), culprit)
                reason = f"the weights enter '{operator(culprit)}'" if others else "nothing follows the softmax"
                raise NotAttention(f"{reason}: no product with values follows", culprit, VALUES)
            node = onward[0]
            if (mix := mix_of(node)) is not None and mix.x is value:
                self.mixing.append(mix)
            elif self.mixing and (bias := added_to(self.mixing[-1], node)) is not None:
                self.mixing[-1] = replace(self.mixing[-1], bias=bias, added=node)
            elif node.op == "matmul":
                inputs = [i for i in node.inputs if i is not None]
                if not all(self.activations.is_operand(i) for i in inputs):
                    raise NotAttention("the weights are multiplied by a constant, not by values", node, VALUES)
                return node, value, guarded
            if node in factors:
                self.factors.append(factors[node])
            guarded |= node.op == "where" and node not in factors and not self.mixing
            self.dropped = node if node.op == "slice" else self.dropped
            value = node.output

    def goes_on_mixing(self, node: Node, value: Value) -> bool:
        """Whether a node mixes the weights across heads, or adds to each head of what a mix gives."""
        mix = mix_of(node)
        return (mix is not None and mix.x is value) or (bool(self.mixing) and added_to(self.mixing[-1], node) is not None)

    def name_axes(self, product: Node, weights: Value) -> Layout:
        """Make the axes at the value product; returns the layout of the weights that enter it."""
        left, right = product.inputs
        assert left is not None and right is not None
        out = product.output.shape
        if out is None or left.shape is None or right.shape is None or min(len(left.shape), len(right.shape)) < 2:
            raise NotAttention("the shapes around the value product are unknown", product)
        self.lead = tuple(Axis(f"j{i}", size) for i, size in enumerate(out[:-2]))
        lead: Layout = tuple((axis,) for axis in self.lead)
        self.k = Axis("k", left.shape[-1])
        if weights is left:
            self.q, self.e = Axis("q", out[-2]), Axis("e", out[-1])
            self.output: Layout = (*lead, (self.q,), (self.e,))
            self.value = (right, self.side(right, lead, self.k, self.e))
            return self.side(left, lead, self.q, self.k)
        self.e, self.q = Axis("e", out[-2]), Axis("q", out[-1])
        self.output = (*lead, (self.e,), (self.q,))
        self.value = (left, self.side(left, lead, self.e, self.k))
        return self.side(right, lead, self.k, self.q)

    @staticmethod
    def side(value: Value, lead: Layout, row: Axis, column: Axis) -> Layout:
        """The layout of a matmul input: its leading dimensions broadcast, its last two are given."""
        assert value.shape is not None
        leading = Value(value.name, value.shape[:-2])
        return (*broadcast_layout(leading, lead), (row,), (column,))

    def up_to_anchor(self, value: Value, stop: Value, layout: Layout) -> Layout:
        while value is not stop:
            node = value.producer
            assert node is not None
            mix = next((m for m in self.mixing if node in (m.node, m.added)), None)
            if mix is not None:
                if node is mix.node:
                    self.weighting.append(self.weight_mix(mix, layout))
                value = mix.x if node is mix.node else mix.node.output
                continue
            if node.op in LAYOUT:
                layout = self.space.before(node, layout)
            factor = next((f for f in self.factors if f.node is node), None)
            if factor is not None:
                self.reweighed.append((factor, layout))
            value = weights_of(node, factor)  # type: ignore[assignment]
        return self.space.resolve(layout)

    def score_operands(self, score: Score) -> tuple[Placed, Placed]:
        """(q, its layout) and (k, its layout) at the product of queries and keys, or of the keys that several products join."""
        assert score.product is not None
        if score.product.op == "concat":
            return joined_operands(self, score)
        return self.product_operands(score.product, score.layout, self.k)

    def product_operands(self, node: Node, layout: Layout, over: Axis) -> tuple[Placed, Placed]:
        """(q, its layout) and (k, its layout) at one product, whose keys are the axis `over`."""
        left, right = node.inputs
        assert left is not None and right is not None and left.shape is not None
        if not self.activations.is_operand(left) or not self.activations.is_operand(right):
            raise NotAttention("one side of the score product is a constant", node, PRODUCT)
        *lead, rows, columns = layout
        self.d = Axis("d", left.shape[-1])
        queries, keys = set(self.space.resolve_group((self.q,))), set(self.space.resolve_group((over,)))
        layout_left = (*broadcast_layout(Value("", left.shape[:-2]), tuple(lead)), rows, (self.d,))
        layout_right = (*broadcast_layout(Value("", (right.shape or ())[:-2]), tuple(lead)), (self.d,), columns)
        # Rows may hold batch axes as well: those along which the keys do not vary.
        if queries <= set(rows) and keys <= set(columns):
            return (left, layout_left), (right, layout_right)
        if keys <= set(rows) and queries <= set(columns):
            return (right, layout_right), (left, layout_left)
        raise NotAttention(
            "the last two dimensions of the scores are not queries and keys", node, "a product q k' over the head width"
        )
