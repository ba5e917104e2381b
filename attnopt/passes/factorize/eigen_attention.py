"""Compute attention in the few directions that keys, queries and values use.

    q = x Wq, k = x Wk    ->   q = x (Wq U), k = x (Wk U)          U [D, r] of each head, no rotation between; the scale stays d^-1/2
    q = x Wq, k = x Wk    ->   k = (x (Wk U)) U', then turned      with rotation: one U for all key heads of a layer, queries as they are
    v = x Wv, o           ->   v = x (Wv V), (V' o)                V [E, r] of each value head, folded into its rows of o

U are the first right singular vectors of a head's keys and queries stacked (of keys alone before a rotation), V those of its values.
A rank per layer, shared by its heads:  r = max over heads of #{j: (s_1 + … + s_j) / sum s < threshold} + 1, s the singular values, not
squared. The authors' code leaves out the + 1 and so keeps less than the threshold asks for. Caches hold r numbers for each key and each
value; rank = width is the identity. Where turned keys are cached, in the graph or by the host beside it, their rank pays in memory alone:
they are lifted and turned at each call, and without a cache they are left as they are; so are keys that are normalised by head, as no
basis passes through a norm.

The authors lower the threshold layer by layer until the layer's error passes a bound. Here every threshold is an offer, its loss is
measured, and the planner takes one for each layer. Ranks are rounded up to `multiple`, in which kernels compute.

Source: "Eigen Attention: Attention in Low-Rank Space for KV Cache Compression".
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from attnopt.errors import OutOfRange
from attnopt.ir.block import Block, HeadNorm, Rotary
from attnopt.ir.site import Refusal
from attnopt.passes.candidate import Candidate, Evidence, Group, Per
from attnopt.passes.edits.heads.candidates import candidate_of, shared_by
from attnopt.passes.edits.heads.changes import HeadChanges, kept_narrow, refuses_change, refuses_late_turn
from attnopt.passes.edits.heads.head_map import HeadMap
from attnopt.passes.edits.heads.head_pass import HeadPass, with_fitted
from attnopt.passes.edits.heads.statistics import HeadMoments, moments

SOURCE = "Eigen Attention: Attention in Low-Rank Space for KV Cache Compression"

NO_DATA = Refusal("its bases are found on calibration data")


@dataclass(frozen=True)
class EigenAttention(HeadPass):
    """Compute attention in the few directions that keys, queries and values use.

    thresholds: of the singular values' sum, in (0, 1]. multiple: ranks are rounded up to one.
    """

    thresholds: tuple[float, ...] = (0.98, 0.95, 0.9, 0.8, 0.7)
    multiple: int = 8
    name: str = "eigen-attention"
    exact: bool = False
    per: Per = "block"

    def __post_init__(self) -> None:
        if any(not 0 < t <= 1 for t in self.thresholds) or self.multiple < 1:
            raise OutOfRange(
                "thresholds of eigen-attention are in (0, 1], its multiple at least 1", f"{self.thresholds}, {self.multiple}"
            )

    def propose(self, group: Group, evidence: Evidence | None) -> list[Candidate] | Refusal:
        if evidence is None:
            return NO_DATA
        fixed = any(isinstance(step, HeadNorm) for b in group.blocks for side in "qk" for step in b.streams.get(side, ()))
        refusal = refuses_change(group, "vo" if fixed else "qkvo", norms="a basis of fewer directions")
        if refusal is not None:
            return refusal
        seen = moments(group, evidence)
        if isinstance(seen, Refusal):
            return seen
        block, late = group.blocks[0], refuses_late_turn(group)
        turns = block.part("k", Rotary) is not None
        keys, values = spectra(seen, turns, shared_by(block))
        made: dict[tuple[int, int], Candidate] = {}
        for threshold in self.thresholds:
            k, v = (self.rank(s, threshold) for s, _ in (keys, values))
            width, wide = len(keys[0][0]), len(values[0][0])
            of_keys = k if not fixed and (not turns or (late is None and kept_narrow(group))) else width
            for rank in dict.fromkeys(((of_keys, v), (width, v))):
                if rank not in made and rank != (width, wide):
                    changes = eigen(block, keys[1], values[1], *rank)
                    what = f"keys in {rank[0]} of {width} directions, values in {rank[1]} of {wide}"
                    kind = f"threshold {threshold:g}" + " values" * (rank[0] == width and of_keys < width)
                    made[rank] = candidate_of(self.name, group, changes, what, kind, SOURCE, {"ranks": list(rank)})
        return with_fitted(made.values(), group, evidence) or Refusal(
            f"heads use all of their directions at {max(self.thresholds):g}", group.name
        )

    def rank(self, singular: Tensor, threshold: float) -> int:
        """singular [H, D], each row descending."""
        shares = singular.cumsum(-1) / singular.sum(-1, keepdim=True).clamp(min=1e-30)
        needed = int((shares < threshold - 1e-12).sum(-1).max()) + 1
        width = singular.shape[-1]
        return min(width, -(-min(needed, width) // self.multiple) * self.multiple)

    def changes(self, options: Mapping[str, Any], group: Group, evidence: Evidence | None) -> HeadChanges | Refusal:
        if evidence is None:
            return NO_DATA
        block, seen = group.blocks[0], moments(group, evidence)
        if isinstance(seen, Refusal):
            return seen
        keys, values = spectra(seen, block.part("k", Rotary) is not None, shared_by(block))
        return eigen(block, keys[1], values[1], *options["ranks"])


def spectra(seen: HeadMoments, turns: bool, queries: int) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """(singular values [G, D], bases [G, D, D]) of keys, with their queries where nothing turns between, and of values."""
    keys = seen.of_keys
    keys = keys.sum(0, keepdim=True).expand_as(keys) if turns else keys + seen.queries.unflatten(0, (-1, queries)).sum(1)
    return decomposed(keys), decomposed(seen.of_values)


def decomposed(gram: Tensor) -> tuple[Tensor, Tensor]:
    energy, basis = torch.linalg.eigh(gram)
    return energy.flip(-1).clamp(min=0).sqrt(), basis.flip(-1)


def eigen(block: Block, keys: Tensor, values: Tensor, k: int, v: int) -> HeadChanges:
    """keys, values: bases [G, D, D], of which the first k and v columns are kept; all of them change nothing but the basis."""
    width, wide = keys.shape[-1], values.shape[-1]
    if not (1 <= k <= width and 1 <= v <= wide):
        raise OutOfRange(f"ranks are from 1 to {width} for keys and to {wide} for values", f"{k}, {v}")
    repeats = shared_by(block)
    turns, normed = block.part("k", Rotary) is not None, any(block.part(side, HeadNorm) is not None for side in "qk")
    of_keys = None if (turns or normed) and k == width else HeadMap.of_bases(keys[..., :k])
    of_queries = None if turns or normed else HeadMap.of_bases(keys[..., :k].repeat_interleave(repeats, 0))
    of_values = HeadMap.of_bases(values[..., :v])
    of_output = HeadMap.of_bases(values[..., :v].repeat_interleave(repeats, 0))
    return HeadChanges(of_queries, of_keys, of_values, of_output, up=keys[..., :k].contiguous() if turns and k < width else None)
