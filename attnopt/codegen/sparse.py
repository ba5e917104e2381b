"""Sparse attention as calls of plain kernels: choose tiles, compute from the list, correct.

    … pooled_blocks(64, 64) delta(64)   ->   … blocks(64, 64, operand=selected_tiles), and dense rows 0, 64, 128, … and the last

`kernels` are the specs that are computed, in any language; `run_sparse` puts their results together.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

from torch import Tensor

from attnopt.codegen import corrected, listed
from attnopt.codegen.listed import EACH, TILES, Run
from attnopt.ir.site import Refusal
from attnopt.ir.spec import AttentionSpec

CHOSEN = {TILES: "bool", EACH: "bool"}  # operands that no model has


def refuses(spec: AttentionSpec) -> Refusal | None:
    """None where the spec is more than one plain kernel, and this is how to compute it."""
    if spec.correction is not None:
        found = corrected.refuses(spec)
        own = listed.refuses(spec.with_(correction=None)) if spec.selection is not None else None
        return found or own
    return listed.refuses(spec)


def kernels(spec: AttentionSpec) -> tuple[AttentionSpec, ...]:
    """The specs of the kernels. Ask `refuses` first."""
    if spec.correction is None:
        return (listed.listed(spec) if listed.refuses(spec) is None else spec,)
    whole = corrected.dense(spec)
    own = kernels(spec.with_(correction=None))
    return (*own, corrected.every(whole, max(1, spec.correction.count(0))), corrected.last_rows(whole))


def run_sparse(run: Run, spec: AttentionSpec, q: Tensor, k: Tensor, v: Tensor, operands: Mapping[str, Tensor]) -> Tensor:
    """The output [B, H, Q, E] for q [B, H, Q, D], k [B, G, K, D], v [B, G', K, E]. run: computes a spec that `kernels` lists."""
    if spec.correction is not None:
        return corrected.run_corrected(partial(run_sparse, run), run, spec, q, k, v, operands)
    found: Tensor = (listed.run_listed if listed.refuses(spec) is None else _plain)(run, spec, q, k, v, operands)
    return found


def _plain(run: Run, spec: AttentionSpec, q: Tensor, k: Tensor, v: Tensor, operands: Mapping[str, Tensor]) -> Tensor:
    found: Tensor = run(spec, q, k, v, operands)
    return found
