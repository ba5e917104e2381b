"""One query on a cache of which some tokens are in codes and others exact: what stands behind the operator attnopt::tvm_pieces.

    run_tvm_pieces(q [B, H, 1, D], [codes, scales, zeros, first, recent] of k, the same of v, "softmax … cache(k=int2, …, recent=128)")
        ->   o [B, H, 1, E]
    run_tvm_blocks(q, [tokens, codes, scales, zeros, …, recent], [tokens, …, balance, recent], "softmax … cache(block=100, …")
        ->   [B, H, 1, E + 100]: o, then the weights of the last 100 tokens

The kernel of the family for few queries reads each piece; `cache_pieces` puts them together. Where TVM is missing torch reads them.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from attnopt.codegen.cache_blocks import BlockPieces, attend_blocks, blocks_of
from attnopt.codegen.cache_pieces import Pieces, attend_both, attend_pieces, pieces_of
from attnopt.codegen.prefill_form import Form
from attnopt.codegen.triton.decode import DecodeForm
from attnopt.codegen.tvm import decode
from attnopt.codegen.tvm.decode_attention import run_tvm_decode
from attnopt.codegen.tvm.tvm_attention import ELSEWHERE
from attnopt.errors import InputMismatch
from attnopt.ir.kv_cache import Cache
from attnopt.ir.packing import Packed
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


def run_tvm_exact_and_coded(q: Tensor, exact: Sequence[Tensor | None], coded: Sequence[Packed | None], spec: str) -> Tensor:
    """As run_tvm_pieces, of a cache whose exact tokens stand together and have no codes: keys and values of each piece, or None."""
    (k, v), (k_codes, v_codes) = exact, coded
    one = None if k is None or v is None else Cache(k, v)
    other = None if k_codes is None or v_codes is None else Cache(k_codes.codes, v_codes.codes).with_sides(k_codes, v_codes)
    return attend_both(by_tvm, read(spec), q, one, other)


def run_tvm_blocks(q: Tensor, k: Sequence[Tensor], v: Sequence[Tensor], spec: str) -> Tensor:
    """[B, H, 1, E + block]; k, v: as `cache_blocks.attend_blocks` takes them. Raises InputMismatch as above. Inference only."""
    blocks = read_blocks(spec)
    fits = len(k) in (5, 8) and len(v) == len(k) + 1 and k[-1].ndim == 4 and k[-1].shape[2] == v[-1].shape[2] == blocks.block
    if q.ndim != 4 or q.shape[2] != 1 or not fits or not k[0].shape[2]:
        raise InputMismatch(
            f"q {list(q.shape)}, {len(k)} tensors of keys and {len(v)} of values",
            where=spec,
            next_move=f"Give one query, and of either side tokens, one or two sets, the balance of values, {blocks.block} exact tokens.",
        )
    return attend_blocks(by_tvm, blocks, q, k, v)


def run_tvm_sets(q: Tensor, k: Sequence[Packed], v: Sequence[Packed], spec: str) -> list[tuple[Tensor, Tensor]]:
    """Output and log-sum-exp of one query on each set of tokens in full blocks, of a cache that holds those that wait elsewhere."""
    blocks, found = read_blocks(spec), []
    for keys, values in zip(k, v, strict=True):
        assert keys.scales is not None
        line = blocks.line(8 * keys.codes.shape[3] // q.shape[3], keys.codes.shape[2] // keys.scales.shape[2])
        found.append(by_tvm(line, q, Cache(keys.codes, values.codes).with_sides(keys, values)))
    return found


def blocks_supports(spec: AttentionSpec, form: Form) -> Refusal | None:
    """None where the kernels compute the spec on a cache in blocks."""
    found = blocks_of(spec)
    if isinstance(found, Refusal):
        return found
    each = DecodeForm(form.width, form.value_width, form.dtype, lse=True)
    lines = [str(found.plain), *(found.line(bits, found.block) for bits in (4, 2))]
    refused = (decode.supports(parse(line), each) for line in lines)
    return next((one for one in refused if one is not None), None)


def by_tvm(line: str, q: Tensor, cache: Cache) -> tuple[Tensor, Tensor]:
    made: Any = run_tvm_decode(q, cache, [], line, lse=True)
    o, lse = made
    return o, lse


@functools.lru_cache(maxsize=256)
def read_blocks(spec: str) -> BlockPieces:
    found = blocks_of(parse(spec))
    if isinstance(found, Refusal):
        raise InputMismatch(str(found), where=spec, next_move=ELSEWHERE)
    return found


@functools.lru_cache(maxsize=256)
def read(spec: str) -> Pieces:
    found = pieces_of(parse(spec))
    if isinstance(found, Refusal):
        raise InputMismatch(str(found), where=spec, next_move=ELSEWHERE)
    return found
