"""One query on a cache of which some tokens are in codes and others exact: what stands behind the operator attnopt::tvm_pieces.

    run_tvm_pieces(q [B, H, 1, D], [codes, scales, zeros, first, recent] of k, the same of v, "softmax … cache(k=int2, …, recent=128)")
        ->   o [B, H, 1, E]

The kernel of the family for few queries reads each piece; `cache_pieces` puts them together. Where TVM is missing torch reads them.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from attnopt.codegen.cache_pieces import Pieces, attend_pieces, pieces_of
from attnopt.codegen.prefill_form import Form
from attnopt.codegen.triton.decode import DecodeForm
from attnopt.codegen.tvm import decode
from attnopt.codegen.tvm.decode_attention import run_tvm_decode
from attnopt.codegen.tvm.tvm_attention import ELSEWHERE
from attnopt.errors import InputMismatch
from attnopt.ir.kv_cache import Cache
from attnopt.ir.site import Refusal
from attnopt.ir.spec import AttentionSpec, parse


def supports(spec: AttentionSpec, form: Form) -> Refusal | None:
    """None where the kernels compute the spec on a cache in pieces."""
    found = pieces_of(spec)
    if isinstance(found, Refusal):
        return found
    each = DecodeForm(form.width, form.value_width, form.dtype, lse=True)
    refused = (decode.supports(parse(line), each) for line in (found.coded, found.exact))
    return next((one for one in refused if one is not None), None)


def run_tvm_pieces(q: Tensor, k: Sequence[Tensor], v: Sequence[Tensor], spec: str) -> Tensor:
    """o [B, H, 1, E]; k, v: codes [B, G, T, …], scales, zeros, and [B, G, n, D] of the exact tokens at either end that the spec names.

    Raises InputMismatch for tensors that do not fit the spec, and for a spec that is not read in pieces. Inference only.
    """
    pieces = read(spec)
    held = 3 + (pieces.first > 0) + (pieces.recent > 0)
    if q.ndim != 4 or q.shape[2] != 1 or len(k) != held or len(v) != held:
        raise InputMismatch(
            f"q {list(q.shape)}, {len(k)} tensors of keys and {len(v)} of values",
            where=spec,
            next_move=f"Give one query, and of either side codes, scales, zeros and {held - 3} of exact tokens.",
        )
    return attend_pieces(by_tvm, pieces, q, k, v)


def by_tvm(line: str, q: Tensor, cache: Cache) -> tuple[Tensor, Tensor]:
    made: Any = run_tvm_decode(q, cache, [], line, lse=True)
    o, lse = made
    return o, lse


@functools.lru_cache(maxsize=256)
def read(spec: str) -> Pieces:
    found = pieces_of(parse(spec))
    if isinstance(found, Refusal):
        raise InputMismatch(str(found), where=spec, next_move=ELSEWHERE)
    return found
