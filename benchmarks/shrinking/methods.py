"""Every method of attnopt's that makes attention smaller, at every strength that it offers, in all layers that it is offered to.

kinds_of(subject, host)  ->  Kind("eigen-attention", "threshold 0.9"), …          applied(host, kind)  ->  the rewritten host, shares
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from attnopt.analysis.evidence import Evidence
from attnopt.ir.block import Block, Projection
from attnopt.ir.site import Host, Refusal
from attnopt.passes import (
    Candidate,
    DropAttention,
    EigenAttention,
    GateNorm,
    Group,
    KeyNormGroups,
    LowRank,
    MeanPooling,
    Pass,
    PruneHeads,
    WeightedGroups,
)
from attnopt.passes.candidate import FITTED, Computes
from attnopt.passes.edits.heads.head_map import HeadMap
from attnopt.plan.memory.memory import Memory
from attnopt.plan.options.groups import Grouping

METHODS: tuple[tuple[str, Pass], ...] = (
    ("eigen-attention", EigenAttention()),
    ("mean-pooling", MeanPooling()),
    ("mean-pooling", MeanPooling(align=True)),
    ("weighted-groups, not aligned", WeightedGroups(align=False)),
    ("weighted-groups", WeightedGroups()),
    ("key-norm-groups", KeyNormGroups()),
    ("prune-heads", PruneHeads()),
    ("gate-norm", GateNorm(per_head=True)),
    ("low-rank", LowRank()),
)
SHRINKING = (
    "eigen-attention",
    "low-rank",
    "mean-pooling",
    "weighted-groups",
    "key-norm-groups",
    "prune-heads",
    "gate-norm",
    "drop-attention",
)
SMALLER = 0.6  # of the cache: where the source of eigen-attention gives its headline


@dataclass(frozen=True)
class Kind:
    """One strength of one method, and its candidate for each group that it is offered to in one host."""

    method: str
    strength: str
    rewrite: Pass
    candidates: tuple[tuple[str, Candidate], ...]


@dataclass(frozen=True)
class Applied:
    """A copy after all candidates of a kind. weights, cache: shares of the original. parameters; cache_bytes: of a token."""

    host: Host
    weights: float
    cache: float
    parameters: int
    cache_bytes: int


def kinds_of(subject: Any, host: Host, quick: bool, fits: bool = False) -> Iterator[Kind]:
    """fits: also those whose output projection is fitted."""
    seen = evidence_of(subject, host)
    for name, rewrite in METHODS[:2] if quick else METHODS:
        yield from offered(name, rewrite, host, seen, fits)
    if not quick:
        yield at_cache(SMALLER, host, seen)


def evidence_of(subject: Any, host: Host) -> Evidence:
    return Evidence(host, subject.data(host), sites=Grouping(host).sites)


def offered(name: str, rewrite: Pass, host: Host, evidence: Evidence | None, fits: bool = False) -> list[Kind]:
    found: dict[str, list[tuple[str, Candidate]]] = {}
    for group in Grouping(host).of(rewrite.per):
        proposed = rewrite.propose(group, evidence)
        for candidate in () if isinstance(proposed, Refusal) else proposed:
            if candidate.needs == "tuning" and not fits:
                continue
            if candidate.needs == "tuning":
                candidate = tuned(rewrite, candidate, group, evidence)
            elif candidate.nodes and not candidate.arrays and isinstance(rewrite, Computes) and evidence is not None:
                candidate = with_arrays(rewrite, candidate, group, evidence)
            found.setdefault(candidate.kind, []).append((group.name, candidate))
    return [Kind(name, strength, rewrite, tuple(all_of)) for strength, all_of in found.items()]


def tuned(rewrite: Any, candidate: Candidate, group: Group, evidence: Evidence | None) -> Candidate:
    """The candidate with all that was fitted for it."""
    found = rewrite.tune(candidate, group, evidence)
    if isinstance(found, Refusal):
        raise RuntimeError(f"{rewrite.name}, {candidate.kind}: {found}")
    return with_arrays(rewrite, found, group, evidence)


def with_arrays(rewrite: Any, candidate: Candidate, group: Group, evidence: Evidence | None) -> Candidate:
    held = rewrite.arrays(candidate, group, evidence)
    if isinstance(held, Refusal):
        raise RuntimeError(f"{rewrite.name}, {candidate.kind}: {held}")
    return replace(candidate, arrays=held)


def at_cache(share: float, host: Host, evidence: Evidence) -> Kind:
    """Eigen Attention at the largest threshold that leaves at most this share of the cache, ranks in steps of one."""
    low, high, best = 0.05, 1.0, None
    for _ in range(12):
        threshold = (low + high) / 2
        (kind, *_) = offered("eigen-attention", EigenAttention((threshold,), multiple=1), host, evidence) or [None]
        if kind is not None and cache_after(host, *changes_of(kind)) <= share * cache_numbers(host):
            low, best = threshold, kind
        else:
            high = threshold
    assert best is not None, "no threshold leaves so little"
    return replace(best, strength=f"cache at most {share:g}, {best.strength[:15]}")


def droppable(host: Host) -> Kind:
    """Without the attention of every layer that may go."""
    (kind,) = offered("drop-attention", DropAttention(), host, None)
    return kind


def dropped(losses: Mapping[str, float], host: Host, evidence: Evidence | None = None) -> Iterator[Kind]:
    """Without the 1, 2, … layers of which each alone loses least, up to half of them; with evidence also what follows them fitted."""
    kinds = offered("drop-attention", DropAttention(), host, evidence, fits=evidence is not None)
    for count in range(1, len(losses) // 2 + 1):
        for kind in kinds:
            ranked = sorted(kind.candidates, key=lambda pair: losses[pair[0]])
            strength = f"{count} of {len(losses)}" + FITTED * kind.strength.endswith(FITTED)
            yield replace(kind, strength=strength, candidates=tuple(ranked[:count]))


def layer_losses(subject: Any) -> dict[str, float]:
    """The loss without the attention of each layer alone, by its group."""
    kind = droppable(subject.torch)
    return {
        name: subject.loss(applied(subject.torch, replace(kind, candidates=((name, candidate),))).host.runner())[0].mean
        for name, candidate in kind.candidates
    }


def applied(host: Host, kind: Kind) -> Applied:
    made = host.copy()
    for name, candidate in kind.candidates:
        kind.rewrite.apply(candidate, next(g for g in Grouping(made).of(kind.rewrite.per) if g.name == name))
        made.finish()
    return sized(host, made, *changes_of(kind))


def changes_of(kind: Kind) -> tuple[set[str], dict[str, Any]]:
    """(sites that go, arrays of all candidates by node)."""
    removed = {name for _, c in kind.candidates for name in c.options.get("sites", ())}
    return removed, {node: held for _, c in kind.candidates for node, held in c.arrays.items()}


def sized(host: Host, made: Host, removed: Collection[str], arrays: Mapping[str, Any]) -> Applied:
    before, after = cache_numbers(host), cache_after(host, removed, arrays)
    weights = weights_of(made) / weights_of(host)
    return Applied(made, weights, after / before if before else 1.0, parameters_of(made), 4 * after)


def weights_of(host: Host) -> float:
    return Memory(host.graph, (), ()).weights


def parameters_of(host: Host) -> int:
    held = {v for n in host.graph.nodes for v in n.inputs if v is not None and v.is_constant and v.handle is not None}
    return sum(math.prod(v.shape or ()) for v in held)  # type: ignore[arg-type]


def cache_numbers(host: Host) -> int:
    """Numbers that a token would leave in the caches of all layers."""
    return sum(sum(row_of(b, s) for s in "kv") for b in Grouping(host).blocks)


def row_of(block: Block, side: str) -> int:
    layer = block.part(side, Projection)
    return 0 if layer is None else layer.channels.numel()


def cache_after(host: Host, removed: Collection[str], arrays: Mapping[str, Any]) -> int:
    """The same after sites went and the heads of others changed."""
    grouping, total = Grouping(host), 0
    for site, block in zip(grouping.sites, grouping.blocks, strict=True):
        for side in "kv" if site.name not in removed else ():
            layer = block.part(side, Projection)
            found = None if layer is None else HeadMap.of(arrays.get(layer.node.name, {}), side)
            total += row_of(block, side) if found is None else found.heads * found.width
    return total
