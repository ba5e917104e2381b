"""A cache kept in codes as state of a decode graph: what comes in, what goes out, and what the attention reads in its place.

    present = concat(past, new), attention(q, present, …)
        ->   codes = concat(past codes, codes of new), scales and zeros alike
             first, recent = the first S and the last W tokens, exact      (places of a fixed size, where a method asks for them)
             attention(q, read(codes, scales, zeros) with first and recent in their places, …)

`recent` [B, H, W, D] ends with the newest token, `first` [B, H, S, D] begins with the first; places that no token has reached hold
zeros, which nothing reads. Every token has its codes from the step it comes at, for codes by token never change; so a token that
leaves `recent` is there. W + S exact tokens are held beside them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from attnopt.ir.block import Block, CacheUpdate
from attnopt.ir.clause import Clause
from attnopt.ir.dims import Dim, Shape, symbol
from attnopt.ir.expr import Index, apply
from attnopt.ir.graph import Value
from attnopt.ir.site import Builder, Site
from attnopt.passes.candidate import Group
from attnopt.passes.edits.caches.nodes import Nodes
from attnopt.passes.edits.caches.rows import Rows
from attnopt.passes.edits.caches.slots import Slot

EXACT = 16  # bits of a token that is kept as it is, in the words of a spec


@dataclass(frozen=True)
class Kept:
    """One side of a cache: rows in codes; the first and the recent tokens exact."""

    rows: Rows
    first: int = 0
    recent: int = 0

    def plain(self) -> dict[str, Any]:
        return {"rows": self.rows.plain(), "first": self.first, "recent": self.recent}

    @classmethod
    def of(cls, plain: Mapping[str, Any], balance: Sequence[Sequence[float]] | None = None) -> Kept:
        return cls(Rows.of(plain["rows"], balance), plain["first"], plain["recent"])

    @property
    def exact(self) -> list[tuple[str, int]]:
        """(word, tokens) of what is held exactly."""
        return [(word, count) for word, count in (("first", self.first), ("recent", self.recent)) if count]

    @property
    def words(self) -> tuple[str, ...]:
        return (*self.rows.words, *(word for word, _ in self.exact))

    def parts(self, slot: Slot) -> list[tuple[str, Shape, str]]:
        batch, heads, length, width = slot.past.shape  # type: ignore[misc]
        exact = [(word, (batch, heads, count, width), slot.past.dtype) for word, count in self.exact]
        return [*self.rows.parts((batch, heads, length), slot.width), *exact]

    def packed(self, x: Tensor) -> list[Tensor]:
        """What an exact past [B, H, P, D] is as state."""
        kept = self.rows.packed(x)
        x, length = self.rows.exact(x), x.shape[2]
        if self.first:
            kept.append(torch.nn.functional.pad(x[:, :, : self.first], (0, 0, 0, max(0, self.first - length))))
        if self.recent:
            kept.append(torch.nn.functional.pad(x[:, :, -self.recent :], (0, 0, max(0, self.recent - length), 0)))
        return kept

    def options(self, side: str) -> dict[str, Any]:
        """What it is of one side in the words of a spec's cache; group, clip, scales and recent are of both sides."""
        rows = self.rows
        found: dict[str, Any] = {side: rows.storage, "group": rows.group, "clip": rows.clip, "scales": rows.scales}
        if self.recent:
            found["recent"] = self.recent
        if self.first:
            found[f"{side}_bits"] = apply("where", apply("lt", Index("k"), self.first), EXACT, rows.bits)
        if rows.turned:
            found[f"{side}_basis"] = "hadamard"
        if rows.balance is not None:
            found |= {f"{side}_shift": f"{side}_shift", f"{side}_spread": f"{side}_spread"}
        return found


def clause(kept: Mapping[str, Kept]) -> Clause:
    """The cache clause of a site whose sides (k, v) are kept so. Raises ValueError where one clause cannot say both."""
    options: dict[str, Any] = {}
    for side, form in kept.items():
        for name, value in form.options(side).items():
            if options.setdefault(name, value) != value:
                raise ValueError(f"keys and values have different '{name}'")
    return Clause("cache", (), tuple(options.items()))


def keep(group: Group, chosen: Sequence[tuple[Slot, Kept]]) -> Group:
    """Let these caches come and go as they are kept. Edits the host of the group in place; give it a copy, and finish it.

    The attentions read what the codes stand for; the sites of the group that comes back say what they are, for kernels that read codes.
    """
    host = group.host
    parts: dict[Value, list[tuple[str, Value]]] = {}
    whole: dict[Value, Value] = {}
    for slot, kept in chosen:
        assert slot.present.producer is not None
        builder = host.builder(slot.present.producer)
        past = host.split_input(slot.past, kept.parts(slot), kept.packed)
        made = state(builder, slot, kept, past)
        parts[slot.present] = list(zip(kept.words, made, strict=True))
        whole[slot.present] = read(builder, slot, kept, made)
    host.split_outputs(parts)
    for old, new in whole.items():
        host.replace(old, new)
    forms = {slot.past: kept for slot, kept in chosen}
    held = {slot.past: [value for _, value in parts[slot.present]] for slot, _ in chosen}
    sites = [in_codes(s, b, forms, held) for s, b in zip(group.sites, group.blocks, strict=True)]
    return replace(group, sites=tuple(sites))


def in_codes(site: Site, block: Block, forms: Mapping[Value, Kept], held: Mapping[Value, Sequence[Value]]) -> Site:
    """The site on codes, scales, zero points and exact tokens, by the past that they were; as it is where its caches are not kept.

    What is folded into weights is no basis to the site: its queries and outputs are turned already.
    """
    updates = {side: block.part(side, CacheUpdate) for side in "kv"}
    found = {side: u.past.value for side, u in updates.items() if u is not None and u.past.value in forms}
    if not found:
        return site
    changed: dict[str, Value] = {}
    codes: dict[str, Value] = {}
    for side, past in found.items():
        changed[side], *rest = held[past]
        codes |= {f"{side}_{word}": value for word, value in zip(forms[past].words[1:], rest, strict=True)}
    kept = {side: forms[past] for side, past in found.items()}
    seen = {
        side: replace(form, rows=replace(form.rows, turned=form.rows.turned and not form.rows.folded))
        for side, form in kept.items()
    }
    return site.on_codes(clause(seen), changed, codes)


def state(builder: Builder, slot: Slot, kept: Kept, past: Sequence[Value]) -> list[Value]:
    """What goes out: past and new tokens in codes, then the exact ones."""
    n, length = Nodes(builder), slot.present.shape[2]  # type: ignore[index]
    new = n.cast(slot.new, slot.past.dtype)
    made = [n.joined([old, x], 2, length) for old, x in zip(past, kept.rows.write(builder, slot.new), strict=False)]
    exact = dict(zip((word for word, _ in kept.exact), past[len(made) :], strict=True))
    for word, count in kept.exact:
        made.append((with_new_first if word == "first" else with_new_recent)(n, exact[word], new, count, length))
    return made


def with_new_recent(n: Nodes, held: Value, new: Value, count: int, length: Dim) -> Value:
    """The last `count` of what is held and what is new."""
    together = n.joined([held, new], 2, longer(count, (new.shape or ())[2]))
    return n.cut(together, 2, -count, None, count)


def with_new_first(n: Nodes, held: Value, new: Value, count: int, length: Dim) -> Value:
    """Places that the past had not reached are filled from the new tokens."""
    past = n.sub(n.size(length), n.size((new.shape or ())[2]))  # [1]
    place = n.sub(n.places(count), past)
    last = n.sub(n.size((new.shape or ())[2]), 1)
    taken = n.taken(new, n.binary("minimum", n.binary("maximum", place, 0), last), 2)
    here = n.binary("lt", place, 0)
    return n.where(n.reshaped(here, 1, 1, count, 1), held, taken)


def read(builder: Builder, slot: Slot, kept: Kept, made: Sequence[Value]) -> Value:
    """What the attention reads, [B, H, T, D] in the type of the model."""
    n, length, dtype = Nodes(builder), slot.present.shape[2], slot.present.dtype  # type: ignore[index]
    whole = kept.rows.read(builder, made[:3], dtype)
    exact = dict(zip(kept.words[3:], made[3:], strict=True))
    if not exact:
        return whole
    place = n.places(length)
    if kept.first:
        taken = n.taken(exact["first"], n.binary("minimum", place, kept.first - 1), 2)
        whole = n.where(column(n, n.binary("lt", place, kept.first), length), n.cast(taken, dtype), whole)
    if kept.recent:
        place = n.add(n.sub(place, n.size(length)), kept.recent)
        taken = n.taken(exact["recent"], n.binary("maximum", place, 0), 2)
        whole = n.where(column(n, n.binary("ge", place, 0), length), n.cast(taken, dtype), whole)
    return whole


def column(n: Nodes, x: Value, length: Dim) -> Value:
    """[T] beside [B, H, T, D]."""
    return n.reshaped(x, 1, 1, length, 1)


def longer(count: int, more: Dim) -> Dim:
    return count + more if isinstance(more, int) else symbol(f"{count} + {more}")
