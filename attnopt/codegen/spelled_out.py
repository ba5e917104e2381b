"""softmax heads(8, 2) scale(s) causal & padding   ->   MatMul, Mul, Add, Softmax, MatMul

An attention as models spell it out: what every kernel is measured against, and what stands where none fits. It is no lowering that
`optimize` chooses: the nodes of the model are as good.
"""

from __future__ import annotations

from dataclasses import dataclass

from attnopt.codegen.additive_mask import additive_mask, scaled_then_biased
from attnopt.codegen.lowering import first_refusal
from attnopt.codegen.materialize import broadcast, shape_of
from attnopt.ir.empty_rows import never_empty
from attnopt.ir.graph import Value
from attnopt.ir.layout import Operand
from attnopt.ir.site import Builder, Refusal, Site, arrange


@dataclass(frozen=True)
class SpelledOut:
    """`host` is "torch" or "onnx"."""

    host: str = "torch"
    opset: int = 13

    @property
    def name(self) -> str:
        return "eager" if self.host == "torch" else "ort-eager"

    def supports(self, site: Site, runtime: str) -> Refusal | None:
        filled = site.spec.mask is None or site.spec.empty_row != "zero" or never_empty(site)
        return scaled_then_biased(site, softcap=True) or first_refusal(
            (filled, "a row without visible key must be zero; a plain softmax makes it no number"), at=site.name
        )

    def emit(self, site: Site, builder: Builder) -> Value:
        a, dtype = site.axes, site.q.value.dtype
        heads = (*a["g"], *a["r"])
        b, h, q, k, e = (site.size(axis) for axis in "bhqke")
        queries = arrange(builder, site.q, [a["b"], heads, a["q"], a["d"]], broadcast=True)
        turned = arrange(builder, site.k, [a["b"], heads, a["d"], a["k"]], broadcast=True)
        values = arrange(builder, site.v, [a["b"], heads, a["k"], a["e"]], broadcast=True)
        scores = builder.emit("matmul", queries, turned, shape=(b, h, q, k), dtype=dtype)

        def then(op: str, value: Value, other: Value) -> Value:
            return builder.emit(op, value, other, shape=broadcast(shape_of(value), shape_of(other)), dtype=dtype)

        if site.spec.scale is not None and site.spec.scale != 1.0:
            scores = then("mul", scores, builder.constant(site.spec.scale, dtype))
        for clause in site.spec.score:
            if clause.name == "softcap":
                cap = builder.constant(clause.number(0), dtype)
                scores = then("mul", builder.emit("tanh", then("div", scores, cap), shape=(b, h, q, k), dtype=dtype), cap)
        mask = additive_mask(site, builder, boolean=False)
        if mask is not None:
            scores = then("add", scores, mask)
        weights = builder.emit("softmax", scores, shape=(b, h, q, k), dtype=dtype, axis=3)
        out = builder.emit("matmul", weights, values, shape=(b, h, q, e), dtype=dtype)
        return arrange(builder, Operand(out, (a["b"], heads, a["q"], a["e"])), site.output.layout)
