"""Candidates that keep caches in codes, as plain data: how each side of each site is kept, and what that is in bytes.

options = {"caches": [["layers.0", "k", {"rows": {"bits": 4, "group": 32, …}, "first": 0, "recent": 0}], …], "balance": {…}}
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from attnopt.ir.block import CacheUpdate
from attnopt.ir.graph import Node, Value
from attnopt.ir.site import Refusal
from attnopt.passes.candidate import Candidate, Evidence, Group, Needs
from attnopt.passes.edits.caches.basis import weights_turned
from attnopt.passes.edits.caches.slots import SIDES, Slot, slots
from attnopt.passes.edits.caches.state import Kept, clause, keep

Balance = Mapping[str, Sequence[Sequence[float]]]


def unfit(held: Sequence[Slot], form: Kept) -> Refusal | None:
    """Why some of these caches cannot be kept so."""
    for slot in held:
        if reason := form.rows.refusal(slot.width):
            return Refusal(f"{SIDES[slot.side]}: {reason}", slot.site.name)
    return None


def codes(
    group: Group,
    name: str,
    kind: str,
    held: Sequence[Slot],
    form: Kept | Callable[[Slot], Kept],
    *,
    balance: Balance | None = None,
    source: str = "",
    note: str = "",
    needs: Needs = "nothing",
    nodes: Sequence[Node] = (),
) -> Candidate:
    """The candidate that keeps these caches so. balance: by site, shift and spread of the channels of its keys.

    nodes: the layers that a basis is folded into.
    """
    forms = [form(slot) if callable(form) else form for slot in held]
    sides = " and ".join(what for side, what in SIDES.items() if any(s.side == side for s in held))
    before = sum(s.bytes_per_token for s in held)
    after = sum(s.heads * f.rows.bytes_per_row(s.width) for s, f in zip(held, forms, strict=True))
    cached = cached_by_site(group, {s.past: f for s, f in zip(held, with_balance(held, forms, balance or {}), strict=True)})
    words = " and ".join(dict.fromkeys(f.rows.storage for f in forms))
    said = f"past {sides} of {len({s.site.name for s in held})} layers in {words}"
    said += ", keys spread by channel" if balance else ""
    said += f", {note}" if note else ""
    said += f": {before} -> {after} bytes per token; they come and go as codes, scales and zeros"
    exact = {word: count for f in forms for word, count in f.exact}
    said += f", beside the {' and '.join(f'{word} {count}' for word, count in exact.items())} tokens exact" if exact else ""
    return Candidate(
        name,
        False,
        said,
        source or next(iter(cached.values())),
        tuple(nodes),
        options={
            "caches": [[s.site.name, s.side, f.plain()] for s, f in zip(held, forms, strict=True)],
            "balance": {site: [list(row) for row in rows] for site, rows in (balance or {}).items()},
        },
        kind=kind,
        cached=cached,
        changes=("cache", "structure", "weights") if nodes else ("cache", "structure"),
        needs="calibration" if balance else needs,
    )


def with_balance(held: Sequence[Slot], forms: Sequence[Kept], balance: Balance) -> list[Kept]:
    found = (balance.get(s.site.name) if s.side == "k" else None for s in held)
    return [Kept.of(form.plain(), rows) for form, rows in zip(forms, found, strict=True)]


def cached_by_site(group: Group, kept: Mapping[Value, Kept]) -> dict[str, str]:
    """What becomes of the cache of each site, in the words of a spec; of sites that share a cache each. kept: by the past."""
    made = {}
    for site, block in zip(group.sites, group.blocks, strict=True):
        updates = {side: block.part(side, CacheUpdate) for side in SIDES}
        found = {side: kept[u.past.value] for side, u in updates.items() if u is not None and u.past.value in kept}
        if found:
            made[site.name] = str(clause(found))
    return made


def forms_of(candidate: Candidate) -> dict[tuple[str, str], Kept]:
    """By site and side, how the cache is kept."""
    balance = candidate.options["balance"]
    return {
        (site, side): Kept.of(plain, balance.get(site) if side == "k" else None)
        for site, side, plain in candidate.options["caches"]
    }


def applied(candidate: Candidate, group: Group) -> Group:
    """Edits the host of the group in place."""
    forms, found = forms_of(candidate), slots(group)
    if isinstance(found, Refusal):
        return group
    folded: dict[str, list[str]] = {}
    for (site, side), form in forms.items():
        if form.rows.folded:
            folded.setdefault(site, []).append(side)
    weights_turned(group, folded).write(group.host)
    return keep(group, [(s, forms[s.site.name, s.side]) for s in found if (s.site.name, s.side) in forms])


def balanced(held: Sequence[Slot], evidence: Evidence | None) -> dict[str, list[list[float]]]:
    """By site: shift and spread [H * D] of the channels of keys, from their smallest and largest value in calibration."""
    found = {}
    for one in [s for s in held if s.side == "k"]:
        seen = None if evidence is None else evidence.attention(one.site)
        if seen is None:
            return {}
        repeats = max(1, seen.k.low.numel() // (one.heads * one.width))
        low, high = (x.reshape(-1, one.width)[::repeats].flatten() for x in (seen.k.low, seen.k.high))
        found[one.site.name] = [((high + low) / 2).tolist(), ((high - low) / 2).clamp(min=1e-6).tolist()]
    return found
