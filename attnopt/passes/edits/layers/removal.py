"""Take attention sublayers out of a host, with their norms, projections and slots of the cache.

    y = x + o_proj(attention(norm(x), past))   ->   y = x

What decides which ones go stands in prune/; this is how they go.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from attnopt.ir.site import Host, Refusal
from attnopt.ir.sublayer import Sublayer, sublayer
from attnopt.passes.candidate import Group


def refuses_removal(host: Host, gone: Sequence[Sublayer]) -> Refusal | None:
    """Why the host cannot do without the slots of these sublayers' caches; None where it can."""
    return host.refuses_drop([v for s in gone for v in s.inputs], [v for s in gone for v in s.outputs])


def remove(group: Group, names: Collection[str]) -> None:
    """Edit the host of the group: the sublayers around the sites of these names go. Raises RuntimeError where the host refuses."""
    host = group.host
    found = [sublayer(host.graph, s, b) for s, b in zip(group.sites, group.blocks, strict=True) if s.name in names]
    gone = [s for s in found if isinstance(s, Sublayer)]
    if (refusal := refuses_removal(host, gone)) is not None:
        raise RuntimeError(f"{', '.join(sorted(names))} cannot go: {refusal.reason}")
    left = {s.ending.output: s.stream for s in gone}
    for old, new in left.items():  # what reads a sum reads what remains of it, through sums that go as well
        while new in left:
            new = left[new]
        host.replace(old, new)
    host.drop([v for s in gone for v in s.inputs], [v for s in gone for v in s.outputs])


def emptied(gone: Sequence[Sublayer]) -> Mapping[str, str]:
    """What their caches hold afterwards, as a candidate says it."""
    return {s.site.name: "" for s in gone if s.inputs}
