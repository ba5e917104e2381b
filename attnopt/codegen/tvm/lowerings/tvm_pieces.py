"""softmax cache(k=int2, v=int2, recent=128, …), one query   ->   attnopt::tvm_pieces(q, [codes, scales, zeros, recent], […], spec)

Tokens in codes are read as codes and exact ones as they are, instead of nodes that make the whole cache floats at every step.
"""

from __future__ import annotations

from dataclasses import dataclass

from attnopt.codegen.operator_lowering import OperatorLowering
from attnopt.codegen.prefill_form import Form
from attnopt.codegen.tvm.availability import missing
from attnopt.codegen.tvm.piece_attention import supports
from attnopt.ir.graph import Value
from attnopt.ir.layout import Operand, size_of
from attnopt.ir.site import Builder, Refusal, Site, arrange
from attnopt.ir.spec import AttentionSpec

HELD = ("scales", "zeros", "first", "recent")  # beside codes, in the order of the operator's lists


@dataclass(frozen=True)
class TvmPieces(OperatorLowering):
    name: str = "tvm-pieces"
    operator: str = "tvm_pieces"
    backend: str = "TVM"
    one: bool = True

    def missing(self) -> str | None:
        return missing()

    def refusal(self, spec: AttentionSpec, form: Form) -> Refusal | None:
        return supports(spec, form)

    def emit(self, site: Site, builder: Builder) -> Value:
        import torch

        import attnopt.operators  # noqa: F401  (registers the operator)

        a = site.axes
        heads = (*a["g"], *a["r"])
        q = arrange(builder, site.q, [a["b"], heads, a["q"], a["d"]], broadcast=True)
        sides = [
            [getattr(site, side).value, *(site.codes[name] for what in HELD if (name := f"{side}_{what}") in site.codes)]
            for side in "kv"
        ]
        layout = (a["b"], heads, a["q"], a["e"])
        shape = tuple(size_of(group) for group in layout)
        operator = torch.ops.attnopt.tvm_pieces.default
        out = builder.call(operator, q, *sides, str(site.spec), shape=shape, dtype=site.q.value.dtype)
        return arrange(builder, Operand(out, layout), site.output.layout)
