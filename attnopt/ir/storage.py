"""Rounding to storage types: one quantiser family for the cache (`cache`) and for the products (`precision`, `rounded_products`).

Symmetric: x ~ round(x / s) * s, s = max|x| / (2^(b-1) - 1). Asymmetric: x ~ (round(x / s) - round(min / s)) * s, s = (max - min) /
(2^b - 1), or |x| where all are equal. fp8 is E4M3, scaled so that the largest element becomes 448. Who shares a scale is an
argument, and so is its type.
`packing` stores what `cache` says in its bits.

Sources: "AKVQ-VL" (groups of channels, clip, Hadamard), "ZipCache" (bits per token, channel balance, tokens compressed a block at a
time), "QAQ" (outliers kept, levels in the middle of bins), "WKVQuant" (static channel shift and spread, current tokens exact),
"Transformer-VQ" (codebook).
"""

from __future__ import annotations

import torch
from torch import Tensor

from attnopt.errors import InputMismatch
from attnopt.ir.clause import Clause
from attnopt.ir.rows import Call
from attnopt.ir.signatures import BITS

FLOATS = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
FP8_MAX = 448.0
EXACT_BITS = 16  # from this many bits per number on, a token is kept as it is


def fp8(x: Tensor) -> Tensor:
    return x.to(torch.float8_e4m3fn).to(x.dtype)


def safe(scale: Tensor) -> Tensor:
    return torch.where(scale == 0, torch.ones_like(scale), scale)


def largest_code(storage: str) -> float:
    """What the largest magnitude of a scale group becomes."""
    return FP8_MAX if storage == "fp8" else float(max(1, 2 ** (BITS[storage] - 1) - 1))


def symmetric(x: Tensor, storage: str, peak: Tensor) -> Tensor:
    """Round x to the storage type with scales from `peak`, the largest magnitude of each scale group, broadcastable to x."""
    if storage in FLOATS:
        return x if storage == "fp32" and x.dtype == torch.float64 else x.to(FLOATS[storage]).to(x.dtype)
    levels = largest_code(storage)
    scale = safe(peak / levels)
    rounded = fp8(x / scale) if storage == "fp8" else (x / scale).round().clamp(-levels, levels)
    return rounded * scale


def group_reduce(x: Tensor, groups: Tensor, how: str) -> Tensor:
    """Reduce x [B, H, L, C] over rows with equal group (a number per row, [L]) and give every row its group's result."""
    names, members = groups.unique(return_inverse=True)
    start = x.new_zeros(*x.shape[:2], len(names), x.shape[-1])
    reduced = start.scatter_reduce(2, members[:, None].expand_as(x), x, how, include_self=False)
    return reduced[:, :, members]


def round_cache(call: Call, x: Tensor, clause: Clause, side: str) -> Tensor:
    """k or v [B, H, K, D] as the cache holds it, `block` tokens after `block` tokens; what stays exact is in no one's scale."""
    if side == "k" and clause.operand("codebook") is not None:
        exact = newest(call, clause).expand(*x.shape[:3], 1)
        return torch.where(exact, x, nearest_code(x, call.operand(clause, "codebook")))
    bits = token_bits(call, clause, side).expand(*x.shape[:3], 1)
    clip = call.key_value(clause.expr("clip"))
    exact = newest(call, clause) | (bits >= EXACT_BITS)
    size = clause.count("block") or max(1, x.shape[2])
    parts = (y.split(size, 2) for y in (x, bits, clip, exact))
    rounded = [stored(call, y, b, c, e, clause, side) for y, b, c, e in zip(*parts, strict=True)]
    return torch.cat(rounded, 2) if rounded else x


def newest(call: Call, clause: Clause) -> Tensor:
    """Which tokens `recent` keeps exact, [K, 1]."""
    place = call.grid.index("k").flatten()
    return (place >= call.grid.kv_len - call.value(clause.expr("recent"), "").flatten())[:, None]


def token_bits(call: Call, clause: Clause, side: str) -> Tensor:
    """Bits of each token [B|1, H|1, K|1, 1]; floating types other than fp8 count as none, for they have no scale to share."""
    expr = clause.expr_or_none(f"{side}_bits")
    if expr is not None:
        return call.key_value(expr)
    storage = clause.word(side)
    return torch.full((1, 1, 1, 1), 0 if storage in FLOATS else BITS[storage], dtype=call.dtype, device=call.grid.device)


def stored(call: Call, x: Tensor, bits: Tensor, clip: Tensor, exact: Tensor, clause: Clause, side: str) -> Tensor:
    """Shift, spread, rotate or balance the channels, round, and undo it. x [B, H, K, D]; bits, clip and exact [B, H, K, 1]."""
    storage = clause.word(side)
    if clause.expr_or_none(f"{side}_bits") is None and storage in (*FLOATS, "fp8"):
        step = x if storage in FLOATS else fp8_step(x.masked_fill(exact, 0.0), clause, side)
        rounded = symmetric(x, storage, x) if storage in FLOATS else fp8((x / step).clamp(-FP8_MAX, FP8_MAX)) * step
        return torch.where(exact, x, rounded)
    shift, spread = (call.operand_or_none(clause, f"{side}_{what}") for what in ("shift", "spread"))
    shift = torch.zeros_like(x) if shift is None else shift.unsqueeze(-2)
    spread = torch.ones_like(x) if spread is None else spread.unsqueeze(-2)
    if side == "v" and clause.word("v_balance") == "root":
        spread = spread * safe(x.masked_fill(exact, 0.0).abs().amax(-2, keepdim=True).sqrt())
    y = (x - shift) / spread
    if turned := clause.word(f"{side}_basis") == "hadamard":
        y = y @ hadamard(y.shape[-1]).to(y)
    y = asymmetric(y, bits, clip, exact, clause, side)
    if turned:
        y = y @ hadamard(y.shape[-1]).to(y).mT
    return torch.where(exact, x, y * spread + shift)


def asymmetric(x: Tensor, bits: Tensor, clip: Tensor, exact: Tensor, clause: Clause, side: str) -> Tensor:
    """Uniform levels between the minimum and maximum of each scale group, of the tokens that are not exact.

    x [B, H, K, D]; bits, clip and exact [B, H, K, 1]. Scale groups: with axis=token `group` channels of one token, with
    axis=channel one channel of `group` tokens that follow each other and have the same number of bits; group=0 is all of them.
    """
    kept = exact | (x.abs() > outlier_threshold(x, exact, clause.number("outliers")))
    result = x
    for count in bits[~exact.expand_as(bits)].unique():
        mine = (bits == count) & ~kept
        low, high = x.masked_fill(~mine, torch.inf), x.masked_fill(~mine, -torch.inf)
        low, high = extremes(low, high, clause.word(f"{side}_axis"), clause.count("group"))
        low, high = (e.masked_fill(e.isinf(), 0.0) * clip for e in (low, high))
        if clause.word("levels") == "middles":
            step = (high - low) / 2**count
            rounded = low + (((x - low) / safe(step)).floor().clamp(0, 2**count - 1) + 0.5) * step
        else:
            step, zero, most = steps(low, high, int(count), clause)
            rounded = codes(x, step, zero, most).add(zero) * step
        result = torch.where(mine, rounded, result)
    return result


def steps(low: Tensor, high: Tensor, bits: int, clause: Clause) -> tuple[Tensor, Tensor, int]:
    """Of scale groups from low to high: the step and the number of its first level, as they are stored; the largest code."""
    if clause.word("levels") == "symmetric":
        top = max(1, 2 ** (bits - 1) - 1)
        step = safe(held(torch.maximum(low.abs(), high.abs()) / top, clause))
        return step, torch.full_like(step, -top), 2 * top
    equal = high == low  # numbers without a range are one step from zero, and so stay as they are
    step = safe(held(torch.where(equal, low.abs(), (high - low) / (2**bits - 1)), clause))
    return step, held((low / step).round(), clause), 2**bits - 1


def codes(x: Tensor, step: Tensor, zero: Tensor, most: int) -> Tensor:
    """The level of each number, 0 … most: x ~ (code + zero) * step."""
    return ((x / step).round() - zero).clamp(0, most)


def fp8_step(x: Tensor, clause: Clause, side: str) -> Tensor:
    """What the numbers of each scale group are divided by."""
    peak = extremes(x.abs(), x.abs(), clause.word(f"{side}_axis"), clause.count("group"))[1]
    return safe(held(peak / FP8_MAX, clause))


def held(x: Tensor, clause: Clause) -> Tensor:
    """A step or a zero point in the type that `scales` names; what is larger than its largest number becomes that."""
    largest = torch.finfo(FLOATS[clause.word("scales")]).max
    return symmetric(x.clamp(-largest, largest), clause.word("scales"), x)


def extremes(low: Tensor, high: Tensor, axis: str, group: int) -> tuple[Tensor, Tensor]:
    """The smallest of low and the largest of high in each scale group, for every one of its members."""
    if axis == "channel":
        low, high = extremes(low.mT, high.mT, "token", group)
        return low.mT, high.mT
    width = low.shape[-1]
    group = group or width
    low, high = (
        torch.nn.functional.pad(x, (0, -width % group), value=fill).unflatten(-1, (-1, group))
        for x, fill in ((low, torch.inf), (high, -torch.inf))
    )
    low, high = low.amin(-1, keepdim=True).expand_as(low), high.amax(-1, keepdim=True).expand_as(high)
    return low.flatten(-2)[..., :width], high.flatten(-2)[..., :width]


def outlier_threshold(x: Tensor, exact: Tensor, share: float) -> Tensor:
    """The magnitude above which the given share of the elements of a head lies, of tokens that are not exact."""
    if share == 0:
        return x.new_tensor(torch.inf)
    found = x.abs().masked_fill(exact, torch.nan).flatten(2).nanquantile(1 - share, dim=-1)
    return found.nan_to_num(torch.inf)[..., None, None]


def nearest_code(x: Tensor, codebook: Tensor) -> Tensor:
    """Each row of x [B, H, K, D] replaced by the nearest row of the codebook [H, S, D] (or [S, D])."""
    codes = codebook.expand(x.shape[1], *codebook.shape[-2:])
    nearest = torch.cdist(x, codes[None]).argmin(-1)
    return torch.stack([codes[h][nearest[:, h]] for h in range(x.shape[1])], 1)


def hadamard(width: int) -> Tensor:
    """The normalised Walsh-Hadamard matrix [width, width]. Raises InputMismatch where the width is no power of two."""
    if width < 1 or width & (width - 1):
        below = 1 << (max(width, 1).bit_length() - 1)
        raise InputMismatch(
            f"a Hadamard basis of {width} channels does not exist: the width must be a power of two",
            next_move=f"The nearest are {below} and {2 * below}.",
        )
    matrix = torch.ones(1, 1, dtype=torch.float64)
    while matrix.shape[0] < width:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)], 0) / 2**0.5
    return matrix
