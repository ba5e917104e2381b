"""softmax causal & window(4096) offset(size(k) - size(q)), one query   ->   attnopt::triton_decode(q, k, v, …, operands, spec)

The kernels of the family for few queries on a long cache, emitted for this spec: programs share the keys, and the heads that share a
key head are worked on together. On CPU tensors the operator computes the reference.
"""

from __future__ import annotations

from dataclasses import dataclass

from attnopt.codegen.operator_lowering import OperatorLowering
from attnopt.codegen.prefill_form import Form
from attnopt.codegen.triton.decode import supports
from attnopt.ir.site import Refusal
from attnopt.ir.spec import AttentionSpec


@dataclass(frozen=True)
class TritonDecode(OperatorLowering):
    name: str = "triton-decode"
    operator: str = "triton_decode"
    backend: str = "Triton"
    few: bool = True

    def refusal(self, spec: AttentionSpec, form: Form) -> Refusal | None:
        return supports(spec, form)
