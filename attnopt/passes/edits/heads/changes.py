"""What becomes of the heads of one block, and whether a block can be changed so.

    HeadChanges(q=…, k=…, v=…, o=…)     a map for each side that changes; None leaves it
    up [G, D, r]                        keys are r numbers until they are read: cached so, then times `up`, then turned
    reads (0, 0, 1, 2, …)               the key head of each query head, where groups are of different sizes

Written by `passes/edits/heads/writer.py`. As data of a candidate: arrays by the name of each projection's node.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from attnopt.ir.block import Block, CacheUpdate, HeadNorm, Joined, Projection, Rotary, Scale
from attnopt.ir.graph import LAYOUT
from attnopt.ir.layout import Group as Axes
from attnopt.ir.layout import Operand
from attnopt.ir.site import Refusal, Site
from attnopt.passes.candidate import Candidate, Group
from attnopt.passes.edits.caches.slots import Slot, slot
from attnopt.passes.edits.heads.head_map import HeadMap
from attnopt.passes.norm_nodes import refuses_norm
from attnopt.passes.rotary_nodes import counts_from, refuses_rotary

SIDES = ("q", "k", "v", "o")
WHAT = {"q": "queries", "k": "keys", "v": "values", "o": "the output"}
SPARSE, ROWS = 0.4, 64  # share of zeros from which on a layer counts as sparse (2 of 4 is the usual form), in so many of its rows
PLAIN = ("offset",)  # slots of a spec beside those of a plain softmax that a change of heads leaves alone


@dataclass(frozen=True, eq=False)
class HeadChanges:
    q: HeadMap | None = None
    k: HeadMap | None = None
    v: HeadMap | None = None
    o: HeadMap | None = None
    up: Tensor | None = None
    reads: tuple[int, ...] = ()

    def side(self, name: str) -> HeadMap | None:
        return getattr(self, name)  # type: ignore[no-any-return]

    def arrays(self, block: Block) -> dict[str, dict[str, Tensor]]:
        """As a candidate holds them, by the name of the node that has the weights."""
        found: dict[str, dict[str, Tensor]] = {}
        for name in SIDES:
            layer, change = layer_of(block, name), self.side(name)
            if layer is not None and change is not None:
                found.setdefault(layer.node.name, {}).update(change.plain(name))
        if self.up is not None and block.k is not None:
            found.setdefault(block.k.node.name, {})["k up"] = self.up
        return found

    @classmethod
    def of(cls, candidate: Candidate, block: Block) -> HeadChanges:
        """What a candidate holds; one that came from a file has no arrays (see `head_pass`)."""
        arrays = candidate.arrays
        held = {name: arrays.get(layer.node.name, {}) for name in SIDES if (layer := layer_of(block, name)) is not None}
        maps = {name: HeadMap.of(kept, name) for name, kept in held.items()}
        return cls(**maps, up=held.get("k", {}).get("k up"), reads=tuple(candidate.options["reads"]))


def layer_of(block: Block, side: str) -> Projection | None:
    return block.o if side == "o" else block.part(side, Projection)


def refuses_change(group: Group, sides: str = "qkvo", norms: str = "a change of basis") -> Refusal | None:
    """Why the heads of a group of blocks cannot be changed on these sides; None where they can.

    norms: what of the change does not pass through a norm of each head; "" where all does.
    """
    own = {layer.node for b in group.blocks for s in SIDES if (layer := layer_of(b, s)) is not None}
    if group.attend is None:
        return Refusal("nothing here writes an attention", group.name)
    for site, block in zip(group.sites, group.blocks, strict=True):
        found = unfit_site(site, block) or group.attend.refuses(site)
        for side in sides:
            found = found or unfit_side(group, site, block, side, own, norms)
        if found is not None:
            return found
    return None


def unfit_site(site: Site, block: Block) -> Refusal | None:
    if site.weights_used is not None:
        return Refusal("the attention weights themselves are read", site.weights_used)
    special = [slot for slot in site.spec.special if slot not in PLAIN]
    if special or site.spec.scale is None or site.spec.normalizer.name != "softmax":
        return Refusal(f"its {special[0] if special else 'score'} is tied to the heads as they are", site.name)
    if site.spec.heads is None or site.spec.width is None or site.spec.heads.operand("map") is not None:
        return Refusal("its numbers of heads and channels are not known, or heads are mapped by a table", site.name)
    if block.o is None or any(block.part(s, Projection) is None for s in "qkv"):
        return next(iter(block.missing), Refusal("its projections are not all known", site.name))
    heads = (*site.axes["g"], *site.axes["r"])
    held = () if site.tensor_form is None else site.tensor_form.operands.values()
    if any(o.axes & set(heads) and not holds(o, heads) for o in (*site.operands.values(), *held)):
        return Refusal("a bias or mask has some of the axes of its heads only", site.name)
    below = block.o.input
    while below is not site.output.value and below.producer is not None and below.producer.op in LAYOUT:
        below = below.producer.inputs[0]  # type: ignore[assignment]
    if below is not site.output.value:
        return Refusal("something stands between the attention and its output projection", below.producer)
    return None


def holds(operand: Operand, heads: Axes) -> bool:
    """Whether one dimension of an operand has these axes, next to each other."""
    return any(group[i : i + len(heads)] == heads for group in operand.layout for i in range(len(group)))


def unfit_side(group: Group, site: Site, block: Block, side: str, own: set[Any], norms: str) -> Refusal | None:
    layer = layer_of(block, side)
    assert layer is not None
    if layer.down is not None or layer.weight.load is None or not layer.weight.dtype.startswith(("float", "bfloat")):
        return Refusal(f"{WHAT[side]} are not made by one layer with real weights", layer.node)
    if any(node not in own for node in layer.shared):
        return Refusal(f"another layer reads the weights that make {WHAT[side]}", layer.node)
    if (zeros := zero_share(layer)) > SPARSE:
        return Refusal(
            f"{zeros:.0%} of the weights that make {WHAT[side]} are zero, and sums of heads would fill them", layer.node
        )
    if side == "o":
        return Refusal("the output projection reads some heads only", layer.node) if layer.packed or layer.for_all_heads else None
    for step in block.streams[side][1:]:
        if isinstance(step, (Joined, Projection)):
            return Refusal(f"{WHAT[side]} are joined from several layers", site.name)
        if isinstance(step, HeadNorm) and (found := refuses_norm(step, WHAT[side], norms)) is not None:
            return found
        if isinstance(step, Rotary) and (found := refuses_rotary(step)) is not None:
            return found
        if not isinstance(step, (HeadNorm, Rotary, Scale, CacheUpdate)):
            return Refusal(f"{WHAT[side]} are changed by {step}", site.name)
    lead = (layer.input.shape or ())[:-1]
    rows = site.size("q") if side == "q" else None
    if len(lead) == 1:  # [batch * length]
        held = slot_of(group, site, block, side)
        return held if isinstance(held, Refusal) else None
    if len(lead) != 2 or lead[0] != site.size("b") or (rows is not None and lead[1] != rows):
        return Refusal(f"{layer.input!r} is not [batch, length, channels]", layer.node)
    held = slot_of(group, site, block, side)
    return held if isinstance(held, Refusal) else None


def zero_share(layer: Projection) -> float:
    """Zeros among the weights of some rows, those left out that are zero as a whole."""
    held = layer.matrix().mT if layer.reads else layer.matrix()
    channels = layer.channels.flatten()
    rows = held[channels[:: max(1, len(channels) // ROWS)]]
    rows = rows[rows.bool().any(-1)]
    return float((rows == 0).double().mean()) if len(rows) else 0.0


def slot_of(group: Group, site: Site, block: Block, side: str) -> Slot | Refusal | None:
    """The cache of keys or values as one that may come and go in another form; None where there is none."""
    update = block.part(side, CacheUpdate)
    if update is None:
        return None
    if block.streams[side][-1] is not update:
        return Refusal(f"{WHAT[side]} are changed after they are cached", site.name)
    return slot(group.host.graph, site, side, update)


def kept_narrow(group: Group) -> bool:
    """Whether keys are kept from call to call, in caches of the graph or beside it, so that they may be kept in few channels."""
    return all(b.cache_k is not None or group.host.caches(s) for s, b in zip(group.sites, group.blocks, strict=True))


def refuses_late_turn(group: Group) -> Refusal | None:
    """Why keys cannot be turned when they are read, instead of before they are cached; None where they can, or where none turn."""
    for site, block in zip(group.sites, group.blocks, strict=True):
        turn, held = block.part("k", Rotary), slot_of(group, site, block, "k")
        if isinstance(held, Refusal):
            return held
        if turn is not None and held is not None and not counts_from(turn, (held.past.shape or ())[2]):
            return Refusal(
                "the positions of past keys are not counted from zero, so that they cannot be turned when read", site.name
            )
    return None


def past_of(change: HeadMap, turn: Rotary | None, late: bool) -> Any:
    """A function from past rows [B, H, P, D] as the model held them to those that it holds now."""

    def made(rows: Tensor) -> list[Tensor]:
        if late and turn is not None:
            from attnopt.ir.block_reference import turned

            back = turned(turn, rows.transpose(1, 2).float(), -torch.arange(rows.shape[2])[None])
            rows = (back / turn.scaling**2).transpose(1, 2).to(rows.dtype)
        return [change.past(rows)]

    return made
