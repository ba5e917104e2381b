"""softmax causal & window(4096) offset(size(k) - size(q)), one query   ->   attnopt::tvm_decode(q, k, v, …, operands, spec)

The kernel of the family for few queries on a long cache, emitted for this spec and compiled for the CPU at hand: threads share the
keys, and the heads that share a key head are worked on together.
"""

from __future__ import annotations

from dataclasses import dataclass

from attnopt.codegen.operator_lowering import OperatorLowering
from attnopt.codegen.prefill_form import Form
from attnopt.codegen.tvm.availability import missing
from attnopt.codegen.tvm.decode import supports
from attnopt.ir.site import Refusal
from attnopt.ir.spec import AttentionSpec


@dataclass(frozen=True)
class TvmDecode(OperatorLowering):
    name: str = "tvm-decode"
    operator: str = "tvm_decode"
    backend: str = "TVM"
    few: bool = True

    def missing(self) -> str | None:
        return missing()

    def refusal(self, spec: AttentionSpec, form: Form) -> Refusal | None:
        return supports(spec, form)
