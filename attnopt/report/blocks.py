"""A block as JSON: names of weights and values, sizes, and what is missing.

{"text": "rms_norm -> q 32x32, …", "q": {"weight": "q_proj.weight", "in": 32, "out": 32, …}, "rotary": {"dims": 8, …}, …}
"""

from __future__ import annotations

from typing import Any

from attnopt.ir.block import Block, CacheUpdate, HeadNorm, Joined, Norm, Projection, Residual, Rotary, projections
from attnopt.ir.graph import Value
from attnopt.report.data import refusal_json


def block_json(block: Block) -> dict[str, Any]:
    return {
        "text": str(block),
        "hidden": name(block.hidden),
        "norm": norm_json(block.norm),
        **{part: projection_json(getattr(block, part)) for part in "qkvo"},
        **{f"{part}_parts": parts for part in "qkv" if (parts := parts_json(block, part)) is not None},
        **{part: head_norm_json(getattr(block, part)) for part in ("q_norm", "k_norm")},
        "rotary": rotary_json(block.rotary),
        **{part: cache_json(getattr(block, part)) for part in ("cache_k", "cache_v")},
        "residual": residual_json(block.residual),
        "missing": [refusal_json(r) for r in block.missing],
    }


def name(value: Value | None) -> str | None:
    return None if value is None else value.name


def norm_json(norm: Norm | None) -> dict[str, Any] | None:
    if norm is None:
        return None
    held = {"weight": name(norm.weight), "bias": name(norm.bias)}
    return {"kind": norm.kind, "eps": norm.eps, "shift": norm.shift, "input": name(norm.input), **held}


def projection_json(projection: Projection | None) -> dict[str, Any] | None:
    """`channels` is [start, stop) of the layer's channels, or null where they are interleaved."""
    if projection is None:
        return None
    sizes = [str(size) for size in projection.size]
    return {
        "node": projection.node.name,
        "weight": name(projection.weight),
        "bias": name(projection.bias),
        "in": int(sizes[0]),
        "out": int(sizes[1]),
        "stored": "in x out" if projection.transposed else "out x in",
        "heads": projection.channels.shape[0],
        "width": projection.channels.shape[1],
        "channels": None if projection.range is None else list(projection.range),
        "shared": [node.name for node in projection.shared],
        **(
            {}
            if projection.down is None
            else {"down": projection_json(projection.down), "down_norm": norm_json(projection.down_norm)}
        ),
    }


def parts_json(block: Block, part: str) -> list[dict[str, Any]] | None:
    """The layers that make the channels of a head, where they are several; `first` of each head on."""
    joined = block.part(part, Joined)
    if joined is None:
        return None
    return [
        {"first": p.first, "width": p.width, **(projection_json(q) or {})} for p in joined.parts for q in projections(p.steps)
    ]


def head_norm_json(found: HeadNorm | None) -> dict[str, Any] | None:
    return None if found is None else {**(norm_json(found.norm) or {}), "axis": found.axis}


def rotary_json(found: Rotary | None) -> dict[str, Any] | None:
    if found is None:
        return None
    return {
        "dims": found.dims,
        "first": found.first,
        "pairs": "interleaved" if found.interleaved else "half",
        "base": found.base,
        "inv_freq": found.inv_freq.tolist(),
        "scaling": found.scaling,
        "on": list(found.on),
        "positions": None if found.positions is None else found.positions.value.name,
    }


def cache_json(found: CacheUpdate | None) -> dict[str, Any] | None:
    if found is None:
        return None
    return {"kind": found.kind, "past": found.past.value.name, "axis": found.axis, "present": name(found.present)}


def residual_json(found: Residual | None) -> dict[str, Any] | None:
    if found is None:
        return None
    norms = {"o_norm": norm_json(found.o_norm), "post_norm": norm_json(found.post_norm)}
    return {"node": found.node.name, "value": found.value.name, "parallel": found.parallel, "scaled": found.scaled, **norms}
