"""A list of tiles in the prefill family: blocks(m, n, operand=map), whoever chose.

    map bool [B | 1, H | 1, ceil(Q / m), ceil(K / n)]   ->   int32 [B * H, ceil(Q / m), 1 + ceil(K / n)] of how many blocks, and which

A program reads the row of the list that its queries share, and walks over the blocks that stand in it: so m is a multiple of its
queries, n of the keys of a step. Blocks that lie in the range that all its queries see come first, without a mask.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from attnopt.codegen.skipped_tiles import skipped
from attnopt.codegen.specialise import Value
from attnopt.codegen.triton.expressions import pointer
from attnopt.codegen.triton.tiles import Tile
from attnopt.ir.clause import Clause
from attnopt.ir.ranges import Range
from attnopt.ir.site import Refusal

LOG2E = math.log2(math.e)
LARGEST = 128  # of a program
SMALLEST = 64  # queries and keys of a tile of the list: every architecture has kernels of as many, or of a part


def refusal(selection: Clause | None, packed: bool) -> Refusal | None:
    if selection is None:
        return None
    if selection.name != "blocks":
        return Refusal(f"{selection.name} chooses keys from the scores; a kernel takes blocks(m, n, operand=…)", selection)
    if packed:
        return Refusal("sequences that stand one after the other have no list of tiles", selection)
    m, n = selection.count(0), selection.count(1)
    if not m or m % SMALLEST or not n or n % SMALLEST:
        return Refusal(f"{selection} has tiles that are no multiples of {SMALLEST} x {SMALLEST}", selection)
    if (grain := skipped(selection)) is not None and (m % grain[0] or not set(grain) <= {SMALLEST, LARGEST}):
        said = f"a program skips the values of {SMALLEST} or {LARGEST} queries, a part of a tile, and as many keys"
        return Refusal(f"{said}: not of {grain[0]} x {grain[1]}", selection)
    return None


def fitted(table: Sequence[Tile], selection: Clause | None) -> tuple[Tile, ...]:
    """The tiles that a list can be read by; where the table has none, its own made smaller."""
    if selection is None:
        return tuple(table)
    m, n = grain_of(selection)
    smaller = (replace(t, block_q=math.gcd(t.block_q, m), block_k=math.gcd(t.block_k, n)) for t in table)
    if skipped(selection) is not None:
        smaller = (replace(t, block_q=m, block_k=n) for t in table)
    return tuple(t for t in table if fits(t, selection)) or tuple(dict.fromkeys(smaller))


def grain_of(selection: Clause) -> tuple[int, int]:
    """Queries and keys of which a program takes a part, or where values are skipped all."""
    return skipped(selection) or (selection.count(0), selection.count(1))


def fits(tile: Tile, selection: Clause) -> bool:
    if (grain := skipped(selection)) is not None:
        return (tile.block_q, tile.block_k) == grain
    return selection.count(0) % tile.block_q == 0 and selection.count(1) % tile.block_k == 0


def constants(selection: Clause | None, tile: Tile, scope: Range, terms: bool) -> dict[str, Value]:
    """What the template must know. terms: scores are changed after the first scale, and are no powers of two."""
    if selection is None:
        return {"LISTED": False, "SKIPS": False}
    made: dict[str, Value] = {
        "LISTED": True, "LIST_ROWS": selection.count(0) // tile.block_q, "LIST_KEYS": selection.count(1) // tile.block_k,
        "LEADING": False, "LEFT_EDGE": False, "SKIPS": skipped(selection) is not None,
    }  # fmt: skip
    if skipped(selection) is not None:
        made |= {"SKIP": float(selection.number("skip")) * (1.0 if terms else LOG2E), "STATIC": False}
        if scope.inner_first:  # what is skipped hangs on the order: those before the range would come after those inside
            made |= {"PHASES": 1, "INNER_MASK": False}
    return made


def operand(selection: Clause | None) -> tuple[str, ...]:
    """The name of the map among the parameters of `attention`."""
    return () if selection is None else (pointer(str(selection.operand("operand")))[2:],)
