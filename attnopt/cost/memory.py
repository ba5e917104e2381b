"""Memory: what a token takes in the cache, and the most that a run holds at once.

cache_bytes_per_token: 2 heads x (64 + 64) x int8          ->   256 bytes a layer
peak_memory:           weights + cache + the largest sum of tensors that are alive together, the scratch of kernels included
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from attnopt.cost.nodes import bytes_of
from attnopt.cost.problem import Problem
from attnopt.ir.block import Block, CacheUpdate, caches
from attnopt.ir.cost import WIDTHS, stored
from attnopt.ir.dims import evaluate
from attnopt.ir.graph import Graph, Value
from attnopt.ir.site import Site
from attnopt.ir.spec import AttentionSpec

FUSED = ("sdpa", "sdpa-repeated", "flex", "triton-prefill", "triton-decode", "tvm-prefill", "tvm-decode", "local-sdpa")


def cache_bytes_per_token(sites: Sequence[tuple[Site, Block]], specs: Sequence[AttentionSpec] | None = None) -> float:
    """Bytes that one more token of one sequence takes in all caches; 0 for a model without.

    specs: what the sites become under a plan, in their order; their `cache` says how keys and values are stored.
    """
    total = 0.0
    known: set[Value] = set()
    for i, (site, block) in enumerate(sites):
        spec = site.spec if specs is None else specs[i]
        for side in "kv":
            for update in caches(block.streams.get(side, ())):
                if update.past.value not in known:  # keys and values may be one latent, layers may share a cache
                    known.add(update.past.value)
                    total += row_numbers(update) * stored(spec.cache, side, width_of(update.new))
    return total


def row_numbers(update: CacheUpdate) -> int:
    """Numbers in one position of a cache: all its fixed dimensions but the first, which is the batch, and its length."""
    shape = update.new.shape or ()
    return math.prod(d for i, d in enumerate(shape) if i not in (0, update.axis % max(1, len(shape))) and isinstance(d, int))


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
