"""softmax heads(8, 2) scale(s) causal & window(w)   ->   com.microsoft::GroupQueryAttention(q, k, v, …, local_window_size=w)

onnxruntime's operator for decoders: always causal, grouped heads as they are, the soft cap and the window built in. It is
used only where the mask is proved to be causal (and a window), and queries and keys are equally many (a whole prompt).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from attnopt.codegen.additive_mask import scaled_then_biased
from attnopt.codegen.lowering import first_refusal
from attnopt.ir.expr import Expr, Term, conjuncts
from attnopt.ir.graph import Value
from attnopt.ir.layout import Operand, size_of
from attnopt.ir.site import Builder, Refusal, Site, arrange


@dataclass(frozen=True)
class GroupQueryAttention:
    name: str = "ort-gqa"
    host: str = "onnx"
    opset: int = 13

    def supports(self, site: Site, runtime: str) -> Refusal | None:
        return first_refusal(
            (runtime == "onnxruntime", f"runtime {runtime} has no com.microsoft::GroupQueryAttention"),
            (isinstance(site.size("h"), int), "the number of heads is not known"),
            (site.q.value.dtype in ("float32", "float16"), f"dtype {site.q.value.dtype}"),
            (causal_window(site.spec.mask) is not None, f"mask '{site.spec.mask}' is not causal with at most a window"),
            (not site.spec.biases, "biases"),
            (site.spec.offset is None, "queries do not start at position 0"),
            (site.size("q") == site.size("k"), "queries and keys differ in number"),
            (site.size("d") == site.size("e"), "values have another width than keys"),
            (isinstance(site.size("d"), int) and int(site.size("d")) % 8 == 0, "the head width is no multiple of 8"),  # type: ignore[arg-type]
            at=site.name,
        ) or scaled_then_biased(site, softcap=True)

    def emit(self, site: Site, builder: Builder) -> Value:
        a = site.axes
        heads = (*a["g"], *a["r"])
        q = arrange(builder, site.q, [a["b"], a["q"], (*heads, *a["d"])], broadcast=True)
        k = arrange(builder, site.k, [a["b"], a["k"], (*a["g"], *a["d"])], broadcast=True)
        v = arrange(builder, site.v, [a["b"], a["k"], (*a["g"], *a["e"])], broadcast=True)
        cap = next((float(c.args[0]) for c in site.spec.score if c.name == "softcap"), 0.0)  # type: ignore[arg-type]
        layout = (a["b"], a["q"], (*heads, *a["e"]))
        last, total = self.lengths(site, builder)
        out = builder.call(
            "com.microsoft::GroupQueryAttention",
            q,
            k,
            v,
            None,
            None,
            last,
            total,
            shape=tuple(size_of(group) for group in layout),
            dtype=site.q.value.dtype,
            num_heads=site.size("h"),
            kv_num_heads=site.size("g"),
            scale=site.spec.scale,
            softcap=cap,
            local_window_size=causal_window(site.spec.mask) or -1,
        )
        return arrange(builder, Operand(out, layout), site.output.layout)

    @staticmethod
    def lengths(site: Site, builder: Builder) -> tuple[Value, Value]:
        """seqlens_k int32 [B] (the last key's index, every row of the batch alike) and total_sequence_length int32 []."""
        position = builder.emit("iota", shape=(site.size("k"),), dtype="int64", start=0, step=1)
        last = builder.emit("reduce_max", position, shape=(), dtype="int64", axes=(0,), keepdims=False)
        narrow = builder.emit("cast", last, shape=(), dtype="int32")
        total = builder.emit(
            "add", narrow, builder.constant(torch.tensor(1, dtype=torch.int32), "int32"), shape=(), dtype="int32"
        )
        each = builder.emit(
            "expand", builder.emit("reshape", narrow, shape=(1,), dtype="int32"), shape=(site.size("b"),), dtype="int32"
        )
        return each, total


def causal_window(mask: Expr | None) -> int | None:
    """0 for `causal`, w for `causal & window(w)`, None for anything else."""
    parts = conjuncts(mask)
    windows = [p for p in parts if isinstance(p, Term) and p.name == "window"]
    if Term("causal") not in parts or len(parts) != 1 + len(windows) or len(windows) > 1:
        return None
    return int(windows[0].args[0]) if windows else 0
