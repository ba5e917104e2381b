"""Rotate what a cache holds by the weights around it, so that no step of decoding turns a row.

    v = x W_v, y = o W_o                 ->   v H = x (W_v H), y = (o H)(H' W_o)          W_v, W_o of each head; o H = P (v H)
    q = x W_q, k = x W_k, no position    ->   q H, k H = x (W_q H), x (W_k H)             (q H)(k H)' = q k'

H is the normalised Hadamard matrix of a head's width, H H' = 1, so that no output changes before something is rounded. A rotation by
position between the layer and the product does not let H through: such keys are turned when they come.
Source: "AKVQ-VL: Attention-Aware KV Cache Adaptive 2-Bit Quantization for Vision-Language Models".
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from attnopt.ir.block import Block, CacheUpdate, Projection, Scale
from attnopt.ir.graph import Node
from attnopt.ir.site import Refusal, Site
from attnopt.ir.storage import hadamard
from attnopt.passes.candidate import Group
from attnopt.passes.rotation import Rotated, head_refusal, turn_heads, turn_outputs

KEEPS = ("scale", "softcap", "add", "mod")  # terms of a score that read nothing but the product of q and k


def basis_refusal(group: Group, name: str, side: str) -> Refusal | None:
    """Why the weights around a site cannot rotate what its cache of keys (k) or values (v) holds; None where they can."""
    site, block = around(group, name)
    update = block.part(side, CacheUpdate)
    if update is None:
        return Refusal("there is no cache on the way", name)
    others = [b for b in group.blocks if b is not block and holds(b, side, update)]
    if others:
        return Refusal("another attention reads the same cache", name)
    if (refusal := head_refusal(site, block, cached=True) if side == "v" else score_refusal(site, block)) is not None:
        return refusal
    layers = (block.v, block.o) if side == "v" else (block.q, block.k)
    width = next(p.channels.shape[1] for p in layers if p is not None)
    return Refusal(f"heads of {width} channels have no Hadamard matrix", name) if width & (width - 1) else None


def holds(block: Block, side: str, update: CacheUpdate) -> bool:
    other = block.part(side, CacheUpdate)
    return other is not None and other.past.value is update.past.value


def score_refusal(site: Site, block: Block) -> Refusal | None:
    """Why no matrix can be moved into the layers of queries and keys."""
    for name, layer in (("q", block.q), ("k", block.k)):
        between = [s for s in block.streams.get(name, ()) if not isinstance(s, (Projection, Scale, CacheUpdate))]
        if layer is None or between or len(block.projections(name)) != 1:
            return Refusal(f"something stands between the layer that makes {name} and the product", site.name)
        if layer.down is not None or layer.for_all_heads or layer.shared:
            return Refusal(f"{name} is made of latents, or shares its weights", site.name)
    spec = site.spec
    more = (spec.qk_norm, spec.position, spec.pairing, spec.through, spec.shared, spec.selection, spec.precision)
    scored = any(clause.name not in KEEPS for clause in spec.score)
    if scored or spec.plus or spec.normalizer.name != "softmax" or any(clause is not None for clause in more):
        return Refusal("the spec reads queries or keys otherwise than by their product", site.name)
    return None


def weights_turned(group: Group, sides: Mapping[str, Sequence[str]]) -> Rotated:
    """The layers around these sites with H in them, to be written into a host. sides: k, v or both, by site."""
    made = Rotated()
    for name, chosen in sides.items():
        _, block = around(group, name)
        for side in chosen:
            one, other = (block.v, block.o) if side == "v" else (block.q, block.k)
            assert one is not None and other is not None
            h: Tensor = hadamard(one.channels.shape[1]).double()
            if side == "v":
                turn_heads(made, one, other, h)
            else:
                turn_outputs(made, one, h)
                turn_outputs(made, other, h)
    return made


def turned_layers(group: Group, folds: Mapping[tuple[str, str], bool]) -> set[Node]:
    """The layers that hold H then. folds: by site and side."""
    found: set[Node] = set()
    for name, side in (place for place, there in folds.items() if there):
        _, block = around(group, name)
        found |= {p.node for p in ((block.v, block.o) if side == "v" else (block.q, block.k)) if p is not None}
    return found


def around(group: Group, name: str) -> tuple[Site, Block]:
    return next((s, b) for s, b in zip(group.sites, group.blocks, strict=True) if s.name == name)
