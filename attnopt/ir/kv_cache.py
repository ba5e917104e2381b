"""A key and value cache as kernels take it: codes with scales, in one piece or in pages, each sequence of its own length.

    pack_cache("softmax cache(k=int8, v=int8)", k, v)   ->   Cache(k=int8 [B, G, K, D], v=…, k_scales=[B, G, K, 1], …)
    in_pages(cache, spec, table)                        ->   the same with k [P, G, page, D], …, pages=table [B, pages]

`attend_cache` is what kernels on a cache are checked against: the reference, one sequence after the other.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from attnopt.errors import InputMismatch
from attnopt.ir.expr import Expr, Size, apply
from attnopt.ir.packing import Packed, pack, refusal, tokens_per_scale, unpack
from attnopt.ir.reference import Attended, attend
from attnopt.ir.spec import AttentionSpec, as_spec


@dataclass(frozen=True)
class Cache:
    """k [B, G, K, D] and v [B, G', K, E] as the spec's `cache` clause stores them; see `Packed` for codes, scales and zeros.

    In pages: k [P, G, page, D] and v alike, in any strides but that of channels; page `pages[b, i]` holds the tokens i * page … of
    sequence b. Scales and zeros stand in pages too, except those of channels over all tokens, which stay [B, G, 1, D].
    lengths: how many tokens of each sequence count; None is all. v_balance [B, G, ceil(K / block), D]: of values balanced in blocks.
    """

    k: Tensor
    v: Tensor
    k_scales: Tensor | None = None
    k_zeros: Tensor | None = None
    v_scales: Tensor | None = None
    v_zeros: Tensor | None = None
    pages: Tensor | None = None
    lengths: Tensor | None = None
    v_balance: Tensor | None = None

    @property
    def parts(self) -> tuple[Tensor | None, ...]:
        """In the order of the operators that decode, which know of no balance."""
        return (self.k, self.v, self.k_scales, self.k_zeros, self.v_scales, self.v_zeros, self.pages, self.lengths)

    def side(self, name: str) -> Packed:
        if name == "k":
            return Packed(self.k, self.k_scales, self.k_zeros)
        return Packed(self.v, self.v_scales, self.v_zeros, self.v_balance)

    def with_sides(self, k: Packed, v: Packed) -> Cache:
        keys = {"k": k.codes, "k_scales": k.scales, "k_zeros": k.zeros}
        return replace(self, **keys, v=v.codes, v_scales=v.scales, v_zeros=v.zeros, v_balance=v.balance)


def waiting_tokens(block: int) -> Expr:
    """How many tokens a cache in blocks keeps exact: those that fill no block, and all of one that the last token has filled."""
    full = apply("mul", apply("floordiv", apply("sub", Size("k"), 1), block), block)
    return apply("sub", Size("k"), full)


def pack_cache(spec: AttentionSpec | str, k: Tensor, v: Tensor, lengths: Tensor | None = None) -> Cache:
    """k [B, G, K, D], v [B, G', K, E] in the bits of the spec's `cache`. Raises InputMismatch where it has no packed form."""
    clause = as_spec(spec).cache
    if (refused := refusal(clause, blocks=True)) is not None:
        raise InputMismatch(str(refused), where=str(clause), next_move="Give keys and values as they are.")
    try:
        return Cache(k, v, lengths=lengths).with_sides(pack(k, clause, "k"), pack(v, clause, "v"))
    except ValueError as error:
        raise InputMismatch(str(error), where=str(clause), next_move="Store them as int8.") from error


def in_pages(cache: Cache, spec: AttentionSpec | str, pages: Tensor, count: int | None = None) -> Cache:
    """The cache cut into pages of `cache(layout=paged, page=…)`, token block i of sequence b on page `pages[b, i]`.

    pages: int32 [B, ceil(K / page)], all different. count: how many pages there are, at least the largest number and one.
    What no sequence fills is NaN where the type has one.
    """
    clause = as_spec(spec).cache
    if clause is None or clause.word("layout") != "paged" or clause.count("page") == 0:
        raise InputMismatch("the spec names no page size", where=str(spec), next_move="Write cache(layout=paged, page=16).")
    count = int(pages.max()) + 1 if count is None else count
    page = clause.count("page")

    def cut(packed: Packed, side: str) -> Packed:
        shared = tokens_per_scale(clause, side)
        scales, zeros = (
            x if x is None or shared == 0 else apart(x, pages, page // shared, count) for x in (packed.scales, packed.zeros)
        )
        return Packed(apart(packed.codes, pages, page, count), scales, zeros)

    return replace(cache.with_sides(*(cut(cache.side(side), side) for side in "kv")), pages=pages)


def apart(x: Tensor, pages: Tensor, rows: int, count: int) -> Tensor:
    """[B, G, K, C] -> [count, G, rows, C]."""
    made = torch.zeros((count, x.shape[1], rows, x.shape[3]), dtype=torch.float32, device=x.device).to(x.dtype)
    if x.dtype.is_floating_point and x.element_size() > 1:
        made.fill_(torch.nan)
    for b, row in enumerate(pages.tolist()):
        for i, page in enumerate(row):
            part = x[b, :, i * rows : (i + 1) * rows]
            made[page, :, : part.shape[1]] = part
    return made


def in_one_piece(cache: Cache, spec: AttentionSpec | str) -> Cache:
    """The cache without pages, each sequence as long as its row of the table is."""
    clause, pages = as_spec(spec).cache, cache.pages
    if clause is None or pages is None:
        return cache

    def joined(x: Tensor) -> Tensor:
        return x[pages.long()].transpose(1, 2).flatten(2, 3)

    def whole(packed: Packed, side: str) -> Packed:
        shared = tokens_per_scale(clause, side)
        return Packed(
            joined(packed.codes), *(x if x is None or shared == 0 else joined(x) for x in (packed.scales, packed.zeros))
        )

    return replace(cache.with_sides(*(whole(cache.side(side), side) for side in "kv")), pages=None)


def unpacked(cache: Cache, spec: AttentionSpec | str, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """k [B, G, K, D] and v [B, G', K, E] that the cache stands for; tokens beyond a sequence's length are whatever is there."""
    clause, whole = as_spec(spec).cache, in_one_piece(cache, spec)
    k, v = (unpack(whole.side(side), clause, side, dtype) for side in "kv")
    return k, v


def attend_cache(spec: AttentionSpec | str, q: Tensor, cache: Cache, **operands: Tensor) -> Attended:
    """`attend` on what the cache stands for, in q's dtype; each sequence sees its own tokens only, as if they were all there are.

    q [B, H, Q, D] -> output [B, H, Q, E], lse [B, H, Q]; weights are those of the longest, NaN beyond a sequence's length. A
    sequence of no tokens gets zeros.
    """
    parsed = as_spec(spec)
    k, v = unpacked(cache, parsed, q.dtype)
    plain = parsed.with_(cache=None)
    if cache.lengths is None:
        return attend(plain, q, k, v, **operands)
    output, lse = q.new_zeros((*q.shape[:3], v.shape[3])), q.new_full(q.shape[:3], -torch.inf)
    weights = q.new_full((*q.shape[:3], k.shape[2]), torch.nan)
    for b, length in enumerate(cache.lengths.tolist()):
        if length:
            found = attend(plain, q, k[:, :, :length], v[:, :, :length], **operands)
            output[b], lse[b], weights[b, :, :, :length] = found.output[b], found.lse[b], found.weights[b]
    return Attended(output, weights, lse)
