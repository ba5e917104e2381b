"""softmax cache(k=int4, v=int4, k_axis=channel, block=100, v_balance=root, …), one query   ->   attnopt::tvm_blocks(q, […], […], spec)

Tokens in blocks are read as codes and those that wait as they are, instead of nodes that make the whole cache floats at every step. What
the last tokens were given comes with the output, for the state that learns from it which tokens are salient.
"""

from __future__ import annotations

from dataclasses import dataclass

from attnopt.codegen.operator_lowering import OperatorLowering
from attnopt.codegen.prefill_form import Form
from attnopt.codegen.tvm.availability import missing
from attnopt.codegen.tvm.piece_attention import blocks_supports
from attnopt.ir.graph import Value
from attnopt.ir.layout import Operand, size_of
from attnopt.ir.site import RECEIVED, Builder, Refusal, Site, arrange
from attnopt.ir.spec import AttentionSpec


@dataclass(frozen=True)
class TvmBlocks(OperatorLowering):
    name: str = "tvm-blocks"
    operator: str = "tvm_blocks"
    backend: str = "TVM"
    one: bool = True

    def missing(self) -> str | None:
        return missing()

    def refusal(self, spec: AttentionSpec, form: Form) -> Refusal | None:
        return blocks_supports(spec, form)

    def supports(self, site: Site, runtime: str) -> Refusal | None:
        if RECEIVED not in site.codes:
            return Refusal("no state learns from the weights", site.name)
        return super().supports(site, runtime)

    def emit(self, site: Site, builder: Builder) -> Value:
        return self.emit_both(site, builder)[0]

    def emit_both(self, site: Site, builder: Builder) -> tuple[Value, Value]:
        """(the output in its layout, what the last tokens were given [B, G, block, 1])."""
        import torch

        import attnopt.operators  # noqa: F401  (registers the operator)

        a = site.axes
        heads = (*a["g"], *a["r"])
        q = arrange(builder, site.q, [a["b"], heads, a["q"], a["d"]], broadcast=True)
        sides = [[getattr(site, s).value, *(x for n, x in site.codes.items() if n.startswith(f"{s}_"))] for s in "kv"]
        recent = sides[0][-1]
        assert recent.shape is not None
        batch, groups, block, _ = recent.shape
        layout = (a["b"], heads, a["q"], a["e"])
        *lead, width = (size_of(group) for group in layout)
        assert isinstance(width, int) and isinstance(block, int)
        operator, dtype = torch.ops.attnopt.tvm_blocks.default, site.q.value.dtype
        made = builder.call(operator, q, *sides, str(site.spec), shape=(*lead, width + block), dtype=dtype)
        parts = [
            builder.emit("slice", made, shape=(*lead, stop - start), dtype=dtype, axis=3, start=start, stop=stop, step=1)
            for start, stop in ((0, width), (width, width + block))
        ]
        rest = size_of(a["r"])
        by_head = builder.emit("reshape", parts[1], shape=(batch, groups, rest, block), dtype=dtype)
        total = builder.emit("reduce_sum", by_head, shape=(batch, groups, 1, block), dtype=dtype, axes=(2,), keepdims=True)
        given = builder.emit("permute", total, shape=(batch, groups, block, 1), dtype=dtype, perm=(0, 1, 3, 2))
        if dtype != "float32":
            given = builder.emit("cast", given, shape=(batch, groups, block, 1), dtype="float32")
        return arrange(builder, Operand(parts[0], layout), site.output.layout), given
