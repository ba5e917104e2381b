"""Two softmaxes, or two parts of the heads of one, whose weights are added or subtracted  ->  one Site.

    (softmax(q k') - l * softmax(q1 k1')) v          softmax … plus(-load(factor0), softmax …, q=q1, k=k1)
    p = softmax(q k');  (p[:, ::2] - l * p[:, 1::2]) v        the same, with every other head of q and k (the paper's own code)

What stands before the first is a gate. Both must see the same keys: one mask, the same biases and scale. Outputs that are added are
read in `summed_outputs`.
Source: "Differential Transformer".
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from attnopt.ir.clause import Clause
from attnopt.ir.expr import Const, Expr, Index, Load, apply
from attnopt.ir.graph import LAYOUT, Node, Value
from attnopt.ir.layout import Axis, Group, Layout, Operand
from attnopt.ir.site import Site
from attnopt.patterns.normalizer import Anchor
from attnopt.patterns.operands import broadcast_layout
from attnopt.patterns.picking import parting
from attnopt.patterns.score import NotAttention
from attnopt.patterns.softmax_attention import SoftmaxAttention

Factor = tuple[Value, Layout]
Weights = Mapping[Value, Anchor]
SAME = "two softmaxes over the same keys and values, under one mask and one scale, with a factor for each row at most"


CROSSED = ("cast", "mul", "slice", *LAYOUT)


def combination(anchor: Anchor, weights: Weights) -> Node | None:
    """The sum or difference in which the anchor's weights, or two parts of them, meet or meet those of another anchor."""
    value, parts = anchor.weights, False
    while value.users and (len(value.users) == 1 or all(n.op == "slice" for n in value.users)):
        node = value.users[0]
        parts = parts or len(value.users) == 2
        if node.op in ("add", "sub"):
            met = [source(i, weights) for i in node.inputs if i is not None]
            return node if len(met) == 2 and None not in met and (met[0] is not met[1]) != parts else None
        if node.op not in CROSSED:
            return None
        value = node.output
    return None


def source(value: Value, weights: Weights) -> Anchor | None:
    """The anchor whose weights a value holds, scaled, arranged and cut."""
    while value not in weights:
        node = value.producer
        if node is None or node.op not in CROSSED:
            return None
        found = [
            i for i in node.inputs[: 2 if node.op == "mul" else 1] if i is not None and (node.op != "mul" or source(i, weights))
        ]
        if len(found) != 1:
            return None
        value = found[0]
    return weights[value]


@dataclass
class DifferentialAttention(SoftmaxAttention):
    """One attempt to read two anchors that meet in a sum; either of them gives the same Site."""

    met: Node | None = None
    anchors: Weights = field(default_factory=dict)

    def from_anchor(self, anchor: Anchor) -> Site:
        node = self.met
        assert node is not None
        product, weights, guarded = self.value_product(Anchor(anchor.scores, node.output, anchor.axis, node))
        if guarded or self.factors or self.mixing:
            raise NotAttention("the combined weights are changed before they meet values", node, SAME)
        self.reached = "value product"
        layout = self.up_to_anchor(weights, node.output, self.name_axes(product, weights))
        output = (product.output, self.output)
        sites: list[Site] = []
        factors: list[list[Factor]] = []
        for side in node.inputs:
            assert side is not None
            self.picks = {}
            own, place, found = self.up_to_weights(side, layout)
            if place[own.axis] != self.space.resolve_group((self.k,)):
                raise NotAttention("a softmax of the sum runs over another axis than the keys", own.node, SAME)
            self.loads = {}
            sites.append(self.from_weights(own, place, self.value, output, product))
            factors.append(found)
        whole = combined(sites[0], sites[1], factors[0], factors[1], node.op == "sub")
        if isinstance(whole, str):
            raise NotAttention(whole, node, SAME)
        return whole

    def up_to_weights(self, value: Value, layout: Layout) -> tuple[Anchor, Layout, list[Factor]]:
        """The anchor of one side, the layout of its weights, and what they are multiplied by on the way."""
        found: list[Factor] = []
        if value.shape is None or broadcast_layout(value, layout) != layout:
            raise NotAttention("weights are repeated where they are combined", self.met, SAME)  # type: ignore[arg-type]
        while value not in self.anchors:
            node = value.producer
            assert node is not None
            if value in self.graph.outputs:
                self.weights_used = node
            inner = next(i for i in node.inputs if i is not None and source(i, self.anchors) is not None)
            if node.op == "mul":
                other = next(i for i in node.inputs if i is not inner)
                assert other is not None
                found.append((other, broadcast_layout(other, layout)))
            elif node.op in LAYOUT:
                layout = self.space.before(node, layout)
            elif node.op == "slice":
                layout = self.before_slice(node, layout)
            value = inner
        if value in self.graph.outputs:
            self.weights_used = self.anchors[value].node
        return self.anchors[value], self.space.resolve(layout), found

    def before_slice(self, node: Node, layout: Layout) -> Layout:
        """The layout of what a slice takes one of several equal parts of: the parts are an axis, of which one place is picked."""
        place, parts = node.attrs["axis"], parting(node)
        ours = {a for axis in (self.q, self.k) for a in self.space.resolve_group((axis,))}
        if parts is None or ours & set(layout[place]):
            raise NotAttention("the weights are cut, and not into equal parts of the heads", node, SAME)
        count, index = parts
        axis = Axis(f"part{len(self.picks)}", count)
        self.picks[axis] = index
        return (*layout[:place], (axis, *layout[place]), *layout[place + 1 :])


def combined(first: Site, second: Site, scaled: Sequence[Factor], other: Sequence[Factor], negative: bool) -> Site | str:
    """The first site with the second as what it adds, or why they are not one."""
    apart = [
        (first.axes != second.axes, "the two attentions have other heads or lengths"),
        ((first.v.value, first.v.layout) != (second.v.value, second.v.layout), "the two attentions have other values"),
        (replace(first.spec, heads=None) != replace(second.spec, heads=None), f"{first.spec} is not {second.spec}"),
        (first.operands != second.operands, "the two have other masks or biases"),
        (bool(first.spec.plus), "the first is a sum already"),
    ]
    reason = next((text for wrong, text in apart if wrong), None)
    if reason is not None:
        return reason
    form = first.tensor_form if first.tensor_form == second.tensor_form else None  # one mask, made twice
    operands = dict(first.operands)
    exprs: list[Expr | None] = []
    for factors in (scaled, other):
        total: Expr | None = None
        for value, layout in factors:
            read = row_factor(value, layout, first.axes, operands)
            if read is None:
                return "a factor on the weights varies along keys or channels"
            total = read if total is None else apply("mul", total, read)
        exprs.append(total)
    gate, share = exprs
    share = Const(1.0) if share is None else share
    if negative:
        share = Const(-share.value) if isinstance(share, Const) else apply("neg", share)
    names = {"q": fresh("q", operands), "k": fresh("k", operands)}
    operands |= {names["q"]: second.q, names["k"]: second.k}
    inner = replace(second.spec, heads=None, width=None)
    spec = first.spec.with_(
        gate=None if gate is None else Clause("gate", (gate,)),
        plus=(Clause("plus", (share, inner), tuple(names.items())),),
    )
    nodes = tuple(dict.fromkeys((*first.nodes, *second.nodes)))
    used = first.weights_used or second.weights_used
    return replace(first, spec=spec, operands=operands, tensor_form=form, nodes=nodes, weights_used=used)


def row_factor(value: Value, layout: Layout, axes: Mapping[str, Group], operands: dict[str, Operand]) -> Expr | None:
    """The factor as an expression of b, h and row; its operand is remembered. None where it varies along anything else."""
    if (number := value.scalar()) is not None:
        return Const(float(number))
    roles = {"b": axes["b"], "h": (*axes["g"], *axes["r"]), "row": axes["q"]}
    indices: list[Expr] = []
    groups: list[Group] = []
    for group in layout:
        held: tuple[Axis, ...] = tuple(a for a in group if a.size != 1)
        role = next((n for n, axis in roles.items() if held and held == tuple(a for a in axis if a.size != 1)), None)
        if held and role is None:
            return None
        indices.append(Const(0) if role is None else Index(role))
        groups.append(() if role is None else roles[role])
    name = fresh("factor", operands)
    operands[name] = Operand(value, tuple(groups))
    return Load(name, tuple(indices))


def fresh(kind: str, taken: Mapping[str, Operand]) -> str:
    start = 0 if kind == "factor" else 1
    return next(f"{kind}{i}" for i in range(start, len(taken) + start + 1) if f"{kind}{i}" not in taken)
