"""Keep past keys and values as int8, each token of each head with a scale and a zero point of its own.

    present = concat(past [B, H, P, D], new), attention(q, present, …)
        ->   codes = concat(past codes, codes of new), scales and zeros alike; attention(q, (codes + 128 + zeros) * scales, …)

    scale = (max - min) / 255      zero = round(min / scale)      code = round(x / scale) - zero - 128      over the D channels of a row

It is what `cache(k=int8, v=int8)` of a spec means, to the last bit: every token is rounded once, when it comes. A second candidate
spreads the channels of keys first, y = (x - shift) / spread with the middle and half the range that calibration saw (`k_shift`,
`k_spread`): channels that are large by themselves then take no levels from the others.

What a caller passes on changes: int8 codes with scales and zeros where a tensor was. So it is offered only for caches that come and go
as tensors of their own. A row of D channels takes D + 8 bytes.

Source of the static shift and spread: "WKVQuant"; of the quantiser: the one family that all cache methods share.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from attnopt.ir.block import CacheUpdate
from attnopt.ir.clause import Clause
from attnopt.ir.dims import Shape
from attnopt.ir.graph import Graph, Value
from attnopt.ir.packing import pack, row_bytes
from attnopt.ir.site import Builder, Refusal, Site
from attnopt.passes.candidate import Candidate, Evidence, Group, Per

SIDES = {"k": "keys", "v": "values"}
WORDS = ("int8", "scales", "zeros")
FLOATS = ("float32", "float16", "bfloat16")
LEVELS, MIDDLE = 255.0, 128.0
ROW = Clause("cache", (), (("k", "int8"), ("v", "int8")))  # how each row is packed, balanced or not


@dataclass(frozen=True)
class Int8Cache:
    """Keep past keys and values as int8, each token of each head with a scale and a zero point of its own."""

    name: str = "int8-cache"
    exact: bool = False
    per: Per = "model"

    def propose(self, group: Group, evidence: Evidence | None) -> list[Candidate] | Refusal:
        found = list(slots(group))
        refused = next((slot for slot in found if isinstance(slot, Refusal)), None)
        held = [slot for slot in found if isinstance(slot, Slot)]
        if not held:
            return refused or Refusal("no attention reads a cache that comes in and goes out of the model")
        if (refusal := group.host.refuses_split([s.past for s in held], [s.present for s in held])) is not None:
            return refusal
        chosen = {"int8 values": [s for s in held if s.side == "v"], "int8": held}
        candidates = [self.candidate(group, kind, slots, {}) for kind, slots in chosen.items() if slots]
        balance = balanced(held, evidence)
        if balance:
            candidates.append(self.candidate(group, "int8 keys by channel", held, balance))
        return candidates

    def candidate(self, group: Group, kind: str, held: Sequence[Slot], balance: Mapping[str, list[list[float]]]) -> Candidate:
        sides = "keys and values" if any(s.side == "k" for s in held) else "values"
        before, after = (sum(s.bytes_per_token(packed) for s in held) for packed in (False, True))
        said = f"past {sides} of {len({s.site.name for s in held})} layers in int8"
        said += ", keys spread by channel" if balance else ""
        said += f": {before} -> {after} bytes per token; they come and go as codes, scales and zeros"
        return Candidate(
            self.name,
            False,
            said,
            "cache(k=int8, v=int8)",
            options={"caches": [[s.site.name, s.side] for s in held], "balance": dict(balance)},
            kind=kind,
            cached=self.cached(group, held, balance),
            changes=("cache", "structure"),
            needs="calibration" if balance else "nothing",
        )

    def cached(self, group: Group, held: Sequence[Slot], balance: Mapping[str, object]) -> dict[str, str]:
        """What the candidate makes of the cache of each site, in the words of a spec; of sites that share a cache each."""
        packed, made = {s.past for s in held}, {}
        for site, block in zip(group.sites, group.blocks, strict=True):
            updates = {side: block.part(side, CacheUpdate) for side in SIDES}
            options = {side: "int8" for side, update in updates.items() if update is not None and update.past.value in packed}
            if options and site.name in balance:
                options |= {"k_shift": "k_shift", "k_spread": "k_spread"}
            if options:
                made[site.name] = str(Clause("cache", (), tuple(options.items())))
        return made

    def apply(self, candidate: Candidate, group: Group) -> Group:
        """Edits the host of the group in place; give it a copy, and finish it."""
        host, wanted = group.host, {tuple(pair) for pair in candidate.options["caches"]}
        parts: dict[Value, list[tuple[str, Value]]] = {}
        whole: dict[Value, Value] = {}
        for slot in [s for s in slots(group) if isinstance(s, Slot) and (s.site.name, s.side) in wanted]:
            numbers = candidate.options["balance"].get(slot.site.name) if slot.side == "k" else None
            rows = Rows(None if numbers is None else torch.tensor(numbers, dtype=torch.float32))
            assert slot.present.producer is not None
            builder = host.builder(slot.present.producer)
            past = host.split_input(slot.past, slot.parts, rows.packed)
            made = [
                builder.emit("concat", old, new, shape=(*(slot.present.shape or ())[:3], width), dtype=new.dtype, axis=2)
                for old, new, width in zip(past, rows.write(builder, slot.new), slot.widths, strict=True)
            ]
            parts[slot.present] = list(zip(WORDS, made, strict=True))
            whole[slot.present] = rows.read(builder, made, slot.present.dtype)
        host.split_outputs(parts)
        for old, new in whole.items():
            host.replace(old, new)
        return group


@dataclass(frozen=True, eq=False)
class Slot:
    """The keys (k) or values (v) of one attention: past comes in, past and new go out, as [B, H, length, D]."""

    site: Site
    side: str
    past: Value
    new: Value
    present: Value

    @property
    def heads(self) -> int:
        return int(self.past.shape[1])  # type: ignore[index, arg-type]

    @property
    def widths(self) -> tuple[int, int, int]:
        return int(self.past.shape[3]), 1, 1  # type: ignore[index, arg-type]

    @property
    def parts(self) -> list[tuple[str, Shape, str]]:
        lead = (self.past.shape or ())[:3]
        return [(w, (*lead, width), "float32" if i else "int8") for i, (w, width) in enumerate(zip(WORDS, self.widths, strict=True))]

    def bytes_per_token(self, packed: bool) -> int:
        width = {"float32": 4}.get(self.past.dtype, 2)
        return int(self.heads * row_bytes(ROW if packed else None, self.side, self.widths[0], width))


def slots(group: Group) -> Iterator[Slot | Refusal]:
    """The caches of the sites, each once: what is shared is rounded once."""
    seen: set[Value] = set()
    for site, block in zip(group.sites, group.blocks, strict=True):
        for side in SIDES:
            update = block.part(side, CacheUpdate)
            if update is not None and update.past.value not in seen:
                seen.add(update.past.value)
                yield slot(group.host.graph, site, side, update)


def slot(graph: Graph, site: Site, side: str, update: CacheUpdate) -> Slot | Refusal:
    past, present, what = update.past.value, update.present, SIDES[side]
    if update.kind != "concat":
        return Refusal(f"{what} are written into places of a cache of fixed size", site.name)
    if not any(past is v for v in graph.inputs) or present is None or present.producer is None:
        return Refusal(f"past {what} do not come in as they go out", site.name)
    if present.producer.op != "concat" or len(past.users) != 1 or past.handle is None or present.handle is None:
        return Refusal(f"only a window of the {what} goes out, or another node reads the past ones", site.name)
    width, shape = site.axes["d" if side == "k" else "e"], past.shape or ()
    if len(shape) != 4 or update.axis != 2 or update.past.layout[-1] != width or not all(isinstance(d, int) for d in shape[1::2]):
        return Refusal(f"past {what} {past!r} are not [batch, heads, length, channels]", site.name)
    if past.dtype not in FLOATS:
        return Refusal(f"past {what} are {past.dtype} already", site.name)
    return Slot(site, side, past, update.new, present)


def balanced(held: Sequence[Slot], evidence: Evidence | None) -> dict[str, list[list[float]]]:
    """By site: shift and spread [H * D] of the channels of keys, from their smallest and largest value in calibration."""
    found = {}
    for one in [s for s in held if s.side == "k"]:
        seen = None if evidence is None else evidence.attention(one.site)
        if seen is None:
            return {}
        width, repeats = one.widths[0], max(1, seen.k.low.numel() // (one.heads * one.widths[0]))
        low, high = (x.reshape(-1, width)[::repeats].flatten() for x in (seen.k.low, seen.k.high))
        spread = ((high - low) / 2).clamp(min=1e-6)
        found[one.site.name] = [((high + low) / 2).tolist(), spread.tolist()]
    return found


@dataclass(frozen=True)
class Rows:
    """How rows [B, H, L, D] become codes, scales and zeros, on tensors and as nodes. balance: shift and spread [2, H * D], or None."""

    balance: Tensor | None = None

    def constants(self, width: int) -> list[Tensor]:
        """shift and spread, [1, H, 1, D]."""
        assert self.balance is not None
        return [x.reshape(1, -1, 1, width) for x in self.balance]

    def packed(self, x: Tensor) -> list[Tensor]:
        """What `write` computes: codes int8 [B, H, L, D], scales and zeros [B, H, L, 1]."""
        x = x.float()
        if self.balance is not None:
            shift, spread = self.constants(x.shape[-1])
            x = (x - shift) / spread
        held = pack(x, ROW, "k")
        assert held.scales is not None and held.zeros is not None
        return [held.codes, held.scales, held.zeros]

    def write(self, builder: Builder, x: Value) -> list[Value]:
        nodes = Nodes(builder, x.shape or ())
        x = nodes.cast(x, "float32")
        if self.balance is not None:
            shift, spread = (builder.constant(c, "float32") for c in self.constants(int(nodes.shape[-1])))  # type: ignore[arg-type]
            x = nodes.binary("div", nodes.binary("sub", x, shift), spread)
        low, high = nodes.extreme("reduce_min", x), nodes.extreme("reduce_max", x)
        scale = nodes.binary("div", nodes.binary("sub", high, low), nodes.number(LEVELS))
        flat = nodes.binary("eq", scale, nodes.number(0.0), "bool")
        scale = builder.emit("where", flat, nodes.number(1.0), scale, shape=scale.shape or (), dtype="float32")
        zero = nodes.unary("round", nodes.binary("div", low, scale))
        code = nodes.binary("sub", nodes.unary("round", nodes.binary("div", x, scale)), zero)
        code = nodes.binary("minimum", nodes.binary("maximum", code, nodes.number(0.0)), nodes.number(LEVELS))
        return [nodes.cast(nodes.binary("sub", code, nodes.number(MIDDLE)), "int8"), scale, zero]

    def read(self, builder: Builder, parts: Sequence[Value], dtype: str) -> Value:
        codes, scales, zeros = parts
        nodes = Nodes(builder, codes.shape or ())
        whole = nodes.binary("add", nodes.cast(codes, "float32"), nodes.binary("add", zeros, nodes.number(MIDDLE)))
        x = nodes.binary("mul", whole, scales)
        if self.balance is not None:
            shift, spread = (builder.constant(c, "float32") for c in self.constants(int(nodes.shape[-1])))  # type: ignore[arg-type]
            x = nodes.binary("add", nodes.binary("mul", x, spread), shift)
        return nodes.cast(x, dtype)


@dataclass(frozen=True)
class Nodes:
    """Nodes on rows of one shape."""

    builder: Builder
    shape: Shape

    def number(self, value: float) -> Value:
        return self.builder.constant(value, "float32")

    def unary(self, op: str, x: Value) -> Value:
        return self.builder.emit(op, x, shape=x.shape or (), dtype=x.dtype)

    def cast(self, x: Value, dtype: str) -> Value:
        return x if x.dtype == dtype else self.builder.emit("cast", x, shape=x.shape or (), dtype=dtype)

    def binary(self, op: str, a: Value, b: Value, dtype: str = "float32") -> Value:
        wider = max(a.shape or (), b.shape or (), key=lambda s: (len(s), s[-1:] != (1,)))
        return self.builder.emit(op, a, b, shape=wider, dtype=dtype)

    def extreme(self, op: str, x: Value) -> Value:
        return self.builder.emit(op, x, shape=(*self.shape[:3], 1), dtype=x.dtype, axes=(3,), keepdims=True)
