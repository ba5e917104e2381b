"""Projections in two steps, as multi-head latent attention has them.

    linear(rms_norm(linear(x, down)), up)   ->   up with its `down` and `down_norm`
"""

from __future__ import annotations

from dataclasses import replace

from attnopt.ir.block import Projection, Step
from attnopt.ir.layout import Axis
from attnopt.patterns.block.norms import norm_at
from attnopt.patterns.block.projection import layer_at, projection, root
from attnopt.patterns.block.stream import stops
from attnopt.patterns.block.terms import NotRead, Walk, whole


def with_down(walk: Walk, steps: tuple[Step, ...]) -> tuple[Step, ...]:
    """The same steps; a projection that reads the result of another knows it."""
    return tuple(paired(walk, step) if isinstance(step, Projection) else step for step in steps)


def paired(walk: Walk, up: Projection) -> Projection:
    read = root(up.input)
    norm = norm_at(read)
    inner = read if norm is None else norm.input
    if not inner.shape or not isinstance(inner.shape[-1], int):
        return up
    axes = tuple(Axis(f"x{i}", size) for i, size in enumerate(inner.shape))
    term = whole(inner, tuple((axis,) for axis in axes), axes[-1:], 1, inner.shape[-1])
    try:
        terms = walk.expand(term, stops)
        layer = layer_at(terms[0].value) if len(terms) == 1 and not terms[0].factors else None
        return up if layer is None else replace(up, down=projection(layer, walk, terms[0], 1), down_norm=norm)
    except NotRead:
        return up
