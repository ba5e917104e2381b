"""attnopt::triton_decode: a spec run on a cache by the kernels that are emitted for it, as one operator that export can save.

    cache = pack_cache("softmax cache(k=int8, v=int8)", k, v)                        # or codes and scales that are there
    decode_attention(q, cache, "softmax scale(0.1) cache(k=int8, v=int8)")           ->   o [B, H, Q, E]

Triton is imported when the operator first runs. Under its interpreter (TRITON_INTERPRET=1, set before Triton is imported) it runs
on CPU tensors, bfloat16 as float32, because the interpreter's products of bfloat16 are wrong.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from attnopt.codegen.triton.availability import interpreted, missing
from attnopt.codegen.triton.decode import DecodeForm, emit, supports
from attnopt.codegen.triton.decode_cache import cache_problem
from attnopt.codegen.triton.decode_tiles import INTERPRETED, block_rows, decode_tiles
from attnopt.codegen.triton.emitted import load
from attnopt.codegen.triton.tiles import ARCHITECTURES, Tile
from attnopt.codegen.triton.triton_attention import architecture, read, refuse_gradients
from attnopt.errors import InputMismatch
from attnopt.ir.kv_cache import Cache
from attnopt.ir.site import Refusal
from attnopt.ir.spec import AttentionSpec, as_spec



def decode_attention(
    q: Tensor, cache: Cache, spec: AttentionSpec | str, *, lse: bool = False, **operands: Tensor
) -> Tensor | tuple[Tensor, Tensor]:
    """q [B, H, Q, D] against a cache, as `attend_cache` defines it -> o [B, H, Q, E] in q's dtype; with lse also float32 [B, H, Q].

    The spec's `cache` clause says how the cache is stored (none: as it is, in one piece [B, G, K, D]); `pack_cache` and `in_pages`
    of attnopt.ir.kv_cache make one from keys and values:

        k, v      as they are: [B, G, K, D], [B, G', K, E] in any strides but that of channels
                  int8: int8 of that shape; int4: uint8 [B, G, K, D / 2]; fp8: float8_e4m3fn
        scales    fp32 (or scales=…) [B, G, K, 1], by groups of channels [B, G, K, D / group], by channel [B, G, 1, D], by channel in
        zeros     groups of tokens [B, G, K / group, D]; zeros alike, where levels are not symmetric
        pages     int32 [B, pages of a sequence], with layout=paged: k [P, G, page, D] and so on; scales in pages too
        lengths   int32 [B]: tokens of each sequence that count

    operands: what the spec loads, by name. How many programs share a sequence is decided by `split_count` of kernels/merge.py from
    batch x key heads, length and processors. Raises InputMismatch where shapes do not fit or the family refuses. Inference only.
    """
    parsed = as_spec(spec)
    if lacking := [name for name in parsed.operands if name not in operands]:
        raise InputMismatch(f"the spec loads '{lacking[0]}', which was not given", next_move=f"Pass {lacking[0]}=tensor.")
    operator = triton_decode_lse if lse else triton_decode
    found: Tensor | tuple[Tensor, Tensor] = operator(
        q, cache.k, cache.v, cache.k_scales, cache.k_zeros, cache.v_scales, cache.v_zeros, cache.pages, cache.lengths,
        [operands[name] for name in parsed.operands], str(parsed),
    )  # fmt: skip
    return found


def run_decode(
    q: Tensor, cache: Cache, tensors: Sequence[Tensor], spec: AttentionSpec, lse: bool = False, splits: int = 0
) -> Any:
    """`decode_attention` with operands in the order of `spec.operands`; splits: programs that share the keys, 0 for a good number."""
    if (reason := missing()) is not None:
        raise InputMismatch(reason, where=str(spec), next_move="pip install triton, or choose another kernel.")
    emulated = interpreted() and q.dtype == torch.bfloat16
    given = widened(cache) if emulated else cache
    dtype = torch.float32 if emulated else q.dtype
    form = form_of(q, given, dict(zip(spec.operands, tensors, strict=True)), dtype, lse, spec)
    if (refused := supports(spec, form)) is not None:
        raise InputMismatch(str(refused), where=str(spec), next_move="Another kernel may compute it: attnopt.attention(…).")
    if (problem := cache_problem(spec, form, q, given)) is not None:
        raise InputMismatch(
            problem, where=str(spec.cache or spec), next_move="attnopt.ir.kv_cache.pack_cache makes a cache that fits."
        )
    module = kernel(spec, form, architecture(q.device), rows_of(q, given))
    parts = (given.k_scales, given.k_zeros, given.v_scales, given.v_zeros, given.pages, given.lengths)
    held = [x.contiguous() for x in parts if x is not None]
    made = module.attention(q.to(dtype), given.k, given.v, *tensors, *held, splits=splits)
    return made if not emulated else (made[0].to(q.dtype), made[1]) if lse else made.to(q.dtype)


def form_of(
    q: Tensor, cache: Cache, operands: dict[str, Tensor], dtype: torch.dtype, lse: bool, spec: AttentionSpec
) -> DecodeForm:
    """What the kernel is compiled for."""
    kinds = tuple((name, str(x.dtype).removeprefix("torch.")) for name, x in operands.items())
    width = value_width(cache.v, spec)
    return DecodeForm(q.shape[3], width, str(dtype).removeprefix("torch."), kinds, lse, lengths=cache.lengths is not None)


def value_width(v: Tensor, spec: AttentionSpec) -> int:
    """E, where v holds rows of it as the spec stores them."""
    return v.shape[3] * (2 if spec.cache is not None and spec.cache.word("v") == "int4" else 1)


def widened(cache: Cache) -> Cache:
    """bfloat16 as float32, which holds the same numbers."""
    return replace(cache, **{name: x.float() for name, x in vars(cache).items() if x is not None and x.dtype == torch.bfloat16})


def rows_of(q: Tensor, cache: Cache) -> int:
    """Rows that share their keys: heads of a key head times queries."""
    return q.shape[2] * math.gcd(q.shape[1] // cache.k.shape[1], q.shape[1] // cache.v.shape[1])


@functools.lru_cache(maxsize=256)
def kernel(spec: AttentionSpec, form: DecodeForm, name: str, rows: int) -> Any:
    """The module that was emitted for a spec on an architecture."""
    if name == "interpreted":
        return load(emit(spec, form, replace(INTERPRETED, block_q=block_rows(rows))))
    return load(emit(spec, form, fitting(spec, form, name, block_rows(rows)), ARCHITECTURES[name].backend))


@functools.lru_cache(maxsize=256)
def fitting(spec: AttentionSpec, form: DecodeForm, name: str, block_q: int) -> Tile:
    """The first tile that the compiler accepts without spills; the last of the table where none is."""
    from attnopt.codegen.triton.decode_compile import compile_best

    best = compile_best(spec, form, name, block_q)
    return decode_tiles(name, spec, form, block_q)[-1] if isinstance(best, Refusal) else best.tile


@torch.library.custom_op("attnopt::triton_decode", mutates_args=())
def triton_decode(
    q: Tensor, k: Tensor, v: Tensor, k_scales: Tensor | None, k_zeros: Tensor | None, v_scales: Tensor | None, v_zeros: Tensor | None,
    pages: Tensor | None, lengths: Tensor | None, operands: list[Tensor], spec: str,
) -> Tensor:  # fmt: skip
    """See `decode_attention`; the parts of its cache one by one, operands in the order of the spec."""
    cache = Cache(k, v, k_scales, k_zeros, v_scales, v_zeros, pages, lengths)
    made: Tensor = run_decode(q, cache, operands, read(spec))
    return made


@torch.library.custom_op("attnopt::triton_decode_lse", mutates_args=())
def triton_decode_lse(
    q: Tensor, k: Tensor, v: Tensor, k_scales: Tensor | None, k_zeros: Tensor | None, v_scales: Tensor | None, v_zeros: Tensor | None,
    pages: Tensor | None, lengths: Tensor | None, operands: list[Tensor], spec: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The output and the log-sum-exp of each row."""
    o, lse = run_decode(q, Cache(k, v, k_scales, k_zeros, v_scales, v_zeros, pages, lengths), operands, read(spec), lse=True)
    return o, lse


@triton_decode.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> Tensor:
    return q.new_empty((*q.shape[:-1], value_width(v, read(rest[-1]))))


@triton_decode_lse.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return q.new_empty((*q.shape[:-1], value_width(v, read(rest[-1])))), q.new_empty(q.shape[:-1], dtype=torch.float32)


for operator in (triton_decode, triton_decode_lse):
    operator.register_autograd(lambda ctx, *gradients: None, setup_context=refuse_gradients)
