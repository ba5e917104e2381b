"""softmax heads(8, 2) scale(s) softcap(c) add(…)   ->   Attention-23(q [B, H, Q, D], k, v, attn_mask)

The standard operator, where the model's opset has it. onnxruntime's kernel refuses masks that broadcast over queries, so
the mask is given whole; `is_causal` is used where queries and keys are equally many, where all readings of it agree.
"""

from __future__ import annotations

from dataclasses import dataclass

from attnopt.codegen.additive_mask import scaled_then_biased
from attnopt.codegen.library.multi_head_attention import attention_bias
from attnopt.codegen.lowering import first_refusal
from attnopt.ir.expr import Term
from attnopt.ir.graph import Value
from attnopt.ir.layout import Operand, size_of
from attnopt.ir.site import Builder, Refusal, Site, arrange


@dataclass(frozen=True)
class OnnxAttention:
    name: str = "onnx-attention"
    host: str = "onnx"
    opset: int = 23

    def supports(self, site: Site, runtime: str) -> Refusal | None:
        whole = isinstance(site.size("h"), int) and isinstance(site.size("g"), int)
        return first_refusal(
            (whole, "the number of heads is not known"),
            at=site.name,
        ) or scaled_then_biased(site, softcap=not site.spec.biases and site.spec.mask in (None, Term("causal")))

    def emit(self, site: Site, builder: Builder) -> Value:
        a = site.axes
        heads = (*a["g"], *a["r"])
        q = arrange(builder, site.q, [a["b"], heads, a["q"], a["d"]], broadcast=True)
        k = arrange(builder, site.k, [a["b"], a["g"], a["k"], a["d"]], broadcast=True)
        v = arrange(builder, site.v, [a["b"], a["g"], a["k"], a["e"]], broadcast=True)
        causal = (
            site.spec.mask == Term("causal")
            and site.spec.offset is None
            and not site.spec.biases
            and site.size("q") == site.size("k")
        )
        mask = None if causal else attention_bias(site, builder)
        cap = next((float(c.args[0]) for c in site.spec.score if c.name == "softcap"), 0.0)  # type: ignore[arg-type]
        layout = (a["b"], heads, a["q"], a["e"])
        out = builder.call(
            "::Attention",
            q,
            k,
            v,
            mask,
            shape=tuple(size_of(group) for group in layout),
            dtype=site.q.value.dtype,
            scale=site.spec.scale,
            softcap=cap,
            is_causal=int(causal),
        )
        return arrange(builder, Operand(out, layout), site.output.layout)
