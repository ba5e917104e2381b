"""softmax heads(8, 2) scale(s) causal   ->   aten.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

`is_causal` aligns top-left, as the spec's `causal` does for offset 0. A mask that must leave averaged empty rows is given as
floats (smallest finite number), others as bools.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from attnopt.codegen.additive_mask import additive_mask, scaled_then_biased
from attnopt.codegen.lowering import first_refusal
from attnopt.ir.expr import Term
from attnopt.ir.graph import Value
from attnopt.ir.layout import Operand, size_of
from attnopt.ir.site import Builder, Refusal, Site, arrange


@dataclass(frozen=True)
class Sdpa:
    """`grouped` hands grouped key heads to the kernel as they are (enable_gqa); otherwise they are repeated first."""

    grouped: bool = True
    host: str = "torch"
    opset: int = 0

    @property
    def name(self) -> str:
        return "sdpa" if self.grouped else "sdpa-repeated"

    def supports(self, site: Site, runtime: str) -> Refusal | None:
        repeats = bool(site.axes["r"])
        return first_refusal(
            (runtime == "torch", f"runtime {runtime} has no scaled_dot_product_attention"),
            (self.grouped or repeats, "there are no grouped heads to repeat"),
            at=site.name,
        ) or scaled_then_biased(site)

    def emit(self, site: Site, builder: Builder) -> Value:
        a = site.axes
        heads = (*a["g"], *a["r"])
        keys = a["g"] if self.grouped else heads
        q = arrange(builder, site.q, [a["b"], heads, a["q"], a["d"]], broadcast=True)
        k = arrange(builder, site.k, [a["b"], keys, a["k"], a["d"]], broadcast=True)
        v = arrange(builder, site.v, [a["b"], keys, a["k"], a["e"]], broadcast=True)
        causal = site.spec.mask == Term("causal") and site.spec.offset is None and not site.spec.biases
        mask = None if causal else additive_mask(site, builder, boolean=True)
        layout = (a["b"], heads, a["q"], a["e"])
        out = builder.call(
            torch.ops.aten.scaled_dot_product_attention.default,
            q,
            k,
            v,
            mask,
            shape=tuple(size_of(group) for group in layout),
            dtype=site.q.value.dtype,
            is_causal=causal,
            scale=site.spec.scale,
            enable_gqa=self.grouped and bool(a["r"]),
        )
        return arrange(builder, Operand(out, layout), site.output.layout)
