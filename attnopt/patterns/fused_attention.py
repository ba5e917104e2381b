"""An attention that is one node already (scaled_dot_product_attention, ONNX Attention)  ->  a Site.

    attention(q [B, 8, Q, D], k [B, 2, K, D], v, mask, causal, scale)   ->   softmax heads(8, 2) scale(…) causal & …

The operands are followed up like those of spelled-out attention, so a repeat_kv before the node is seen through as well.
"""

from __future__ import annotations

from dataclasses import dataclass

from attnopt.ir.clause import Clause
from attnopt.ir.dims import divide
from attnopt.ir.expr import Const, Term
from attnopt.ir.graph import Node, Value
from attnopt.ir.layout import Axis, Group, Layout, LayoutMismatch
from attnopt.ir.site import Site
from attnopt.patterns.assembly import Assembly, Placed
from attnopt.patterns.operands import broadcast_layout
from attnopt.patterns.score import NotAttention, Score


@dataclass
class FusedAttention(Assembly):
    """Reads one `attention` node."""

    def from_node(self, node: Node) -> Site:
        q, k, v = node.inputs[:3]
        mask = node.inputs[3] if len(node.inputs) > 3 else None
        if q is None or k is None or v is None or any(x.shape is None or len(x.shape) not in (3, 4) for x in (q, k, v)):
            raise NotAttention("the shapes of q, k and v are unknown or not of rank 3 or 4", node)
        try:
            return self.read(node, q, k, v, mask)
        except LayoutMismatch as mismatch:
            raise NotAttention(str(mismatch), node) from None

    def read(self, node: Node, q: Value, k: Value, v: Value, mask: Value | None) -> Site:
        assert q.shape and k.shape and v.shape
        self.q, self.k = Axis("q", q.shape[-2]), Axis("k", k.shape[-2])
        self.d, self.e = Axis("d", q.shape[-1]), Axis("e", v.shape[-1])
        self.lead = tuple(Axis(f"j{i}", size) for i, size in enumerate((node.output.shape or q.shape)[:-2]))
        lead: Layout = tuple((axis,) for axis in self.lead)
        queries = (q, (*broadcast_layout(Value("", q.shape[:-2]), lead), (self.q,), (self.d,)))
        keys = (k, (*self.key_lead(k, lead), (self.k,), (self.d,)))
        values = (v, (*self.key_lead(v, lead), (self.k,), (self.e,)))
        output: Placed = (node.output, (*lead, (self.q,), (self.e,)))
        score = Score(terms=self.terms(node))
        if mask is not None:
            if mask.shape is None:
                raise NotAttention("the shape of the mask is unknown", node)
            where = broadcast_layout(mask, (*lead, (self.q,), (self.k,)))
            if mask.dtype == "bool":
                score.masks.append(self.load(mask, where, "mask"))
                score.empty_row = "zero"
            else:
                score.terms.append(Clause("add", (self.load(mask, where, "bias"),)))
        if node.attrs.get("causal"):
            score.masks.append(Term("causal"))
        return self.site(node, queries, keys, values, output, score)

    def key_lead(self, value: Value, lead: Layout) -> Layout:
        """The leading groups of k or v: as those of q, but the head dimension may hold fewer heads (grouped queries)."""
        assert value.shape is not None
        if len(lead) == 2 and len(value.shape) == 4:
            heads, own = self.lead[1], value.shape[1]
            ratio = divide(heads.size, own)
            if ratio is None:
                raise LayoutMismatch(f"{heads.size} query heads are no multiple of {own} key heads")
            if own != 1 and ratio != 1:
                outer: Group = self.space.resolve_group((heads,))
                if len(outer) == 1:
                    outer = self.space.split(heads, ratio)
                return (*broadcast_layout(Value("", value.shape[:1]), lead[:1]), outer[:1])
        return broadcast_layout(Value("", value.shape[:-2]), lead)

    @staticmethod
    def terms(node: Node) -> list[Clause]:
        """What the node does to its scores: scale first, then the soft cap, then (by the caller) the mask."""
        scale, cap = float(node.attrs["scale"]), float(node.attrs.get("softcap") or 0.0)
        terms = [Clause("scale", (Const(scale),))] if scale != 1.0 else []
        return [*terms, Clause("softcap", (cap,))] if cap else terms
