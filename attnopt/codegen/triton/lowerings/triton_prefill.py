"""softmax softcap(30.0) add(alibi) causal & window(512)   ->   attnopt::triton_attention(q, k, v, operands, spec)

The kernel of the family for many queries, emitted for this spec: blocks of keys that the mask rules out are never visited, and masks
and biases that are expressions are never in memory. The operator runs on GPUs; on CPU tensors it computes the reference, so that the
model can be checked.
"""

from __future__ import annotations

from dataclasses import dataclass

from attnopt.codegen.operator_lowering import OperatorLowering
from attnopt.codegen.prefill_form import Form
from attnopt.codegen.triton.prefill import supports
from attnopt.codegen.triton.site_kernels import form_of
from attnopt.ir.site import Refusal, Site
from attnopt.ir.spec import AttentionSpec


@dataclass(frozen=True)
class TritonPrefill(OperatorLowering):
    name: str = "triton-prefill"
    operator: str = "triton_attention"
    backend: str = "Triton"

    def form(self, site: Site) -> Form | Refusal:
        return form_of(site)

    def refusal(self, spec: AttentionSpec, form: Form) -> Refusal | None:
        return supports(spec, form)
