"""From a spec to the tiles that it visits: the one interface of all selectors.

    select(spec, q, k, operands)   ->   Choice, equal to what ir/selections says of the spec's `selection` under its mask

Without a selection the choice is what the mask shows. A new selector is a file with `refuses`, `choose`, `tiling` and the like, and a
line here.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import ModuleType

from torch import Tensor

from attnopt.ir.reference import query_offset
from attnopt.ir.site import Refusal
from attnopt.ir.spec import AttentionSpec
from attnopt.selectors import block_topk, blocks, pooled_blocks
from attnopt.selectors.shown import shown_tiles
from attnopt.selectors.tiles import Choice, Tiles

SELECTORS: dict[str, ModuleType] = {"block_topk": block_topk, "pooled_blocks": pooled_blocks, "blocks": blocks}
TILE = (64, 64)  # where only the mask decides
UNREAD = ("qk_norm", "position", "pairing", "through")  # slots that change rows before they meet


def refusal(spec: AttentionSpec) -> Refusal | None:
    """None where the tiles of this spec can be chosen from q and k as they are given; else why not."""
    clause = spec.selection
    if clause is None:
        return None
    if clause.name not in SELECTORS:
        return Refusal(f"{clause} chooses single keys, or what a cache keeps: no tiles", clause)
    if spec.heads is not None and spec.heads.operand("map") is not None:
        return Refusal("query heads are mapped to key heads by a table", spec.heads)
    if (slot := next((s for s in spec.special if s in UNREAD), None)) is not None:
        return Refusal(f"{slot} changes queries and keys after tiles are chosen from them", spec)
    found: Refusal | None = SELECTORS[clause.name].refuses(spec, clause)
    return found


def select(spec: AttentionSpec, q: Tensor, k: Tensor, operands: Mapping[str, Tensor]) -> Choice:
    """The choice for q [B, H, Q, D] and k [B, G, K, D]; tiles that the mask hides are never chosen. Ask `refusal` first."""
    clause = spec.selection
    rows, keys = tiling(spec) if clause is None else SELECTORS[clause.name].looked_at(clause)
    shown = shown_tiles(spec, q, k, operands, rows, keys)
    if clause is None:
        return Choice(Tiles(rows, keys, shown.expand(q.shape[0], q.shape[1], -1, -1)))
    if clause.name == "blocks":
        return blocks.given(clause, q, shown, operands)
    made: Choice = SELECTORS[clause.name].choose(spec, clause, q, k, shown, query_offset(spec, q.shape[2], k.shape[2]))
    return made


def tiling(spec: AttentionSpec) -> tuple[int, int]:
    """Queries and keys of the tiles that `select` gives."""
    if spec.selection is None:
        return TILE
    rows, keys = SELECTORS[spec.selection.name].tiling(spec.selection)
    return rows, keys
