"""A kernel of sparse attention on a CPU: the spec as the text that attnopt::tvm_attention takes (see codegen/sparse_call).

run(parse("softmax causal blocks(64, 64, operand=selected_tiles)"), q, k, v, {"selected_tiles": tiles})   ->   o
"""

from __future__ import annotations

import functools
from collections.abc import Mapping

from torch import Tensor

from attnopt.codegen.gathered import Parts
from attnopt.codegen.tvm.packed_attention import run_tvm_packed
from attnopt.codegen.tvm.tvm_attention import run_tvm
from attnopt.ir.spec import AttentionSpec


def run(spec: AttentionSpec, q: Tensor, k: Tensor, v: Tensor, operands: Mapping[str, Tensor]) -> Tensor:
    """One kernel."""
    line, names = spelled(spec)
    made: Tensor = run_tvm(q, k, v, [operands[name] for name in names], line)
    return made


def run_with_lse(spec: AttentionSpec, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    output, lse = run_tvm(q, k, v, [], spelled(spec)[0], lse=True)
    return output, lse


def run_packed(spec: AttentionSpec, q: Tensor, k: Tensor, v: Tensor, q_starts: Tensor, k_starts: Tensor) -> tuple[Tensor, Tensor]:
    output, lse = run_tvm_packed(q, k, v, q_starts, k_starts, [], spelled(spec)[0], lse=True)
    return output, lse


@functools.lru_cache(maxsize=256)
def spelled(spec: AttentionSpec) -> tuple[str, tuple[str, ...]]:
    return str(spec), spec.operands


PARTS = Parts(run_with_lse, run_packed)
