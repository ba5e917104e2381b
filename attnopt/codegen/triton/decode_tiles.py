"""Tiles of the decode family: rows of a program, keys of a step, by architecture and width.

    decode_tiles("sm_90", Form(128, 128))   ->   (Tile(16, 64, 4, 3), Tile(16, 32, 4, 2))

A step has to keep memory busy, not tensor cores: the smallest product (16 rows), and so many keys in flight that two programs fit on
a processor. The order is a judgement, to be replaced by measurements.
"""

from __future__ import annotations

from dataclasses import replace

from attnopt.codegen.triton.prefill import Form
from attnopt.codegen.triton.tiles import ARCHITECTURES, Tile

Table = dict[int, tuple[Tile, ...]]

# By the widest row of q, k or v: 64, 128, 256.
NVIDIA: Table = {64: (Tile(16, 128, 4, 3), Tile(16, 64, 4, 2)), 128: (Tile(16, 64, 4, 3), Tile(16, 32, 4, 2)),
                 256: (Tile(16, 32, 4, 3), Tile(16, 32, 4, 2), Tile(16, 16, 4, 1))}  # fmt: skip
AMD: Table = {64: (Tile(16, 128, 4, 1), Tile(16, 64, 4, 1)), 128: (Tile(16, 64, 4, 1), Tile(16, 32, 4, 1)),
              256: (Tile(16, 32, 4, 1), Tile(16, 16, 4, 1))}  # fmt: skip
SINGLE: Table = {64: (Tile(16, 64, 4, 2), Tile(16, 32, 4, 2)), 128: (Tile(16, 32, 4, 2), Tile(16, 16, 4, 1)),
                 256: (Tile(16, 16, 4, 2), Tile(16, 16, 4, 1))}  # fmt: skip
MOST_ROWS = 64


def decode_tiles(architecture: str, form: Form, block_q: int = 16) -> tuple[Tile, ...]:
    """The tiles to try, best first, with so many rows."""
    table = SINGLE if form.dtype == "float32" else NVIDIA if ARCHITECTURES[architecture].backend == "cuda" else AMD
    found = table[next(w for w in sorted(table) if max(form.width, form.value_width) <= w)]
    return tuple(replace(tile, block_q=block_q) for tile in found)


def block_rows(rows: int) -> int:
    """Rows of a program where so many share their keys: all of them, if they are few."""
    return max(16, min(MOST_ROWS, 1 << (rows - 1).bit_length()))
