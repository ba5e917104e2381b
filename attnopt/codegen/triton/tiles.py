"""Tile sizes by architecture and width: the table from which kernels are compiled, first choice first.

    tiles("sm_90", width=128, value_width=128, dtype="float16")   ->   (Tile(128, 128, 8, 2), Tile(128, 64, 8, 3), …)

Which of them fit is the compiler's to say (see compile); the order is a judgement from public kernels of the same shape, which the
cost model adapts to a spec and measurements correct (see ranking).
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Architecture:
    """backend, version and warp size are Triton's; shared_memory is what one program may use, in bytes."""

    backend: str
    version: int | str
    warp_size: int
    shared_memory: int


@dataclass(frozen=True)
class Tile:
    """Rows of queries of a program, keys of a step, warps of a program, and steps whose loads are in flight.

    persistent: as many programs as run at once, each of which takes items in turns. descriptors: the copy engine of Hopper and
    later reads blocks of rows. specialised: some warps only read, the others only calculate.
    """

    block_q: int
    block_k: int
    num_warps: int
    num_stages: int
    persistent: bool = False
    descriptors: bool = False
    specialised: bool = False

    @property
    def programs(self) -> int:
        """How many programs a multiprocessor has registers for: eight warps of 255, of which specialising adds four or more."""
        return 1 if self.specialised else max(1, 8 // self.num_warps)


ARCHITECTURES = {
    "sm_80": Architecture("cuda", 80, 32, 166912),
    "sm_86": Architecture("cuda", 86, 32, 101376),
    "sm_89": Architecture("cuda", 89, 32, 101376),
    "sm_90": Architecture("cuda", 90, 32, 232448),
    "sm_100": Architecture("cuda", 100, 32, 232448),
    "gfx942": Architecture("hip", "gfx942", 64, 65536),
    "gfx950": Architecture("hip", "gfx950", 64, 163840),
}

Table = dict[int, tuple[Tile, ...]]

# By the widest row of q, k or v that they are for: 64, 128, 256.
SMALL: Table = {64: (Tile(128, 64, 4, 3), Tile(64, 64, 4, 3), Tile(64, 32, 4, 3)),
                128: (Tile(128, 64, 8, 2), Tile(128, 32, 8, 3), Tile(64, 64, 4, 2), Tile(64, 32, 4, 2)),
                256: (Tile(64, 32, 8, 2), Tile(32, 32, 4, 1))}  # fmt: skip
AMPERE: Table = {64: (Tile(128, 64, 4, 3), Tile(64, 64, 4, 3), Tile(64, 32, 4, 3)),
                 128: (Tile(128, 64, 8, 3), Tile(128, 64, 8, 2), Tile(64, 64, 4, 2), Tile(64, 32, 4, 2)),
                 256: (Tile(64, 64, 8, 2), Tile(64, 32, 8, 2), Tile(32, 64, 4, 2))}  # fmt: skip
HOPPER: Table = {64: (Tile(128, 128, 8, 3), Tile(128, 64, 4, 3), Tile(64, 64, 4, 3), Tile(64, 32, 4, 2)),
                 128: (Tile(128, 128, 8, 2), Tile(128, 64, 8, 3), Tile(64, 64, 4, 3), Tile(64, 32, 4, 2)),
                 256: (Tile(128, 32, 8, 2), Tile(64, 64, 8, 2), Tile(64, 32, 8, 2))}  # fmt: skip
BLACKWELL: Table = {64: (Tile(128, 128, 8, 3), Tile(128, 64, 8, 3), Tile(64, 64, 4, 3), Tile(64, 32, 4, 2)),
                    128: (Tile(128, 64, 8, 3), Tile(64, 64, 4, 3), Tile(64, 32, 4, 2)),
                    256: (Tile(64, 64, 8, 2), Tile(64, 32, 8, 2))}  # fmt: skip
CDNA: Table = {64: (Tile(128, 64, 4, 1), Tile(64, 64, 4, 1)), 128: (Tile(128, 64, 4, 1), Tile(128, 32, 4, 1)),
               256: (Tile(64, 64, 4, 1), Tile(128, 32, 8, 1))}  # fmt: skip
# float32 takes twice the registers and the shared memory, on whatever machine. Tensor cores hold a whole query in the registers of
# each warp, split in three: rows of more than 128 channels do not fit, and are multiplied without them.
SINGLE: Table = {64: (Tile(64, 32, 4, 2), Tile(32, 32, 4, 2)),
                 128: (Tile(32, 32, 8, 2), Tile(16, 32, 4, 2), Tile(16, 32, 4, 1), Tile(16, 16, 4, 1)),
                 256: (Tile(32, 32, 8, 1), Tile(16, 32, 8, 1), Tile(32, 32, 16, 1), Tile(16, 32, 16, 1))}  # fmt: skip
SPLIT = 128  # channels up to which float32 is multiplied on tensor cores, as three products of tf32
TABLE = {"sm_80": AMPERE, "sm_86": SMALL, "sm_89": SMALL, "sm_90": HOPPER, "sm_100": BLACKWELL, "gfx942": CDNA,
         "gfx950": CDNA}  # fmt: skip

INTERPRETED = Tile(32, 32, 1, 1)


def tiles(architecture: str, width: int, value_width: int, dtype: str) -> tuple[Tile, ...]:
    """The tiles to try, best first."""
    table = SINGLE if dtype == "float32" else TABLE[architecture]
    return table[next(w for w in sorted(table) if max(width, value_width) <= w)]
