"""One query against the pages of a cache that it chose: a table of pages for the kernels of few queries.

    softmax scale(s) offset(size(k) - size(q)) causal pages(16, 8, group=max)      q [B, H, 1, D], k [B, G, K, D], v [B, G, K, E]
        ->   softmax scale(s) cache(layout=paged, page=16)                         q [B G, H / G, 1, D], k [B G P, 1, 16, D], table [B G, 8]

Heads that choose apart are sequences of their own to the kernel, whose pages are the same memory. The newest page comes last in a
table and may be short: a length says so. Nothing of a page that was not chosen is read.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from attnopt.errors import InputMismatch
from attnopt.ir.clause import Clause
from attnopt.ir.expr import Term
from attnopt.ir.kv_cache import Cache
from attnopt.ir.site import Refusal
from attnopt.ir.spec import AttentionSpec
from attnopt.selectors.pages import PageState, choose

Decode = Callable[[AttentionSpec, Tensor, Cache], Tensor]
Tables = Callable[[Clause, Tensor, PageState, int], "tuple[Tensor, Tensor] | None"]  # pages and lengths, as `by_torch` gives them


def refuses(spec: AttentionSpec) -> Refusal | None:
    """None where a query may be computed from some pages as if there were no others."""
    if spec.selection is None or spec.selection.name != "pages":
        return Refusal("it chooses no pages", spec)
    if spec.normalizer.name != "softmax" or (odd := [s for s in spec.special if s not in ("selection", "offset")]):
        return Refusal(f"it is no plain softmax: {odd[0] if spec.normalizer.name == 'softmax' else spec.normalizer}", spec)
    if spec.mask not in (None, Term("causal")):
        return Refusal(f"the mask '{spec.mask}' reads positions, which pages in a table do not have", spec)
    if len(spec.score) != sum(c.name in ("scale", "softcap") for c in spec.score):
        return Refusal("a score reads positions, which pages in a table do not have", spec)
    return None


@functools.lru_cache(maxsize=256)
def paged(spec: AttentionSpec) -> AttentionSpec:
    """What the kernel computes. Ask `refuses` first."""
    assert spec.selection is not None
    cache = Clause("cache", (), (("layout", "paged"), ("page", spec.selection.count(0))))
    return AttentionSpec(spec.normalizer, score=spec.score, cache=cache)


def run_pages(
    run: Decode, spec: AttentionSpec, q: Tensor, k: Tensor, v: Tensor, state: PageState, tables: Tables | None = None
) -> Tensor:
    """o [B, H, 1, E] for the newest query q [B, H, 1, D]; k [B, G, K, D] and v are a cache of whole pages, `state.length` keys in it.

    tables: a kernel that chooses. Raises InputMismatch where the cache holds no whole pages, or there is more than one query.
    """
    clause = spec.selection
    assert clause is not None
    size, (batch, groups, room, _) = clause.count(0), k.shape
    if q.shape[2] != 1 or room % size or not (k.is_contiguous() and v.is_contiguous()) or v.shape[1] != groups:
        raise InputMismatch(
            f"{q.shape[2]} queries, {room} rows of a cache",
            where=str(spec),
            next_move=f"Give one query, and whole pages of {size}.",
        )
    found = None if tables is None else tables(clause, q, state, room // size)
    pages, lengths = by_torch(clause, q, state, room // size) if found is None else found
    pool_k, pool_v = (x.view(batch * groups * (room // size), 1, size, x.shape[3]) for x in (k, v))
    together = q.shape[1] * batch // len(pages)  # query heads of a table
    cache = Cache(pool_k, pool_v, pages=pages, lengths=lengths)
    made = run(paged(spec), q.reshape(len(pages), together, 1, q.shape[3]), cache)
    return made.reshape(batch, q.shape[1], 1, v.shape[3])


def by_torch(clause: Clause, q: Tensor, state: PageState, pages_of_head: int) -> tuple[Tensor, Tensor]:
    """Pages int32 [tables, n] and how many keys are in them, int32 [tables]; a table for each head, or group, that chooses for itself."""
    size, groups = clause.count(0), state.low.shape[:2].numel()
    chosen = choose(clause, q, state).flatten(0, 1)  # [B G or B H, P]
    count = int(chosen[0].sum())
    pages = chosen.int().topk(count, -1).indices.sort(-1).values
    newest = -(-state.length // size) - 1
    lengths = torch.where(pages[:, -1] == newest, state.length - newest * size, size) + (count - 1) * size
    apart = len(chosen) // groups  # tables of each key head
    place = torch.arange(len(chosen), device=q.device)[:, None] // apart * pages_of_head
    return (place + pages).to(torch.int32), lengths.to(torch.int32)


def by_tvm(spec: AttentionSpec, q: Tensor, cache: Cache, operands: Mapping[str, Tensor] | None = None) -> Tensor:
    """The kernel on a CPU. The numbers of pages are those of `run_pages`: they are not looked at again."""
    from attnopt.codegen.tvm.decode_attention import run_tvm_decode

    made: Tensor = run_tvm_decode(q, cache, [], written(spec), trusted=True)
    return made


def tables_by_tvm(clause: Clause, q: Tensor, state: PageState, pages_of_head: int) -> tuple[Tensor, Tensor] | None:
    """The choice by a kernel on a CPU, where there is one."""
    from attnopt.codegen.tvm.page_choice import choose_pages

    return choose_pages(clause, q, state, pages_of_head)


@functools.lru_cache(maxsize=256)
def written(spec: AttentionSpec) -> str:
    return str(spec)
