"""softmax causal pooled_blocks(64, 64, share=0.3) delta(64)   ->   attnopt::tvm_sparse(q, k, v, operands, spec)

Tiles that a selector chooses, or that a mask of positions leaves, by the kernel of the family for many queries, which is given their
list; dense rows of a correction by the same family. It stands inside an operator of ours that carries the spec as text.
"""

from __future__ import annotations

from dataclasses import dataclass

from attnopt.codegen.lowering import first_refusal
from attnopt.codegen.operator_call import call_operator
from attnopt.codegen.sparse import refuses_site
from attnopt.codegen.tvm.availability import missing
from attnopt.codegen.tvm.prefill import supports
from attnopt.ir.graph import Value
from attnopt.ir.site import Builder, Refusal, Site


@dataclass(frozen=True)
class TvmSparse:
    name: str = "tvm-sparse"
    host: str = "torch"
    opset: int = 0

    def supports(self, site: Site, runtime: str) -> Refusal | None:
        refusal = first_refusal(
            (runtime == "torch", f"runtime {runtime} has no TVM kernels"),
            (missing() is None, missing() or ""),
            at=site.name,
        )
        return refusal or refuses_site(site, supports)

    def emit(self, site: Site, builder: Builder) -> Value:
        import torch

        import attnopt.operators  # noqa: F401  (registers the operator)

        return call_operator(torch.ops.attnopt.tvm_sparse.default, site, builder)
