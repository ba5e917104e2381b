"""Every method of attnopt's that makes attention smaller, at every strength that it offers, in all layers that it is offered to.

kinds_of(subject, host)  ->  Kind("eigen-attention", "threshold 0.9"), …          applied(host, kind)  ->  the rewritten host, shares
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from attnopt.analysis.evidence import Evidence
from attnopt.ir.block import Block, Projection
from attnopt.ir.site import Host, Refusal
from attnopt.passes import (
    Candidate,
    DropAttention,
    EigenAttention,
    GateNorm,
    KeyNormGroups,
    MeanPooling,
    Pass,
    PruneHeads,
    WeightedGroups,
)
from attnopt.passes.head_map import HeadMap
from attnopt.plan.memory.memory import Memory
from attnopt.plan.options.groups import Grouping

METHODS: tuple[tuple[str, Pass], ...] = (
    ("eigen-attention", EigenAttention()),
    ("mean-pooling", MeanPooling()),
    ("weighted-groups, not aligned", WeightedGroups(align=False)),
    ("weighted-groups", WeightedGroups()),
    ("key-norm-groups", KeyNormGroups()),
    ("prune-heads", PruneHeads()),
    ("gate-norm", GateNorm(per_head=True)),
)
SHRINKING = (
    "eigen-attention",
    "mean-pooling",
    "weighted-groups",
    "key-norm-groups",
    "prune-heads",
    "gate-norm",
    "drop-attention",
)


@dataclass(frozen=True)
class Kind:
    """One strength of one method, and its candidate for each group that it is offered to in one host."""

    method: str
    strength: str
    rewrite: Pass
    candidates: tuple[tuple[str, Candidate], ...]


@dataclass(frozen=True)
class Applied:
    """A copy after all candidates of a kind. weights, cache: shares of the original."""

    host: Host
    weights: float
    cache: float


def kinds_of(subject: Any, host: Host, quick: bool) -> Iterator[Kind]:
    seen = Evidence(host, subject.data(host), sites=Grouping(host).sites)
    for name, rewrite in METHODS[:2] if quick else METHODS:
        yield from offered(name, rewrite, host, seen)


def offered(name: str, rewrite: Pass, host: Host, evidence: Evidence | None) -> list[Kind]:
    found: dict[str, list[tuple[str, Candidate]]] = {}
    for group in Grouping(host).of(rewrite.per):
        proposed = rewrite.propose(group, evidence)
        for candidate in () if isinstance(proposed, Refusal) else proposed:
            if candidate.needs == "tuning":
                candidate = rewrite.tune(candidate, group, evidence)  # type: ignore[attr-defined]
            found.setdefault(candidate.kind, []).append((group.name, candidate))
    return [Kind(name, strength, rewrite, tuple(all_of)) for strength, all_of in found.items()]


def applied(host: Host, kind: Kind) -> Applied:
    made = host.copy()
    for name, candidate in kind.candidates:
        kind.rewrite.apply(candidate, next(g for g in Grouping(made).of(kind.rewrite.per) if g.name == name))
        made.finish()
    before = cache_numbers(host)
    return Applied(made, weights_of(made) / weights_of(host), cache_after(host, kind) / before if before else 1.0)


def weights_of(host: Host) -> float:
    return Memory(host.graph, (), ()).weights


def cache_numbers(host: Host) -> int:
    """Numbers that a token would leave in the caches of all layers."""
    return sum(sum(row_of(b, s) for s in "kv") for b in Grouping(host).blocks)


def row_of(block: Block, side: str) -> int:
    layer = block.part(side, Projection)
    return 0 if layer is None else layer.channels.numel()


def cache_after(host: Host, kind: Kind) -> int:
    """The same after a kind was applied everywhere."""
    removed = {name for _, c in kind.candidates for name in c.options.get("sites", ())}
    changed = dict(kind.candidates)
    total = 0
    for site, block in zip(Grouping(host).sites, Grouping(host).blocks, strict=True):
        held = {} if site.name not in changed else changed[site.name].arrays
        for side in "kv" if site.name not in removed else ():
            layer = block.part(side, Projection)
            found = None if layer is None else HeadMap.of(held.get(layer.node.name, {}), side)
            total += row_of(block, side) if found is None else math.prod((found.heads, found.width))
    return total


__all__ = ["METHODS", "SHRINKING", "Applied", "DropAttention", "Kind", "applied", "kinds_of", "offered"]
