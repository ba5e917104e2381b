"""Candidates that change the heads of a block: what they hold, and what they leave to compute and to keep."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from attnopt.ir.block import Block, CacheUpdate
from attnopt.passes.candidate import Candidate, Group
from attnopt.passes.edits.heads.changes import SIDES, HeadChanges, layer_of
from attnopt.passes.edits.heads.head_map import HeadMap
from attnopt.passes.edits.heads.site import sizes_after


def candidate_of(
    name: str,
    group: Group,
    changes: HeadChanges,
    what: str,
    kind: str,
    source: str,
    options: Mapping[str, Any],
    *,
    needs_data: bool = True,
) -> Candidate:
    """The candidate whose `apply` is `heads.writer.write` of these changes. options: from which its pass finds them again."""
    block = group.blocks[0]
    layers = {s: layer for b in group.blocks for s in SIDES if (layer := layer_of(b, s)) is not None}
    cached = {
        s: changes.side(s) or HeadMap.identity(*layers[s].channels.shape) for s in "kv" if block.part(s, CacheUpdate) is not None
    }
    return Candidate(
        name,
        False,
        what + ("" if len(group.sites) == 1 else f", in {len(group.sites)} blocks that share their weights"),
        source,
        nodes=tuple(dict.fromkeys(layer.node for b in group.blocks for s in SIDES if (layer := layer_of(b, s)) is not None)),
        options={"reads": list(changes.reads), **options},
        kind=kind,
        changes=("structure",),
        layers=sizes_of(group, changes),
        shapes={site.name: sizes_after(site, changes) for site in group.sites},
        rows={site.name: {s: (m.heads, m.width) for s, m in cached.items()} for site in group.sites} if cached else {},
        needs="calibration" if needs_data else "nothing",
        arrays=changes.arrays(block),
    )


def sizes_of(group: Group, changes: HeadChanges) -> dict[str, tuple[int, int]]:
    """(in, out) of each layer afterwards, by the name of its node; one layer may make several sides."""
    found: dict[str, tuple[int, int]] = {}
    for block in group.blocks:
        wide: dict[str, int] = {}
        for s in SIDES:
            layer, change = layer_of(block, s), changes.side(s)
            if layer is None:
                continue
            count = layer.channels.numel() if change is None else change.heads * change.width
            wide[layer.node.name] = wide.get(layer.node.name, 0) + count
            inside, outside = (int(x) for x in layer.size)  # type: ignore[arg-type]
            found[layer.node.name] = (wide[layer.node.name], outside) if layer.reads else (inside, wide[layer.node.name])
    return found


def shared_by(block: Block) -> int:
    """Query heads on each key head."""
    assert block.q is not None and block.k is not None
    return len(block.q.channels) // len(block.k.channels)
