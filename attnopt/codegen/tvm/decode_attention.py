"""Run a spec on a cache by the kernel that is emitted for it: what stands behind the operator attnopt::tvm_decode.

    run_tvm_decode(q, pack_cache(line, k, v), [], "softmax scale(0.1) cache(k=int8, v=int8)")   ->   o [B, H, Q, E]

As `tvm_attention`, for few queries on many keys, which may be stored as int8, int4 or int2, in pages, each sequence of its own length.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from attnopt.codegen.triton.decode import DecodeForm
from attnopt.codegen.triton.decode_cache import cache_problem
from attnopt.codegen.tvm.availability import missing, say_once
from attnopt.codegen.tvm.cpu import host
from attnopt.codegen.tvm.decode import emit, supports
from attnopt.codegen.tvm.decode_tiles import decode_tile
from attnopt.codegen.tvm.kernel_cache import compiled
from attnopt.codegen.tvm.operand_shapes import check_operands
from attnopt.codegen.tvm.tvm_attention import ELSEWHERE, Ready, call, read, rows, runnable, typed
from attnopt.errors import InputMismatch
from attnopt.ir.kv_cache import Cache, attend_cache
from attnopt.ir.packing import PER_BYTE
from attnopt.ir.ranges import key_range
from attnopt.ir.site import Refusal
from attnopt.ir.spec import AttentionSpec

PARTS = tuple(field.name for field in fields(Cache))
Described = tuple[torch.Size, torch.dtype] | None


def run_tvm_decode(
    q: Tensor, cache: Cache, tensors: Sequence[Tensor], spec: str, lse: bool = False, trusted: bool = False
) -> Any:
    """q [B, H, Q, D] against a cache, as `attend_cache` defines it -> o [B, H, Q, E] in q's dtype; with lse also float32 [B, H, Q].

    tensors in the order of the spec's operands. Raises InputMismatch where shapes do not fit, numbers of tokens or pages lie beyond
    the cache (trusted: they do not), tensors are not on a CPU, or the family refuses. Inference only.
    """
    return run_parts(q, tuple(getattr(cache, name) for name in PARTS), tensors, spec, lse, trusted)


def run_parts(
    q: Tensor, parts: tuple[Tensor | None, ...], tensors: Sequence[Tensor], spec: str, lse: bool = False, trusted: bool = False
) -> Any:
    """The same with the parts of a cache in order, as the operator has them: on a small cache each microsecond here counts."""
    shape = q.shape
    described = plain(parts) if not tensors else None
    described = described or tuple(None if x is None else (x.shape, x.dtype) for x in parts)
    found = ready(spec, (shape, q.dtype), described, tuple((x.shape, x.dtype) for x in tensors), q.device.type, lse)
    if not trusted and (parts[6] is not None or parts[7] is not None):
        within(Cache(*parts), spec)  # type: ignore[arg-type]
    if isinstance(found.kernel, Refusal):
        return by_reference(q, Cache(*parts), tensors, found.spec, lse)  # type: ignore[arg-type]
    o = q.new_empty((*shape[:3], value_width(parts[1].shape[3], found.spec)))  # type: ignore[union-attr]
    outputs = (o, torch.empty(shape[:3], dtype=torch.float32)) if lse else (o,)
    if o.numel():
        call(found.kernel, (*[rows(x) for x in (q, *parts) if x is not None], *tensors, *outputs), spec)
    return outputs if lse else o


def plain(parts: Sequence[Tensor | None]) -> tuple[Described, ...] | None:
    """Of a cache of numbers alone, one token stands for all: its kernel is looked up once, and not anew for each token that comes."""
    k, v, *others = parts
    if k is None or v is None or any(x is not None for x in others) or k.ndim != 4 or v.ndim != 4:
        return None
    (b, g, length, d), (_, groups, stored, e) = k.shape, v.shape
    if not length == stored > 0 or v.shape[0] != b:
        return None
    return (torch.Size((b, g, 1, d)), k.dtype), (torch.Size((b, groups, 1, e)), v.dtype), *[None] * len(others)


@functools.lru_cache(maxsize=1024)
def ready(
    spec: str,
    q: tuple[torch.Size, torch.dtype],
    parts: tuple[Described, ...],
    tensors: tuple[tuple[torch.Size, torch.dtype], ...],
    device: str,
    lse: bool,
) -> Ready:
    """The kernel for tensors of these shapes and types, which are checked. Raises InputMismatch."""
    if device != "cpu":
        raise InputMismatch(
            f"TVM's kernels run on a CPU, not on '{device}'", where=spec, next_move="Move the tensors with .cpu()."
        )
    queries = torch.empty(q[0], dtype=q[1], device="meta")
    given = [None if part is None else torch.empty(part[0], dtype=part[1], device="meta") for part in parts]
    cache = Cache(**dict(zip(PARTS, given, strict=False)))
    if queries.ndim != 4 or cache.v.ndim != 4:
        raise InputMismatch(f"q has {queries.ndim} dimensions", where=str(tuple(q[0])), next_move="Give [B, H, Q, D].")
    kinds = tuple(dtype for _, dtype in tensors)
    parsed, form = asked(spec, q[0][3], cache.v.shape[3], q[1], kinds, lse, lengths=cache.lengths is not None)
    if (problem := cache_problem(parsed, form, queries, cache)) is not None:
        raise InputMismatch(
            problem, where=str(parsed.cache or parsed), next_move="attnopt.ir.kv_cache.pack_cache makes a cache that fits."
        )
    if (
        form.operands and cache.lengths is None
    ):  # else operands may be as short as the longest sequence, which tensors say at run time
        longest = cache.k.shape[2] * (1 if cache.pages is None else cache.pages.shape[1])
        shapes = dict(zip((name for name, _ in form.operands), (shape for shape, _ in tensors), strict=True))
        check_operands(parsed, q[0], (q[0][0], cache.k.shape[1], longest, q[0][3]), shapes)
    heads, ratio = q[0][1], math.gcd(q[0][1] // cache.k.shape[1], q[0][1] // cache.v.shape[1])
    return Ready(parsed, kernel(parsed, form, q[0][2] * (ratio if heads else 1)))


@functools.lru_cache(maxsize=256)
def asked(
    spec: str, width: int, stored: int, dtype: torch.dtype, operands: tuple[torch.dtype, ...], lse: bool, lengths: bool
) -> tuple[AttentionSpec, DecodeForm]:
    """What does not hang on how long a cache is: one that grows asks it once. stored: columns of v. Raises InputMismatch."""
    parsed = read(spec)
    if len(operands) != len(parsed.operands):
        said = f"{len(operands)} operands were given, and the spec has {len(parsed.operands)}"
        raise InputMismatch(said, where=spec, next_move=f"Give {', '.join(parsed.operands) or 'none'}, in this order.")
    named = tuple((name, typed(x)) for name, x in zip(parsed.operands, operands, strict=True))
    form = DecodeForm(width, value_width(stored, parsed), typed(dtype), named, lse, lengths=lengths)
    if (refused := supports(parsed, form)) is not None:
        raise InputMismatch(str(refused), where=spec, next_move=ELSEWHERE)
    return parsed, form


@functools.lru_cache(maxsize=256)
def kernel(spec: AttentionSpec, form: DecodeForm, count: int) -> Any:
    """The compiled kernel of a spec on this machine, for so many rows that share their keys; why not, where there is none."""
    if (reason := missing()) is not None:
        say_once(reason)
        return Refusal(reason)
    tile = decode_tile(host(), count, windowed=bool(key_range(spec.mask).first))
    return runnable(compiled("decode", spec, form, tile, host(), lambda: emit(spec, form, tile, host())))


def within(cache: Cache, spec: str) -> None:
    """Numbers that a kernel follows into memory must lie in it."""
    for name, x, end in (
        ("pages", cache.pages, cache.k.shape[0]),
        ("lengths", cache.lengths, cache.k.shape[2] * (1 if cache.pages is None else cache.pages.shape[1]) + 1),
    ):
        if x is not None and x.numel() and not 0 <= int(x.min()) <= int(x.max()) < end:
            raise InputMismatch(f"{name} lie outside of 0 … {end - 1}", where=spec, next_move=f"Give {name} of this cache.")


def by_reference(q: Tensor, cache: Cache, tensors: Sequence[Tensor], spec: AttentionSpec, lse: bool) -> Any:
    made = attend_cache(spec, q.float(), cache, **dict(zip(spec.operands, tensors, strict=True)))
    output = made.output.to(q.dtype).contiguous()
    return (output, made.lse) if lse else output


def value_width(stored: int, spec: AttentionSpec) -> int:
    """E, where v holds rows of `stored` as the spec stores them."""
    return stored * (1 if spec.cache is None else PER_BYTE.get(spec.cache.word("v"), 1))
