"""What the report of a live model says beside that of any other: kernels of its layers, widths of its cache, what was left as it is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from attnopt.ir.site import Refusal
from attnopt.ir.spec import AttentionSpec
from attnopt.plan.live.converting import Live


def named(refusals: Sequence[Refusal]) -> tuple[Refusal, ...]:
    """Refusals with names in place of nodes, which hold the whole graph."""
    return tuple(Refusal(r.reason, r.node, r.reached, r.remedy) for r in refusals)


def lines(made: Live, planned: Mapping[str, AttentionSpec]) -> list[str]:
    """What the report says of the live model."""
    said = []
    for phase, at in (("prefill", 0), ("decode", 1)):
        names = [x.names[at] or "the model's own" for x in made.layers.values()]
        if names:
            counted = ", ".join(f"{name} in {names.count(name)} layers" for name in dict.fromkeys(names))
            said.append(f"live, {phase}: {counted}")
    kept = [of_widths(o) for o in options_of(made, "widths")]
    said += [f"live, cache: {what}, in {kept.count(what)} layers" for what in dict.fromkeys(kept)]
    said += [f"live, {path}: computes '{made.layers[path].spec}'" for path in planned if path in made.layers]
    by_reason: dict[str, list[str]] = {}
    for path, refusal in made.refusals.items():
        by_reason.setdefault(refusal.reason, []).append(path)
    return [
        *said,
        *(f"{paths[0]}" + f" and {len(paths) - 1} more" * (len(paths) > 1) + f": {why}" for why, paths in by_reason.items()),
    ]


def of_widths(o: Mapping[str, Any]) -> str:
    said = f"keys of {o['keys']} and values of {o['values']} channels, of {o['whole']}"
    said += ", keys lifted and turned whenever they are read" * ("turn" in o)
    reads = list(o.get("reads", ()))
    return said + (
        f"; {len(set(reads))} heads, read by {', '.join(str(reads.count(g)) for g in sorted(set(reads)))}" if reads else ""
    )


def options_of(made: Live, kind: str) -> list[Mapping[str, Any]]:
    return [change.options for change in made.changes if change.kind == kind]
