"""softmax offset(size(k) - size(q)) causal pages(16, 64, recent=1, low=l, high=h)   ->   attnopt::tvm_pages(q, k, v, [l, h], spec)

One kernel chooses the pages of one query by bounds that come with the cache, and the kernel of the family for few queries reads them
where they lie, instead of nodes that choose, gather and attend.
"""

from __future__ import annotations

from dataclasses import dataclass

from attnopt.codegen.operator_lowering import OperatorLowering
from attnopt.codegen.prefill_form import Form
from attnopt.codegen.tvm.availability import missing
from attnopt.codegen.tvm.page_attention import supports
from attnopt.ir.site import Refusal
from attnopt.ir.spec import AttentionSpec


@dataclass(frozen=True)
class TvmPages(OperatorLowering):
    name: str = "tvm-pages"
    operator: str = "tvm_pages"
    backend: str = "TVM"
    one: bool = True

    def missing(self) -> str | None:
        return missing()

    def refusal(self, spec: AttentionSpec, form: Form) -> Refusal | None:
        return supports(spec, form)
