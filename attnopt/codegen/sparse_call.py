"""What stands behind the operators attnopt::tvm_sparse and attnopt::triton_sparse: a spec as text, checked, and run in parts.

    run_checked(run, q, k, v, [], "softmax scale(0.1) causal pooled_blocks(64, 64, share=0.3)")   ->   o [B, H, Q, E]

Tiles are chosen by torch from pooled rows; `run` is a kernel that takes a spec, from the list and for the dense rows of a correction.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

from torch import Tensor

from attnopt.codegen import sparse
from attnopt.codegen.gathered import Parts
from attnopt.codegen.listed import Run
from attnopt.errors import InputMismatch
from attnopt.ir.reference import check_shapes
from attnopt.ir.spec import AttentionSpec, parse

ELSEWHERE = "Another kernel may compute it: attnopt.attention(…)."


def run_checked(
    run: Run, q: Tensor, k: Tensor, v: Tensor, tensors: Sequence[Tensor], spec: str, parts: Parts | None = None
) -> Tensor:
    """q [B, H, Q, D], k [B, G, K, D], v [B, G', K, E] -> o [B, H, Q, E]; tensors in the order of the spec's operands.

    Raises InputMismatch for inputs that do not fit the spec, or a spec that no kernels make up. Inference only.
    """
    parsed = checked(spec)
    check_shapes(parsed, q, k, v)
    if parsed.correction is not None and q.shape[2] != k.shape[2]:
        raise InputMismatch(
            f"{q.shape[2]} queries and {k.shape[2]} keys: only a whole prompt is corrected", where=spec, next_move=ELSEWHERE
        )
    return sparse.run_sparse(run, parsed, q, k, v, dict(zip(parsed.operands, tensors, strict=True)), parts)


@functools.lru_cache(maxsize=256)
def checked(spec: str) -> AttentionSpec:
    parsed = parse(spec)
    if (refused := sparse.refuses(parsed)) is not None:
        raise InputMismatch(str(refused), where=spec, next_move=ELSEWHERE)
    return parsed
