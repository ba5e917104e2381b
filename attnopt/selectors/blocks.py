"""blocks(m, n, operand=name): tiles that are given.

an operand [B | 1, H | 1, ceil(Q / m), ceil(K / n)], true where a tile is visited   ->   those of them that the mask shows
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from attnopt.errors import InputMismatch
from attnopt.ir.clause import Clause
from attnopt.ir.site import Refusal
from attnopt.ir.spec import AttentionSpec
from attnopt.selectors.tiles import Choice, Tiles


def refuses(spec: AttentionSpec, clause: Clause) -> Refusal | None:
    return None


def given(clause: Clause, q: Tensor, shown: Tensor, operands: Mapping[str, Tensor]) -> Choice:
    """shown: tiles of `tiling` that the mask shows. Raises InputMismatch where the operand is not of their shape."""
    name = clause.word("operand")
    if name not in operands:
        raise InputMismatch(f"the spec reads '{name}', which was not given", where=str(clause), next_move=f"Pass {name}=tensor.")
    tiles = operands[name].bool()
    if tiles.ndim != 4 or tiles.shape[2:] != shown.shape[2:]:
        raise InputMismatch(
            f"'{name}' is {list(tiles.shape)}", where=str(clause), next_move=f"Give [B, H, {shown.shape[2]}, {shown.shape[3]}]."
        )
    rows, keys = tiling(clause)
    return Choice(Tiles(rows, keys, (tiles & shown).expand(q.shape[0], q.shape[1], -1, -1)))


def looked_at(clause: Clause) -> tuple[int, int]:
    """Queries and keys of the tiles that it is shown."""
    return tiling(clause)


def tiling(clause: Clause) -> tuple[int, int]:
    """Queries and keys of a tile."""
    return clause.count(0), clause.count(1)


def chooses_each(clause: Clause) -> bool:
    """Whether queries of one tile choose for themselves."""
    return False
