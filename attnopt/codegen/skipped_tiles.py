"""Tiles of a list whose values a kernel may skip: `late_tiles` of ir/selections, by whoever holds just the queries that skip together.

blocks(128, 64, operand=t, skip=20.0, skip_rows=64)   ->   64 queries x 64 keys
"""

from __future__ import annotations

import math

from attnopt.ir.clause import Clause


def skipped(selection: Clause | None) -> tuple[int, int] | None:
    """Queries that skip the values of a block of keys together, and the keys of the block; None where none are skipped."""
    if selection is None or selection.name != "blocks" or selection.number("skip") == math.inf:
        return None
    return selection.count("skip_rows") or selection.count(0), selection.count(1)
