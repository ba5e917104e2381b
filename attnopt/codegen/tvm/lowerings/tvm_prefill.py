"""softmax softcap(30.0) add(alibi) causal & window(512)   ->   attnopt::tvm_attention(q, k, v, operands, spec)

The kernel of the family for many queries, emitted for this spec and compiled for the CPU at hand: blocks of keys that the mask rules out
are never visited, and masks and biases that are expressions are never in memory. Where TVM is missing when it runs, the operator
computes by torch's kernels.
"""

from __future__ import annotations

from dataclasses import dataclass

from attnopt.codegen.operator_lowering import OperatorLowering
from attnopt.codegen.prefill_form import Form
from attnopt.codegen.tvm.availability import missing
from attnopt.codegen.tvm.prefill import supports
from attnopt.ir.site import Refusal
from attnopt.ir.spec import AttentionSpec


@dataclass(frozen=True)
class TvmPrefill(OperatorLowering):
    name: str = "tvm-prefill"
    operator: str = "tvm_attention"
    backend: str = "TVM"

    def missing(self) -> str | None:
        return missing()

    def refusal(self, spec: AttentionSpec, form: Form) -> Refusal | None:
        return supports(spec, form)
