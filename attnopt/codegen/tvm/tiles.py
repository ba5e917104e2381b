"""Tiles of the family for many queries by vector width: the first is a judgement that holds on most machines, the rest are tried besides.

    tiles(named("haswell"), Form(64, 64))   ->   (Tile(block_q=24, block_k=64, keys=4, channels=4), …)

The accumulators of a tile stay in registers: keys (channels) x block_q floats, at most 1024 bytes, which is what TVM keeps on the
stack, and as many vectors as the machine has beside those of the other operand (16 of AVX-512's 32; 12 of AVX2's 16).
"""

from __future__ import annotations

from dataclasses import dataclass

from attnopt.codegen.prefill_form import Form
from attnopt.codegen.skipped_tiles import skipped
from attnopt.codegen.tvm.cpu import Cpu
from attnopt.ir.spec import AttentionSpec

MANY = 257  # queries from which on a tile that is not full does not count
ONE_VECTOR = (
    1.25  # as slow is a tile of one vector of queries, for each of them: 114 instead of 139 GFLOP/s where it was measured
)
WORTH = 0.85  # of the time of the usual tile: a kernel more is compiled for less
STACK = 1024  # bytes of a buffer up to which TVM does not take it from the heap


@dataclass(frozen=True)
class Tile:
    """Queries of an item, side by side in vectors; keys of a step; keys and channels of the output in registers at a time."""

    block_q: int
    block_k: int
    keys: int
    channels: int


BY_VECTOR = {
    64: ((64, 64, 4, 4), (64, 128, 4, 4), (48, 64, 4, 4), (32, 64, 8, 8), (32, 64, 4, 4), (16, 64, 8, 8)),
    32: ((24, 64, 4, 4), (16, 60, 6, 4), (24, 128, 4, 4), (16, 64, 4, 4), (8, 64, 8, 8)),
    16: ((12, 64, 4, 4), (8, 64, 8, 8), (12, 128, 4, 4), (4, 64, 8, 8)),
}  # bytes of a vector -> block_q, block_k, keys, channels
WIDE_REGISTERS = {16: ((16, 64, 4, 4), (24, 64, 4, 4), (12, 64, 4, 4))}  # NEON has 32 of them


def tiles(cpu: Cpu, form: Form) -> tuple[Tile, ...]:
    """The tiles to try, best first."""
    neon = cpu.vector_bytes == 16 and cpu.has("neon")
    return tuple(Tile(*sizes) for sizes in (WIDE_REGISTERS if neon else BY_VECTOR)[cpu.vector_bytes])


def fitting(table: tuple[Tile, ...], spec: AttentionSpec) -> tuple[Tile, ...]:
    """Those whose queries have one row of a list of blocks, where there are such: what the list says is then no part of the mask.

    Where values of tiles are skipped there is one, of as many queries and keys as are skipped together.
    """
    if spec.selection is None:
        return table
    if (grain := skipped(spec.selection)) is not None:
        rows, keys = grain
        first = table[0]  # as much stays in registers
        return (Tile(rows, keys, max(1, first.keys * first.block_q // rows), max(1, first.channels * first.block_q // rows)),)
    return tuple(tile for tile in table if spec.selection.count(0) % tile.block_q == 0) or table


def narrowed(table: tuple[Tile, ...], usual: Tile, queries: int, cpu: Cpu) -> Tile:
    """The usual tile, or a narrower one where few queries would leave much of it empty: what is empty is computed all the same."""
    if queries >= MANY:
        return usual

    def work(tile: Tile) -> float:
        lanes = max(1, -(-queries // tile.block_q)) * tile.block_q
        return lanes * (ONE_VECTOR if tile.block_q * 4 == cpu.vector_bytes else 1.0)

    best = min(table, key=work)
    return best if work(best) < WORTH * work(usual) else usual
