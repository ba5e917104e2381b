"""Sparse attention on a CPU: what stands behind the operator attnopt::tvm_sparse.

    run_tvm_sparse(q, k, v, [], "softmax scale(0.1) causal pooled_blocks(64, 64, share=0.3)")   ->   o [B, H, Q, E]

Tiles are chosen by torch from pooled rows; the kernels of tvm_attention compute from the list, and dense rows of a correction.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence

from torch import Tensor

from attnopt.codegen import sparse
from attnopt.codegen.tvm.tvm_attention import ELSEWHERE, read, run_tvm
from attnopt.errors import InputMismatch
from attnopt.ir.reference import check_shapes
from attnopt.ir.spec import AttentionSpec


def run_tvm_sparse(q: Tensor, k: Tensor, v: Tensor, tensors: Sequence[Tensor], spec: str) -> Tensor:
    """q [B, H, Q, D], k [B, G, K, D], v [B, G', K, E] -> o [B, H, Q, E]; tensors in the order of the spec's operands.

    Raises InputMismatch for inputs that do not fit the spec, or a spec that no kernels make up. Inference only.
    """
    parsed = checked(spec)
    check_shapes(parsed, q, k, v)
    if parsed.correction is not None and q.shape[2] != k.shape[2]:
        raise InputMismatch(
            f"{q.shape[2]} queries and {k.shape[2]} keys: only a whole prompt is corrected", where=spec, next_move=ELSEWHERE
        )
    return sparse.run_sparse(run, parsed, q, k, v, dict(zip(parsed.operands, tensors, strict=True)))


def run(spec: AttentionSpec, q: Tensor, k: Tensor, v: Tensor, operands: Mapping[str, Tensor]) -> Tensor:
    """One kernel."""
    line, names = spelled(spec)
    made: Tensor = run_tvm(q, k, v, [operands[name] for name in names], line)
    return made


@functools.lru_cache(maxsize=256)
def spelled(spec: AttentionSpec) -> tuple[str, tuple[str, ...]]:
    return str(spec), spec.operands


@functools.lru_cache(maxsize=256)
def checked(spec: str) -> AttentionSpec:
    parsed = read(spec)
    if (refused := sparse.refuses(parsed)) is not None:
        raise InputMismatch(str(refused), where=spec, next_move=ELSEWHERE)
    return parsed
