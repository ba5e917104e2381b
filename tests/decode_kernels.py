"""Decode kernels of TVM compiled for this machine, or for what another of its kind can do, and run on caches that are poisoned.

run(case)   ->   o, lse of the kernel; what no sequence counts of the cache is NaN, and so are the outputs before
"""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache

import torch
from decode_cases import DecodeCase, tensors
from torch import Tensor

from attnopt.codegen.triton.decode_attention import form_of, rows_of
from attnopt.codegen.tvm.compile import Compiled, compile_source, loaded
from attnopt.codegen.tvm.cpu import Cpu, host
from attnopt.codegen.tvm.decode import emit, supports
from attnopt.codegen.tvm.decode_tiles import DecodeTile, decode_tile
from attnopt.ir.kv_cache import Cache
from attnopt.ir.ranges import key_range
from attnopt.ir.spec import parse

PARTS = ("k_scales", "k_zeros", "v_scales", "v_zeros", "pages", "lengths", "v_balance")


def poisoned(cache: Cache) -> Cache:
    """NaN wherever a token stands that its sequence does not count."""
    if cache.lengths is None or cache.pages is not None:
        return cache
    made = {}
    for name in ("k", "v", *PARTS[:4]):
        x = getattr(cache, name)
        if x is not None and x.is_floating_point() and x.element_size() > 1 and x.shape[2] == cache.k.shape[2]:
            made[name] = x.clone()
            for b, length in enumerate(cache.lengths.tolist()):
                made[name][b, :, length:] = torch.nan
    return replace(cache, **made)


@lru_cache
def kernel(line: str, form: object, tile: DecodeTile, cpu: Cpu):
    spec = parse(line)
    assert supports(spec, form) is None  # type: ignore[arg-type]
    made = compile_source(emit(spec, form, tile, cpu), cpu)  # type: ignore[arg-type]
    assert isinstance(made, Compiled), made
    return loaded(made)


def call(line: str, q: Tensor, cache: Cache, operands: dict[str, Tensor], tile: DecodeTile | None = None, cpu: Cpu | None = None):
    """o and lse of the kernel on these tensors as they are."""
    spec, cpu = parse(line), cpu or host()
    form = form_of(q, cache, operands, q.dtype, True, spec)
    run = kernel(line, form, tile or decode_tile(cpu, rows_of(q, cache), windowed=bool(key_range(spec.mask).first)), cpu)
    o = torch.full((*q.shape[:3], form.value_width), torch.nan, dtype=q.dtype)
    lse = torch.full(q.shape[:3], torch.nan)
    run(q, cache.k, cache.v, *(x for name in PARTS if (x := getattr(cache, name)) is not None), *operands.values(), o, lse)
    return o, lse


def run(case: DecodeCase, tile: DecodeTile | None = None, cpu: Cpu | None = None):
    q, cache, rest = tensors(case)
    return call(case.spec, q, poisoned(cache), {name: rest[name] for name in parse(case.spec).operands}, tile, cpu)
