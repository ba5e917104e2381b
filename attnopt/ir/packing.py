"""One side of a cache in its bits: what `cache(…)` of a spec rounds to, as codes with their scales and zero points.

    k [B, G, K, D], cache(k=int4, group=32)   ->   codes uint8 [B, G, K, D / 2], scales [B, G, K, D / 32], zeros of the same shape

    x ~ (code + zero) * scale          fp8, and int8 that is symmetric, have no zero points

int8 keeps its codes less 128 (symmetric ones as they are) in int8. Narrower codes share a byte: of int4, byte j of D / 2 holds channel
j in its low half and channel D / 2 + j in its high half; of int2, byte j of D / 4 holds channels j, D / 4 + j, D / 2 + j and
3 D / 4 + j from its lowest bits up; int1 likewise. So parts of a row of bytes are parts of a row of channels.
`unpack(pack(x))` is `stored(x)` of the reference, bit for bit, in x's own dtype.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from attnopt.ir.clause import Clause
from attnopt.ir.expr import Const
from attnopt.ir.signatures import BITS
from attnopt.ir.site import Refusal
from attnopt.ir.storage import FLOATS, FP8_MAX, codes, extremes, fp8_step, largest_code, safe, steps

PACKED = ("int8", "int4", "int2", "int1", "fp8")
MIDDLE = {"int8": 128}  # what is taken off a code before it is stored
PER_BYTE = {"int4": 2, "int2": 4, "int1": 8}  # codes that share a byte
PLAIN = (
    "outliers",
    "k_basis",
    "v_basis",
    "block",
    "v_balance",
    "k_bits",
    "v_bits",
    "k_shift",
    "k_spread",
    "v_shift",
    "v_spread",
    "codebook",
    "recent",
)
WHAT = {
    "recent": "the newest tokens stay exact",
    "codebook": "keys are read from a codebook",
    "block": "tokens are rounded a block at a time",
}


@dataclass(frozen=True)
class Packed:
    """Codes [B, G, K, D or D / 2], scales and zeros [B, G, K or ceil(K / group) or 1, ceil(D / group) or 1 or D].

    balance: what the channels of values were divided by, [B, G, ceil(K / block), D], where the clause has `v_balance=root`.
    """

    codes: Tensor
    scales: Tensor | None = None
    zeros: Tensor | None = None
    balance: Tensor | None = None


def refusal(clause: Clause | None, blocks: bool = False) -> Refusal | None:
    """None where codes, scales and zero points hold all that the clause says. blocks: tokens of a cache that no more join are held too."""
    if clause is None:
        return None
    signature = clause.signature.options
    if blocks and (refused := blocks_refusal(clause)) is not None:
        return refused
    plain = [o for o in PLAIN if not blocks or o not in ("block", "v_balance")]
    if (option := next((o for o in plain if clause.get(o) != signature[o][1]), None)) is not None:
        return Refusal(WHAT.get(option, f"{option} of the cache"), clause)
    if clause.word("levels") == "middles" and any(BITS[clause.word(side)] < 8 or clause.word(side) == "int8" for side in "kv"):
        return Refusal("levels of the cache lie in the middle of their bins", clause)
    odd = next((clause.word(side) for side in "kv" if clause.word(side) not in (*FLOATS, *PACKED)), None)
    if odd is not None:
        return Refusal(f"{odd} codes have no packed form; the nearest are int2 and int4", clause)
    if clause.word("levels") == "symmetric" and "int1" in (clause.word("k"), clause.word("v")):
        return Refusal("symmetric levels are three at least, and int1 has two", clause)
    return None


def blocks_refusal(clause: Clause) -> Refusal | None:
    """Why tokens that were rounded a block at a time have no packed form."""
    block, balanced = clause.count("block"), clause.word("v_balance") == "root"
    if block and clause.count("group"):
        return Refusal("tokens are rounded in blocks, and in groups of another size", clause)
    if balanced and (not block or clause.word("v_axis") == "channel" or clause.word("levels") == "symmetric"):
        return Refusal("values are balanced in blocks of tokens, each token with a scale and a zero point", clause)
    return None


def pack(x: Tensor, clause: Clause | None, side: str) -> Packed:
    """k or v [B, G, K, D] as `clause` stores it; call `refusal` first.

    Raises ValueError for rows that do not fill their bytes, and for numbers that are not finite: the first is named.
    """
    storage = "fp32" if clause is None else clause.word(side)
    if clause is None or storage == "fp32":
        return Packed(x)
    if storage in FLOATS:
        return Packed(x.to(FLOATS[storage]))
    x = x if x.dtype == torch.float64 else x.float()
    kind = x.dtype if clause.word("scales") == "fp32" else FLOATS[clause.word("scales")]
    if storage == "fp8":
        require_finite(x, side)
        step = fp8_step(x, clause, side)
        held = (x / step).clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn)
        return Packed(held, once(step, clause, side).to(kind))
    balance = None
    if balanced(clause, side):
        require_finite(x, side)
        balance = balance_of(x, clause.count("block"))
        x = x / in_blocks(balance, x.shape[2], clause.count("block"))
    found, step, zero = levels(x, clause, side)
    symmetric = clause.word("levels") == "symmetric"
    scales, zeros = step.to(kind), None if symmetric else zero.to(kind)
    if storage in PER_BYTE:
        return Packed(joined(found.to(torch.uint8), BITS[storage]), scales, zeros, balance)
    return Packed((found - (largest_code(storage) if symmetric else MIDDLE[storage])).to(torch.int8), scales, zeros, balance)


def balanced(clause: Clause, side: str) -> bool:
    return side == "v" and clause.word("v_balance") == "root"


def balance_of(x: Tensor, block: int) -> Tensor:
    """The root of the largest magnitude of each channel of each block of tokens, [B, G, ceil(K / block), D]; 1 where that is 0."""
    padded = torch.nn.functional.pad(x.abs(), (0, 0, 0, -x.shape[2] % block))
    return safe(padded.unflatten(2, (-1, block)).amax(3).sqrt())


def in_blocks(x: Tensor, length: int, block: int) -> Tensor:
    """A row for each block as one for each of its tokens."""
    return x.repeat_interleave(block, 2).narrow(2, 0, length)


def levels(x: Tensor, clause: Clause, side: str) -> tuple[Tensor, Tensor, Tensor]:
    """The code of each number [B, G, K, D], with the step and the zero point of each scale group, once.

    Groups of channels of one token are reduced where they stand: a token that comes alone takes a few small operations.
    """
    clip, group, bits = clause.expr("clip"), clause.count("group") or x.shape[3], BITS[clause.word(side)]
    assert isinstance(clip, Const)
    if clause.word(f"{side}_axis") == "channel" or x.shape[3] % group or not x.numel():
        require_finite(x, side)
        low, high = (e * float(clip.value) for e in extremes(x, x, clause.word(f"{side}_axis"), members(clause, side)))
        step, zero, most = steps(low, high, bits, clause)
        return codes(x, step, zero, most), once(step, clause, side), once(zero, clause, side)
    rows = x if group == x.shape[3] else x.unflatten(3, (-1, group))
    low, high = rows.amin(-1, keepdim=True), rows.amax(-1, keepdim=True)
    if not math.isfinite((high - low).detach().sum().item()):  # or the sum of numbers that are is too large to be one
        require_finite(x, side)
    if (share := float(clip.value)) != 1.0:
        low, high = low * share, high * share
    step, zero, most = steps(low, high, bits, clause)
    found = codes(rows, step, zero, most)
    return (found, step, zero) if rows is x else (found.flatten(3), step.squeeze(-1), zero.squeeze(-1))


def require_finite(x: Tensor, side: str) -> None:
    """Raises ValueError, which names the first number that is not."""
    if not bool((finite := x.isfinite()).all()):
        b, head, token, channel = (~finite).nonzero()[0].tolist()
        what = f"{side} is {float(x[b, head, token, channel])} in sequence {b}, head {head}, token {token}, channel {channel}"
        raise ValueError(f"{what}: it would spread over its scale group")


def unpack(packed: Packed, clause: Clause | None, side: str, dtype: torch.dtype) -> Tensor:
    """The numbers [B, G, K, D] that a packed side stands for, in `dtype`."""
    storage = "fp32" if clause is None else clause.word(side)
    if packed.scales is None or clause is None:
        return packed.codes.to(dtype)
    found = apart(packed.codes, BITS[storage]) if storage in PER_BYTE else packed.codes
    scales = everywhere(packed.scales.to(dtype), found.shape, clause, side)
    if packed.zeros is None:
        return (found.to(dtype) - centre(storage)) * scales
    made = (found.to(dtype) + MIDDLE.get(storage, 0) + everywhere(packed.zeros.to(dtype), found.shape, clause, side)) * scales
    return made if packed.balance is None else made * in_blocks(packed.balance.to(dtype), made.shape[2], clause.count("block"))


def once(x: Tensor, clause: Clause, side: str) -> Tensor:
    """One number for each scale group, of x [B, G, K, D] whose groups are of equal numbers."""
    by_channel, group = clause.word(f"{side}_axis") == "channel", members(clause, side)
    return (x[:, :, :: group or max(1, x.shape[2])] if by_channel else x[..., :: group or x.shape[3]]).contiguous()


def everywhere(x: Tensor, shape: torch.Size, clause: Clause, side: str) -> Tensor:
    """`once` undone: each scale group's number for all of its members, as [B, G, K, D] or what broadcasts to it."""
    axis = 2 if clause.word(f"{side}_axis") == "channel" else 3
    if x.shape[axis] == 1:  # a number for the whole row stands for it as it is
        return x
    return x.repeat_interleave(members(clause, side) or shape[axis], axis).narrow(axis, 0, shape[axis])


def centre(storage: str) -> int:
    """The code of zero in symmetric levels that share bytes; those of int8 are kept as they are."""
    return 2 ** (BITS[storage] - 1) - 1 if storage in PER_BYTE else 0


def joined(x: Tensor, bits: int) -> Tensor:
    """Codes 0 … 2^bits - 1 [..., D] of 1, 2 or 4 bits in bytes, uint8 [..., D * bits / 8]."""
    count = 8 // bits
    if x.shape[-1] % count:
        raise ValueError(f"rows of {x.shape[-1]} channels {uneven(x.shape[-1], count)}")
    made, *others = x.chunk(count, -1)
    for i, part in enumerate(others, 1):
        made = made | (part << (bits * i))
    return made


def uneven(width: int, count: int) -> str:
    """What is wrong with a width that `count` does not divide."""
    below = width - width % count
    nearest = f"{below} and {below + count}" if below else f"{count}"
    return f"cannot be packed {NUMBERS.get(count, count)} to a byte; the nearest widths are {nearest}"


NUMBERS = {2: "two", 4: "four", 8: "eight"}


def apart(x: Tensor, bits: int) -> Tensor:
    """The codes of bytes [..., D * bits / 8], as [..., D]."""
    return torch.cat([(x >> shift) & (2**bits - 1) for shift in range(0, 8, bits)], -1)


def row_bytes(clause: Clause | None, side: str, channels: int, width: float) -> float:
    """Bytes of the D channels of one head at one position, its share of scales and zero points included.

    width: bytes of a number that is kept as it is. 64 channels in int8 of one group: 64 + a scale and a zero of 4.
    """
    storage = "fp32" if clause is None else clause.word(side)
    if clause is None or storage == "fp32":
        return channels * width
    if storage in FLOATS:
        return channels * BITS[storage] / 8
    group, block = clause.count("group"), clause.count("block")
    balance = 4 * channels / block if side == "v" and block and clause.word("v_balance") == "root" else 0.0
    if clause.word(f"{side}_axis") == "channel":
        sets = 2 if clause.get(f"{side}_bits") is not None else 1  # tokens of as many bits share a scale
        shared = min(x for x in (group, block) if x) if group or block else 0
        groups = sets * channels / shared if shared else 0.0  # shared by so many positions, or by all
    else:
        groups = math.ceil(channels / group) if group else 1.0
    numbers = 1 if storage == "fp8" or clause.word("levels") == "symmetric" else 2
    return channels * BITS[storage] / 8 + groups * numbers * BITS[clause.word("scales")] / 8 + balance


def tokens_per_scale(clause: Clause, side: str) -> int:
    """How many tokens share a scale; 0 is all."""
    return members(clause, side) if clause.word(f"{side}_axis") == "channel" else 1


def members(clause: Clause, side: str) -> int:
    """How many numbers share a scale along the axis of a side: channels of a token, or tokens of a channel; 0 is all."""
    return clause.count("group") or (clause.count("block") if clause.word(f"{side}_axis") == "channel" else 0)
