"""A kernel of sparse attention on a GPU: the prefill family, with the list among its operands (see codegen/sparse_call).

run(parse("softmax causal blocks(128, 64, operand=selected_tiles)"), q, k, v, {"selected_tiles": tiles})   ->   o
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from attnopt.codegen.triton.triton_attention import operands_of, run_triton
from attnopt.ir.spec import AttentionSpec


def run(spec: AttentionSpec, q: Tensor, k: Tensor, v: Tensor, operands: Mapping[str, Tensor]) -> Tensor:
    """One kernel; on CPU tensors outside of the interpreter the meaning of the spec."""
    made: Tensor = run_triton(q, k, v, [operands[name] for name in operands_of(spec)], spec)
    return made
