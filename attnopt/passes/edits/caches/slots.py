"""The caches of a decoding model that a pass may keep in another form: they come in and go out as tensors of their own.

present = concat(past [B, H, P, D], new [B, H, n, D]), attention(q, present, …)   ->   Slot(site, "k", past, new, present)
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from attnopt.ir.block import CacheUpdate
from attnopt.ir.graph import Graph, Value
from attnopt.ir.site import Refusal, Site
from attnopt.passes.candidate import Group

SIDES = {"k": "keys", "v": "values"}
FLOATS = ("float32", "float16", "bfloat16")


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
    def width(self) -> int:
        return int(self.past.shape[3])  # type: ignore[index, arg-type]

    @property
    def bytes_per_token(self) -> int:
        """As the model has it."""
        return self.heads * self.width * {"float32": 4}.get(self.past.dtype, 2)


def slots(group: Group) -> list[Slot] | Refusal:
    """The caches of the sites, each once: what is shared is rounded once. A refusal where there is none that can be changed."""
    found = list(caches(group))
    held = [slot for slot in found if isinstance(slot, Slot)]
    if not held:
        nothing = Refusal("no attention reads a cache that comes in and goes out of the model")
        return next((slot for slot in found if isinstance(slot, Refusal)), nothing)
    refused = group.host.refuses_split([s.past for s in held], [s.present for s in held])
    return held if refused is None else refused


def caches(group: Group) -> Iterator[Slot | Refusal]:
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
