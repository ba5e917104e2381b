"""A block as one line: what `attnopt inspect --explain` prints.

rms_norm -> q 256x256, k 256x64, v 256x64 (packed 256x384) bias; q/k rms_norm per head; rotary 64 half base 10000;
cache concat; o 256x256; residual
"""

from __future__ import annotations

from attnopt.ir.block import Block, Lift, Projection, caches


def text(block: Block) -> str:
    parts = [before(block) + projections(block), *head_norms(block)]
    turn = block.rotary
    if turn is not None:
        only = f" on {turn.on[0]}" if len(turn.on) == 1 else ""
        parts.append(f"{turn}{only}{', then norm' if block.rotary_first else ''}")
    parts += [f"{name} {lift}" for name in "qkv" if (lift := block.part(name, Lift)) is not None]
    kinds = {cache.kind for name in "kv" for cache in caches(block.streams.get(name, ()))}
    parts += [f"cache {kind}" for kind in sorted(kinds)]
    if block.o is not None:
        parts.append(f"o {size(block.o)}{' bias' * (block.o.bias is not None)}{shared(block.o)}")
    parts += after(block)
    parts += [f"missing: {refusal}" for refusal in block.missing]
    return "; ".join(part for part in parts if part)


def before(block: Block) -> str:
    return f"{block.norm} -> " if block.norm is not None else ""


def projections(block: Block) -> str:
    """q, k and v with the sizes of their own channels, then what they share."""
    found = {name: p for name in "qkv" if (p := block.projections(name))}
    shown = ", ".join(f"{name} {' + '.join(map(layer, p))}" for name, p in found.items())
    if block.packed:
        whole = "x".join(map(str, found["q"][0].size))
        shown += f" (packed {whole}{'' if all(p.range for (p,) in found.values()) else ', interleaved'})"
    if block.cross:
        shown += " (k, v from another sequence)"
    biased = [name for name, p in found.items() if any(layer.bias is not None for layer in p)]
    if biased:
        shown += " bias" if len(biased) == len(found) else f" bias on {', '.join(biased)}"
    return shown


def layer(projection: Projection) -> str:
    return f"{size(projection)}{' for all heads' * projection.for_all_heads}{shared(projection)}"


def size(projection: Projection) -> str:
    own = projection.channels.unique().numel()
    sizes = (own, projection.size[1]) if projection.reads else (projection.size[0], own)
    kept = ", cached" if projection.down_cache is not None else ""
    low = f" of low rank ({size(projection.down)}{kept})" if projection.down is not None else ""
    return "x".join(map(str, sizes)) + low


def shared(projection: Projection) -> str:
    others = projection.shared
    return f" (weight also read by {others[0].name})" if others else ""


def head_norms(block: Block) -> list[str]:
    q, k = block.q_norm, block.k_norm
    if q is not None and k is not None and str(q) == str(k):
        return [f"q/k {q}"]
    return [f"{name} {norm}" for name, norm in (("q", q), ("k", k)) if norm is not None]


def after(block: Block) -> list[str]:
    found = block.residual
    if found is None:
        return []
    steps = [f"o {found.o_norm}"] if found.o_norm is not None else []
    steps.append("parallel residual" if found.parallel else "residual")
    return [*steps, *([f"then {found.post_norm}"] if found.post_norm is not None else [])]
