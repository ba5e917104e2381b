"""A list of tiles in the prefill family: blocks(m, n, operand=map), whoever chose.

    map bool [B | 1, H | 1, ceil(Q / m), ceil(K / n)]   ->   int32 [B * H, ceil(Q / m), 1 + ceil(K / n)] of how many blocks, and which

A program reads the row of the list that its queries share, and walks over the blocks that stand in it: so m is a multiple of its
queries, n of the keys of a step.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from attnopt.codegen.specialise import Value
from attnopt.codegen.triton.expressions import pointer
from attnopt.codegen.triton.tiles import Tile
from attnopt.ir.clause import Clause
from attnopt.ir.site import Refusal

SMALLEST = 64  # queries and keys of a tile of the list: every architecture has kernels of as many, or of a part


def refusal(selection: Clause | None, packed: bool) -> Refusal | None:
    if selection is None:
        return None
    if selection.name != "blocks":
        return Refusal(f"{selection.name} chooses keys from the scores; a kernel takes blocks(m, n, operand=…)", selection)
    if packed:
        return Refusal("sequences that stand one after the other have no list of tiles", selection)
    if not selection.count(0) or selection.count(0) % SMALLEST or not selection.count(1) or selection.count(1) % SMALLEST:
        return Refusal(f"{selection} has tiles that are no multiples of {SMALLEST} x {SMALLEST}", selection)
    return None


def fitted(table: Sequence[Tile], selection: Clause | None) -> tuple[Tile, ...]:
    """The tiles that a list can be read by; where the table has none, its own made smaller."""
    if selection is None:
        return tuple(table)
    m, n = selection.count(0), selection.count(1)
    smaller = (replace(t, block_q=math.gcd(t.block_q, m), block_k=math.gcd(t.block_k, n)) for t in table)
    return tuple(t for t in table if fits(t, selection)) or tuple(smaller)


def fits(tile: Tile, selection: Clause) -> bool:
    return selection.count(0) % tile.block_q == 0 and selection.count(1) % tile.block_k == 0


def constants(selection: Clause | None, tile: Tile) -> dict[str, Value]:
    """What the template must know: every block of the list is masked, and bounds say nothing more."""
    if selection is None:
        return {"LISTED": False}
    return {
        "LISTED": True, "LIST_ROWS": selection.count(0) // tile.block_q, "LIST_KEYS": selection.count(1) // tile.block_k,
        "PHASES": 1, "RANGE": False, "LEADING": False, "LEFT_EDGE": False, "INNER_MASK": False,
    }  # fmt: skip


def operand(selection: Clause | None) -> tuple[str, ...]:
    """The name of the map among the parameters of `attention`."""
    return () if selection is None else (pointer(str(selection.operand("operand")))[2:],)
