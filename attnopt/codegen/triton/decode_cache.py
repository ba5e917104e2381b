"""What kernels of the decode family read of a cache: how the spec's `cache` clause stores each side, and what does not fit it.

cache(k=int8, v=int4, group=32), rows of 128   ->   k: Side(int8, 128, token), v: Side(int4, 64 bytes, groups of 32)
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from attnopt.codegen.triton.prefill import Form, pieces
from attnopt.ir.kv_cache import Cache
from attnopt.ir.packing import FLOATS, PACKED, PER_BYTE, balanced, centre, members, refusal, tokens_per_scale, uneven
from attnopt.ir.site import Refusal
from attnopt.ir.spec import AttentionSpec

HELD = {"int8": "int8", "int4": "uint8", "int2": "uint8", "fp8": "float8_e4m3fn"}
SIZES = {"float32": 4, "float16": 2, "bfloat16": 2}
SMALLEST = 16  # channels of a piece: what products of tensor cores need


@dataclass(frozen=True)
class Side:
    """How a kernel reads keys or values. storage: plain, int8, int4, int2 or fp8. stored: bytes or numbers of a row.

    scales: none, token, group (of channels of a token), channel, block (of tokens of a channel), or balanced (of a token, after the
    channels of a block of tokens were divided by a balance); group: how many share one.
    """

    storage: str
    stored: int
    scales: str
    group: int
    zeros: bool
    centre: int
    dtype: str
    scale_dtype: str

    @property
    def row_bytes(self) -> int:
        return self.stored * SIZES.get(self.dtype, 1)

    @property
    def piece(self) -> tuple[int, int]:
        """Channels of a piece, and how many pieces a row has."""
        if self.scales == "group" and self.storage in PER_BYTE and self.group < self.stored * PER_BYTE[self.storage]:
            piece = math.gcd(self.group, self.stored, 256)  # shares of bytes begin where groups need not
            return piece, -(-self.stored // piece)
        if self.scales == "group" and self.group < self.stored:
            piece = min(math.gcd(self.group, 256), 256)
            return piece, -(-self.stored // piece)
        main, rest = pieces(self.stored)
        if rest == 0:
            return main, 1
        # Two unequal pieces in prefill are equal ones here, where a loop goes over them.
        return min(((p, -(-self.stored // p)) for p in (64, 32, 16)), key=lambda found: found[0] * found[1] + 4 * found[1])


@functools.lru_cache(maxsize=256)
def side_of(spec: AttentionSpec, form: Form, side: str) -> Side:
    """What the spec's cache says of k or v, in the terms of the kernel."""
    width = form.width if side == "k" else form.value_width
    clause = spec.cache
    storage = "fp32" if clause is None else clause.word(side)
    if clause is None or storage in FLOATS:
        held = form.dtype if storage == "fp32" else str(FLOATS[storage]).removeprefix("torch.")
        return Side("plain", width, "none", width, False, 0, held, "float32")
    group, symmetric = clause.count("group"), clause.word("levels") == "symmetric"
    if clause.word(f"{side}_axis") == "channel":
        group = members(clause, side)
        scales = "block" if group else "channel"
    elif balanced(clause, side):
        scales, group = "balanced", clause.count("block")
    else:
        scales = "group" if side == "v" or 0 < group < width else "token"
        group = min(group or width, width)
    stored = width // PER_BYTE.get(storage, 1)
    middle = centre(storage) if symmetric else 0
    scale_dtype = str(FLOATS[clause.word("scales")]).removeprefix("torch.")
    return Side(storage, stored, scales, group, storage != "fp8" and not symmetric, middle,
                HELD[storage], scale_dtype)  # fmt: skip


def cache_refusal(spec: AttentionSpec, form: Form) -> Refusal | None:
    clause = spec.cache
    if clause is None or (refused := refusal(clause)) is not None:
        return None if clause is None else refused
    layout, page = clause.word("layout"), clause.count("page")
    if "int1" in (clause.word("k"), clause.word("v")):
        return Refusal("the kernels read no int1 codes", clause)
    if layout == "ring":
        return Refusal("a ring does not say which position a token has", clause)
    if layout == "paged" and page == 0:
        return Refusal("a paged cache needs page=", clause)
    for name in "kv":
        side = side_of(spec, form, name)
        shared = tokens_per_scale(clause, name) if side.storage in PACKED else 1
        if layout == "paged" and shared > 1 and page % shared:
            return Refusal(f"pages of {page} tokens cut groups of {shared} apart", clause)
        width, count = form.width if name == "k" else form.value_width, PER_BYTE.get(side.storage, 1)
        if width % count:
            return Refusal(f"rows of {width} channels {uneven(width, count)}", clause)
        grouped = side.scales == "group" and side.group < width
        if grouped and (side.group % SMALLEST or (count > 1 and side.stored % SMALLEST)):
            return Refusal(f"groups of {side.group} channels do not fit pieces of {SMALLEST}", clause)
    return None


def cache_problem(spec: AttentionSpec, form: Form, q: Tensor, cache: Cache) -> str | None:
    """What of a cache does not fit the spec, the form or the queries; None where all does."""
    paged = spec.cache is not None and spec.cache.word("layout") == "paged"
    if paged != (cache.pages is not None):
        return (
            "the spec's cache is paged and pages are not given" if paged else "pages are given, but the spec's cache is not paged"
        )
    for name, x, width in (("k", cache.k, form.width), ("v", cache.v, form.value_width)):
        side, packed = side_of(spec, form, name), cache.side(name)
        if x.ndim != 4 or x.shape[3] != side.stored:
            return f"{name} {list(x.shape)} has no rows of {side.stored}, which hold {width} channels as {side.storage}"
        if side.storage != "plain" and str(x.dtype).removeprefix("torch.") != side.dtype:
            return f"{name} is {x.dtype}, and {side.storage} is kept as {side.dtype}"
        if q.shape[1] % x.shape[1] or (not paged and x.shape[0] != q.shape[0]):
            return f"{name} {list(x.shape)} does not fit q {list(q.shape)}"
        for part, given, due in (("scales", packed.scales, side.scales != "none"), ("zeros", packed.zeros, side.zeros)):
            if due != (given is not None):
                return f"{name}_{part} are {'missing' if due else 'given, and nothing reads them'}"
            if given is not None and (problem := misshapen(spec, form, name, side, x, given)):
                return f"{name}_{part} {list(given.shape)} should be {problem}"
        if (side.scales == "balanced") != (packed.balance is not None):
            return f"{name}_balance is {'missing' if packed.balance is None else 'given, and nothing reads it'}"
        if packed.balance is not None:
            shape = [x.shape[0], x.shape[1], -(-x.shape[2] // side.group), width]
            if list(packed.balance.shape) != shape or packed.balance.dtype != torch.float32:
                return f"{name}_balance {list(packed.balance.shape)} of {packed.balance.dtype} should be {shape} of torch.float32"
    if cache.k.shape[2] != cache.v.shape[2] or (
        paged and spec.cache is not None and cache.k.shape[2] != spec.cache.count("page")
    ):
        return f"k has {cache.k.shape[2]} rows{' in a page' if paged else ''}, v {cache.v.shape[2]}"
    for label, x in (("pages", cache.pages), ("lengths", cache.lengths)):
        if x is not None and (x.shape[0] != q.shape[0] or x.ndim != (2 if label == "pages" else 1) or x.is_floating_point()):
            return f"{label} {list(x.shape)} of {x.dtype} are not whole numbers for {q.shape[0]} sequences"
    if cache.lengths is None and cache.k.shape[2] == 0:
        return "there are no keys"
    return None


def misshapen(spec: AttentionSpec, form: Form, name: str, side: Side, x: Tensor, scales: Tensor) -> str:
    """The shape that scales or zeros should have, where they have another."""
    assert spec.cache is not None
    width, shared = form.width if name == "k" else form.value_width, tokens_per_scale(spec.cache, name)
    columns = width if side.scales in ("channel", "block") else 1 if side.scales == "balanced" else -(-width // side.group)
    rows = 1 if shared == 0 else -(-x.shape[2] // shared)
    due = (None if shared == 0 else x.shape[0], x.shape[1], rows, columns)
    fits = scales.ndim == 4 and all(d in (None, s) for d, s in zip(due, scales.shape, strict=True))
    return "" if fits else str([d if d is not None else "B" for d in due])
