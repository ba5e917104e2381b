"""Fit the output projection to what is left after heads changed: the layer gives what it gave, as nearly as it can.

    a [rows, H E] reads the output projection W before, a' [rows, H' E'] after a change whose own map of its rows is C_0 [H' E', H E]:

    min over C of  E |a W - a' C W|² + l |C - C_0|²     ->     C = (A' + l)^-1 (B + l C_0),   A' = E a'^T a',  B = E a'^T a
    one factor for each head, C = diag(s) C_0           ->     the s of least E |a W - a' C W|²              where rows are few

Closed forms of second moments that are added up batch by batch, over at most ROWS rows: nothing is trained, the same data give the same
numbers. What is attended to is computed from q, k and v of the model as it was, so that each layer is fitted for itself.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from attnopt.analysis.operands import held, tapped
from attnopt.analysis.padding import Padding
from attnopt.ir.block import Block, Rotary
from attnopt.ir.block_reference import turned
from attnopt.ir.reference import reference
from attnopt.ir.site import NotIsolated, Refusal
from attnopt.passes.candidate import Evidence, Group
from attnopt.passes.edits.heads.changes import HeadChanges
from attnopt.passes.edits.heads.head_map import HeadMap
from attnopt.passes.edits.heads.site import changed
from attnopt.passes.edits.heads.statistics import turned_back

ROWS = 16384  # of calibration tokens that a fit looks at
FEW = 4  # rows for each channel of a': with fewer a whole matrix would fit the data, not the model
RIDGE = 1e-4  # of the mean of A's diagonal


@dataclass(frozen=True, eq=False)
class OutputMoments:
    """After and before: own [H' E', H' E'] and cross [H' E', H E], means over rows, float64."""

    own: Tensor
    cross: Tensor
    rows: int


def fitted(group: Group, changes: HeadChanges, evidence: Evidence) -> HeadChanges | Refusal:
    """The changes with the output projection fitted on calibration data; a refusal where what it reads cannot be computed."""
    block = group.blocks[0]
    assert block.o is not None
    seen = output_moments(group, changes, evidence)
    if isinstance(seen, Refusal):
        return seen
    start = matrix_of(changes.o or HeadMap.identity(*block.o.channels.shape), len(block.o.channels))
    if seen.rows < FEW * len(seen.own):
        made = scaled(start, seen, block.o.rows().double().flatten(0, 1), len(start) // width_of(changes, block))
    else:
        ridge = RIDGE * seen.own.diagonal().mean()
        eye = torch.eye(len(seen.own), dtype=torch.float64)
        made = torch.linalg.solve(seen.own + ridge * eye, seen.cross + ridge * start)
    return replace(changes, o=map_of(made, len(made) // width_of(changes, block), len(block.o.channels)))


def scaled(start: Tensor, seen: OutputMoments, weight: Tensor, heads: int) -> Tensor:
    """diag(s) C_0 with the s [H'] of least squares. weight [H E, out]."""
    metric = weight @ weight.mT
    split = start.unflatten(0, (heads, -1))  # [H', E', H E]
    own = torch.einsum("gahb,gac,hbc->gh", seen.own.reshape(heads, -1, heads, split.shape[1]), split @ metric, split)
    both = torch.einsum("gac,gac->g", seen.cross.unflatten(0, (heads, -1)), split @ metric)
    ridge = RIDGE * own.diagonal().mean().clamp(min=1e-30)
    s = torch.linalg.solve(own + ridge * torch.eye(heads, dtype=torch.float64), both + ridge)
    return (s[:, None, None] * split).flatten(0, 1)


def output_moments(group: Group, changes: HeadChanges, evidence: Evidence) -> OutputMoments | Refusal:
    own = cross = None
    count = 0
    try:
        for after, before in pairs(group, changes, evidence):
            a, b = after.double(), before.double()
            own, cross = (a.mT @ a, a.mT @ b) if own is None or cross is None else (own + a.mT @ a, cross + a.mT @ b)
            count += len(a)
    except NotIsolated as failure:
        return Refusal(f"what its output projection reads cannot be tapped: {failure}", group.name)
    if own is None or cross is None or not count:
        return Refusal("there are no calibration data to fit its output projection on", group.name)
    return OutputMoments(own / count, cross / count, count)


def pairs(group: Group, changes: HeadChanges, evidence: Evidence) -> Iterator[tuple[Tensor, Tensor]]:
    """(a', a) of the rows that are no padding, batch by batch, of every block of the group."""
    padding = Padding.of(group.host.graph)
    for site, block in zip(group.sites, group.blocks, strict=True):
        assert block.o is not None and block.k is not None
        reads, left = (*tapped(site), block.o.input), ROWS
        channels, spec = block.o.channels.flatten(), changed(site, changes).spec
        for inputs, data in evidence.hold(reads):
            on = held(site, dict(zip(reads, data, strict=True)), group.host.graph.sizes(inputs))
            real = padding.rows(site.size("q"), len(on.q), on.q.shape[2], inputs)
            keys = len(block.k.channels)
            q, k, v = on.q.float(), *(x.float()[:, :: x.shape[1] // keys] for x in (on.k, on.v))  # each key head once
            step = len(q) if on.operands else 1  # an operand may differ from sample to sample
            rows = zip(*(x.split(step) for x in attended(block, changes, q, k, v)), strict=True)
            made = torch.cat([reference(spec, *each, **on.operands) for each in rows])  # [B, H', Q, E']
            after = made.transpose(1, 2).flatten(2).flatten(0, 1)
            before = data[-1].reshape(-1, data[-1].shape[-1])[:, channels]
            kept = slice(None) if real is None else real.flatten()
            yield after[kept][:left], before[kept][:left]
            left -= len(after)
            if left <= 0:
                break


def attended(block: Block, changes: HeadChanges, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Rows as the attention reads them after the changes. q and k are turned already: maps pass through turning, but for `up`."""
    turn, up = block.part("k", Rotary), changes.up
    if up is not None and changes.k is not None:
        k = changes.k.past(k if turn is None else turned_back(turn, k, 0)) @ up.mT.to(k)
        k = k if turn is None else turned(turn, k.transpose(1, 2), torch.arange(k.shape[2])[None]).transpose(1, 2)
    elif changes.k is not None:
        k = changes.k.past(k)
    q = q if changes.q is None else changes.q.past(q)
    v = v if changes.v is None else changes.v.past(v)
    return (q, k[:, list(changes.reads)], v[:, list(changes.reads)]) if changes.reads else (q, k, v)


def width_of(changes: HeadChanges, block: Block) -> int:
    """E' of what the output projection reads."""
    assert block.v is not None
    return block.v.channels.shape[1] if changes.v is None else changes.v.width


def matrix_of(change: HeadMap, heads: int) -> Tensor:
    """A map of rows as one matrix [H' E', H E]."""
    groups, _, width, old = change.matrices.shape
    made = torch.zeros(groups, width, heads, old, dtype=torch.float64)
    for g, sources in enumerate(change.sources.tolist()):
        for n, h in enumerate(sources):
            made[g, :, h] += change.matrices[g, n]
    return made.reshape(groups * width, heads * old)


def map_of(matrix: Tensor, heads: int, old: int) -> HeadMap:
    """The same back: every new head from all old ones."""
    split = matrix.reshape(heads, -1, old, matrix.shape[1] // old)
    return HeadMap(torch.arange(old).expand(heads, old), split.permute(0, 2, 1, 3).contiguous())
