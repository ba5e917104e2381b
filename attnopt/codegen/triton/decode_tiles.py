"""Tiles of the decode family: rows of a program and keys of a step, by the bytes of a row of the cache.

    decode_tiles("sm_90", spec, Form(128, 128))   ->   (Tile(16, 64, 4, 3), Tile(16, 32, 4, 2))

A step has to keep memory busy, not tensor cores: the smallest product (16 rows), and as many keys in flight as let two programs stand
on a processor. Rows of a program go up to 64 where so many share their keys; more of them read the keys again. The cost
model ranks them for a spec, measurements correct it (`ranking`).
"""

from __future__ import annotations

from dataclasses import replace

from attnopt.codegen.triton.decode_cache import side_of
from attnopt.codegen.triton.prefill import Form, from_rows
from attnopt.codegen.triton.ranking import Question, ranked
from attnopt.codegen.triton.tiles import ARCHITECTURES, Tile
from attnopt.ir.spec import AttentionSpec

Table = dict[int, tuple[Tile, ...]]

# By the bytes of the longest row of keys or values: 128 are 64 numbers of float16, or 256 of int4.
NVIDIA: Table = {128: (Tile(16, 128, 4, 3), Tile(16, 64, 4, 2), Tile(16, 32, 4, 2)), 256: (Tile(16, 64, 4, 3), Tile(16, 32, 4, 2)),
                 512: (Tile(16, 32, 4, 3), Tile(16, 32, 4, 2), Tile(16, 16, 4, 2)),
                 1024: (Tile(16, 16, 4, 2), Tile(16, 32, 8, 1), Tile(16, 16, 4, 1))}  # fmt: skip
# Half the keys where a processor has half the shared memory.
ADA: Table = {128: (Tile(16, 64, 4, 3), Tile(16, 64, 4, 2), Tile(16, 32, 4, 2)), 256: (Tile(16, 32, 4, 3), Tile(16, 32, 4, 2)),
              512: (Tile(16, 16, 4, 3), Tile(16, 32, 4, 2), Tile(16, 16, 4, 2)),
              1024: (Tile(16, 16, 4, 2), Tile(16, 16, 4, 1))}  # fmt: skip
AMD: Table = {128: (Tile(16, 128, 4, 1), Tile(16, 64, 4, 1), Tile(16, 32, 4, 1)), 256: (Tile(16, 64, 4, 1), Tile(16, 32, 4, 1)),
              512: (Tile(16, 32, 4, 1), Tile(16, 16, 4, 1)), 1024: (Tile(16, 16, 4, 1), Tile(16, 16, 8, 1))}  # fmt: skip
TABLES = {name: AMD if name.startswith("gfx") else ADA if name in ("sm_86", "sm_89") else NVIDIA for name in ARCHITECTURES}
MOST_ROWS = 64
INTERPRETED = Tile(16, 32, 1, 1)


def decode_tiles(architecture: str, spec: AttentionSpec, form: Form, block_q: int = 16) -> tuple[Tile, ...]:
    """The tiles to try, best first, with so many rows."""
    table = TABLES[architecture]
    longest = max(side_of(spec, form, side).row_bytes for side in "kv")
    fitting = tuple(replace(tile, block_q=block_q) for tile in table[next(b for b in sorted(table) if longest <= b)])
    return ranked(fitting, Question("decode", from_rows(spec), form.width, form.value_width, form.dtype, architecture))


def block_rows(rows: int) -> int:
    """Rows of a program where so many share their keys: all of them, if they are few."""
    return max(16, min(MOST_ROWS, 1 << (rows - 1).bit_length()))
