"""Key and value heads in groups: which heads share one, how they are turned first, and what each counts for.

    contiguous(8, 2)                    ->   ((0, 1, 2, 3), (4, 5, 6, 7))
    aligned(cross moments, groups)      ->   a rotation of each head's channels that brings it near the others of its group
    shared(block, groups, …)            ->   HeadChanges: k' of a group = sum of w_h K_h R_h, and each query times R_h

Turning a key head and its queries alike (or a value head and its rows of the output projection) changes nothing: x R (y R)' = x y'. Where
positions turn pairs of channels, only rotations of the same pairs pass through, one angle each.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from attnopt.errors import OutOfRange
from attnopt.ir.block import Block, Rotary
from attnopt.passes.edits.heads.candidates import shared_by
from attnopt.passes.edits.heads.changes import HeadChanges
from attnopt.passes.edits.heads.head_map import HeadMap

ROUNDS = 10  # of turning each head towards the mean of its group

Groups = tuple[tuple[int, ...], ...]


def contiguous(heads: int, count: int) -> Groups:
    """Neighbours together, equally many in each. Raises OutOfRange."""
    if count < 1 or heads % count:
        raise OutOfRange(f"numbers of groups that divide {heads}: {', '.join(map(str, divisors(heads)))}", f"{count} groups")
    size = heads // count
    return tuple(tuple(range(g * size, (g + 1) * size)) for g in range(count))


def divisors(heads: int) -> list[int]:
    return [n for n in range(1, heads + 1) if heads % n == 0]


def aligned(cross: Tensor, groups: Groups, turn: Rotary | None = None) -> Tensor:
    """Rotations R [H, D, D], float64, that bring the heads of each group together: sum |K_h R_h - mean|² is least (Procrustes, in turns).

    cross [H, H, D, D]: K_i' K_j. Each head is turned towards the first, then, ROUNDS times, towards the mean of the
    others. turn: of keys that
    positions turn afterwards: then each pair of channels is turned by an angle, other channels stay.
    """
    heads, width = len(cross), cross.shape[-1]
    turns = torch.eye(width, dtype=torch.float64).repeat(heads, 1, 1)
    for group in groups:
        for h in group[1:]:
            turns[h] = nearest(cross[h, group[0]]) if turn is None else nearest_in_pairs(cross[h, group[0]], turn)
        for _ in range(ROUNDS if len(group) > 2 else 0):
            for h in group:
                towards = torch.stack([cross[h, j] @ turns[j] for j in group if j != h]).mean(0)
                turns[h] = nearest(towards) if turn is None else nearest_in_pairs(towards, turn)
    return turns


def nearest(a: Tensor) -> Tensor:
    """The rotation R with the largest tr(R' a)."""
    u, _, v = torch.linalg.svd(a)
    return u @ v


def nearest_in_pairs(a: Tensor, turn: Rotary) -> Tensor:
    """The same among rotations of the pairs that a rotary embedding turns."""
    made = torch.eye(len(a), dtype=a.dtype)
    half = turn.dims // 2
    for i in range(half):
        x, y = (turn.first + 2 * i, turn.first + 2 * i + 1) if turn.interleaved else (turn.first + i, turn.first + half + i)
        cos, sin = a[x, x] + a[y, y], a[x, y] - a[y, x]
        length = (cos.square() + sin.square()).sqrt()
        if float(length) > 0:
            cos, sin = cos / length, sin / length
            made[x, x], made[x, y], made[y, x], made[y, y] = cos, sin, -sin, cos
    return made


def turned_moments(cross: Tensor, turns: Tensor) -> Tensor:
    """R_i' (K_i' K_j) R_j."""
    return turns.mT[:, None] @ cross @ turns[None]


def shared(
    block: Block,
    groups: Groups,
    *,
    keys: Tensor | None = None,
    values: Tensor | None = None,
    weights: Mapping[str, Tensor] | None = None,
    reads: Sequence[int] = (),
) -> HeadChanges:
    """One key head and one value head for each group. keys, values: rotations [H, D, D] of the heads first.

    weights: by side, what each head counts for in its group: [H], or [H, D] for each channel; else 1 / size. reads: the group of each
    query head, where that is not the group of its own key head.
    """
    assert block.k is not None and block.v is not None and block.q is not None and block.o is not None
    made: dict[str, HeadMap] = {}
    repeats = shared_by(block)
    for side, layer, turns in (("k", block.k, keys), ("v", block.v, values)):
        heads, width = layer.channels.shape
        counted = (weights or {}).get(side)
        if counted is None:
            counted = torch.zeros(heads, dtype=torch.float64)
            for group in groups:
                counted[list(group)] = 1.0 / len(group)
        counted = counted if counted.ndim == 2 else counted[:, None].expand(heads, width)
        made[side] = HeadMap.pooled(groups, {h: torch.diag(counted[h]) for group in groups for h in group})
        if turns is not None:
            made[side] = made[side].after(turns)
            made["q" if side == "k" else "o"] = HeadMap.of_bases(turns.repeat_interleave(repeats, 0))
    return HeadChanges(made.get("q"), made["k"], made["v"], made.get("o"), reads=tuple(reads))
