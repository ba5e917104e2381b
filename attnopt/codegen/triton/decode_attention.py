"""attnopt::triton_decode: a spec run on a cache by the kernels that are emitted for it, as one operator that export can save.

    cache = pack_cache("softmax cache(k=int8, v=int8)", k, v)                        # or codes and scales that are there
    decode_attention(q, cache, "softmax scale(0.1) cache(k=int8, v=int8)")           ->   o [B, H, Q, E]

Triton is imported when the operator first runs. Under its interpreter (TRITON_INTERPRET=1, set before Triton is imported) it runs
on CPU tensors, bfloat16 as float32, because the interpreter's products of bfloat16 are wrong. Without it CPU tensors take the
reference.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from attnopt.codegen.emitted import load
from attnopt.codegen.triton.availability import interpreted, missing
from attnopt.codegen.triton.decode import DecodeForm, emit, supports
from attnopt.codegen.triton.decode_cache import cache_problem
from attnopt.codegen.triton.decode_tiles import INTERPRETED, block_rows, decode_tiles
from attnopt.codegen.triton.tiles import ARCHITECTURES
from attnopt.codegen.triton.triton_attention import architecture, operands_of
from attnopt.errors import InputMismatch
from attnopt.ir.kv_cache import Cache, attend_cache
from attnopt.ir.packing import PER_BYTE
from attnopt.ir.site import Refusal
from attnopt.ir.spec import AttentionSpec, as_spec


def decode_attention(
    q: Tensor, cache: Cache, spec: AttentionSpec | str, *, lse: bool = False, **operands: Tensor
) -> Tensor | tuple[Tensor, Tensor]:
    """q [B, H, Q, D] against a cache, as `attend_cache` defines it -> o [B, H, Q, E] in q's dtype; with lse also float32 [B, H, Q].

    The spec's `cache` clause says how the cache is stored (none: as it is, in one piece [B, G, K, D]); `pack_cache` and `in_pages`
    of attnopt.ir.kv_cache make one from keys and values:

        k, v      as they are: [B, G, K, D], [B, G', K, E] in any strides but that of channels
                  int8: int8 of that shape; int4: uint8 [B, G, K, D / 2]; int2: [B, G, K, D / 4]; fp8: float8_e4m3fn
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
    operator = torch.ops.attnopt.triton_decode_lse if lse else torch.ops.attnopt.triton_decode
    found: Tensor | tuple[Tensor, Tensor] = operator(
        q, cache.k, cache.v, cache.k_scales, cache.k_zeros, cache.v_scales, cache.v_zeros, cache.pages, cache.lengths,
        [operands[name] for name in parsed.operands], str(parsed),
    )  # fmt: skip
    return found


def run_decode(
    q: Tensor, cache: Cache, tensors: Sequence[Tensor], spec: AttentionSpec, lse: bool = False, splits: int = 0
) -> Any:
    """`decode_attention` with operands in the order of `spec.operands`; splits: programs that share the keys, 0 for a good number."""
    on_cpu = q.device.type == "cpu" and not interpreted()
    if (reason := missing()) is not None and not on_cpu:
        raise InputMismatch(reason, where=str(spec), next_move="pip install triton, or choose another kernel.")
    emulated = interpreted() and q.dtype == torch.bfloat16
    given = widened(cache) if emulated else cache
    dtype = torch.float32 if emulated else q.dtype
    operands = dict(zip(operands_of(spec), tensors, strict=True))
    form = form_of(q, given, operands, dtype, lse, spec)
    if (refused := refusal(spec, form)) is not None:
        raise InputMismatch(str(refused), where=str(spec), next_move="Another kernel may compute it: attnopt.attention(…).")
    if (problem := cache_problem(spec, form, q, given)) is not None:
        raise InputMismatch(
            problem, where=str(spec.cache or spec), next_move="attnopt.ir.kv_cache.pack_cache makes a cache that fits."
        )
    if on_cpu:
        found = attend_cache(spec, q.float(), cache, **operands)
        output = found.output.to(q.dtype).contiguous()
        return (output, found.lse) if lse else output
    module = kernel(spec, form, architecture(q.device), rows_of(q, given))
    parts = (given.k_scales, given.k_zeros, given.v_scales, given.v_zeros, given.pages, given.lengths)
    held = [x.contiguous() for x in parts if x is not None]
    with torch.cuda.device_of(q):  # Triton launches on the current GPU
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
    return v.shape[3] * (1 if spec.cache is None else PER_BYTE.get(spec.cache.word("v"), 1))


def widened(cache: Cache) -> Cache:
    """bfloat16 as float32, which holds the same numbers."""
    return replace(cache, **{name: x.float() for name, x in vars(cache).items() if x is not None and x.dtype == torch.bfloat16})


def rows_of(q: Tensor, cache: Cache) -> int:
    """Rows that share their keys: heads of a key head times queries."""
    return q.shape[2] * math.gcd(q.shape[1] // cache.k.shape[1], q.shape[1] // cache.v.shape[1])


@functools.lru_cache(maxsize=256)
def kernel(spec: AttentionSpec, form: DecodeForm, name: str, rows: int) -> Any:
    """The module that was emitted for a spec on an architecture: with the first tile that the compiler accepts without spills, or
    the last of the table where it accepts none."""
    block_q = block_rows(rows)
    if name == "interpreted":
        return load(emit(spec, form, replace(INTERPRETED, block_q=block_q)))
    from attnopt.codegen.triton.kernel_cache import compiled_decode

    best = compiled_decode(spec, form, name, block_q)
    if isinstance(best, Refusal):
        return load(emit(spec, form, decode_tiles(name, spec, form, block_q)[-1], ARCHITECTURES[name].backend))
    return load(best.source)


@functools.lru_cache(maxsize=256)
def refusal(spec: AttentionSpec, form: DecodeForm) -> Refusal | None:
    return supports(spec, form)
