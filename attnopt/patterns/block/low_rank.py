"""Projections in two steps, as multi-head latent attention has them.

linear(rms_norm(linear(x, down)), up)   ->   up with its `down` and `down_norm`
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from attnopt.ir.block import Joined, Projection, Step
from attnopt.ir.graph import Graph, Value
from attnopt.ir.layout import Axis
from attnopt.patterns.block.cache_update import cache_update, meets_cache
from attnopt.patterns.block.norms import norm_at
from attnopt.patterns.block.projection import layer_at, projection, root
from attnopt.patterns.block.stream import MOST_STEPS, stops
from attnopt.patterns.block.terms import NotRead, Walk, whole


def with_down(graph: Graph, walk: Walk, steps: tuple[Step, ...]) -> tuple[Step, ...]:
    """The same steps; a projection that reads the result of another knows it."""
    return each_layer(steps, lambda layer: paired(graph, walk, layer))


def down_to(graph: Graph, walk: Walk, steps: tuple[Step, ...], hidden: Value) -> tuple[Step, ...]:
    """The same steps; a projection that does not read `hidden` itself, but a layer that does, knows that layer."""

    def lowered(layer: Projection) -> Projection:
        if layer.down is not None or root(layer.input) is hidden:
            return layer
        pair = paired(graph, walk, layer)
        return pair if pair.down is not None and root(pair.down.input) is hidden else layer

    return each_layer(steps, lowered)


def each_layer(steps: tuple[Step, ...], change: Callable[[Projection], Projection]) -> tuple[Step, ...]:
    """The steps with every projection changed, those of parts too."""
    return tuple(
        change(step)
        if isinstance(step, Projection)
        else Joined(tuple(replace(part, steps=each_layer(part.steps, change)) for part in step.parts))
        if isinstance(step, Joined)
        else step
        for step in steps
    )


def paired(graph: Graph, walk: Walk, up: Projection) -> Projection:
    read = root(up.input)
    if not read.shape or not isinstance(read.shape[-1], int):
        return up
    axes = tuple(Axis(f"x{i}", size) for i, size in enumerate(read.shape))
    term = whole(read, tuple((axis,) for axis in axes), axes[-1:], 1, read.shape[-1])
    norm, cache = None, None
    try:
        for _ in range(MOST_STEPS):
            terms = walk.expand(term, stops)
            if len(terms) != 1 or terms[0].factors:
                return up
            term = terms[0]
            if (layer := layer_at(term.value)) is not None:
                return replace(up, down=projection(layer, walk, term, 1), down_norm=norm, down_cache=cache)
            if norm is None and (found := norm_at(term.value)) is not None:
                norm, term = found, replace(term, value=found.input)
            elif norm is None and cache is None and meets_cache(walk, term):
                cache, term = cache_update(walk, term, graph)
            else:
                return up
    except NotRead:
        pass
    return up
