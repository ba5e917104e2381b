"""How the decode family cuts its work: rows and keys whose sums stand in registers, and keys of a block.

    tile_for(named("sapphirerapids"), form, rows=4)   ->   DecodeTile(rows=4, keys=4, block=256, lanes=16)

Sums of rows x keys fill half of the registers (half of 32 with AVX-512, of 16 without); the other half holds what is multiplied.

Keys of a block: 64 and 128 rescale more often, which shows where a cache is near, for int8 more than for float32; 512 gains little more
and leaves fewer splits to threads. A float32 cache that is not near is read as fast as torch sums it, so no tile makes it faster.
"""

from __future__ import annotations

from dataclasses import dataclass

from attnopt.codegen.tvm.cpu import Cpu

BLOCK = 256  # each block is one more rescaling of sums
WINDOWED = 128  # where a mask cuts the keys on both sides, and of the blocks at its ends much is hidden
MOST_ROWS = 8


@dataclass(frozen=True)
class DecodeTile:
    """rows: of queries that are multiplied at once. keys: at once with them. block: keys between two rescalings.

    lanes: float32 of a vector.
    """

    rows: int
    keys: int
    block: int = BLOCK
    lanes: int = 16

    @property
    def sums(self) -> int:
        """Vectors of sums at once."""
        return self.rows * self.keys


def decode_tile(cpu: Cpu, rows: int, windowed: bool = False) -> DecodeTile:
    """The tile for so many rows that share their keys; windowed: a mask says which key is the first that they see."""
    lanes = cpu.vector_bytes // 4
    sums = 16 if cpu.vector_bytes == 64 or cpu.architecture == "aarch64" else 8
    held = min(1 << (rows - 1).bit_length(), MOST_ROWS, sums)
    return DecodeTile(held, sums // held, WINDOWED if windowed else BLOCK, lanes)
