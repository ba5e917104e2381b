"""One query against the pages of a cache that it chose: a table of pages for the kernels of few queries.

    softmax scale(s) offset(size(k) - size(q)) causal pages(16, 8, group=max)      q [B, H, 1, D], k [B, G, K, D], v [B, G, K, E]
        ->   softmax scale(s) cache(layout=paged, page=16)           q [B G, H / G, 1, D], k [places, 1, 16, D], table [B G, 8]

A page is named by its first row, counted over all rows of the cache: places overlap, so that a cache of any length is read as it lies.
Heads that choose apart are sequences of their own to the kernel, whose pages are the same memory. The newest page comes last in a
table and may be short: a length says so. Nothing of a page that was not chosen is read.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.nn import functional as F

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
    run: Decode, spec: AttentionSpec, q: Tensor, k: Tensor, v: Tensor, state: PageState, tables: Tables | None = None,
    within: bool = False, read: AttentionSpec | None = None,
) -> Tensor:  # fmt: skip
    """o [B, H, 1, E] for the newest query q [B, H, 1, D]; k [B, G, K, D] and v are a cache with `state.length` keys in it.

    tables: a kernel that chooses. within: `run` reads no row behind the length of a sequence, so the last page may end behind the
    cache, and rows of a cache with spare places are read where they lie. read: `paged(spec)`, where it is known.

    Raises InputMismatch where there is more than one query, or keys and values are not as many.
    """
    clause = spec.selection
    assert clause is not None
    size, (batch, groups, room, _) = clause.count(0), k.shape
    if q.shape[2] != 1 or v.shape[:3] != k.shape[:3] or not 0 < state.length <= room:
        raise InputMismatch(
            f"{q.shape[2]} queries, {state.length} keys in caches {list(k.shape)} and {list(v.shape)}",
            where=str(spec),
            next_move="Give one query, and keys and values of as many heads and rows.",
        )
    more = -room % size if not within or batch * groups * room <= size else 0
    if more:
        k, v, room = F.pad(k, (0, 0, 0, more)), F.pad(v, (0, 0, 0, more)), room + more
    elif within and (places := spaced(k)) is not None and places == spaced(v):
        k, v, room = in_room(k, places), in_room(v, places), places
    found = None if tables is None else tables(clause, q, state, room)
    pages, lengths = by_torch(clause, q, state, room) if found is None else found
    together = q.shape[1] * batch // len(pages)  # query heads of a table
    cache = Cache(overlapping(k.contiguous(), size), overlapping(v.contiguous(), size), pages=pages, lengths=lengths)
    made = run(paged(spec) if read is None else read, q.reshape(len(pages), together, 1, q.shape[3]), cache)
    return made.reshape(batch, q.shape[1], 1, v.shape[3])


def spaced(x: Tensor) -> int | None:
    """Rows of the room that x [B, G, K, D] is the beginning of, head by head; None where it lies in another way."""
    batch, groups, _, width = x.shape
    places, rest = divmod(x.stride(1), width) if groups > 1 else divmod(x.stride(0), width)
    ordered = x.stride()[2:] == (width, 1) and (batch == 1 or x.stride(0) == groups * places * width)
    if rest or not ordered or not x.shape[2] <= places:
        return None
    held = x.untyped_storage().nbytes() // x.element_size() - x.storage_offset()
    return places if batch * groups * places * width <= held else None


def in_room(x: Tensor, places: int) -> Tensor:
    """The room of x [B, G, K, D], its spare places too."""
    batch, groups, _, width = x.shape
    return x.as_strided((batch, groups, places, width), (groups * places * width, places * width, width, 1))


def overlapping(x: Tensor, size: int) -> Tensor:
    """x [B, G, K, D] as [places, 1, size, D]: at each row begins a page."""
    rows, width = x.shape[:3].numel(), x.shape[3]
    return x.as_strided((rows - size + 1, 1, size, width), (width, size * width, width, 1))


def by_torch(clause: Clause, q: Tensor, state: PageState, room: int) -> tuple[Tensor, Tensor]:
    """First rows of pages, int32 [tables, n], and how many keys are in them, int32 [tables]; a table for each head, or group, that chooses.

    room: rows of the cache of a key head.
    """
    size, groups = clause.count(0), state.low.shape[:2].numel()
    chosen = choose(clause, q, state).flatten(0, 1)  # [B G or B H, P]
    count = int(chosen[0].sum())
    pages = chosen.int().topk(count, -1).indices.sort(-1).values
    newest = -(-state.length // size) - 1
    lengths = torch.where(pages[:, -1] == newest, state.length - newest * size, size) + (count - 1) * size
    apart = len(chosen) // groups  # tables of each key head
    place = torch.arange(len(chosen), device=q.device)[:, None] // apart * room
    return (place + size * pages).to(torch.int32), lengths.to(torch.int32)


def by_tvm(spec: AttentionSpec, q: Tensor, cache: Cache, operands: Mapping[str, Tensor] | None = None) -> Tensor:
    """The kernel on a CPU. The numbers of pages are those of `run_pages`: they are not looked at again."""
    from attnopt.codegen.tvm.decode_attention import run_tvm_decode

    made: Tensor = run_tvm_decode(q, cache, [], written(spec), trusted=True)
    return made


def tables_by_tvm(clause: Clause, q: Tensor, state: PageState, room: int) -> tuple[Tensor, Tensor] | None:
    """The choice by a kernel on a CPU, where there is one."""
    from attnopt.codegen.tvm.page_choice import choose_pages

    return choose_pages(clause, q, state, room)


@functools.lru_cache(maxsize=256)
def written(spec: AttentionSpec) -> str:
    return str(spec)
