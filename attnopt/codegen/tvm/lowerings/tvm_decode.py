"""softmax causal & window(4096) offset(size(k) - size(q)), one query   ->   attnopt::tvm_decode(q, k, v, …, operands, spec)

The kernel of the family for few queries on a long cache, emitted for this spec and compiled for the CPU at hand: threads share the
keys, and the heads that share a key head are worked on together. The cache is what the model holds, in one piece. It stands inside an
operator of ours that carries the spec as text: loading such a file needs `import attnopt`.
"""

from __future__ import annotations

from dataclasses import dataclass

from attnopt.codegen.lowering import first_refusal
from attnopt.codegen.operator_call import cache_parts, call_operator
from attnopt.codegen.site_form import FEW, form_of
from attnopt.codegen.triton.decode import DecodeForm
from attnopt.codegen.tvm.availability import missing
from attnopt.codegen.tvm.decode import supports
from attnopt.ir.graph import Value
from attnopt.ir.site import Builder, Refusal, Site


@dataclass(frozen=True)
class TvmDecode:
    name: str = "tvm-decode"
    host: str = "torch"
    opset: int = 0

    def supports(self, site: Site, runtime: str) -> Refusal | None:
        absent = [name for name in site.spec.operands if name not in site.operands]
        queries = site.size("q")
        refusal = first_refusal(
            (runtime == "torch", f"runtime {runtime} has no TVM kernels"),
            (missing() is None, missing() or ""),
            (
                isinstance(queries, int) and queries <= FEW,
                f"{queries} queries; this kernel is for a number that is known to be at most {FEW}",
            ),
            (not absent, f"{next(iter(absent), '')} is not known inside the kernel"),
            at=site.name,
        )
        form = form_of(site)
        if refusal is not None or isinstance(form, Refusal):
            return refusal or form  # type: ignore[return-value]
        return supports(site.spec, DecodeForm(form.width, form.value_width, form.dtype, form.operands))

    def emit(self, site: Site, builder: Builder) -> Value:
        import torch

        import attnopt.operators  # noqa: F401  (registers the operator)

        return call_operator(torch.ops.attnopt.tvm_decode.default, site, builder, cache_parts(site))
