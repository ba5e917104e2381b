"""Memory: what a token takes in the cache, and the most that a run holds at once.

cache_bytes_per_token: 2 heads x 2 x (64 x int8 + a scale and a zero) ->   288 bytes a layer
cache_bytes:           that of each layer, times the positions that are kept, times the sequences
peak_memory:           weights + cache + the largest sum of tensors that are alive together, the scratch of kernels included
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

from attnopt.cost.nodes import bytes_of
from attnopt.cost.problem import Problem
from attnopt.ir.block import Block, CacheUpdate, caches
from attnopt.ir.clause import Clause
from attnopt.ir.cost import WIDTHS
from attnopt.ir.dims import evaluate
from attnopt.ir.graph import Graph, Value
from attnopt.ir.packing import row_bytes
from attnopt.ir.site import Site
from attnopt.ir.spec import as_spec

FUSED = (
    "sdpa",
    "sdpa-repeated",
    "flex",
    "triton-prefill",
    "triton-decode",
    "tvm-prefill",
    "tvm-sparse",
    "triton-sparse",
    "tvm-decode",
    "tvm-pages",
    "local-sdpa",
)


def cache_bytes_per_token(sites: Sequence[tuple[Site, Block]], clauses: Mapping[str, str] | None = None) -> float:
    """Bytes that one more token of one sequence takes in all caches; 0 for a model without.

    clauses: by the name of a site, what its cache holds under a plan in the words of a spec, "cache(k=int8, v=int8)", or "" where
    the cache is gone; the others stay as the model has them. What several sites read is counted once.
    """
    return sum(position_bytes(*held) for held in caches_held(sites, clauses or {}))


Rows = Mapping[str, Mapping[str, tuple[int, int]]]


def cache_bytes(
    sites: Sequence[tuple[Site, Block]],
    sizes: Mapping[str, int],
    clauses: Mapping[str, str] | None = None,
    rows: Rows | None = None,
) -> float:
    """Bytes of all caches after one call at these sizes of the model's symbols: of every sequence and every position kept.

    rows: by site and side the (heads, channels) of a position, where a plan changes them.
    """
    held = caches_held(sites, clauses or {})
    return sum(
        position_bytes(site, side, update, clause, (rows or {}).get(site.name, {}).get(side)) * positions(site, update, sizes)
        for site, side, update, clause in held
    )


def caches_held(
    sites: Sequence[tuple[Site, Block]], clauses: Mapping[str, str]
) -> Iterator[tuple[Site, str, CacheUpdate, Clause | None]]:
    """Every cache that some site keeps, once, with what says how it is stored: of the first site that reads it."""
    known: set[Value] = set()
    for site, block in sites:
        text = clauses.get(site.name)
        if text == "":
            continue
        clause = site.spec.cache if text is None else as_spec(f"softmax {text}").cache
        for side in "kv":
            for update in caches(block.streams.get(side, ())):
                if update.past.value not in known:  # keys and values may be one latent, layers may share a cache
                    known.add(update.past.value)
                    yield site, side, update, clause


def position_bytes(
    site: Site, side: str, update: CacheUpdate, clause: Clause | None, row: tuple[int, int] | None = None
) -> float:
    """Bytes of one position of one sequence: of each head a row, or one row where it is not cut into heads (a latent).

    row: heads and channels, where they are not those of the model.
    """
    if row is not None:
        return row[0] * row_bytes(clause, side, row[1], width_of(update.new))
    numbers, width = row_numbers(update), site.size("d" if side == "k" else "e")
    channels = width if isinstance(width, int) and width and numbers % width == 0 else numbers
    return numbers // max(1, channels) * row_bytes(clause, side, channels, width_of(update.new))


def row_numbers(update: CacheUpdate) -> int:
    """Numbers in one position of a cache: all its fixed dimensions but the first, which is the batch, and its length."""
    shape = update.new.shape or ()
    return math.prod(d for i, d in enumerate(shape) if i not in (0, update.axis % max(1, len(shape))) and isinstance(d, int))


def positions(site: Site, update: CacheUpdate, sizes: Mapping[str, int]) -> int:
    """Sequences times what is kept of each: a window where the model passes one on. 0 where no size tells."""
    kept = update.past.value if update.present is None and update.kind == "scatter" else update.present
    try:
        if kept is not None and kept.shape:
            return evaluate(kept.shape[0], sizes) * evaluate(kept.shape[update.axis % len(kept.shape)], sizes)
        return evaluate(site.size("b"), sizes) * evaluate(site.size("k"), sizes)
    except KeyError:
        return 0


def width_of(value: Value) -> float:
    return WIDTHS.get(value.dtype, 32) / 8


def scratch(kernel: str, problem: Problem) -> float:
    """Bytes that a kernel holds besides its operands and its output: a fused one none that grow with the scores."""
    if kernel in FUSED:
        return 0.0
    return problem.heads * problem.all_pairs * problem.width


def peak_memory(
    graph: Graph,
    sizes: Mapping[str, int],
    sites: Sequence[Site] = (),
    kernels: Sequence[str] = (),
    *,
    weights: float | None = None,
) -> float:
    """The most bytes that a run of the graph holds at once.

    sizes: values of the symbolic sizes. kernels: for each site the name of its kernel, "" for its own nodes. weights: their bytes
    under a plan; as they are in the graph where it is left out.
    """
    fixed: dict[Value, float] = {}
    last: dict[Value, int] = {}
    replaced = {id(node): i for i, site in enumerate(sites) if i < len(kernels) and kernels[i] for node in site.nodes}
    ends = {id(site.output.value.producer): i for i, site in enumerate(sites) if i < len(kernels) and kernels[i]}
    steps = [(n, [v for v in n.inputs if v is not None]) for n in graph.nodes if id(n) not in replaced or id(n) in ends]
    for at, (node, inputs) in enumerate(steps):
        if id(node) in ends:
            inputs.extend(operand.value for operand in sites[ends[id(node)]].reads)
        for value in inputs:
            if value.is_constant:
                fixed[value] = bytes_of(value, sizes)
            else:
                last[value] = at
    last |= dict.fromkeys(graph.outputs, len(steps))
    alive = {value: bytes_of(value, sizes) for value in graph.inputs}
    most = sum(alive.values())
    for at, (node, _) in enumerate(steps):
        alive |= {value: bytes_of(value, sizes) for value in node.outputs if value.handle is not None}
        extra = 0.0
        if id(node) in ends:
            site = sites[ends[id(node)]]
            shape = {axis: evaluate(dim, sizes) for axis, dim in site.shape.items()}
            extra = scratch(kernels[ends[id(node)]], Problem(site.spec, shape, site.q.value.dtype or "float32"))
        most = max(most, sum(alive.values()) + extra)
        alive = {value: size for value, size in alive.items() if last.get(value, -1) > at}
    return most + (sum(fixed.values()) if weights is None else weights)
