"""softmax heads(12) scale(s) add(…)   ->   com.microsoft::MultiHeadAttention(q [B, Q, H*D], k, v, attention_bias)

onnxruntime's operator, at the model's own opset. It takes no grouped heads (they are repeated), a bias whose last two
dimensions are whole, and `unidirectional` only where queries and keys are equally many. A row of minus infinity comes out as
NaN: where it must be zero, it is set to zero afterwards.
"""

from __future__ import annotations

from dataclasses import dataclass

from attnopt.codegen.additive_mask import additive_mask, scaled_then_biased
from attnopt.codegen.lowering import first_refusal
from attnopt.codegen.materialize import shape_of
from attnopt.ir.expr import Term
from attnopt.ir.graph import Value
from attnopt.ir.layout import Operand, size_of
from attnopt.ir.site import Builder, Refusal, Site, arrange


@dataclass(frozen=True)
class MultiHeadAttention:
    name: str = "ort-mha"
    host: str = "onnx"
    opset: int = 13

    def supports(self, site: Site, runtime: str) -> Refusal | None:
        return first_refusal(
            (runtime == "onnxruntime", f"runtime {runtime} has no com.microsoft::MultiHeadAttention"),
            (isinstance(site.size("h"), int), "the number of heads is not known"),
            (site.q.value.dtype in ("float32", "float16"), f"dtype {site.q.value.dtype}"),
            at=site.name,
        ) or scaled_then_biased(site)

    def emit(self, site: Site, builder: Builder) -> Value:
        a = site.axes
        heads = (*a["g"], *a["r"])
        q = arrange(builder, site.q, [a["b"], a["q"], (*heads, *a["d"])], broadcast=True)
        k = arrange(builder, site.k, [a["b"], a["k"], (*heads, *a["d"])], broadcast=True)
        v = arrange(builder, site.v, [a["b"], a["k"], (*heads, *a["e"])], broadcast=True)
        causal = (
            site.spec.mask == Term("causal")
            and site.spec.offset is None
            and not site.spec.biases
            and site.size("q") == site.size("k")
        )
        bias = None if causal else attention_bias(site, builder)
        layout = (a["b"], a["q"], (*heads, *a["e"]))
        out = builder.call(
            "com.microsoft::MultiHeadAttention",
            q,
            k,
            v,
            None,
            None,
            bias,
            shape=tuple(size_of(group) for group in layout),
            dtype=site.q.value.dtype,
            num_heads=site.size("h"),
            scale=site.spec.scale,
            unidirectional=int(causal),
        )
        if bias is not None and site.spec.empty_row != "mean":
            out = zero_for_nan(out, builder)
        return arrange(builder, Operand(out, layout), site.output.layout)


def zero_for_nan(x: Value, builder: Builder) -> Value:
    unknown = builder.emit("isnan", x, shape=shape_of(x), dtype="bool")
    return builder.emit("where", unknown, builder.constant(0.0, x.dtype), x, shape=shape_of(x), dtype=x.dtype)


def attention_bias(site: Site, builder: Builder) -> Value | None:
    """The additive mask with its last two dimensions whole: onnxruntime broadcasts only batch and heads."""
    bias = additive_mask(site, builder, boolean=False)
    if bias is None or bias.shape is None:
        return bias
    shape = (*((1,) * (4 - len(bias.shape)) + bias.shape[:-2])[:2], site.size("q"), site.size("k"))
    return bias if bias.shape == shape else builder.emit("expand", bias, shape=shape, dtype=bias.dtype)
