"""A selection that data decides, as one that a kernel is given: chosen first, then computed from the list.

    softmax scale(s) causal pooled_blocks(64, 64, mass=0.98)
        ->   softmax scale(s) causal blocks(64, 64, operand=selected_tiles)     and selected_tiles bool [B, H, M, N] by a selector

Where single queries see less than their tile, the mask says so: `& load(selected_keys, b, h, row, k // n)`. A mask of positions that
is no band (dilated, by powers of two) is a list of tiles too, the same for all calls of one length; what of it is the same for all
pairs of a tile the kernel is not asked again. The kernel does not know who chose.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from attnopt.ir.clause import Clause
from attnopt.ir.expr import Expr, Index, Load, apply, conjunction, conjuncts, expand, indices
from attnopt.ir.expr import operands as loaded
from attnopt.ir.ranges import comparison
from attnopt.ir.site import Refusal
from attnopt.ir.spec import AttentionSpec
from attnopt.selectors.select import SELECTORS, refusal, select, tiling
from attnopt.selectors.shown import by_tiles, is_led
from attnopt.selectors.tiles import Choice, Tiles

TILES, EACH = "selected_tiles", "selected_keys"
Run = Callable[[AttentionSpec, Tensor, Tensor, Tensor, Mapping[str, Tensor]], Any]  # spec, q, k, v, operands


def refuses(spec: AttentionSpec) -> Refusal | None:
    """None where a list would leave out tiles that a kernel would visit without one, and a selector knows which."""
    clause = spec.selection
    if clause is None and all(is_led(part) or comparison(expand(part)) is not None for part in of_positions(spec)):
        return Refusal("no tile is left out but by bounds and data, which kernels know", spec)
    if clause is not None and clause.name == "blocks":
        return Refusal(f"{clause} is a list already", clause)
    return refusal(spec)


def of_positions(spec: AttentionSpec) -> tuple[Expr, ...]:
    """The parts of the mask that read no data."""
    return tuple(part for part in conjuncts(spec.mask) if not loaded(part))


def listed(spec: AttentionSpec) -> AttentionSpec:
    """What the kernel computes. Ask `refuses` first."""
    rows, keys = tiling(spec)
    told = () if spec.offset is not None else tuple(p for p in conjuncts(spec.mask) if by_tiles(p, rows, keys))
    mask = conjunction(*(p for p in conjuncts(spec.mask) if p not in told))
    if chooses_each(spec):
        mask = conjunction(
            *conjuncts(mask), Load(EACH, (Index("b"), Index("h"), Index("row"), apply("floordiv", Index("k"), keys)))
        )
    return spec.with_(mask=mask, selection=Clause("blocks", (rows, keys), (("operand", TILES), *skipping(spec.selection))))


def skipping(clause: Clause | None) -> tuple[tuple[str, Any], ...]:
    """What the kernel has to know of values that are skipped: the tiles are those of the selection."""
    if clause is None or clause.name != "pooled_blocks":
        return ()
    return tuple((key, value) for key, value in clause.options if key in ("skip", "skip_rows"))


def chooses_each(spec: AttentionSpec) -> bool:
    """Whether queries of one tile choose for themselves."""
    return spec.selection is not None and bool(SELECTORS[spec.selection.name].chooses_each(spec.selection))


def run_listed(run: Run, spec: AttentionSpec, q: Tensor, k: Tensor, v: Tensor, operands: Mapping[str, Tensor]) -> Any:
    """Choose, then let `run` compute `listed(spec)` with the choice among its operands; returns what `run` does."""
    choice = fixed(spec, q, k) if spec.selection is None else select(spec, q, k, operands)
    given = {**operands, TILES: choice.tiles.chosen}
    if choice.each is not None:
        given[EACH] = choice.each
    return run(listed(spec), q, k, v, given)


def fixed(spec: AttentionSpec, q: Tensor, k: Tensor) -> Choice:
    """The tiles of a mask of positions, which are found once for each length."""
    spec = spec.with_(mask=conjunction(*of_positions(spec)))
    found = tiles_of(spec, q.shape[1] if by_head(spec) else 1, q.shape[2], k.shape[2], str(q.device))
    return Choice(found)


def by_head(spec: AttentionSpec) -> bool:
    return bool(indices(spec.mask) & {"b", "h"})


@functools.lru_cache(maxsize=32)
def tiles_of(spec: AttentionSpec, heads: int, q_len: int, kv_len: int, device: str) -> Tiles:
    q, k = (torch.empty(1, heads, length, 0, device=device) for length in (q_len, kv_len))
    return select(spec, q, k, {}).tiles
